"""Two plots of a record: the roofline of the operations, and throughput against the number of tasks."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from hyperclip_fast.bench.harness.report import title
from hyperclip_fast.utils.extras import require
from hyperclip_fast.utils.files import written_file

COLOURS = {"stock": "#57606a", "naive": "#cf222e", "ours": "#0969da", "loop": "#bc4c00", "liger": "#8250df"}
COLOURS |= {"triton": "#1a7f37", "single": "#54aeff"}
MARKERS = {"layer_norm": "o", "add_layer_norm": "s", "linear_gelu": "^", "linear_add": "D"}
MARKERS |= {"norm_linear": "v", "norm_linear_gelu": "P"}
DASHES = {"eager": "-", "compiled": "--", "graph": ":", "frozen": "-.", "onnxruntime": (0, (1, 3))}
Row = dict[str, Any]


def draw(record: dict[str, Any], folder: str | Path, prefix: str = "") -> list[Path]:
    """Draw what the record has figures for; returns the files, `<prefix>roofline.png` and `<prefix>tasks.png`.

    Raises:
        ImportError: without matplotlib.
    """
    plt = require("matplotlib", "bench")
    plt.use("Agg")
    rows = [row for row in record["rows"] if row["status"] == "ok"]
    plots = {"roofline": ([row for row in rows if "flops" in row], _roofline), "tasks": (_sweeps(rows), _tasks)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (figures, function) in plots.items():
        if figures:
            paths.append(Path(folder) / f"{prefix}{name}.png")
            figure = function(figures, record["machine"])
            with written_file(paths[-1]) as beside:
                figure.savefig(beside, dpi=150, bbox_inches="tight")
            require("matplotlib.pyplot", "bench").close(figure)
    return paths


def _roofline(rows: list[Row], machine: dict[str, Any]):
    """FLOP/s against FLOP per byte, both axes logarithmic, under the copy's slope and the product's ceiling.

    All providers of a case have the same intensity: they are drawn side by side.
    """
    plt = require("matplotlib.pyplot", "bench")
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    copy, product = machine["copy_bytes_per_second"], machine["product_flops_per_second"]
    ridge, intensities = product / copy, [row["flops"] / row["bytes"] for row in rows]
    low, high = min(*intensities, ridge) / 2, 2 * max(*intensities, ridge)
    providers = [name for name in COLOURS if any(row["provider"] == name for row in rows)]
    operations = [name for name in MARKERS if any(row["operation"] == name for row in rows)]
    for axis, step in zip(axes, ("forward", "training")):
        axis.plot([low, ridge, high], [low * copy, product, product], color="black", lw=1.2, zorder=1)
        for row in rows:
            if row["step"] != step:
                continue
            colour = COLOURS.get(row["provider"], "black")
            aside = 1.09 ** (providers.index(row["provider"]) - (len(providers) - 1) / 2)
            axis.scatter(
                row["flops"] / row["bytes"] * aside,
                row["flops"] / row["seconds"][1],
                marker=MARKERS.get(row["operation"], "*"),
                facecolors=colour if row["engine"] == "eager" else "none",
                edgecolors=colour,
                s=36,
                alpha=0.85,
                zorder=2,
            )
        axis.set(xscale="log", yscale="log", title=step, xlim=(low, high))
        axis.set_xlabel("FLOP per byte that must move (providers side by side)")
        axis.grid(alpha=0.3, which="both", lw=0.4)
    axes[0].set_ylabel("FLOP/s")
    roofs = f"copy {copy / 1e9:.0f} GB/s, product {product / 1e12:.2g} TFLOP/s"
    figure.suptitle(f"{_where(machine)}: {roofs}; what stays in a cache may lie above the slope", fontsize=11)
    handles = [_dot("o", COLOURS[name], name) for name in providers]
    handles += [_dot(MARKERS[name], "white", name, edge="black") for name in operations]
    handles += [_dot("o", "grey", "eager"), _dot("o", "none", "compiled", edge="grey")]
    figure.tight_layout()
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    return figure


def _where(machine: dict[str, Any]) -> str:
    threads = "" if machine["type"] == "cuda" else f", {machine['threads']} of {machine['cores']} cores"
    return f"{machine['device']}{threads}, {machine['dtype']}"


def _dot(marker: str, colour: str, label: str, edge: str | None = None):
    line = require("matplotlib.lines", "bench").Line2D
    return line([], [], marker=marker, ls="", markerfacecolor=colour, markeredgecolor=edge or colour, label=label)


def _sweeps(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by panel, where a panel has more than one T; one task is the same in every mix."""
    panels: dict[str, list[Row]] = defaultdict(list)
    rows = [row for row in rows if "tasks" in row]
    for row in rows:
        for mix in [row["mix"]] if row["tasks"] > 1 else dict.fromkeys(other["mix"] for other in rows):
            labels = {key: value for key, value in row.items() if key not in ("tasks", "tokens")}
            panels[title({**labels, "mix": mix})].append(row)
    return {name: panel for name, panel in panels.items() if len({row["tasks"] for row in panel}) > 1}


def _tasks(panels: dict[str, list[Row]], machine: dict[str, Any]):
    """Samples a second against T, a panel for each operation or model, step and size; bands are quartiles."""
    plt = require("matplotlib.pyplot", "bench")
    names = list(panels)[:12]
    across = min(3, len(names))
    down = -(-len(names) // across)
    figure, axes = plt.subplots(down, across, figsize=(5.4 * across, 4 * down), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    drawn = {}
    for name, axis in zip(names, axes.flat):
        lines: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in sorted(panels[name], key=lambda row: row["tasks"]):
            lines[row["provider"], row["engine"]].append(row)
        for (provider, engine), line in lines.items():
            tasks = [row["tasks"] for row in line]
            slow, middle, fast = ([row["batch"] / row["seconds"][i] for row in line] for i in (2, 1, 0))
            style = {"color": COLOURS.get(provider, "black"), "ls": DASHES.get(engine, "-")}
            (drawn[f"{provider} {engine}"],) = axis.plot(tasks, middle, marker=".", lw=1.4, **style)
            axis.fill_between(tasks, slow, fast, color=style["color"], alpha=0.12, lw=0)
        axis.set_title(name, fontsize=9)
        axis.set(xlabel="tasks T", ylabel="images/s")
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks := sorted({row["tasks"] for row in panels[name]}), ticks)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3, lw=0.4)
    figure.suptitle(_where(machine), fontsize=11)
    figure.tight_layout()
    figure.legend(drawn.values(), drawn, loc="upper left", bbox_to_anchor=(1.0, 0.95), frameon=False, fontsize=9)
    return figure
