"""The loaders' switches on Qwen-Image and Z-Image: first-block cache, streaming, attention in both of a block's paths, saving."""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from tonfa.models.formats.checkpoint import open_packed
from tonfa.models.linear import Leaf
from tonfa.nodes.host.caching import cache_config, use_first_block_cache
from tonfa.nodes.host.lora_files import teach_stock_nodes
from tonfa.nodes.host.offloading import Offload
from tonfa.nodes.host.shell import Placement, family_of, load_model

from .families import FAMILIES, conditioning, loaded, made, needs_z_image, packed_files, sample, twin
from .lab import CPU, rel, snr


@pytest.fixture(scope="module")
def models() -> dict:
    return {}


@pytest.fixture(params=FAMILIES)
def model(request, models) -> tuple:
    """(family, our patcher, its latent), made once."""
    family = request.param
    if family not in models:
        ours = loaded(made(family, depth=3))
        models[family] = family, ours, sample(ours, family, steps=6)
    return models[family]


def cached(ours, threshold: float, most: int = 0, **part: float):
    copy = ours.clone()
    use_first_block_cache(copy, cache_config(threshold, 0.0, part.get("start", 0.0), part.get("end", 1.0), most, "a test"))
    return copy


# -- first-block cache -----------------------------------------------------------------------------------------------------------------


def test_threshold_0_changes_no_bit(model):
    family, ours, want = model
    assert torch.equal(sample(cached(ours, 0.0), family, steps=6), want)


def test_every_second_step_is_reused(model, caplog):
    family, ours, want = model
    caplog.set_level(logging.INFO)
    got = sample(cached(ours, 1.0, most=1), family, steps=6)
    assert "3 of 6 steps reused" in caplog.text
    assert 1e-4 < rel(got, want) < 0.5
    assert torch.equal(sample(ours, family, steps=6), want)


def test_nothing_is_reused_outside_its_part_of_sampling(model, caplog):
    family, ours, want = model
    caplog.set_level(logging.INFO)
    got = sample(cached(ours, 1.0, start=0.999, end=1.0), family, steps=6)
    assert "0 of 6 steps reused" in caplog.text and torch.equal(got, want)


def test_conditionings_do_not_mix(model):
    """With CFG each conditioning reuses its own: as when they are sampled in calls of their own."""
    family, ours, _ = model
    negative = conditioning(tokens=20, seed=9)
    together = sample(cached(ours, 1.0, most=1), family, negative=negative, cfg=3.0, steps=4)
    plain = sample(ours, family, negative=negative, cfg=3.0, steps=4)
    assert 1e-4 < rel(together, plain) < 0.5


# -- streaming -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pin", [True, False])
@pytest.mark.parametrize("resident", [0, 1, 99])
def test_streaming_gives_the_same_latent(model, resident, pin):
    family, ours, want = model
    copy = ours.clone()
    copy.set_offload(Offload("enable", resident, pin))
    assert torch.equal(sample(copy, family, steps=6), want)
    blocks = copy.model.diffusion_model.blocks()
    streamed = [{leaf.streamer is not None for leaf in block.modules() if isinstance(leaf, Leaf)} for block in blocks]
    assert streamed == [{i >= resident} for i in range(len(blocks))]
    assert torch.equal(sample(ours, family, steps=6), want)


