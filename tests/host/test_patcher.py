"""LoRA, memory and merging through the host's own nodes and manager, against the dense twin under the host's own patcher."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_extras import nodes_model_merging
from safetensors.torch import load_file, save_file
from tonfa.models.linear import PackedLinear
from tonfa.nodes.host.patcher import TonfaPatcher

import nodes

from .lab import CPU, conditioning, dense_state, loaded, made, rel, sample, snr, twin

HIDDEN, DEPTH = 128, 2
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
        "misfit": misfit,
    }
    for name, make in kinds.items():
        save_file(make(), Path(base, "models", "loras", f"{name}.safetensors"))
    return {name: f"{name}.safetensors" for name in kinds}


class Random:
    def __init__(self, seed: int):
        self.g = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.g) * 0.2


def packed_only(seed: int = 7, rank: int = 4) -> dict[str, torch.Tensor]:
    """Low-rank patches on packed layers only: split q, k, v (row offsets in the host) and, in kohya's form with alpha, single blocks."""
    r, sd = Random(seed), {}
    for i in range(DEPTH):
        for name in ("to_q", "to_k", "to_v", "add_q_proj"):
            sd[f"transformer.transformer_blocks.{i}.attn.{name}.lora_A.weight"] = r(rank, HIDDEN)
            sd[f"transformer.transformer_blocks.{i}.attn.{name}.lora_B.weight"] = r(HIDDEN, rank)
        sd[f"transformer.transformer_blocks.{i}.norm1.linear.lora_A.weight"] = r(rank, HIDDEN)
        sd[f"transformer.transformer_blocks.{i}.norm1.linear.lora_B.weight"] = r(6 * HIDDEN, rank)
        for name, n, k in (("linear1", 7, 1), ("linear2", 1, 5)):
            sd[f"lora_unet_single_blocks_{i}_{name}.lora_down.weight"] = r(rank, k * HIDDEN)
            sd[f"lora_unet_single_blocks_{i}_{name}.lora_up.weight"] = r(n * HIDDEN, rank)
            sd[f"lora_unet_single_blocks_{i}_{name}.alpha"] = torch.tensor(2.0)
    return sd


def mixed() -> dict[str, torch.Tensor]:
    """That, and what is not low-rank (LoKr, LoHa, DoRA, a full difference), biases, and layers that are not packed."""
    r, sd = Random(8), packed_only()
    sd["lora_unet_double_blocks_0_txt_mlp_0.lokr_w1"] = r(4, 4)
    sd["lora_unet_double_blocks_0_txt_mlp_0.lokr_w2"] = r(HIDDEN, HIDDEN // 4)
    for key, shape in (("hada_w1_a", (HIDDEN, 4)), ("hada_w1_b", (4, HIDDEN)), ("hada_w2_a", (HIDDEN, 4)), ("hada_w2_b", (4, HIDDEN))):
        sd[f"lora_unet_double_blocks_1_img_attn_proj.{key}"] = r(*shape)
    sd["lora_unet_double_blocks_1_img_mlp_0.lora_down.weight"] = r(4, HIDDEN)
    sd["lora_unet_double_blocks_1_img_mlp_0.lora_up.weight"] = r(4 * HIDDEN, 4)
    sd["lora_unet_double_blocks_1_img_mlp_0.dora_scale"] = 1 + r(4 * HIDDEN, 1)
    sd["diffusion_model.double_blocks.0.txt_mlp.2.diff"] = r(HIDDEN, 4 * HIDDEN) * 0.2
    sd["diffusion_model.double_blocks.0.txt_mlp.2.diff_b"] = r(HIDDEN)
    sd["diffusion_model.double_blocks.1.img_attn.proj.diff_b"] = r(HIDDEN)
    sd["diffusion_model.img_in.lora_up.weight"] = r(HIDDEN, 2)
    sd["diffusion_model.img_in.lora_down.weight"] = r(2, 64)
    return sd


def misfit() -> dict[str, torch.Tensor]:
    """A LoRA of a wider model on one layer, a right one on another."""
    r = Random(9)
    sd = {f"lora_unet_single_blocks_0_linear2.lora_{k}.weight": r(*s) for k, s in (("down", (4, 6 * HIDDEN)), ("up", (HIDDEN, 4)))}
    return sd | {f"lora_unet_single_blocks_1_linear2.lora_{k}.weight": r(*s) for k, s in (("down", (4, 5 * HIDDEN)), ("up", (HIDDEN, 4)))}


def with_lora(model, file: str, strength: float = 0.7):
    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, file, strength)[0]


