"""Nodes that read a model's weights: merging, saving, extracting. They get what the dense twin under the host's own patcher gives them."""

from __future__ import annotations

import logging

import comfy.model_patcher
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_extras import nodes_lora_extract, nodes_model_merging
from safetensors.torch import load_file
from tonfa.nodes.host.merging import shift_of, shifts_input

from .lab import CPU, dense_state, loaded, made, rel, sample, snr, twin
from .loras import CLOSE, HIDDEN, Random, applied, counted, misfit, mixed, one_step, packed_only, sizes, unload, unpacked_only

SHIFTED = "diffusion_model.double_blocks.0.img_mlp.2"
NEWER = hasattr(comfy.model_patcher.ModelPatcher, "model_state_dict_for_saving")


@pytest.fixture(scope="module")
def pair():
    ours, theirs = loaded(made()), twin(made())
    return ours, theirs, sample(ours)


@pytest.fixture(scope="module")
def seconds():
    return loaded(made(seed=1)), twin(made(seed=1))


def everything() -> dict[str, torch.Tensor]:
    return mixed() | unpacked_only()


# -- merging -----------------------------------------------------------------------------------------------------------------------------

simple = nodes_model_merging.ModelMergeSimple().merge
MERGES = {
    "simple": lambda a, b: simple(a, b, 0.6)[0],
    "blocks": lambda a, b: nodes_model_merging.ModelMergeBlocks().merge(a, b, double_blocks=0.3, single_blocks=0.8)[0],
    "add": lambda a, b: nodes_model_merging.ModelAdd().merge(a, b)[0],
    "subtract": lambda a, b: nodes_model_merging.ModelSubtract().merge(a, b, 0.4)[0],
    "added difference": lambda a, b: nodes_model_merging.ModelAdd().merge(a, nodes_model_merging.ModelSubtract().merge(b, a, 1.0)[0])[0],
    "lora, then simple": lambda a, b: simple(applied(a, everything()), b, 0.6)[0],
    "simple, then lora": lambda a, b: applied(simple(a, b, 0.6)[0], everything()),
    "loras on both": lambda a, b: simple(applied(a, packed_only()), applied(b, everything()), 0.6)[0],
    "twice": lambda a, b: simple(simple(a, b, 0.6)[0], applied(a, packed_only()), 0.5)[0],
}


@pytest.mark.parametrize("kind", MERGES)
def test_merges_of_packed_models(pair, seconds, kind):
    got = sample(MERGES[kind](pair[0], seconds[0]))
    unload()
    assert snr(got, sample(MERGES[kind](pair[1], seconds[1]))) > CLOSE
    assert rel(got, pair[2]) > 1e-2


def test_merges_with_a_dense_model_both_ways(pair, seconds):
    ours, theirs, _ = pair
    dense = seconds[1]
    for one, other in ((ours, theirs), (applied(ours, everything()), applied(theirs, everything()))):
        wanted = sample(simple(other, dense, 0.6)[0])
        assert snr(sample(simple(one, dense, 0.6)[0]), wanted) > CLOSE
        wanted = sample(simple(dense, other, 0.6)[0])
        assert snr(sample(simple(dense, one, 0.6)[0]), wanted) > CLOSE


