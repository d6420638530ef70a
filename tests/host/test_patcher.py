"""LoRA, memory and merging through the host's own nodes and manager, against the dense twin under the host's own patcher."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_extras import nodes_model_advanced
from safetensors.torch import save_file
from tonfa.nodes.host.patcher import TonfaPatcher

from .lab import CPU, loaded, made, rel, sample, snr, twin
from .loras import (
    CLOSE,
    HIDDEN,
    Random,
    applied,
    counted_loads,
    misfit,
    mixed,
    one_step,
    one_step_of,
    packed_of,
    packed_only,
    unload,
    with_lora,
)

BIAS_ROUNDING = 5e-4  # biases keep the file's bf16; the host rounds a patched one differently in a loaded and in an offloaded layer


@pytest.fixture(scope="module")
def pair():
    """Our model and its dense twin, and the latents without any patch."""
    ours, theirs = loaded(made()), twin(made())
    return ours, theirs, sample(ours)


@pytest.fixture(scope="module")
def loras(base) -> dict[str, str]:
    """LoRA files in the host's folder: name -> file name."""
    kinds = {
        "mixed": mixed,
        "packed": packed_only,
        "other": lambda: packed_only(seed=11),
        "wide": lambda: packed_only(rank=100),
    }
    for name, make in kinds.items():
        save_file(make(), Path(base, "models", "loras", f"{name}.safetensors"))
    return {name: f"{name}.safetensors" for name in kinds}


# -- LoRA ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["packed", "mixed", "wide"])
def test_lora_equals_the_hosts_merge(pair, loras, kind):
    ours, theirs, plain = pair
    got = sample(with_lora(ours, loras[kind]))
    assert snr(got, sample(with_lora(theirs, loras[kind]))) > CLOSE
    assert rel(got, plain) > 1e-2
    assert torch.equal(sample(ours), plain), "the LoRA stayed in the model"


@pytest.mark.parametrize("compute", ["exact", "fast"])
def test_lora_in_the_quantised_modes(pair, loras, compute):
    """The branch runs in 16 bit or more, so the distance to the dense model stays that of the mode itself."""
    ours, theirs, _ = pair
    model = ours.clone()
    model.model_options["transformer_options"]["tonfa"] = {"compute": compute}
    without = snr(sample(model), sample(theirs))
    assert snr(sample(with_lora(model, loras["mixed"])), sample(with_lora(theirs, loras["mixed"]))) > without - 6


def test_stacked_loras_add_up(pair, loras):
    ours, theirs, _ = pair
    stacked = sample(with_lora(with_lora(ours, loras["mixed"], 0.3), loras["other"], -0.4))
    assert snr(stacked, sample(with_lora(with_lora(theirs, loras["mixed"], 0.3), loras["other"], -0.4))) > CLOSE
    once = sample(with_lora(ours, loras["packed"], 0.7))
    assert snr(sample(with_lora(with_lora(ours, loras["packed"], 0.3), loras["packed"], 0.4)), once) > CLOSE


def test_order_beside_model_sampling_flux_is_all_the_same(pair, loras):
    def shifted(model):
        return nodes_model_advanced.ModelSamplingFlux().patch(model, 1.6, 0.3, 1024, 768)[0]

    ours, theirs, plain = pair
    first, second = sample(with_lora(shifted(ours), loras["mixed"])), sample(shifted(with_lora(ours, loras["mixed"])))
    assert torch.equal(first, second) and snr(first, sample(shifted(with_lora(theirs, loras["mixed"])))) > CLOSE
    assert rel(first, sample(with_lora(ours, loras["mixed"]))) > 1e-3 and torch.equal(sample(ours), plain)


def test_row_and_column_offsets(pair):
    ours, theirs, plain = pair
    r, key = Random(4), "diffusion_model.single_blocks.0.linear2.weight"
    adapter = comfy.weight_adapter.LoRAAdapter
    patches = {
        (key, (1, HIDDEN, 4 * HIDDEN)): adapter(set(), (r(HIDDEN, 4), r(4, 4 * HIDDEN), 2.0, None, None, None)),
        (key, (0, 32, 64)): adapter(set(), (r(64, 3), r(3, 5 * HIDDEN), None, None, None, None)),
    }
    found = []
    for model in (ours.clone(), theirs.clone()):
        assert len(model.add_patches(patches, 0.8)) == 2
        found.append(sample(model))
    assert snr(*found) > CLOSE
    assert rel(found[0], plain) > 1e-3


