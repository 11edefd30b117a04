"""Draw throughput.svg from what `hyperclip bench model --json docs/pictures/throughput.json` measured.

    python docs/pictures/throughput.py

Images a second against the number of tasks in use: the median over rounds, and a band from quartile to quartile.
"""

import json
from pathlib import Path
from typing import Any

from draw import DARK, LIGHT, WIDTH, box, style, text

HEIGHT = 400
LEFT, RIGHT, TOP, BOTTOM = 84, 664, 84, 330
LINES = {  # provider: colour, dashes, what it is
    "ours": ("task0", "", ("a mixed batch, ours",)),
    "stock": ("soft", "6 5", ("stock timm,", "one task for all images")),
    "naive": ("task1", "", ("a mixed batch, written", "in separate operations")),
    "loop": ("task2", "", ("stock timm,", "one pass a task")),
}


class Axes:
    """Where a number of tasks and a throughput stand on the canvas.

    Args:
        tasks: the numbers of tasks, evenly spaced.
        most: the greatest throughput.
    """

    def __init__(self, tasks: list[int], most: float):
        self.tasks = tasks
        self.step = next(unit for unit in (5, 10, 20, 25, 50, 100, 200, 250, 500, 1000) if most / unit <= 5)
        self.most = self.step * -(-most // self.step)

    def x(self, tasks: int) -> float:
        return LEFT + (RIGHT - LEFT) * self.tasks.index(tasks) / (len(self.tasks) - 1)

    def y(self, throughput: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * throughput / self.most, 1)

    def draw(self) -> list[str]:
        """Lines of the grid, and the numbers beside them."""
        parts = []
        for i in range(int(self.most / self.step) + 1):
            y = self.y(i * self.step)
            parts.append(f'<line x1="{LEFT}" y1="{y}" x2="{RIGHT}" y2="{y}" class="line-edge"/>')
            parts.append(text(LEFT - 10, y + 5, f"{i * self.step:,}", "soft", 13, "end"))
        parts += [text(round(self.x(count)), BOTTOM + 22, f"{count:,}", "soft", 13, "middle") for count in self.tasks]
        parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 46, "tasks", "ink", 14, "middle"))
        return parts


def line(axes: Axes, provider: str, rows: list[dict[str, Any]]) -> list[str]:
    """One provider's medians as a line in the band of its quartiles."""
    colour, dashes, _ = LINES[provider]
    points = [(round(axes.x(row["tasks"]), 1), *(axes.y(row["batch"] / s) for s in row["seconds"])) for row in rows]
    band = [f"{x},{fast}" for x, fast, _, _ in points] + [f"{x},{slow}" for x, _, _, slow in reversed(points)]
    middle = " ".join(f"{x},{y}" for x, _, y, _ in points)
    parts = [f'<polygon points="{" ".join(band)}" class="{colour}" opacity="0.15"/>']
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    parts.append(f'<polyline points="{middle}" class="line-{colour}" stroke-width="2.4"{dashed}/>')
    return parts + [f'<circle cx="{x}" cy="{y}" r="3.4" class="{colour}"/>' for x, _, y, _ in points if not dashes]


def labels(heights: dict[str, float]) -> list[str]:
    """What each line is, to the right of its end; moved down where two would touch."""
    parts, free = [], 0.0
    for provider, y in sorted(heights.items(), key=lambda item: item[1]):
        colour, _, words = LINES[provider]
        first = max(y + 5 - 9 * (len(words) - 1), free)
        parts += [text(RIGHT + 16, first + 18 * i, word, colour, 14, bold=True) for i, word in enumerate(words)]
        free = first + 18 * len(words) + 6
    return parts


def draw(record: dict[str, Any], colours: dict[str, str] = LIGHT, darker: dict[str, str] | None = DARK) -> str:
    """The whole plot; `darker` colours take over where the reader prefers a dark page."""
    lines = {name: [row for row in record["rows"] if row["provider"] == name] for name in LINES}
    lines = {name: sorted(rows, key=lambda row: row["tasks"]) for name, rows in lines.items() if rows}
    every = [row for rows in lines.values() for row in rows]
    axes = Axes(sorted({row["tasks"] for row in every}), max(row["batch"] / row["seconds"][0] for row in every))
    machine, about = record["machine"], every[0]
    where = f"{about['model']}, batch of {about['batch']}, {machine['dtype']}, {machine['device']}"
    where += f", {machine['threads']} of {machine['cores']} cores, torch {machine['versions']['torch'].split('+')[0]}"
    rules = style(colours) + (f" @media (prefers-color-scheme: dark) {{ {style(darker)} }}" if darker else "")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        ' aria-label="Measured throughput against the number of tasks"'
        ' font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f"<style>{rules}</style>",
        box(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "card", 12),
        text(32, 40, "Images a second against the number of tasks", size=18, bold=True),
        text(32, 62, where, "soft", 13),
        *axes.draw(),
        *(part for name in reversed(lines) for part in line(axes, name, lines[name])),
        *labels({name: axes.y(rows[-1]["batch"] / rows[-1]["seconds"][1]) for name, rows in lines.items()}),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    folder = Path(__file__).parent
    record = json.loads((folder / "throughput.json").read_text(encoding="utf-8"))
    (folder / "throughput.svg").write_text(draw(record), encoding="utf-8")
