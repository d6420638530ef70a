"""What LoRA puts beside a packed linear: extra columns of the low-rank branch, and a dense delta for what has no such form.

The columns of a part are a Columns (kernels/layout.py): y += (x @ down) @ up^T, as the layer's own low-rank branch. Where LoRAs concern
only some rows (a fused qkv with separate q, k and v), the part's rows are cut into segments with columns of their own, so that no row
multiplies the zeros of another: the kernels take up to four, which begin at multiples of 128 rows.

Terms, deltas and results have their rows in the outputs' order. Columns of a part that stores its rows in pairs (kernels/layout.py) lie as
the part does, in one segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.layout import TILE, Columns, PackSpec, PartSpec, in_order

MOST_SEGMENTS = 4
RANKS = 16  # ranks are filled up to multiples of this


@dataclass(frozen=True, eq=False)
class Term:
    """scale * up [n, r] @ down [r, k], for rows row to row + n and columns col to col + k of a weight. Any float types and devices."""

    up: Tensor
    down: Tensor
    scale: float = 1.0
    row: int = 0
    col: int = 0


Shape = tuple[int, int, int, int, int]  # (r, n, k, row, col) of a term


def shape_of(term: Term) -> Shape:
    return term.down.shape[0], term.up.shape[0], term.down.shape[1], term.row, term.col


@dataclass(frozen=True)
class Cut:
    """How a part's columns are laid out: where its segments begin, the ranks of each, and for every term the first rank it has in each."""

    segments: tuple[int, ...]
    rank: int
    places: tuple[tuple[int | None, ...], ...]  # of every term, by segment; None: not there

    def elements(self, part: PartSpec) -> int:
        return self.rank * (len(self.segments) * part.k_padded + part.n_padded)


def plan_part(part: PartSpec, shapes: list[Shape]) -> Cut | None:
    """The cheaper of one segment for all rows and one for every stretch of rows; None where no term touches the part."""
    inside = [_inside(part, s) for s in shapes]
    if not any(inside):
        return None
    edges = {0} | {e for rows in inside if rows for e in rows if e < part.n}
    plans = [_layout((0,), part, shapes, inside)]
    if not part.paired and 1 < len(edges) <= MOST_SEGMENTS and all(e % TILE == 0 for e in edges):
        plans.append(_layout(tuple(sorted(edges)), part, shapes, inside))
    return min(plans, key=lambda cut: cut.rank)


def _inside(part: PartSpec, shape: Shape) -> tuple[int, int] | None:
    """The rows of the part that a term adds to."""
    _, n, k, row, col = shape
    first, end = max(row - part.row_offset, 0), min(row + n - part.row_offset, part.n)
    columns = min(col + k, part.col_offset + part.k) > max(col, part.col_offset)
    return (first, end) if first < end and columns else None


