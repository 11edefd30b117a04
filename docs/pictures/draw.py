"""Draw idea.svg, the picture of README.md: class names become rows, and a batch mixes images with different rows.

    python docs/pictures/draw.py

The picture brings its own background, and darker colours where the reader's system asks for them, so that it can be
read on any page. Coordinates are pixels of a canvas of WIDTH x HEIGHT, y downwards.
"""

import random
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 960, 574
TASKS = (("pets", "cat, dog, parrot"), ("food", "pizza, sushi"), ("digits", "zero, one, ... nine"))
LANES = (("cat", 0), ("pizza", 1), ("seven", 2), ("sushi", 1), ("dog", 0))  # what an image shows, and its task
LIGHT = {"page": "#ffffff", "edge": "#d0d7de", "ink": "#1f2328", "soft": "#59636e", "slab": "#eaeef2"}
LIGHT |= {"task0": "#0969da", "task1": "#bc4c00", "task2": "#1a7f37"}
DARK = {"page": "#0d1117", "edge": "#3d444d", "ink": "#f0f6fc", "soft": "#9198a1", "slab": "#212830"}
DARK |= {"task0": "#4493f8", "task1": "#f0883e", "task2": "#3fb950"}
TOP, STEP = 316, 44  # the first lane's middle, and from one lane to the next
NORMS, PRODUCTS = (202, 412, 622), (307, 517)  # middles of the encoder's parts along x
NORM_WIDTH, PRODUCT_WIDTH = 84, 92


def style(colours: dict[str, str]) -> str:
    """Rules that name each colour by what it is for."""
    rules = [f".{name} {{ fill: {value} }}" for name, value in colours.items()]
    rules += [f".line-{name} {{ stroke: {value}; fill: none }}" for name, value in colours.items()]
    rules.append(f".card {{ fill: {colours['page']}; stroke: {colours['edge']} }}")
    return " ".join(rules)


def text(x: float, y: float, words: str, kind: str = "ink", size: int = 15, anchor: str = "start", bold=False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" class="{kind}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
    )


def box(x: float, y: float, width: float, height: float, kind: str, radius: float = 8, opacity: float = 1) -> str:
    faded = f' opacity="{opacity:.2f}"' if opacity < 1 else ""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" class="{kind}"{faded}/>'


def arrow(x: float, y: float, end: float, kind: str = "soft") -> str:
    """A line to the right, a head at its end."""
    line = f'<line x1="{x}" y1="{y}" x2="{end - 8}" y2="{y}" class="line-{kind}" stroke-width="1.6"/>'
    return line + f'<path d="M{end - 10} {y - 5} L{end} {y} L{end - 10} {y + 5} Z" class="{kind}"/>'


def row(x: float, y: float, task: int, cells: int, size: float) -> str:
    """Numbers of a task's row as cells of different strength."""
    shades = random.Random(task)
    strengths = [0.25 + 0.75 * shades.random() for _ in range(cells)]
    return "".join(box(x + i * (size + 2), y, size, size, f"task{task}", 2, s) for i, s in enumerate(strengths))


def names_to_rows() -> list[str]:
    """The upper half: three tasks, the hypernetwork, three rows."""
    parts = [text(32, 42, "Class names become rows", size=18, bold=True)]
    for task, (name, classes) in enumerate(TASKS):
        middle = 88 + 52 * task
        parts += [box(32, middle - 20, 214, 40, "card"), box(32, middle - 20, 6, 40, f"task{task}", 3)]
        parts += [text(48, middle + 5, name, f"task{task}", bold=True), text(104, middle + 5, classes)]
        parts += [arrow(252, middle, 296), arrow(486, middle, 532)]
        parts.append(row(542, middle - 8, task, 18, 16))
        parts.append(text(928, middle + 5, f"row {task}", f"task{task}", 14, "end", bold=True))
    parts += [box(302, 68, 178, 144, "slab"), text(391, 126, "text tower", anchor="middle")]
    parts += [text(391, 146, "+", "soft", anchor="middle"), text(391, 166, "hypernetwork", anchor="middle", bold=True)]
    parts.append(text(542, 228, "weight and bias of every norm: 9,600 numbers for ViT-Ti", "soft", 13))
    return parts


