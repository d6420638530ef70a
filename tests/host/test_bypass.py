"""LoRA in bypass mode (newer hosts): the host wraps the forward of single modules instead of patching their weights."""

from __future__ import annotations

import comfy.sd
import pytest
import torch
from tonfa.models.linear import PackedLinear

from .lab import loaded, made, rel, sample, snr, twin
from .loras import CLOSE, HIDDEN, Random, applied, counted, mixed, packed_of, packed_only, sizes, unload

pytestmark = pytest.mark.skipif(
    not hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="this ComfyUI has no bypass LoRA (0.29.0 has it: set COMFYUI_PATH to one)"
)


@pytest.fixture(scope="module")
def pair():
    ours, theirs = loaded(made()), twin(made())
    return ours, theirs, sample(ours)


def bypassed(model, tensors: dict[str, torch.Tensor], strength: float = 0.7):
    """The model with a LoRA by what the host's bypass node calls."""
    return comfy.sd.load_bypass_lora_for_models(model, None, dict(tensors), strength, 0.0)[0]


def every_layer(seed: int = 51) -> dict[str, torch.Tensor]:
    """Low-rank patches on every kind of linear, whole ones: the host's bypass leaves slices out, on every model."""
    r, h, sd = Random(seed), HIDDEN, {}
    sizes = {
        "double_blocks.0.img_attn.qkv": (3 * h, h), "double_blocks.0.txt_attn.proj": (h, h), "double_blocks.1.img_mlp.0": (4 * h, h),
        "double_blocks.1.img_mlp.2": (h, 4 * h), "double_blocks.0.img_mod.lin": (6 * h, h), "single_blocks.0.linear1": (7 * h, h),
        "single_blocks.1.linear2": (h, 5 * h), "single_blocks.1.modulation.lin": (3 * h, h), "img_in": (h, 64),
        "final_layer.linear": (64, h),
    }  # fmt: skip
    for name, (n, k) in sizes.items():
        sd[f"diffusion_model.{name}.lora_up.weight"], sd[f"diffusion_model.{name}.lora_down.weight"] = r(n, 4), r(4, k)
    return sd


def others() -> dict[str, torch.Tensor]:
    """Other kinds of adapters, and differences, which bypass merges as ever. (Its OFT fails on the output of any linear.)"""
    r, name = Random(52), "diffusion_model.double_blocks.0"
    sd = {f"{name}.img_attn.proj.lokr_w1": r(4, 4), f"{name}.img_attn.proj.lokr_w2": r(HIDDEN // 4, HIDDEN // 4)}
    sd |= {f"{name}.txt_mlp.0.hada_{k}": r(*s) for k, s in (("w1_a", (512, 4)), ("w1_b", (4, 128)), ("w2_a", (512, 4)), ("w2_b", (4, 128)))}
    return sd | {f"{name}.img_mlp.2.diff": r(HIDDEN, 512) * 0.2, f"{name}.img_mlp.2.diff_b": r(HIDDEN)}


def looked_into(model):
    """The model with a patch on every block, which takes the way that shows hosts and nodes everything in between."""
    model = model.clone()
    for kind in ("double_block", "single_block"):
        for i in range(2):
            model.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", kind, i)
    model.set_model_attn1_patch(lambda q, k, v, **_: {"q": q, "k": k, "v": v})
    return model


@pytest.mark.parametrize("path", ["fused", "plain"])
@pytest.mark.parametrize("tensors", [every_layer, others])
def test_bypass_lora_equals_the_dense_twins(pair, tensors, path):
    ours, theirs, plain = pair
    model, dense = bypassed(ours, tensors()), bypassed(theirs, tensors())
    if path == "plain":
        model, dense = looked_into(model), looked_into(dense)
    got = sample(model)
    unload()
    assert snr(got, sample(dense)) > CLOSE and rel(got, plain) > 1e-2
    unload()
    assert torch.equal(sample(ours), plain), "the LoRA stayed in the model"


def test_bypass_over_an_ordinary_lora_and_in_turn_with_others(pair):
    ours, theirs, plain = pair
    models = [bypassed(applied(m, mixed(), 0.4), every_layer()) for m in (ours, theirs)]
    second = [bypassed(m, every_layer(53), -0.5) for m in (ours, theirs)]
    wanted = []
    for dense in (models[1], second[1]):
        wanted.append(sample(dense))
        unload()
    for _ in range(2):
        assert snr(sample(models[0]), wanted[0]) > CLOSE
        assert snr(sample(second[0]), wanted[1]) > CLOSE
        assert torch.equal(sample(ours), plain)
        sizes(models[0], second[0], ours)


@pytest.mark.parametrize("compute", ["exact", "fast"])
def test_bypass_in_the_quantised_modes(pair, compute):
    """As far from the dense model as without a LoRA; and afterwards the same bits as before, by the same kernels."""
    ours, theirs, _ = pair
    model = ours.clone()
    model.model_options["transformer_options"]["tonfa"] = {"compute": compute}
    before = sample(model)
    without = snr(before, sample(theirs))
    assert snr(sample(bypassed(model, every_layer())), sample(bypassed(theirs, every_layer()))) > without - 6
    assert torch.equal(sample(model), before)


def test_what_is_ejected_leaves_the_layers_as_they_were(pair):
    """The host puts the bound method back on the instance: that is no wrapper, and must not cost the fused kernels."""
    ours, _, _ = pair
    sample(bypassed(ours, every_layer()))
    with counted(PackedLinear, "_run") as calls:
        sample(ours)
    called = {id(leaf): [] for leaf in packed_of(ours)}
    for leaf, _, *fused in calls:
        called[id(leaf)].append(len(fused))
    wrapped = [leaf for leaf in packed_of(ours) if called[id(leaf)] and max(called[id(leaf)]) <= 1 and not leaf.is_modulation]
    assert not wrapped, "layers are still called one by one"


def test_bypass_in_a_partially_loaded_model(pair, monkeypatch):
    ours, theirs, plain = pair
    wanted = sample(bypassed(theirs, every_layer()))
    model = bypassed(applied(ours, packed_only(), 0.0), every_layer())
    load = model.partially_load
    monkeypatch.setattr(model, "partially_load", lambda device, *a, **k: load(device, model.model_size() // 3))
    assert snr(sample(model), wanted) > CLOSE and model.model.model_lowvram
    monkeypatch.undo()
    unload()
    assert torch.equal(sample(ours), plain)