def test_another_strength_or_lora_on_packed_layers_reloads_nothing(pair, loras):
    ours, theirs, plain = pair
    wanted = {s: sample(with_lora(theirs, loras["packed"], s)) for s in (0.7, -0.5)}
    other = sample(with_lora(theirs, loras["other"], 1.0))
    sample(ours)
    places = [m.weight.data_ptr() for m in packed_of(ours)]
    alone = ours.loaded_size()
    with counted_loads() as loads:
        for strength, latent in wanted.items():
            model = with_lora(ours, loras["packed"], strength)
            assert snr(sample(model), latent) > CLOSE
            assert model.loaded_size() == alone + sum(t.nbytes for m in packed_of(ours) for t in m.side_tensors()) > alone
            assert model.loaded_size() == model.model_size()
        assert snr(sample(with_lora(ours, loras["other"], 1.0)), other) > CLOSE
        assert torch.equal(sample(ours), plain)
        assert loads == []
    assert places == [m.weight.data_ptr() for m in packed_of(ours)]
    assert ours.loaded_size() == alone


def test_clones_with_different_loras_do_not_mix(pair, loras):
    ours, theirs, plain = pair
    a, b = with_lora(ours, loras["mixed"]), with_lora(ours, loras["other"])
    assert type(a) is TonfaPatcher and a.is_clone(b) and not a.clone_has_same_weights(b)
    assert a.clone().clone_has_same_weights(a)
    wanted_a, wanted_b = sample(with_lora(theirs, loras["mixed"])), sample(with_lora(theirs, loras["other"]))
    for _ in range(2):
        assert snr(sample(a), wanted_a) > CLOSE
        assert snr(sample(b), wanted_b) > CLOSE
        assert torch.equal(sample(ours), plain)


def test_clone_keeps_class_size_and_recipe(pair, loras):
    model = with_lora(pair[0], loras["packed"])
    for copy in (model.clone(), model.clone().clone()):
        assert type(copy) is TonfaPatcher
        assert copy.model_size() == model.model_size() > pair[0].model_size()
        factory, arguments = copy.cached_patcher_init[:2]
    fresh = factory(*arguments, disable_dynamic=True)
    assert type(fresh) is TonfaPatcher and fresh.model is not model.model
    if "disable_dynamic" in str(comfy.model_patcher.ModelPatcher.clone.__code__.co_varnames):
        assert type(model.clone(disable_dynamic=True)) is TonfaPatcher


def test_a_lora_that_does_not_fit_is_named_once_and_the_rest_applies(pair, caplog):
    """Once per change: not when the model is loaded again, nor when the loader runs again."""
    ours, theirs, plain = pair
    tensors = misfit()

    def said() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == "tonfa.nodes.host.patcher"]

    with caplog.at_level(logging.WARNING, logger="tonfa"):
        model = applied(ours, tensors)
        got = sample(model)
        assert len(said()) == 1 and "diffusion_model.single_blocks.0.linear2.weight is 128 x 640, the LoRA 128 x 768" in said()[0]
        sample(applied(ours, tensors))
        unload()
        sample(model)
        assert len(said()) == 1
        sample(applied(ours, tensors, 0.5))
        assert len(said()) == 2
    assert rel(got, plain) > 1e-3
    assert snr(got, sample(applied(theirs, tensors))) > CLOSE


def test_of_many_that_do_not_fit_a_few_are_named(pair, caplog):
    tensors = {}
    for key, leaf in pair[0].packed.items():
        name, n = key.removesuffix(".weight"), leaf.out_features
        tensors |= {f"{name}.lora_up.weight": torch.ones(n, 1), f"{name}.lora_down.weight": torch.ones(1, 7)}
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sample(applied(pair[0], tensors)), pair[2])
    (said,) = (record.getMessage() for record in caplog.records if record.name == "tonfa.nodes.host.patcher")
    assert said.startswith(f"{len(tensors) // 2} patch(es)") and said.endswith(f"; and {len(tensors) // 2 - 6} more")