def batch() -> list[str]:
    """The lower half: images go through shared products, each with its own row in the norms."""
    bottom = TOP + STEP * len(LANES)
    parts = [text(32, 268, "One batch, one encoder: every image takes its own row", size=18, bold=True)]
    for middle, words in zip(PRODUCTS, ("attention", "MLP")):
        left = middle - PRODUCT_WIDTH / 2
        parts.append(box(left, TOP - 22, PRODUCT_WIDTH, STEP * len(LANES), "slab"))
        parts.append(text(middle, bottom - 4, words, anchor="middle", size=14))
        parts.append(text(middle, bottom + 13, "one product for all", "soft", 12, "middle"))
    for middle in NORMS:
        parts.append(text(middle, bottom - 4, "norm", anchor="middle", size=14))
        parts.append(text(middle, bottom + 13, "own row", "soft", 12, "middle"))
    for lane, (shown, task) in enumerate(LANES):
        parts += lane_of(TOP + STEP * lane, shown, task)
    parts.append(text(58, bottom - 4, "image", anchor="middle", size=14))
    parts.append(text(118, bottom - 4, "row", anchor="middle", size=14))
    return parts


def lane_of(middle: float, shown: str, task: int) -> list[str]:
    """One image's way: picture, norms with its row, products that it shares, answer."""
    parts = [arrow(82, middle, 718, f"task{task}")]
    for part in NORMS:
        parts.append(box(part - NORM_WIDTH / 2, middle - 13, NORM_WIDTH, 26, "card", 6))
        parts.append(row(part - NORM_WIDTH / 2 + 6, middle - 6, task, 5, 12.8))
    for part in PRODUCTS:  # the slab again, over the line, so that the way disappears in the common product
        parts.append(box(part - PRODUCT_WIDTH / 2, middle - 4, PRODUCT_WIDTH, 8, "slab", 0))
    parts += [
        box(107, middle - 11, 22, 22, f"task{task}", 11),
        text(118, middle + 5, str(task), "page", 14, "middle", True),
    ]
    parts += [box(40, middle - 18, 36, 36, "card", 6), PICTURES[shown](58, middle, f"task{task}")]
    parts.append(text(732, middle + 5, shown, f"task{task}", bold=True))
    parts.append(text(798, middle + 5, f"among {TASKS[task][0]}", "soft", 14))
    return parts


def cat(x: float, y: float, kind: str) -> str:
    ears = f'<path d="M{x - 10} {y} V{y - 12} L{x} {y - 5} L{x + 10} {y - 12} V{y} Z" class="{kind}"/>'
    return ears + f'<circle cx="{x}" cy="{y + 2}" r="10" class="{kind}"/>' + eyes(x, y + 1)


def dog(x: float, y: float, kind: str) -> str:
    ears = "".join(f'<ellipse cx="{x + side}" cy="{y + 1}" rx="4" ry="8.5" class="{kind}"/>' for side in (-9.5, 9.5))
    head = f'<ellipse cx="{x}" cy="{y}" rx="8.5" ry="10" class="{kind}" opacity="0.7"/>'
    return head + ears + eyes(x, y - 2) + f'<circle cx="{x}" cy="{y + 4}" r="2.2" class="page"/>'


def eyes(x: float, y: float) -> str:
    return "".join(f'<circle cx="{x + side}" cy="{y}" r="1.8" class="page"/>' for side in (-4, 4))


def pizza(x: float, y: float, kind: str) -> str:
    slice_ = f'<path d="M{x} {y + 13} L{x - 12} {y - 8} Q{x} {y - 15} {x + 12} {y - 8} Z" class="{kind}"/>'
    spots = ((-4, -5), (4, -4), (0, 3))
    return slice_ + "".join(f'<circle cx="{x + i}" cy="{y + j}" r="2.2" class="page"/>' for i, j in spots)


def sushi(x: float, y: float, kind: str) -> str:
    roll = f'<ellipse cx="{x}" cy="{y}" rx="13" ry="11" class="{kind}"/>'
    rice = f'<ellipse cx="{x}" cy="{y}" rx="9.5" ry="7.5" class="page"/>'
    return roll + rice + f'<circle cx="{x}" cy="{y}" r="3.6" class="{kind}"/>'


def seven(x: float, y: float, kind: str) -> str:
    line = f'<path d="M{x - 7} {y - 10} H{x + 7} L{x - 2} {y + 11}" class="line-{kind}"'
    return line + ' stroke-width="4" stroke-linecap="round" stroke-linejoin="round"/>'


PICTURES = {"cat": cat, "dog": dog, "pizza": pizza, "sushi": sushi, "seven": seven}


def draw(colours: dict[str, str] = LIGHT, darker: dict[str, str] | None = DARK) -> str:
    """The whole picture; `darker` colours take over where the reader prefers a dark page."""
    rules = style(colours) + (f" @media (prefers-color-scheme: dark) {{ {style(darker)} }}" if darker else "")
    label = "Class names become norm rows; a batch mixes images with different rows in shared products"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}"'
        ' font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f"<style>{rules}</style>",
        box(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "card", 12),
        *names_to_rows(),
        *batch(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("idea.svg").write_text(draw(), encoding="utf-8")
