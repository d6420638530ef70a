"""Draws the example graphs beside their .json: the picture that ComfyUI's template browser shows (it asks for the same name in .jpg).

    python workflows/draw.py        needs Pillow

It is a drawing of the graph (nodes, titles, main values, wires), not a picture that a model made.
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN, TITLE = 1280, 40, 30
PAPER, BOX, HEAD, TEXT, DIM = "#1e1f22", "#33363b", "#45494f", "#f0f0f0", "#b4b8be"
OURS = "#7a4fb5"
WIRES = {"MODEL": "#b39ddb", "CLIP": "#ffd500", "VAE": "#ff6e6e", "CONDITIONING": "#ffa931", "LATENT": "#ff9cf9", "IMAGE": "#64b5f6"}


def draw(path: Path) -> Path:
    """Writes `path` with the ending .jpg and returns that."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    left, top = (min(node["pos"][i] for node in nodes.values()) for i in (0, 1))
    right, bottom = (max(node["pos"][i] + node["size"][i] for node in nodes.values()) for i in (0, 1))
    scale = (WIDTH - 2 * MARGIN) / (right - left)

    def place(x: float, y: float) -> tuple[int, int]:
        return round(MARGIN + (x - left) * scale), round(MARGIN + TITLE + (y - top) * scale)

    picture = Image.new("RGB", (WIDTH, place(0, bottom)[1] + MARGIN), PAPER)
    pen = ImageDraw.Draw(picture)
    ends = []
    for _, source, output, target, slot, kind in graph["links"]:
        a, b, colour = nodes[source], nodes[target], WIRES.get(kind, DIM)
        start = place(a["pos"][0] + a["size"][0], a["pos"][1] + 16 + 22 * output)
        end = place(b["pos"][0], b["pos"][1] + 16 + 22 * slot)
        draw_wire(pen, start, end, colour)
        ends += [(start, colour), (end, colour)]
    for node in nodes.values():
        draw_node(pen, node, place)
    for (x, y), colour in ends:
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
    out = path.with_suffix(".jpg")
    picture.save(out, quality=88, optimize=True)
    return out


def draw_node(pen: ImageDraw.ImageDraw, node: dict, place) -> None:
    x, y = node["pos"]
    (x0, y0), (x1, y1) = place(x, y), place(x + node["size"][0], y + node["size"][1])
    pen.rounded_rectangle((x0, y0 - 20, x1, y1), 6, fill=BOX)
    ours = node["type"].startswith(("Nunchaku", "SVDQuant"))
    pen.rounded_rectangle((x0, y0 - 20, x1, y0), 6, fill=OURS if ours else HEAD)
    pen.text((x0 + 8, y0 - 17), node.get("title", node["type"]), fill=TEXT, font=ImageFont.load_default(13))
    font = ImageFont.load_default(11)
    lines = [line for value in node.get("widgets_values", []) for line in str(value).replace("**", "").replace("## ", "").splitlines()]
    for i, line in enumerate(lines[: max((y1 - y0) // 15, 0)]):
        while pen.textlength(line, font=font) > x1 - x0 - 32:
            line = line[:-4].rstrip("…") + "…"
        pen.text((x0 + 16, y0 + 4 + 15 * i), line, fill=DIM, font=font)


def draw_wire(pen: ImageDraw.ImageDraw, start: tuple[int, int], end: tuple[int, int], colour: str) -> None:
    """A cubic Bezier curve that leaves to the right and arrives from the left, as the host draws it."""
    (x0, y0), (x3, y3) = start, end
    reach = max(abs(x3 - x0) // 2, 30)
    points = []
    for i in range(33):
        t = i / 32
        u = 1 - t
        x = u**3 * x0 + 3 * u**2 * t * (x0 + reach) + 3 * u * t**2 * (x3 - reach) + t**3 * x3
        points.append((x, u**3 * y0 + 3 * u**2 * t * y0 + 3 * u * t**2 * y3 + t**3 * y3))
    pen.line(points, fill=colour, width=3, joint="curve")


if __name__ == "__main__":
    for found in sorted(Path(__file__).resolve().parent.glob("*.json")):
        print(draw(found))
