"""Eight steps of the host's sampler on the golden checkpoints against their dense twins."""

from statistics import median

import pytest

from .lab import DATA, loaded, sample, snr, twin

FILES = ("mini_flux_int4", "mini_flux_int4_hd128", "mini_flux_nvfp4")
LEAST = {
    ("int4", "weight_only"): 50,
    ("int4", "fast"): 33,
    ("int4", "exact"): 17,
    ("nvfp4", "weight_only"): 50,
    ("nvfp4", "fast"): 33,
    ("nvfp4", "exact"): 32,
}
SEEDS = range(1, 6)


@pytest.fixture(scope="module")
def wanted():
    """Latents of the dense twins, per file and seed."""
    found = {}
    for name in FILES:
        model = twin(DATA / f"{name}.safetensors")
        found[name] = [sample(model, seed=seed, steps=8) for seed in SEEDS]
    return found


@pytest.mark.parametrize("compute", ["weight_only", "fast", "exact"])
@pytest.mark.parametrize("name", FILES)
def test_median_snr_of_five_seeds(name, compute, wanted, record_property):
    model = loaded(DATA / f"{name}.safetensors", compute)
    found = [snr(sample(model, seed=seed, steps=8), latent) for seed, latent in zip(SEEDS, wanted[name], strict=True)]
    record_property("snr", median(found))
    print(f"SNR {name} {compute}: median {median(found):.1f} dB, least {min(found):.1f}")
    assert median(found) >= LEAST["nvfp4" if "nvfp4" in name else "int4", compute]