def test_what_the_other_model_cannot_apply_is_named_and_the_rest_is_merged(pair, seconds, caplog):
    """A LoRA that does not fit, and a BOFT without alpha that does, on the model that is merged in."""
    boft = {"diffusion_model.double_blocks.0.img_attn.proj.oft_blocks": Random(3)(2, HIDDEN // 8, 8, 8)}
    wanted = applied(seconds[1], misfit() | boft | {"diffusion_model.double_blocks.0.img_attn.proj.alpha": torch.tensor(0.0)})
    wanted = sample(simple(pair[1], wanted, 0.6)[0])
    unload()
    with caplog.at_level(logging.WARNING, logger="tonfa"):
        got = sample(simple(pair[0], applied(seconds[1], misfit() | boft), 0.6)[0])
    said = [r.getMessage() for r in caplog.records if r.name == "tonfa.nodes.host.patcher"]
    assert len(said) == 1 and "single_blocks.0.linear2.weight" in said[0] and "img_attn" not in said[0]
    assert snr(got, wanted) > CLOSE


# -- saving ------------------------------------------------------------------------------------------------------------------------------


def saved(model, path) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        comfy.sd.save_checkpoint(str(path), model)
    return load_file(path)


def check_saved(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys() and len(got) == len(dense_state(made()))
    for key, tensor in wanted.items():
        assert got[key].dtype == tensor.dtype
        # the host rounds a patched bias to the file's bf16
        assert rel(got[key], tensor) < (4e-3 if key.endswith(".bias") else 1e-4), key


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_checkpoint_holds_real_numbers(pair, lora, tmp_path):
    """CheckpointSave's function on our model, LoRA merged in, against the same on the twin."""
    found = []
    for model in pair[:2]:
        found.append(saved(applied(model, everything()) if lora else model, tmp_path / "model.safetensors"))
        unload()
    check_saved(*found)
    assert torch.equal(sample(pair[0]), pair[2])


@pytest.mark.parametrize("share", [2, 100])
def test_saving_a_partially_loaded_model(pair, share, tmp_path):
    """Newer hosts write offloaded layers as they are, and make the rest when its turn has come."""
    wanted = saved(applied(pair[1], everything()), tmp_path / "model.safetensors")
    unload()
    model = applied(pair[0], everything())
    with torch.inference_mode():
        model.patch_model(CPU, lowvram_model_memory=model.model_size() // share)
        with counted(type(model.packed[f"{SHIFTED}.weight"]), "convert_weight") as calls:
            state = model.state_dict_for_saving() if NEWER else model.model.state_dict_for_saving()
            assert not (NEWER and calls), "dense weights are made before they are written"
        state = {key: t if t.is_contiguous() else t.contiguous() for key, t in state.items()}
        comfy.utils.save_torch_file(state, str(tmp_path / "part.safetensors"))
        sizes(model)
        model.unpatch_model(CPU)
    got = load_file(tmp_path / "part.safetensors")
    if not NEWER:  # they save only what is loaded in full: look at the packed layers
        keys = [key for key in got if key.removeprefix("model.") in model.packed]
        got, wanted = ({key: tensors[key] for key in keys} for tensors in (got, wanted))
        assert keys and all(rel(got[key], wanted[key]) < 1e-4 for key in keys)
    else:
        check_saved(got, wanted)


# -- extracting --------------------------------------------------------------------------------------------------------------------------


def test_a_lora_extracted_from_a_merged_model(pair, seconds):
    """Extract and Save LoRA on the difference of two models: a LoRA gives itself back, another model its difference."""
    r, name = Random(17), "diffusion_model.double_blocks.0.img_attn.proj"
    lora = {f"{name}.lora_up.weight": r(HIDDEN, 4), f"{name}.lora_down.weight": r(4, HIDDEN), f"{SHIFTED}.diff_b": r(HIDDEN)}
    subtract, extract = nodes_model_merging.ModelSubtract().merge, nodes_lora_extract.calc_lora_model
    for kind in nodes_lora_extract.LORAType:
        found = []
        for model, second in zip(pair[:2], seconds, strict=True):
            for difference in (subtract(applied(model, lora, 1.0), model, 1.0)[0], subtract(second, model, 1.0)[0]):
                with torch.inference_mode():
                    out = extract(difference, 4, "diffusion_model.", "diffusion_model.", {}, kind, bias_diff=True)
                found.append(out)
                unload()
        ours, other, theirs, wanted = found
        assert ours.keys() >= theirs.keys() and other.keys() == wanted.keys()
        assert rel(ours[f"{SHIFTED}.diff_b"], lora[f"{SHIFTED}.diff_b"]) < 1e-2
        for key in wanted:
            if key.endswith((".diff", ".diff_b")):
                assert rel(other[key], wanted[key]) < (2e-2 if key.endswith("_b") else 2e-3), key  # biases are bf16, LoRAs fp16
        product = lora[f"{name}.lora_up.weight"] @ lora[f"{name}.lora_down.weight"]
        if kind is nodes_lora_extract.LORAType.FULL_DIFF:
            assert rel(ours[f"{name}.diff"], product) < 2e-3
        else:  # the host clips the largest numbers
            extracted = [out[f"{name}.lora_up.weight"].float() @ out[f"{name}.lora_down.weight"].float() for out in (ours, theirs)]
            assert rel(*extracted) < 1e-2


def test_the_model_state_dict_is_read_as_dense_and_listed_for_nothing(pair):
    ours, theirs, _ = pair
    with torch.inference_mode():
        for model in (clones := [applied(model, everything()) for model in (ours, theirs)]):
            model.patch_model(CPU)
        state, wanted = (model.model_state_dict("diffusion_model.") for model in clones)
        with counted(type(ours.packed[f"{SHIFTED}.weight"]), "convert_weight") as calls:
            assert list(state) == list(state.keys()) and state.keys() == wanted.keys() and len(state) == len(wanted)
            assert f"{SHIFTED}.weight" in state and clones[0].model_state_dict().keys() == clones[0].model.state_dict().keys()
        assert not calls
        for read in (
            lambda s, k: s[k],
            lambda s, k: s.get(k),
            lambda s, k: dict(s)[k],
            lambda s, k: dict(s.items())[k],
            lambda s, k: s.copy()[k],
        ):
            for key in (f"{SHIFTED}.weight", f"{SHIFTED}.bias", "diffusion_model.img_in.weight"):
                assert rel(read(state, key), read(wanted, key)) < 4e-3, key
        state["x"] = state[f"{SHIFTED}.weight"] = torch.ones(1)
        assert torch.equal(state["x"], state.pop(f"{SHIFTED}.weight")) and state.get(f"{SHIFTED}.weight") is None
        for model in clones:
            model.unpatch_model(CPU)


def test_the_host_lists_stored_bytes_for_its_own_use(pair):
    """Merging nodes get bytes and the function that makes them real numbers."""
    (weight, convert), *patches = applied(pair[0], packed_only()).get_key_patches()["diffusion_model.single_blocks.0.linear1.weight"]
    assert weight.dtype == torch.uint8 and len(patches) == 1
    assert rel(convert(weight.float()), pair[1].model.diffusion_model.single_blocks[0].linear1.weight) < 1e-5


# -- biases of layers that shift their input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [("set", (torch.full((HIDDEN,), 0.2),)), ("diff", (torch.full((HIDDEN,), 0.2),))])
@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_patches_on_a_shifted_bias_mean_the_plain_one(pair, patch, kept):
    module = pair[0].packed[f"{SHIFTED}.weight"]
    plain = pair[1].model.diffusion_model.double_blocks[0].img_mlp[2].bias
    assert shifts_input(module) and shift_of(module).abs().max() > 1e-3
    assert rel(module.bias.float() + shift_of(module), plain) < 1e-2
    found = []
    for model in (pair[0].clone(), pair[1].clone()):
        model.add_patches({f"{SHIFTED}.bias": patch}, 0.7, kept)
        with torch.inference_mode():
            model.patch_model(CPU)
            found.append(one_step(model))
            model.unpatch_model(CPU)
    assert snr(*found) > CLOSE