def test_a_partial_load_gives_the_same_latent(model, monkeypatch):
    family, ours, want = model
    comfy.model_management.unload_all_models()
    with monkeypatch.context() as m:
        m.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NORMAL_VRAM)
        ours.partially_load(CPU, ours.model_size() // 2)
        assert torch.equal(sample(ours, family, steps=6), want)
    comfy.model_management.unload_all_models()


# -- files -----------------------------------------------------------------------------------------------------------------------------


def test_the_family_is_told(model):
    family, ours, _ = model
    assert family_of(ours) == family and family_of(ours.clone()) == family and family_of(object()) == ""


@needs_z_image
def test_refiners_that_a_file_leaves_in_16_bit_are_the_hosts_own():
    path = made("z-image", skip_refiners=True)
    ours, dense = loaded(path), twin(path)
    assert snr(sample(ours, "z-image"), sample(dense, "z-image")) > 50
    network = ours.model.diffusion_model
    assert len(network.noise_refiner) == 1 and not any(isinstance(m, Leaf) for m in network.noise_refiner.modules())


@pytest.mark.parametrize("modulation", ["w4a4", "plain"])
def test_modulation_in_other_forms(modulation):
    path = made("qwen-image", modulation=modulation)
    ours, dense = loaded(path), twin(path)
    assert snr(sample(ours, "qwen-image"), sample(dense, "qwen-image")) > 50


@torch.inference_mode()  # as nodes run
def test_what_is_saved_has_the_hosts_keys_and_numbers(model):
    family, ours, _ = model
    want = twin(made(family, depth=3)).model.diffusion_model.state_dict()
    if hasattr(comfy.model_patcher.ModelPatcher, "model_state_dict_for_saving"):
        state = ours.model_state_dict_for_saving()
        found = {k.removeprefix("diffusion_model."): v for k, v in state.items() if k.startswith("diffusion_model.")}
    else:
        state = ours.model.state_dict_for_saving()
        found = {k.removeprefix("model.diffusion_model."): v for k, v in state.items() if k.startswith("model.diffusion_model.")}
    assert set(found) == set(want)
    for name, tensor in want.items():
        value = found[name]
        value = value.to(device=CPU) if not type(value).__name__.startswith("Lazy") else value.to("cpu")
        assert value.shape == tensor.shape and rel(value.float(), tensor) < 5e-3, name


def test_readers_of_weights_see_the_hosts_keys(model):
    family, ours, _ = model
    want = twin(made(family, depth=3)).model.diffusion_model.state_dict()
    state, patches = ours.model_state_dict("diffusion_model."), ours.get_key_patches("diffusion_model.")
    assert {k.removeprefix("diffusion_model.") for k in state} == set(want) == {k.removeprefix("diffusion_model.") for k in patches}
    name = "transformer_blocks.1.attn.to_k.weight" if family == "qwen-image" else "layers.1.feed_forward.w1.weight"
    assert rel(state[f"diffusion_model.{name}"].float(), want[name]) < 5e-3
    (weight, convert), *_ = patches[f"diffusion_model.{name}"]
    assert rel(convert(weight, inplace=True).float(), want[name]) < 5e-3


def test_a_merge_takes_rows_of_stacked_linears(model):
    """ModelMergeSimple and its kin, both ways: our weights, with a LoRA on them, into the host's own model, and its weights into ours."""
    family, ours, _ = model
    name = "transformer_blocks.1.attn.to_k" if family == "qwen-image" else "layers.1.feed_forward.w1"
    dense, g = twin(made(family, depth=3)), torch.Generator().manual_seed(1)
    n, k = dense.model.diffusion_model.get_submodule(name).weight.shape
    up, down = torch.randn(n, 4, generator=g), torch.randn(4, k, generator=g) * k**-0.5
    lora = {f"diffusion_model.{name}.lora_up.weight": up, f"diffusion_model.{name}.lora_down.weight": down}
    teach_stock_nodes()
    source = comfy.sd.load_lora_for_models(ours, None, lora, 0.7, 0)[0]
    key = f"diffusion_model.{name}.weight"
    merged = dense.clone()
    assert list(merged.add_patches({key: source.get_key_patches("diffusion_model.")[key]}, 1.0, 0.0)) == [key]
    both = comfy.sd.load_lora_for_models(twin(made(family, depth=3)), None, lora, 0.7, 0)[0]
    assert rel(sample(merged, family, steps=2), sample(both, family, steps=2)) < 5e-3
    other = twin(made(family, seed=1, depth=3))
    mixed = [m.clone() for m in (ours, twin(made(family, depth=3)))]
    for m in mixed:
        assert key in m.add_patches({key: other.get_key_patches("diffusion_model.")[key]}, 0.5, 0.5)
    got, want = (sample(m, family, steps=2) for m in mixed)
    assert rel(got, want) < 1e-2 and rel(got, sample(ours, family, steps=2)) > 1e-3


def test_no_z_image_in_this_host(tmp_path):
    import comfy.supported_models

    if hasattr(comfy.supported_models, "ZImage"):
        pytest.skip("this ComfyUI has Z-Image")
    tensors, metadata, _ = packed_files.zimage()
    path = packed_files.save(tmp_path / "z.safetensors", tensors, metadata)
    assert open_packed(path).family == "z-image"
    with pytest.raises(ValueError, match="Update ComfyUI"):
        load_model(str(path), Placement(CPU, CPU, torch.float32))
