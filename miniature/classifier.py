"""Reads a scene back: which object is at each of the nine places, by a small convolution network on the place's 64 x 64 pixels.

Used to count how many pictures of the miniature FLUX show what their caption says.
"""

from __future__ import annotations

import os

import torch
from safetensors.torch import load_file
from scenes import CENTRES, COLOURS, SHAPES, Facts
from torch import Tensor, nn
from torch.nn import functional as F

CROP, BATCH = 64, 250


def _level(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]


class Classifier(nn.Module):
    """Pictures [B, 3, 128, 128] -> (there [B, 9], shape [B, 9, 16], colour [B, 9, 8]): logits for each place, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*_level(3, 32), *_level(32, 64), *_level(64, 96), *_level(96, 96), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(96 * 16, 128), nn.ReLU(), nn.Linear(128, 1 + len(SHAPES) + len(COLOURS)))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        starts = [int(c) - CROP // 2 for c in CENTRES]
        crops = torch.stack([pictures[..., y : y + CROP, x : x + CROP] for y in starts for x in starts], 1)
        logits = self.head(self.features(crops.flatten(0, 1) - 0.5)).unflatten(0, (-1, 9)).float()
        there, shape, colour = logits.split((1, len(SHAPES), len(COLOURS)), -1)
        return there[..., 0], shape, colour


def loss(outputs: tuple[Tensor, Tensor, Tensor], facts: Facts) -> Tensor:
    """Cross entropies of presence at all places, of shape and colour where an object is."""
    there, shape, colour = outputs
    present = torch.zeros_like(there)
    present.scatter_(1, facts.cell[:, 1:], (facts.count == 2).float()[:, None])
    present.scatter_(1, facts.cell[:, :1], 1.0)
    total = F.binary_cross_entropy_with_logits(there, present)
    row = torch.arange(there.shape[0], device=there.device)
    for i in range(2):
        weight = (facts.count > i).float() / there.shape[0]
        for logits, truth in ((shape, facts.shape), (colour, facts.colour)):
            total = total + (F.cross_entropy(logits[row, facts.cell[:, i]], truth[:, i], reduction="none") * weight).sum()
    return total


@torch.no_grad()
def read(classifier: Classifier, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(shape, colour, cell), each int64 [B], of the object that comes first in reading order; where none is seen, of the likeliest."""
    found = [classifier(part) for part in pictures.split(BATCH)]
    there, shape, colour = (torch.cat(parts) for parts in zip(*found, strict=True))
    seen = there > 0
    cell = torch.where(seen.any(1), seen.long().argmax(1), there.argmax(1))
    row = torch.arange(cell.shape[0], device=cell.device)
    return shape[row, cell].argmax(1), colour[row, cell].argmax(1), cell


def right(classifier: Classifier, pictures: Tensor, facts: Facts) -> dict[str, Tensor]:
    """For "shape", "colour" and "position" of the first object in reading order: bool [B], whether the picture shows it."""
    found, truth = read(classifier, pictures), facts.first()
    return {name: f == t for name, f, t in zip(("shape", "colour", "position"), found, truth, strict=True)}


def load_classifier(path: str | os.PathLike, device: torch.device | str = "cpu") -> Classifier:
    model = Classifier()
    model.load_state_dict(load_file(path))
    return model.to(device).eval().requires_grad_(False)
