"""Qwen-Image and Z-Image through the real loader: the latents of the host's own class on the dequantised weights."""

from __future__ import annotations

import statistics

import pytest

from .families import FAMILIES, loaded, made, sample, twin
from .lab import rel, snr

SEEDS = range(1, 6)


@pytest.mark.parametrize(
    ("compute", "precision", "least"), [("weight_only", "int4", 50), ("weight_only", "nvfp4", 50), ("fast", "int4", 30)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_those_of_the_dense_twin(family, compute, precision, least):
    path = made(family, precision)
    ours, dense = loaded(path, compute), twin(path)
    found = [snr(sample(ours, family, seed=seed), sample(dense, family, seed=seed)) for seed in SEEDS]
    assert statistics.median(found) > least, found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_two_equals_two_of_one(family):
    ours = loaded(made(family))
    both = sample(ours, family, batch=2)
    first = sample(ours, family)
    assert rel(both[:1], first) < 1e-5
    assert rel(both[1:], first) > 0.1  # another noise
