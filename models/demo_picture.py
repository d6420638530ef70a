"""The demo's picture: for every caption 16 bit | 4 bit | difference, two captions a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

PANEL, GAP, MARGIN, LABEL, COLUMNS = 192, 4, 10, 24, 2
GAINS = (1, 2, 4, 8, 16, 32, 64)


def pillow_problem() -> str | None:
    """A sentence when draw() could not draw, else None. Asked before the work starts, not after it."""
    try:
        import PIL
        from PIL import Image, ImageDraw  # noqa: F401  (the compiled half may be broken)

        if tuple(int(number) for number in PIL.__version__.split(".")[:2]) >= (10, 1):  # text of a chosen size
            return None
        found = f"finds Pillow {PIL.__version__}, which is too old"
    except Exception as error:
        found = f"cannot import Pillow ({type(error).__name__}: {error})"
    return f'the demo draws a picture and {found}; run `pip install ".[demo]"` in the folder of this pack, with the same Python.'


def draw(path: Path, captions: Sequence[str], dense: Tensor, four: Tensor, name: str) -> None:
    """Writes the PNG. dense, four: pictures fp32 [B, 3, H, W] of 0..1. The differences share one gain."""
    from PIL import Image, ImageDraw

    difference = four - dense
    strong = float(difference.abs().flatten(1).quantile(0.995, 1).max())  # a few pixels at an edge may saturate
    gain = max((g for g in GAINS if g * strong <= 1), default=1)
    width, height = 3 * PANEL + 2 * GAP, LABEL + PANEL + MARGIN
    rows = -(-len(captions) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width + (COLUMNS + 2) * MARGIN, LABEL + rows * height + MARGIN), "white")
    text = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        left, top = MARGIN + i % COLUMNS * (width + 2 * MARGIN), LABEL + i // COLUMNS * height
        for column, label in enumerate(("16 bit", name, f"difference x {gain}")):
            if i < COLUMNS:
                text.text((left + column * (PANEL + GAP), 4), label, fill="black", font_size=14)
        text.text((left, top + 4), caption, fill="black", font_size=13)
        for column, picture in enumerate((dense[i], four[i], 0.5 + gain / 2 * difference[i])):
            sheet.paste(image(picture), (left + column * (PANEL + GAP), top + LABEL))
    part = path.with_name(path.name + ".part")
    sheet.save(part, format="PNG")
    part.replace(path)


def image(picture: Tensor):
    """[3, h, w], 0..1 -> a PANEL x PANEL image."""
    from PIL import Image

    values = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(values).resize((PANEL, PANEL), Image.Resampling.BICUBIC)