# -- memory ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, "packed", "mixed"])
def test_partial_load_unload_and_reload_give_the_same(pair, loras, lora):
    model = pair[0] if lora is None else with_lora(pair[0], loras[lora])
    packed, close = packed_of(model), BIAS_ROUNDING if lora == "mixed" else 1e-6
    with torch.inference_mode():
        model.patch_model(CPU)
        assert model.loaded_size() == model.model_size()
        wanted = one_step(model)
        freed = model.partially_unload(CPU, model.model_size() // 2)
        assert model.model_size() // 2 <= freed == model.model_size() - model.loaded_size() < model.model_size()
        assert 0 < sum(m.comfy_cast_weights for m in packed) < len(packed)
        assert rel(one_step(model), wanted) < close
        model.unpatch_model(CPU)
        assert model.loaded_size() == 0 and not any(m.comfy_cast_weights or m.side_tensors() or m.weight_function for m in packed)
        model.patch_model(CPU, lowvram_model_memory=model.model_size() // 2)
        assert model.model.model_lowvram and 0 < model.loaded_size() <= model.model_size() // 2
        assert 0 < sum(m.comfy_cast_weights for m in packed) < len(packed)
        assert rel(one_step(model), wanted) < close
        model.unpatch_model(CPU)


def test_lora_exchanged_in_a_partially_loaded_model(pair, loras):
    ours, theirs, _ = pair
    wanted = one_step_of(with_lora(theirs, loras["other"]))
    with torch.inference_mode():
        first = with_lora(ours, loras["packed"])
        first.patch_model(CPU, lowvram_model_memory=first.model_size() // 2)
        first.detach(unpatch_all=False)
        second = with_lora(ours, loras["other"])
        second.partially_load(CPU, 1)
        assert 0 < sum(m.comfy_cast_weights for m in packed_of(ours)) < len(packed_of(ours))
        assert snr(one_step(second), wanted) > CLOSE
        second.unpatch_model(CPU)


def test_unload_and_reload_by_the_manager(pair, loras):
    ours, _, plain = pair
    model = with_lora(ours, loras["mixed"])
    before = sample(model)
    assert ours.loaded_size() > 0
    unload()
    assert ours.loaded_size() == 0 and not any(m.side_tensors() for m in packed_of(ours))
    assert torch.equal(sample(model), before)
    unload()
    assert torch.equal(sample(ours), plain)


@pytest.mark.parametrize("lora", [None, "mixed"])
def test_little_free_memory_loads_partially_and_gives_the_same_latent(pair, loras, monkeypatch, lora):
    """The manager is told that the CPU is a device with little memory left."""
    ours, _, plain = pair
    model = ours if lora is None else with_lora(ours, loras[lora])
    wanted = sample(model)
    unload()
    manager = comfy.model_management
    spare = manager.minimum_inference_memory() * 2  # what a small step asks for is below
    monkeypatch.setattr(manager, "vram_state", manager.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(manager, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(manager, "MIN_WEIGHT_MEMORY_RATIO", 0.0)
    monkeypatch.setattr(manager, "get_free_memory", lambda device=None, torch_free_too=False: (spare, spare) if torch_free_too else spare)
    floor = 128 * 1024 * 1024  # older hosts give every model at least this, which is more than the small model needs
    limit = model.model_size() // 2
    monkeypatch.setattr(manager, "max", lambda *values: limit if floor in values or len(values) == 3 else max(values), raising=False)
    got = sample(model)
    assert model.model.model_lowvram and 0 < model.loaded_size() < model.model_size()
    monkeypatch.undo()
    unload()
    assert rel(got, wanted) < (1e-6 if lora is None else BIAS_ROUNDING)
    assert torch.equal(sample(ours), plain)


# -- cancelling ------------------------------------------------------------------------------------------------------------------


def test_cancel_inside_a_block_leaves_the_model_usable(pair, loras):
    ours, _, plain = pair
    model = with_lora(ours, loras["packed"])
    before = sample(model)
    cancelling = model.clone()

    def cancel(args, extra):
        comfy.model_management.interrupt_current_processing()
        return extra["original_block"](args)

    cancelling.set_model_patch_replace(cancel, "dit", "double_block", 1)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(cancelling)
    assert torch.equal(sample(model), before)
    assert torch.equal(sample(ours), plain)
