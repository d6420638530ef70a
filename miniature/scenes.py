"""Scenes of one or two simple objects with captions: what the miniature FLUX is trained on. Drawn in batches by signed distances.

Every scene is 128 x 128. Objects sit at the nine places of a 3 x 3 grid, two of them at opposite sides. A caption is the ids of at most 16
words in this order (words in brackets are sometimes left out):

    [size] colour [texture] shape [rows] [columns]  and  [size] colour [texture] shape [rows] [columns]  on background
    [size] colour [texture] shape  left of | right of | above | below  [size] colour [texture] shape  on background
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE, CAPTION = 128, 16
CENTRES = (32.0, 64.0, 96.0)  # of the grid's rows and columns, in pixels
DIGITS = tuple("0123456789")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", *DIGITS)
COLOURS = {
    "red": (0.90, 0.14, 0.14),
    "orange": (1.00, 0.55, 0.08),
    "yellow": (0.98, 0.90, 0.20),
    "green": (0.18, 0.72, 0.25),
    "cyan": (0.22, 0.85, 0.90),
    "blue": (0.18, 0.32, 0.95),
    "purple": (0.58, 0.22, 0.85),
    "pink": (1.00, 0.55, 0.78),
}
NEUTRALS = {"black": (0.06, 0.06, 0.06), "grey": (0.45, 0.45, 0.45), "white": (0.93, 0.93, 0.93)}
BACKGROUNDS = (*COLOURS, *NEUTRALS)  # of a colour's name: its dark tone
TEXTURES = ("plain", "striped", "dotted", "shaded")
SIZES = {"small": 14.0, "medium": 19.0, "large": 25.0}  # radius in pixels
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
RELATIONS = ("left of", "right of", "above", "below")
VOCABULARY = (
    "", *SHAPES, *COLOURS, *NEUTRALS, *TEXTURES, *SIZES,
    "top", "bottom", "left", "right", "centre", "above", "below", "of", "and", "on",
)  # fmt: skip

_ID = {word: i for i, word in enumerate(VOCABULARY)}
_CENTRE_CELL = 4
_PAIRS = tuple((a, b) for a, b in itertools.product(range(9), repeat=2) if max(abs(a // 3 - b // 3), abs(a % 3 - b % 3)) == 2)
_RELATION_CELLS = ((3, 5), (5, 3), (1, 7), (7, 1))
_SEGMENTS = ["abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg"]  # lit segments of 0..9
_SEGMENT_BOXES = {  # centre x, centre y, half width, half height, in radii
    "a": (0, -0.80, 0.52, 0.17),
    "b": (0.42, -0.41, 0.17, 0.50),
    "c": (0.42, 0.41, 0.17, 0.50),
    "d": (0, 0.80, 0.52, 0.17),
    "e": (-0.42, 0.41, 0.17, 0.50),
    "f": (-0.42, -0.41, 0.17, 0.50),
    "g": (0, 0, 0.52, 0.17),
}


@functools.lru_cache(maxsize=64)
def _table(values: tuple, device: torch.device) -> Tensor:
    """A constant on the device: copying it there every time would make the program wait for the GPU."""
    return torch.tensor(values, device=device)


@dataclass(frozen=True)
class Facts:
    """What is in each scene. Objects in the caption's order; the second is there where `count` is 2.

    shape, colour, texture, size, cell   int64 [n, 2]: indices into SHAPES, COLOURS, TEXTURES, SIZES, and 3 * row + column
    count, background                    int64 [n]: 1 or 2; index into BACKGROUNDS
    relation                             int64 [n]: 0 for none, else 1 + index into RELATIONS
    """

    shape: Tensor
    colour: Tensor
    texture: Tensor
    size: Tensor
    cell: Tensor
    count: Tensor
    background: Tensor
    relation: Tensor

    def first(self) -> tuple[Tensor, Tensor, Tensor]:
        """(shape, colour, cell), each [n], of the object that comes first in reading order."""
        cell = self.cell.clone()
        cell[self.count == 1, 1] = 9
        which = cell.argmin(1, keepdim=True)
        return tuple(t.gather(1, which)[:, 0] for t in (self.shape, self.colour, self.cell))


@dataclass(frozen=True)
class Scenes:
    """pictures fp32 [n, 3, 128, 128] in 0..1, words int64 [n, 16] (ids into VOCABULARY, 0 behind the caption's end), and the facts."""

    pictures: Tensor
    words: Tensor
    facts: Facts


def scenes(n: int, generator: torch.Generator) -> Scenes:
    """n random scenes, on the generator's device; the same ones for the same state of the generator (and device and torch)."""
    facts = draw_facts(n, generator)
    return Scenes(render(facts, generator), caption_words(facts, generator), facts)


def caption_text(words: Tensor) -> str:
    """The caption of one row of word ids [16]."""
    return " ".join(VOCABULARY[i] for i in words.tolist() if i)


# -- what is in a scene -----------------------------------------------------------------------------------------------------------


def draw_facts(n: int, generator: torch.Generator) -> Facts:
    device = generator.device

    def pick(choices: int, *shape: int) -> Tensor:
        return torch.randint(choices, shape, generator=generator, device=device)

    count = 1 + (pick(5, n) > 1).long()
    relation = torch.where((count == 2) & (pick(5, n) > 2), 1 + pick(4, n), 0)
    pairs, related = _table(_PAIRS, device)[pick(len(_PAIRS), n)], _table(((0, 0), *_RELATION_CELLS), device)[relation]
    cell = torch.where((relation > 0)[:, None], related, pairs)
    cell = torch.where((count == 1)[:, None], pick(9, n, 1), cell)
    colour = pick(len(COLOURS), n, 2)
    background = pick(len(BACKGROUNDS) - 2, n)  # not the name of either object's colour
    low, high = colour.amin(1), colour.amax(1)
    background = background + (background >= low)
    background = background + (background >= torch.where(high == low, len(BACKGROUNDS) - 1, high))
    return Facts(pick(len(SHAPES), n, 2), colour, pick(4, n, 2), pick(3, n, 2), cell, count, background, relation)


def caption_words(facts: Facts, generator: torch.Generator) -> Tensor:
    """Word ids int64 [n, 16]. Half of the words that say what is usual (medium, plain, centre) are left out."""
    n, device = facts.count.shape[0], facts.count.device

    def words(choices: Iterable[str]) -> Tensor:
        return _table(tuple(_ID[w] for w in choices), device)

    two, related = facts.count == 2, facts.relation > 0
    slots = torch.zeros(n, CAPTION, dtype=torch.int64, device=device)
    for i, at in enumerate((0, 8)):
        there = two if i else torch.ones_like(two)
        placed = there & ~related
        row, column = facts.cell[:, i] // 3, facts.cell[:, i] % 3
        slots[:, at] = words(SIZES)[facts.size[:, i]] * there
        slots[:, at + 1] = words(COLOURS)[facts.colour[:, i]] * there
        slots[:, at + 2] = words(TEXTURES)[facts.texture[:, i]] * there
        slots[:, at + 3] = words(SHAPES)[facts.shape[:, i]] * there
        centre = _ID["centre"] * (facts.cell[:, i] == _CENTRE_CELL)
        slots[:, at + 4] = (words(ROWS)[row] + centre) * placed
        slots[:, at + 5] = words(COLUMNS)[column] * placed
    slots[:, 6] = torch.where(two, words(("and", "left", "right", "above", "below"))[facts.relation], 0)
    slots[:, 7] = words(("", "of", "of", "", ""))[facts.relation]
    slots[:, 14], slots[:, 15] = _ID["on"], words(BACKGROUNDS)[facts.background]
    usual = torch.isin(slots, words(("medium", "plain", "centre")))
    slots[usual & (torch.rand(slots.shape, generator=generator, device=device) < 0.5)] = 0
    return slots.gather(1, (slots == 0).long().argsort(stable=True, dim=1))


# -- drawing ----------------------------------------------------------------------------------------------------------------------


def render(facts: Facts, generator: torch.Generator) -> Tensor:
    """Pictures fp32 [n, 3, 128, 128]. Places, sizes, turns and tones vary a little beyond what the facts say."""
    n, device = facts.count.shape[0], facts.count.device

    def vary(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device) * 2 - 1

    tones = _table((*COLOURS.values(), *NEUTRALS.values()), device)
    grounds = torch.where(torch.arange(len(BACKGROUNDS), device=device)[:, None] < len(COLOURS), 0.4 * tones + 0.03, tones)
    ramp = torch.linspace(1.12, 0.88, SIZE, device=device)[:, None]  # lighter above
    picture = (grounds[facts.background] + 0.02 * vary(n, 3))[..., None, None] * ramp
    picture = picture.expand(-1, -1, -1, SIZE).contiguous()
    centres, radii = _table(CENTRES, device), _table(tuple(SIZES.values()), device)
    axis = torch.arange(SIZE, device=device) + 0.5
    for i in range(2):
        cell = facts.cell[:, i]
        centre_x, centre_y = centres[cell % 3] + 2 * vary(n), centres[cell // 3] + 2 * vary(n)
        radius, turn = radii[facts.size[:, i]] * (1 + 0.05 * vary(n)), math.radians(7) * vary(n)
        dx, dy = (axis - centre_x[:, None])[:, None, :], (axis - centre_y[:, None])[:, :, None]
        cos, sin, r = (t[:, None, None] for t in (turn.cos(), turn.sin(), radius))
        x, y = (cos * dx + sin * dy) / r, (cos * dy - sin * dx) / r
        cover = (0.5 - shape_distance(facts.shape[:, i], x, y) * r).clamp(0, 1)
        if i:
            cover = cover * (facts.count == 2)[:, None, None]
        tone = tones[facts.colour[:, i]] + 0.02 * vary(n, 3)
        paint = textured(facts.texture[:, i], tone, x, y, r)
        picture = torch.lerp(picture, paint, cover[:, None])
    return picture.clamp_(0, 1)


def textured(texture: Tensor, tone: Tensor, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """The object's colour at every pixel [n, 3, H, W]. x, y [n, H, W] in radii, r [n, 1, 1] the radius in pixels."""
    period = 0.5
    wave = ((x + y) / (math.sqrt(2) * period)).remainder(1)  # dark where within a quarter of 0.5
    stripe = (0.5 - ((wave - 0.5).abs() - 0.25) * period * r).clamp(0, 1)
    across, down = ((t / period).remainder(1) - 0.5 for t in (x, y))
    dot = (0.5 - (torch.hypot(across, down) - 0.3) * period * r).clamp(0, 1)
    shade = (0.5 + 0.5 * y).clamp(0, 1)
    kind = texture[:, None, None]
    dark = 0.6 * torch.where(kind == 1, stripe, torch.where(kind == 3, shade, 0.0))
    light = 0.75 * torch.where(kind == 2, dot, 0.0)
    painted = tone[..., None, None] * (1 - dark)[:, None]
    return painted + (1 - painted) * light[:, None]


def shape_distance(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance (negative inside) to each scene's shape. shape [n], x and y [n, H, W]; all in radii."""
    radius = torch.hypot(x, y)
    kinds = {
        "circle": radius - 0.95,
        "square": _box(x, y, 0, 0, 0.82, 0.82),
        "triangle": _triangle(x, y),
        "star": _star(x, y, radius),
        "ring": (radius - 0.70).abs() - 0.25,
        "cross": torch.minimum(_box(x, y, 0, 0, 0.95, 0.3), _box(x, y, 0, 0, 0.3, 0.95)),
    }
    which = shape[:, None, None]
    out = _digit(shape, x, y)
    for i, distance in enumerate(kinds.values()):  # SHAPES begins with these, in this order
        out = torch.where(which == i, distance, out)
    return out


def _box(x: Tensor, y: Tensor, centre_x: float, centre_y: float, half_width: float, half_height: float) -> Tensor:
    across, down = (x - centre_x).abs() - half_width, (y - centre_y).abs() - half_height
    return torch.hypot(across.clamp(min=0), down.clamp(min=0)) + torch.maximum(across, down).clamp(max=0)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    """Equilateral, corners at radius 1, one of them up."""
    slope = math.sqrt(3) / 2
    return torch.maximum(y, slope * x.abs() - 0.5 * y) - 0.5


def _star(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Five points at radius 1, one of them up, corners between them at 0.42."""
    part = 2 * math.pi / 5
    angle = ((torch.atan2(x, -y) + part / 2).remainder(part) - part / 2).abs()
    inner_x, inner_y = 0.42 * math.cos(part / 2), 0.42 * math.sin(part / 2)
    length = math.hypot(1 - inner_x, inner_y)
    return ((radius * angle.cos() - 1) * inner_y + radius * angle.sin() * (1 - inner_x)) / length


def _digit(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Seven segments, lit as the digit has them; far away for what is no digit."""
    first = SHAPES.index("0")
    lit = _table(tuple(tuple(s in _SEGMENTS[d] for s in _SEGMENT_BOXES) for d in range(10)), shape.device)
    on = lit[(shape - first).clamp(min=0)]
    out = torch.full_like(x, 9.0)
    for i, box in enumerate(_SEGMENT_BOXES.values()):
        out = torch.minimum(out, torch.where(on[:, i, None, None], _box(x, y, *box), 9.0))
    return out