def unload() -> None:
    comfy.model_management.unload_all_models()


def packed_of(patcher) -> list[PackedLinear]:
    return [m for m in patcher.model.modules() if isinstance(m, PackedLinear)]


@contextlib.contextmanager
def counted_loads(monkeypatch):
    """Counts the host's loads of weights inside."""
    calls, load = [], comfy.model_patcher.ModelPatcher.load
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", lambda self, *a, **k: (calls.append(a), load(self, *a, **k))[1])
    yield calls
    monkeypatch.undo()


# -- LoRA ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["packed", "mixed", "wide"])
def test_lora_equals_the_hosts_merge(pair, loras, kind):
    ours, theirs, plain = pair
    got = sample(with_lora(ours, loras[kind]))
    assert snr(got, sample(with_lora(theirs, loras[kind]))) > 50
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
    assert snr(stacked, sample(with_lora(with_lora(theirs, loras["mixed"], 0.3), loras["other"], -0.4))) > 50
    once = sample(with_lora(ours, loras["packed"], 0.7))
    assert snr(sample(with_lora(with_lora(ours, loras["packed"], 0.3), loras["packed"], 0.4)), once) > 50


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
    assert snr(*found) > 50
    assert rel(found[0], plain) > 1e-3


def test_another_strength_or_lora_on_packed_layers_reloads_nothing(pair, loras, monkeypatch):
    ours, theirs, plain = pair
    wanted = {s: sample(with_lora(theirs, loras["packed"], s)) for s in (0.7, -0.5)}
    other = sample(with_lora(theirs, loras["other"], 1.0))
    sample(ours)
    places = [m.weight.data_ptr() for m in packed_of(ours)]
    alone = ours.loaded_size()
    with counted_loads(monkeypatch) as loads:
        for strength, latent in wanted.items():
            model = with_lora(ours, loras["packed"], strength)
            assert snr(sample(model), latent) > 50
            assert model.loaded_size() == alone + sum(m.side_nbytes() for m in packed_of(ours)) > alone
            assert model.loaded_size() == model.model_size()
        assert snr(sample(with_lora(ours, loras["other"], 1.0)), other) > 50
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
        assert snr(sample(a), wanted_a) > 50
        assert snr(sample(b), wanted_b) > 50
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


def test_a_lora_that_does_not_fit_is_named_once_and_the_rest_applies(pair, loras, caplog):
    ours, theirs, plain = pair
    with caplog.at_level(logging.WARNING, logger="tonfa"):
        got = sample(with_lora(ours, loras["misfit"]))
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("tonfa")]
    assert len(lines) == 1 and "diffusion_model.single_blocks.0.linear2.weight is 128 x 640, the LoRA 128 x 768" in lines[0]
    assert rel(got, plain) > 1e-3
    assert snr(got, sample(with_lora(theirs, loras["misfit"]))) > 50


# -- weight hooks ----------------------------------------------------------------------------------------------------------------


def hooked(file: Path, strength: float, **extra: object) -> list:
    group = comfy.hooks.create_hook_lora(lora=load_file(file), strength_model=strength, strength_clip=0.0)
    return comfy.hooks.set_hooks_for_conditioning(conditioning(**extra), group)


def test_hook_lora(pair, loras, base):
    """One LoRA on the positive side only, by Create Hook LoRA, on top of an ordinary one."""
    ours, theirs, plain = pair
    file = Path(base, "models", "loras", loras["mixed"])
    negative = conditioning(tokens=20, seed=9)
    found = []
    for model in (ours, theirs):
        model = with_lora(model, loras["other"], 0.5)
        found.append(sample(model, hooked(file, 0.7), negative, cfg=2.0))
        found.append(sample(model, negative=negative, cfg=2.0))
        unload()
    assert snr(found[0], found[2]) > 50
    assert rel(found[0], found[1]) > 1e-2
    assert snr(found[1], found[3]) > 50
    assert torch.equal(sample(ours), plain)