def _layout(segments: tuple[int, ...], part: PartSpec, shapes: list[Shape], inside: list[tuple[int, int] | None]) -> Cut:
    used, places = [0] * len(segments), []
    ends = (*segments[1:], part.n)
    for shape, rows in zip(shapes, inside, strict=True):
        place: list[int | None] = [None] * len(segments)
        for i, (first, end) in enumerate(zip(segments, ends, strict=True)):
            if rows and rows[0] < end and rows[1] > first:
                place[i], used[i] = used[i], used[i] + shape[0]
        places.append(tuple(place))
    return Cut(segments, -(-max(used) // RANKS) * RANKS, tuple(places))


def planned_nbytes(spec: PackSpec, shapes: list[Shape], itemsize: int) -> int:
    """Bytes that make_side's columns will take for terms of these shapes."""
    cuts = [(part, plan_part(part, shapes)) for part in spec.parts]
    return sum(cut.elements(part) for part, cut in cuts if cut is not None) * itemsize


def check_term(spec: PackSpec, term: Term) -> None:
    """Raises ValueError where a term's factors do not multiply or leave the weight."""
    n, k = spec.out_features, spec.in_features
    r, rows, cols, row, col = shape_of(term)
    if term.up.ndim != 2 or term.down.ndim != 2 or term.up.shape[1] != r or row + rows > n or col + cols > k:
        at = f" at row {row}, column {col}" if row or col else ""
        raise ValueError(f"the layer is {n} x {k}, the LoRA {list(term.up.shape)} times {list(term.down.shape)}{at}")


@dataclass(frozen=True, eq=False)
class Side:
    """What lies beside one packed linear: columns of every part's low-rank branch and a dense delta [N, K], each or both."""

    columns: tuple[Columns | None, ...]
    delta: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        pairs = [t for c in self.columns if c is not None for t in (c.down, c.up)]
        return pairs if self.delta is None else [*pairs, self.delta]

    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors())

    def to(self, device: torch.device) -> Side:
        if all(t.device == device for t in self.tensors()):
            return self
        columns = tuple(None if c is None else Columns(c.down.to(device), c.up.to(device), c.segments) for c in self.columns)
        return Side(columns, None if self.delta is None else self.delta.to(device))

    def dense(self, spec: PackSpec) -> Tensor:
        """fp32 [N, K]: all of it as one matrix."""
        device = self.tensors()[0].device
        total = torch.zeros(spec.out_features, spec.in_features, device=device) if self.delta is None else self.delta.float().clone()
        for part, c in zip(spec.parts, self.columns, strict=True):
            for first, end, down, up in _by_segment(part, c):
                rows, cols = part.row_offset, slice(part.col_offset, part.col_offset + part.k)
                total[rows + first : rows + end, cols] += up.float() @ down[: part.k].float().t()
        return total

    def add(self, spec: PackSpec, y: Tensor, x: Tensor) -> Tensor:
        """y [..., N] + this of x [..., K], beside kernels that know nothing of it. Products in x's type, one rounding to y's.

        All in place: autocast leaves that alone.
        """
        rows = x.reshape(-1, x.shape[-1])
        total = y.reshape(-1, y.shape[-1]).clone()
        for part, c in zip(spec.parts, self.to(x.device).columns, strict=True):
            source = rows[:, part.col_offset : part.col_offset + part.k]
            for first, end, down, up in _by_segment(part, c):
                out = total[:, part.row_offset + first : part.row_offset + end]
                low = source.new_empty(source.shape[0], down.shape[1]).addmm_(source, down[: part.k].to(x.dtype), beta=0)
                out.addmm_(low, up.to(x.dtype).t())
        if self.delta is not None:
            total.addmm_(rows, self.delta.to(x.device, x.dtype).t())
        return total.view(y.shape)


def _by_segment(part: PartSpec, columns: Columns | None) -> list[tuple[int, int, Tensor, Tensor]]:
    """(first row, end, down [Kp, R], up [end - first, R]) of every segment."""
    if columns is None:
        return []
    ends = (*columns.segments[1:], part.n)
    up = in_order(columns.up[: part.n]) if part.paired else columns.up
    ups = [up[first:end] for first, end in zip(columns.segments, ends, strict=True)]
    return list(zip(columns.segments, ends, columns.down.split(columns.up.shape[1], 1), ups, strict=True))


def make_side(spec: PackSpec, terms: list[Term], delta: Tensor | None, device: torch.device, dtype: torch.dtype) -> Side | None:
    """The side of a linear on `device` in `dtype`; None where there is nothing. Raises ValueError as check_term."""
    for term in terms:
        check_term(spec, term)
    shapes = [shape_of(term) for term in terms]
    cuts = [plan_part(part, shapes) for part in spec.parts]
    if not any(cuts) and delta is None:
        return None
    # All that stays is allocated before anything that goes: the allocator wastes up to 1 MB of a hole that is filled again.
    columns = tuple(None if cut is None else _empty(part, cut, device, dtype) for part, cut in zip(spec.parts, cuts, strict=True))
    for i, term in enumerate(terms):
        up, down = term.up.to(device), term.down.to(device)  # in their own type: fewer bytes to move
        for part, cut, place in zip(spec.parts, cuts, columns, strict=True):
            if cut is not None and place is not None:
                _fill(part, cut, place, term, cut.places[i], up, down)
    return Side(columns, None if delta is None else delta.to(device, dtype))


def _empty(part: PartSpec, cut: Cut, device: torch.device, dtype: torch.dtype) -> Columns:
    down = torch.zeros(part.k_padded, len(cut.segments) * cut.rank, dtype=dtype, device=device)
    return Columns(down, torch.zeros(part.n_padded, cut.rank, dtype=dtype, device=device), cut.segments)


def _fill(part: PartSpec, cut: Cut, columns: Columns, term: Term, places: tuple[int | None, ...], up: Tensor, down: Tensor) -> None:
    """Writes a term to its places; up and down are its factors on the columns' device."""
    r, n, k, row, col = shape_of(term)
    first_k, end_k = max(col, part.col_offset), min(col + k, part.col_offset + part.k)
    for first, end, place, segment in zip(cut.segments, (*cut.segments[1:], part.n), places, range(len(places)), strict=True):
        if place is None:
            continue
        first, end = max(first, row - part.row_offset), min(end, row + n - part.row_offset)
        at = segment * cut.rank + place
        target = columns.down[first_k - part.col_offset : end_k - part.col_offset, at : at + r]
        target.copy_(down[:, first_k - col : end_k - col].t())
        rows = up[first + part.row_offset - row : end + part.row_offset - row]
        # The scale is folded into up, rounded once.
        same = rows if rows.dtype == columns.up.dtype else rows.float()
        if part.paired:
            at = in_order(torch.arange(part.n, device=up.device))[first:end]
            columns.up[at, place : place + r] = (same * term.scale).to(columns.up.dtype)
        else:
            torch.mul(same, term.scale, out=columns.up[first:end, place : place + r])
