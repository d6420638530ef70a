"""Latents to a labelled picture: 16 bit | 4 bit | difference, one row for each way of computing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

PANEL, MARGIN, LABEL = 384, 12, 26
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


def to_rgb(latent: Tensor) -> Tensor:
    """latent [1, 16, h, w] -> RGB [3, h, w] by a fixed linear map of 16 channels to 3, orthonormal rows, not yet scaled to 0..1."""
    rows = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(3)))[0].T
    return torch.einsum("rc,chw->rhw", rows, latent[0].float())


def draw(path: Path, latents: dict[str, Tensor], dense: str, compared: tuple[str, ...]) -> None:
    """Writes the PNG. latents by name; `dense` is the left column, each name in `compared` a row. All share one scale and one gain."""
    from PIL import Image, ImageDraw

    reference = to_rgb(latents[dense])
    low, high = (reference.flatten().kthvalue(max(1, int(reference.numel() * q))).values for q in (0.01, 0.99))
    pictures = {name: (to_rgb(latents[name]) - low) / (high - low) for name in (dense, *compared)}
    worst = max(float((pictures[name] - pictures[dense]).abs().max()) for name in compared)
    gain = max((g for g in GAINS if g * worst <= 1), default=1)
    size = (3 * PANEL + 4 * MARGIN, len(compared) * (PANEL + LABEL) + (len(compared) + 1) * MARGIN)
    sheet = Image.new("RGB", size, "white")
    text = ImageDraw.Draw(sheet)
    for row, name in enumerate(compared):
        top = MARGIN + row * (PANEL + LABEL + MARGIN)
        difference = 0.5 + gain / 2 * (pictures[name] - pictures[dense])
        panels = (
            ("16 bit (dense bfloat16)", pictures[dense]),
            (f"4 bit, compute {name}", pictures[name]),
            (f"difference x {gain} (grey is none)", difference),
        )
        for column, (label, picture) in enumerate(panels):
            left = MARGIN + column * (PANEL + MARGIN)
            text.text((left, top + 6), label, fill="black", font_size=15)
            sheet.paste(image(picture), (left, top + LABEL))
    part = path.with_name(path.name + ".part")
    sheet.save(part, format="PNG")
    part.replace(path)


def image(picture: Tensor):
    """[3, h, w], 0..1 -> a PANEL x PANEL image."""
    from PIL import Image

    values = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(values).resize((PANEL, PANEL), Image.Resampling.BICUBIC)