def test_hooks_applied_and_taken_off_by_hand(pair, loras, base):
    file = Path(base, "models", "loras", loras["packed"])
    group = comfy.hooks.create_hook_lora(lora=load_file(file), strength_model=0.7, strength_clip=0.0)
    model = with_lora(pair[0], loras["other"], 0.5)
    with torch.inference_mode():
        model.patch_model(CPU)
        before, size = one_step(model), model.loaded_size()
        model.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model), {})
        model.patch_hooks(group)
        assert rel(one_step(model), before) > 1e-3 and model.loaded_size() > size
        model.unpatch_hooks()
        assert torch.equal(one_step(model), before) and model.loaded_size() == size
        model.unpatch_model(CPU)


# -- memory ----------------------------------------------------------------------------------------------------------------------


def one_step(patcher, seed: int = 6) -> torch.Tensor:
    """The model on one latent as it is loaded now, without the manager's help."""
    g = torch.Generator().manual_seed(seed)
    x, context, y = (torch.randn(s, generator=g) for s in ((1, 16, 8, 12), (1, 12, 96), (1, 64)))
    patcher.model.current_patcher = patcher
    options = {"tonfa": {"compute": "weight_only"}}
    with torch.inference_mode():
        return patcher.model.apply_model(
            x, torch.tensor([0.5]), c_crossattn=context, y=y, guidance=torch.tensor([3.5]), transformer_options=options
        )


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
        assert model.loaded_size() == 0 and not any(m.comfy_cast_weights or m.side_nbytes() or m.weight_function for m in packed)
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
        assert snr(one_step(second), wanted) > 50
        second.unpatch_model(CPU)


def one_step_of(patcher) -> torch.Tensor:
    with torch.inference_mode():
        patcher.patch_model(CPU)
        out = one_step(patcher)
        patcher.unpatch_model(CPU)
    return out


def test_unload_and_reload_by_the_manager(pair, loras):
    ours, _, plain = pair
    model = with_lora(ours, loras["mixed"])
    before = sample(model)
    assert ours.loaded_size() > 0
    unload()
    assert ours.loaded_size() == 0 and not any(m.side_nbytes() for m in packed_of(ours))
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


# -- merging and saving ----------------------------------------------------------------------------------------------------------


def test_merge_of_two_packed_models(pair):
    ours, theirs, plain = pair
    second, second_twin = loaded(made(seed=1)), twin(made(seed=1))
    merge = nodes_model_merging.ModelMergeSimple().merge
    got = sample(merge(ours, second, 0.6)[0])
    assert snr(got, sample(merge(theirs, second_twin, 0.6)[0])) > 50
    assert rel(got, plain) > 1e-2


def test_merge_with_a_dense_model_both_ways(pair, loras):
    ours, theirs, _ = pair
    dense = twin(made(seed=1))
    merge = nodes_model_merging.ModelMergeSimple().merge
    wanted = sample(merge(theirs, dense, 0.6)[0])
    assert snr(sample(merge(ours, dense, 0.6)[0]), wanted) > 50
    wanted = sample(merge(dense, with_lora(theirs, loras["mixed"]), 0.6)[0])
    assert snr(sample(merge(dense, with_lora(ours, loras["mixed"]), 0.6)[0]), wanted) > 50


@pytest.mark.parametrize("lora", [None, "mixed"])
def test_saved_checkpoint_holds_real_numbers(pair, loras, lora, tmp_path):
    """CheckpointSave's function on our model, LoRA merged in, against the same on the twin."""
    saved = []
    for model, name in zip(pair[:2], ("ours", "theirs"), strict=True):
        model = model if lora is None else with_lora(model, loras[lora])
        with torch.inference_mode():
            comfy.sd.save_checkpoint(str(tmp_path / f"{name}.safetensors"), model)
        saved.append(load_file(tmp_path / f"{name}.safetensors"))
        unload()
    assert saved[0].keys() == saved[1].keys() and len(saved[0]) == len(dense_state(made()))
    for key, wanted in saved[1].items():
        # the host rounds a patched bias to the file's bf16
        assert rel(saved[0][key], wanted) < (4e-3 if key.endswith(".bias") else 1e-4), key
