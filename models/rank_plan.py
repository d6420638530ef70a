"""The rank of every layer's branch, chosen so that the layers together make the least noise in a file of a given size.

What a rank saves differs from layer to layer: it is what the singular values behind it hold. `noise_by_rank` reads that off one layer,
`plan_ranks` distributes the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .formats.nunchaku import GROUP
from .formats.quantize import low_rank
from .svdquant import InputStatistics, Recipe
from .svdquant_inputs import layer_inputs

RANKS = (16, 32, 64, 128)
_ROOM = 1 << 16  # entries of the plan's table, at most; sizes are rounded up to fit


def pair_bytes(n: int, k: int, rank: int) -> int:
    """Bytes of a low-rank pair of a linear [n, k] in a file."""
    return 2 * rank * (n + k)


def noise_by_rank(weight: Tensor, recipe: Recipe, smooth: Tensor | None = None, statistics: InputStatistics | None = None,
                  act_unsigned: bool = False, ranks: Sequence[int] = RANKS) -> dict[int, float]:  # fmt: skip
    """Rank -> noise of a linear's outputs over their signal, up to a factor that the layers of one file share. Arguments as `svd_quantize`.

    What rounding costs is proportional to the squares of what the branch leaves, every group of inputs weighted by its activations.
    """
    dtype = recipe.dtype
    smooth = torch.ones(weight.shape[1], device=weight.device, dtype=dtype) if smooth is None else smooth.to(weight.device, dtype)
    inputs = layer_inputs(statistics, smooth, recipe.precision, act_unsigned)
    w = weight.float() * inputs.t
    columns = inputs.rounding_cost(GROUP[recipe.precision]).columns
    _, down = low_rank(w, max(ranks), columns=columns)
    taken = (down * columns).square().sum(1).double().cumsum(0).tolist()
    whole = float((w * columns).square().sum())
    signal = float((inputs.x @ w.T).square().mean(0).sum() if len(inputs.x) else (w.square() * inputs.square).sum())
    if not signal:
        return dict.fromkeys(ranks, 0.0)
    return {rank: max(whole - taken[min(rank, len(taken)) - 1], 0.0) / signal for rank in ranks}


def plan_ranks(noise: Mapping[str, Mapping[int, float]], sizes: Mapping[str, tuple[int, int]], budget: int,
               tied: Sequence[Sequence[str]] = ()) -> dict[str, int]:  # fmt: skip
    """Layer -> rank, with the least summed noise of all plans whose pairs take at most `budget` bytes.

    noise  layer -> rank -> its noise, the same ranks for all (noise_by_rank)
    sizes  layer -> (N, K)
    tied   groups of layers that get one rank, as the two of a linear1
    Exact: sizes of pairs are counted in their greatest common divisor; only where that would take more than 65536 steps, in larger units,
    rounded up. ValueError when not even the smallest ranks fit, and for names, ranks or numbers that do not.
    """
    groups = _groups(noise, sizes, tied)
    ranks = sorted(next(iter(noise.values()), {}))
    for name, found in noise.items():
        if sorted(found) != ranks or not ranks or not all(math.isfinite(value) for value in found.values()):
            raise ValueError(f"noise of {name} is {dict(found)}, expected a finite number for each of the ranks {ranks}")
    if not groups:
        return {}
    costs = [[sum(pair_bytes(*sizes[name], rank) for name in group) for rank in ranks] for group in groups]
    least = sum(row[0] for row in costs)
    if least > budget:
        raise ValueError(f"the budget is {budget} bytes, rank {ranks[0]} everywhere takes {least}: raise the budget")
    room = min(budget, sum(row[-1] for row in costs)) - least
    extra = [[cost - row[0] for cost in row] for row in costs]
    unit = max(math.gcd(*(cost for row in extra for cost in row)), -(-room // _ROOM), 1)
    values = [[sum(noise[name][rank] for name in group) for rank in ranks] for group in groups]
    chosen = _least_sum(values, [[-(-cost // unit) for cost in row] for row in extra], room // unit)
    return {name: ranks[i] for group, i in zip(groups, chosen, strict=True) for name in group}


def _groups(noise: Mapping[str, object], sizes: Mapping[str, object], tied: Sequence[Sequence[str]]) -> list[list[str]]:
    bound = [name for group in tied for name in group]
    unknown = [name for name in bound if name not in noise] + [name for name in noise if name not in sizes]
    if unknown:
        raise ValueError(f"{unknown[0]} is in the plan, but its noise or its size is not given")
    if len(set(bound)) != len(bound):
        raise ValueError("a layer is tied twice")
    return [list(group) for group in tied if group] + [[name] for name in noise if name not in set(bound)]


def _least_sum(values: list[list[float]], costs: list[list[int]], room: int) -> list[int]:
    """One index a row, of the least sum of values whose costs together are at most `room`: dynamic programming, row after row."""
    best = torch.zeros(room + 1, dtype=torch.float64)  # by what the rows so far may cost
    picks = []
    for value, cost in zip(values, costs, strict=True):
        tried = torch.full((len(value), room + 1), math.inf, dtype=torch.float64)
        for i, (v, c) in enumerate(zip(value, cost, strict=True)):
            if c <= room:
                tried[i, c:] = best[: room + 1 - c] + v
        best, pick = tried.min(0)
        picks.append(pick.to(torch.uint8))
    chosen, left = [], room
    for pick, cost in zip(reversed(picks), reversed(costs), strict=True):
        chosen.append(int(pick[left]))
        left -= cost[chosen[-1]]
    return chosen[::-1]
