"""Two plots of a record: the roofline of the operations, and throughput against the number of tasks."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from hyperclip_fast.extras import require

from .report import title

COLOURS = {"stock": "#57606a", "naive": "#cf222e", "ours": "#0969da", "loop": "#bc4c00", "liger": "#8250df"}
COLOURS |= {"triton": "#1a7f37"}
MARKERS = {"layer_norm": "o", "add_layer_norm": "s", "linear_gelu": "^", "linear_add": "D"}
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
            figure.savefig(paths[-1], dpi=150, bbox_inches="tight")
            require("matplotlib.pyplot", "bench").close(figure)
    return paths


def _roofline(rows: list[Row], machine: dict[str, Any]):
    """FLOP/s against FLOP per byte, both axes logarithmic, under the copy's slope and the product's ceiling."""
    plt = require("matplotlib.pyplot", "bench")
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    copy, product = machine["copy_bytes_per_second"], machine["product_flops_per_second"]
    intensities = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 2, max(max(intensities) * 2, 2 * product / copy)
    for axis, step in zip(axes, ("forward", "training")):
        ridge = product / copy
        axis.plot([low, ridge, high], [low * copy, product, product], color="black", lw=1.2, zorder=1)
        chosen = [row for row in rows if row["step"] == step]
        for row in chosen:
            hollow = row["engine"] != "eager"
            colour = COLOURS.get(row["provider"], "black")
            axis.scatter(
                row["flops"] / row["bytes"],
                row["flops"] / row["seconds"][1],
                marker=MARKERS.get(row["operation"], "P"),
                facecolors="none" if hollow else colour,
                edgecolors=colour,
                s=36,
                alpha=0.85,
                zorder=2,
            )
        axis.set(xscale="log", yscale="log", xlabel="FLOP per byte (least possible bytes)", title=step)
        axis.set_xlim(low, high)
        axis.grid(alpha=0.3, which="both", lw=0.4)
    axes[0].set_ylabel("FLOP/s")
    roofs = f"copy {copy / 1e9:.0f} GB/s, product {product / 1e12:.2g} TFLOP/s"
    figure.suptitle(f"{machine['device']}, {machine['dtype']}, {machine['threads']} threads: {roofs}", fontsize=11)
    providers = [name for name in COLOURS if any(row["provider"] == name for row in rows)]
    operations = [name for name in MARKERS if any(row["operation"] == name for row in rows)]
    handles = [_dot("o", COLOURS[name], name) for name in providers]
    handles += [_dot(MARKERS[name], "white", name, edge="black") for name in operations]
    handles += [_dot("o", "grey", "eager"), _dot("o", "none", "compiled", edge="grey")]
    figure.legend(handles=handles, loc="outside right center" if figure.get_layout_engine() else "center left",
                  bbox_to_anchor=(0.91, 0.5), frameon=False, fontsize=9)  # fmt: skip
    return figure


def _dot(marker: str, colour: str, label: str, edge: str | None = None):
    line = require("matplotlib.lines", "bench").Line2D
    return line([], [], marker=marker, ls="", markerfacecolor=colour, markeredgecolor=edge or colour, label=label)


def _sweeps(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by panel, where a panel has more than one T; a single-task figure belongs to every mix."""
    panels: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if "tasks" in row:
            panels[title({key: value for key, value in row.items() if key not in ("tasks", "tokens")})].append(row)
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
        axis.set(xscale="log", title=name, xlabel="tasks T", ylabel="images/s")
        axis.title.set_fontsize(9)
        axis.set_ylim(bottom=0)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3, lw=0.4)
    figure.suptitle(f"{machine['device']}, {machine['dtype']}, {machine['threads']} threads", fontsize=11)
    figure.tight_layout()
    figure.legend(drawn.values(), drawn, loc="upper left", bbox_to_anchor=(1.0, 0.95), frameon=False, fontsize=9)
    return figure
