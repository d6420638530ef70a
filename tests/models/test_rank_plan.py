"""Ranks under a budget: the plan is the best there is, and what it goes by is what the quantiser then shows."""

import itertools

import pytest
import torch
from tonfa.models.rank_plan import RANKS, noise_by_rank, pair_bytes, plan_ranks
from tonfa.models.svdquant import InputStatistics, Recipe, svd_quantize


def draw(layers: int, seed: int):
    """Noise that falls with the rank, unevenly, and sizes as FLUX has them in small."""
    gen = torch.Generator().manual_seed(seed)
    noise = {f"l{i}": dict(zip(RANKS, sorted(torch.rand(4, generator=gen).tolist(), reverse=True), strict=True)) for i in range(layers)}
    shapes = [(384, 128), (128, 128), (512, 128), (128, 512)]
    return noise, {f"l{i}": shapes[i % 4] for i in range(layers)}


def cost(plan, sizes):
    return sum(pair_bytes(*sizes[name], rank) for name, rank in plan.items())


def total(plan, noise):
    return sum(noise[name][rank] for name, rank in plan.items())


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_is_better(seed):
    noise, sizes = draw(5, seed)
    tied = [("l0", "l3")]
    every = [dict(zip(noise, ranks, strict=True)) for ranks in itertools.product(RANKS, repeat=5)]
    every = [plan for plan in every if plan["l0"] == plan["l3"]]
    least = cost(dict.fromkeys(noise, 16), sizes)
    most = cost(dict.fromkeys(noise, 128), sizes)
    for part in (0.0, 0.1, 0.23, 0.5, 0.77, 1.0):
        budget = least + int(part * (most - least))
        plan = plan_ranks(noise, sizes, budget, tied)
        assert plan.keys() == noise.keys() and cost(plan, sizes) <= budget and plan["l0"] == plan["l3"]
        best = min(total(p, noise) for p in every if cost(p, sizes) <= budget)
        assert total(plan, noise) == pytest.approx(best, abs=1e-12)
    assert plan_ranks(noise, sizes, 10**12) == dict.fromkeys(noise, 128)


def test_odd_sizes_stay_within_the_budget():
    """Sizes without a large common divisor are rounded up: a little may be left over, never too much taken."""
    noise, sizes = draw(40, 7)
    sizes = {name: (n + 3 * i * 7919, k + 1) for i, (name, (n, k)) in enumerate(sizes.items())}
    budget = 3 * cost(dict.fromkeys(noise, 16), sizes)
    plan = plan_ranks(noise, sizes, budget)
    assert 0.99 * budget < cost(plan, sizes) <= budget
    assert total(plan, noise) < total(dict.fromkeys(noise, 32), noise)


def test_flux_is_planned_at_once():
    noise, _ = draw(304, 8)
    shapes = [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288)]
    sizes = {name: shapes[i % 4] for i, name in enumerate(noise)}
    budget = cost(dict.fromkeys(noise, 32), sizes)
    plan = plan_ranks(noise, sizes, budget)
    assert cost(plan, sizes) <= budget and total(plan, noise) < 0.95 * total(dict.fromkeys(noise, 32), noise)


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_noise_is_what_the_quantiser_shows(precision):
    """A layer whose weight is nearly of low rank gains from ranks, another does not; measured and foretold noise go together."""
    gen = torch.Generator().manual_seed(9)
    n, k = 256, 512
    flat = torch.randn(n, k, generator=gen)
    low = torch.randn(n, 48, generator=gen) @ torch.randn(48, k, generator=gen) + 2 * flat
    x = torch.randn(256, k, generator=gen) * torch.exp(torch.randn(k, generator=gen))
    known = InputStatistics(x.abs().amax(0), x.square().mean(0), x, len(x))
    ratios = []
    for w in (flat, low):
        told = noise_by_rank(w, Recipe(precision), None, known)
        assert list(told) == list(RANKS) and sorted(told.values(), reverse=True) == list(told.values())
        seen = {r: 10 ** (-svd_quantize(w, None, Recipe(precision, r, (), 0), None, known)[1].output_snr_db / 10) for r in RANKS}
        ratios += [seen[r] / told[r] for r in RANKS]
    assert max(ratios) < 1.5 * min(ratios)
    without = noise_by_rank(low, Recipe(precision))
    assert without[128] < without[64] < 0.6 * without[16]
    assert noise_by_rank(torch.zeros(128, 128), Recipe(precision)) == dict.fromkeys(RANKS, 0.0)


def test_what_does_not_fit_is_told():
    noise, sizes = draw(3, 1)
    with pytest.raises(ValueError, match="raise the budget"):
        plan_ranks(noise, sizes, 1000)
    with pytest.raises(ValueError, match="l9"):
        plan_ranks(noise, sizes, 10**9, [("l0", "l9")])
    with pytest.raises(ValueError, match="tied twice"):
        plan_ranks(noise, sizes, 10**9, [("l0", "l1"), ("l1", "l2")])
    with pytest.raises(ValueError, match="noise of l2"):
        plan_ranks(noise | {"l2": {16: 1.0}}, sizes, 10**9)
    with pytest.raises(ValueError, match="finite"):
        plan_ranks(noise | {"l2": dict.fromkeys(RANKS, float("nan"))}, sizes, 10**9)
    assert plan_ranks({}, {}, 0) == {}
