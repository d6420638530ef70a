"""The node "Tonfa Quantize FLUX" on small models in the host's own class: what it reads, what it writes, cancel, and a real server."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import comfy.utils
import folder_paths
import pytest
import tonfa.models.quantize_flux as quantize_flux
import torch
from safetensors.torch import save_file
from tonfa import NODE_CLASS_MAPPINGS
from tonfa.models.formats.checkpoint import open_checkpoint
from tonfa.models.formats.flux_names import layer_specs
from tonfa.models.formats.writer import dims_of
from tonfa.nodes.host import quantizing
from tonfa.nodes.host.dense_model import host_key, open_model
from tonfa.nodes.host.flux_shell import TonfaFlux

from . import test_server
from .lab import CONFIG as LARGER
from .lab import CPU, conditioning, host_fields, loaded, made, random_state, rel, sample, snr
from .loras import applied, control, mixed, unload, unpacked_only, with_lora
from .test_server import Server, latent

KEY = "TonfaQuantizeFlux"
CONFIG = {**LARGER, "depth": 1, "depth_single_blocks": 1}
LINEARS = 13  # of its blocks
LOOKED_AT = ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "double_blocks.0.txt_mlp.2", "single_blocks.0.linear2")
LOUD = (3, 40, 77, 101)  # channels of the block linears' inputs that are large, as a few are in FLUX
SMALL = {"steps": 2, "width": 96, "height": 64}
INTERRUPT = comfy.model_management.InterruptProcessingException
QUANTISED_TENSORS = hasattr(comfy.ops, "QuantizedTensor")  # newer hosts'


def dense_state() -> dict[str, torch.Tensor]:
    state = random_state(CONFIG)
    for name, t in state.items():
        if name.endswith("_mod.lin.bias") or name.endswith("modulation.lin.bias"):
            for chunk in t.view(-1, 128)[1::3]:  # the scales of (shift, scale, gate)
                chunk[list(LOUD)] = 25.0
    return state


def dense(dtype: torch.dtype = torch.float32, computes: torch.dtype | None = None, operations=None, state=None):
    """A dense MODEL in the host's own FLUX under its own patcher."""
    config = comfy.supported_models.Flux({"image_model": "flux", **host_fields(CONFIG)})
    config.set_inference_dtype(dtype, computes)
    config.custom_operations = operations
    model = config.get_model({}, device=CPU)
    with torch.inference_mode():
        model.diffusion_model.load_state_dict(config.process_unet_state_dict(state or named_for_host(dense_state(), model)), strict=True)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def named_for_host(state: dict[str, torch.Tensor], model) -> dict[str, torch.Tensor]:
    ours = model.diffusion_model.state_dict()
    return {name if name in ours else name.replace("_norm.scale", "_norm.weight"): t for name, t in state.items()}


def prompts(count: int = 2) -> list:
    return [entry for i in range(count) for entry in conditioning(seed=3 + i)]


def run(model, filename: str, **inputs):
    """The node as the host runs it; (MODEL, lines of text)."""
    node = NODE_CLASS_MAPPINGS[KEY]()
    with torch.inference_mode():
        out = getattr(node, node.FUNCTION)(model=model, filename=filename, **inputs)
    return out["result"][0], out["ui"]["text"]


def exact(model):
    """The MODEL with activations rounded to 4 bits, as on a GPU that is asked for it."""
    model = model.clone()
    model.model_options["transformer_options"]["tonfa"] = {"compute": "exact"}
    return model


@pytest.fixture
def folder(base):
    """The host's diffusion_models folder, empty before and after the test."""
    path = Path(base) / "models" / "diffusion_models"

    def empty() -> None:
        for inner in sorted(path.rglob("*"), reverse=True):
            inner.rmdir() if inner.is_dir() and not inner.is_symlink() else inner.unlink()

    empty()
    yield path
    unload()
    empty()


def listed(folder: Path) -> list[str]:
    """What the host lists of that folder; other tests may have added folders of their own."""
    return sorted(name for name in folder_paths.get_filename_list("diffusion_models") if (folder / name).is_file())


@pytest.fixture
def quick(monkeypatch):
    """Quantising without its searches, for tests that are about other things."""
    real = quantize_flux.Options.recipe

    def recipe(self, rank: int):
        return dataclasses.replace(real(self, rank), migrations=(0.5,), refinements=0, clipping=False)

    monkeypatch.setattr(quantize_flux.Options, "recipe", recipe)


# -- what comes out ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_both_modes_make_a_file_that_samples_like_the_dense_model(precision, folder):
    model, found = dense(), {}
    before = sample(model)
    for mode in ("data-free", "calibrated"):
        made4, text = run(model, mode, precision=precision, rank=16, mode=mode, conditioning=prompts(), **SMALL)
        checkpoint = open_checkpoint(folder / f"{mode}.safetensors")
        assert (checkpoint.precision, checkpoint.rank, checkpoint.model_class, checkpoint.warnings) == (precision, 16, "Flux", [])
        checkpoint.close()
        assert isinstance(made4.model.diffusion_model, TonfaFlux) and str(folder / f"{mode}.safetensors") in text[0]
        found[mode] = snr(sample(exact(made4)), before)
        facts = json.loads((folder / f"{mode}.report.json").read_text())
        assert facts["mode"] == mode and facts["measured"] == ("output" if mode == "calibrated" else "weight")
    assert torch.equal(sample(model), before)
    assert found["calibrated"] > found["data-free"] + 3 and found["calibrated"] > 18, found
    assert listed(folder) == ["calibrated.safetensors", "data-free.safetensors"]


def test_ranks_under_a_size_and_gptq(folder, quick):
    model, dims = dense(), dims_of(CONFIG)
    least, most = (quantize_flux.file_bytes(dims, "int4", dict.fromkeys(layer_specs(dims), rank)) for rank in (16, 128))
    budget = (least + most) / 2e9
    run(model, "small", mode="data-free", size_gb=budget)
    run(model, "gptq", rank=16, gptq=True, conditioning=prompts(), **SMALL)
    assert (folder / "small.safetensors").stat().st_size < budget * 1e9
    ranks = {layer["rank"] for layer in json.loads((folder / "small.report.json").read_text())["layers"]}
    assert len(ranks - {None}) > 1 and not open_checkpoint(folder / "gptq.safetensors").warnings


def test_a_stock_lora_is_inside_the_file(folder, base, quick):
    save_file(mixed(), Path(base) / "models" / "loras" / "inside.safetensors")
    plain = dense()
    model = with_lora(plain, "inside.safetensors", 0.7)
    with_it, without = sample(model), sample(plain)
    made4, _ = run(model, "with-lora", mode="data-free", rank=64)
    got = sample(made4)
    assert snr(got, with_it) > 20 > snr(got, without) + 10
    assert torch.equal(sample(model), with_it) and torch.equal(sample(plain), without)


def test_a_control_lora_makes_a_model_with_its_inputs(folder, quick):
    model = applied(dense(), control(), 1.0)
    made4, _ = run(model, "control", mode="data-free", rank=64)
    assert open_checkpoint(folder / "control.safetensors").config["in_channels"] == 32
    g = torch.Generator().manual_seed(5)
    seen = conditioning(concat_latent_image=torch.randn(1, 16, 8, 12, generator=g))
    assert snr(sample(made4, seen), sample(model, seen)) > 15


def test_calibration_of_a_partly_loaded_model(folder, monkeypatch, quick):
    """Calibration while the host has two thirds of the model offloaded and casts weights at every call."""
    model = dense(torch.bfloat16, torch.float32)
    load = model.partially_load
    run(model, "whole", rank=16, conditioning=prompts(), **SMALL)
    monkeypatch.setattr(model, "partially_load", lambda device, *a, **k: load(device, model.model_size() // 3))
    run(model, "parts", rank=16, conditioning=prompts(), **SMALL)
    assert (folder / "whole.safetensors").read_bytes() == (folder / "parts.safetensors").read_bytes()


# -- what is read ------------------------------------------------------------------------------------------------------------------------


class Stored(torch.Tensor):
    """A tensor of packed bytes as ComfyUI-GGUF has them: its shape is another one's, and `to` and `detach` have a mind of their own."""

    def __new__(cls, data, **_):
        return super().__new__(cls, data)

    def __init__(self, data, tensor_type=8, tensor_shape=None, patches=()):
        self.tensor_type, self.tensor_shape, self.patches = tensor_type, tensor_shape, list(patches)

    @property
    def shape(self):
        return self.tensor_shape

    def to(self, *args, **kwargs):
        new = super().to(*args, **kwargs)
        new.tensor_type, new.tensor_shape, new.patches = self.tensor_type, self.tensor_shape, list(self.patches)
        return new

    def detach(self):
        return self


def stored(weight: torch.Tensor) -> Stored:
    """Bytes of 127ths of each row's largest value, which follows as fp32."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return Stored(torch.cat((codes.view(torch.uint8), scale.contiguous().view(torch.uint8)), 1), tensor_shape=weight.shape)


def unpacked(bytes_: torch.Tensor) -> torch.Tensor:
    plain = bytes_.as_subclass(torch.Tensor)
    return plain[:, :-4].view(torch.int8).float() * plain[:, -4:].contiguous().view(torch.float32)


class StoredOps(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            self.weight = torch.nn.Parameter(state_dict[f"{prefix}weight"], requires_grad=False)
            self.bias = torch.nn.Parameter(state_dict[f"{prefix}bias"], requires_grad=False)

        def get_weight(self, tensor, dtype):
            if not isinstance(tensor, Stored):
                return tensor.to(dtype)
            weight = unpacked(tensor).to(dtype)
            for patches, key in tensor.patches:
                weight = comfy.lora.calculate_weight(patches, weight, key)
            return weight

        def forward_comfy_cast_weights(self, x):
            return torch.nn.functional.linear(x, self.get_weight(self.weight, x.dtype), self.bias.to(x.dtype))


class StoredPatcher(comfy.model_patcher.ModelPatcher):
    def patch_weight_to_device(self, key, device_to=None, *args, **kwargs):
        weight = comfy.utils.get_attr(self.model, key)
        if key in self.patches and isinstance(weight, Stored):
            held = weight.to(device_to, copy=True)
            held.patches = [(self.patches[key], key)]
            comfy.utils.set_attr_param(self.model, key, held)
            return None
        return super().patch_weight_to_device(key, device_to, *args, **kwargs)


def as_bytes() -> tuple:
    """A MODEL as ComfyUI-GGUF makes them, and the numbers that its bytes stand for."""
    probe = dense()
    state = named_for_host(dense_state(), probe.model)
    kept = {name: stored(t) if "blocks." in name and name.endswith(".weight") and t.ndim == 2 else t for name, t in state.items()}
    model = dense(operations=StoredOps, state=kept)
    return model_as(StoredPatcher, model), {name: unpacked(t) if isinstance(t, Stored) else t for name, t in kept.items()}


def model_as(kind: type, model):
    return kind(model.model, load_device=CPU, offload_device=CPU)


def as_fp8() -> tuple:
    model = dense(torch.float8_e4m3fn, torch.float32)
    return model, {name: t.float() for name, t in model.model.diffusion_model.state_dict().items()}


def as_scaled_fp8() -> tuple:
    """What hosts of 2025 make of a scaled fp8 file: bytes and a scale, which `convert_weight` joins."""
    model = dense(torch.float8_e4m3fn, torch.float32)
    truth = {name: t.float() for name, t in model.model.diffusion_model.state_dict().items()}
    for name, module in model.model.diffusion_model.named_modules():
        if "blocks." in name and isinstance(module, torch.nn.Linear):
            factor = 0.5 + (len(name) % 3)
            module.convert_weight = lambda weight, inplace=False, factor=factor: weight.mul_(factor) if inplace else weight * factor
            truth[f"{name}.weight"] = truth[f"{name}.weight"] * factor
    return model, truth


def as_quantised_tensors() -> tuple:
    """What hosts of 2026 make of a scaled fp8 file."""
    state = dense_state()
    for name in [n for n, t in state.items() if "blocks." in n and n.endswith(".weight") and t.ndim == 2]:
        scale = state[name].abs().max() / 448
        state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
        state[f"{name}_scale"] = scale
        described = json.dumps({"format": "float8_e4m3fn"}).encode()
        state[name.replace(".weight", ".comfy_quant")] = torch.tensor(list(described), dtype=torch.uint8)
    operations = comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32, full_precision_mm=True)
    probe = dense()
    state = {n if "_norm.scale" not in n else named_for_host({n: state[n]}, probe.model).popitem()[0]: t for n, t in state.items()}
    truth = {
        n: t.float() * state[f"{n}_scale"] if f"{n}_scale" in state else t for n, t in state.items() if t.ndim and t.dtype != torch.uint8
    }
    return dense(torch.float32, operations=operations, state=state), truth


FORMS = {
    "fp32": lambda: (dense(), {n: t.float() for n, t in dense().model.diffusion_model.state_dict().items()}),
    "bf16": lambda: (dense(torch.bfloat16), {n: t.float() for n, t in dense(torch.bfloat16).model.diffusion_model.state_dict().items()}),
    "fp8": as_fp8,
    "scaled fp8": as_scaled_fp8,
    "ggml": as_bytes,
    "quantised tensors": as_quantised_tensors,
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_read_as_they_were_loaded_and_patched_in_fp32(form):
    """Idle, loaded by the host, loaded with other patches by another clone, and partly loaded: the same numbers every time."""
    if form == "quantised tensors" and not QUANTISED_TENSORS:
        pytest.skip("this host has no quantised tensors")
    plain, truth = FORMS[form]()
    patched, other = applied(plain, mixed() | unpacked_only(), 0.5), applied(plain, unpacked_only(), -0.3)
    wanted = dict(truth)
    for key, patches in patched.patches.items():
        name = key.removeprefix("diffusion_model.")
        if name in truth:
            wanted[name] = comfy.lora.calculate_weight(patches, truth[name].clone(), key)
    prints = {name: open_model(model).fingerprint() for name, model in (("plain", plain), ("patched", patched), ("other", other))}
    assert len(set(prints.values())) == 3
    for state in ("idle", "loaded", "another's", "parts"):
        with torch.inference_mode():
            owner = other if state == "another's" else patched
            if state != "idle":
                owner.patch_model(CPU, lowvram_model_memory=owner.model_size() // 3 if state == "parts" else 0)
            source = open_model(patched)
            assert source.fingerprint() == prints["patched"]
            for name in LOOKED_AT:
                weight, bias = source.linear(name)
                assert weight.dtype == torch.float32 and rel(weight, wanted[f"{name}.weight"]) < 1e-6, (state, name)
                assert torch.equal(bias, wanted[f"{name}.bias"]), (state, name)
            for name in ("img_in.weight", "final_layer.adaLN_modulation.1.weight", "double_blocks.0.img_attn.norm.query_norm.scale"):
                assert rel(source.tensor(name), wanted[host_key(name).removeprefix("diffusion_model.")]) < 1e-6, (state, name)
            if state != "idle":
                owner.unpatch_model(CPU)


@pytest.mark.parametrize("form", ["fp8", "ggml"])
def test_models_of_other_storage_through_the_node(form, folder, quick):
    model, _ = FORMS[form]()
    wanted = sample(model)
    made4, _ = run(model, "stored", rank=32, conditioning=prompts(), **SMALL)
    assert snr(sample(made4), wanted) > 15
    assert torch.equal(sample(model), wanted)


# -- cancelled, and again ----------------------------------------------------------------------------------------------------------------


def cancelled_at(monkeypatch, words: str, done: int) -> None:
    """The user presses cancel when a stage has come so far."""
    show = quantizing.Progress.__call__

    def pressed(self, now: int, total: int) -> None:
        if self.what.startswith(words) and now >= done:
            comfy.model_management.interrupt_current_processing()
        show(self, now, total)

    monkeypatch.setattr(quantizing.Progress, "__call__", pressed)


def hooks(model) -> int:
    return sum(len(m._forward_pre_hooks) for m in model.model.modules())


def test_cancel_leaves_no_file_and_the_next_run_goes_on(folder, monkeypatch, quick):
    model, job = dense(), {"rank": 16, "conditioning": prompts(), **SMALL}
    run(model, "straight", **job)
    wanted = sample(model)
    for words, done in (("Calibrating", 3), ("Quantising", 6)):
        with monkeypatch.context() as m, pytest.raises(INTERRUPT):
            cancelled_at(m, words, done)
            run(model, "out", **job)
        assert [p.name for p in folder.iterdir() if p.name.startswith("out")] == ["out.safetensors.part"]
        assert listed(folder) == ["straight.safetensors"]
        assert hooks(model) == 0 and torch.equal(sample(model), wanted)
    kept = len(list((folder / "out.safetensors.part").glob("0*")))
    assert 3 <= kept < LINEARS
    layers, real = [], quantize_flux.Quantizer.make
    monkeypatch.setattr(quantize_flux.Quantizer, "make", lambda self, host: (layers.append(host), real(self, host))[1])
    monkeypatch.setattr(quantizing, "sampled", lambda *_: pytest.fail("it calibrated again"))
    run(dense(), "out", **job)  # the model loaded anew, as after a restart
    assert len(layers) == LINEARS - kept
    assert (folder / "out.safetensors").read_bytes() == (folder / "straight.safetensors").read_bytes()
    assert not (folder / "out.safetensors.part").exists()


def test_the_same_again_loads_the_file_and_another_job_does_not_write_over_it(folder, monkeypatch, quick):
    model = dense()
    first, _ = run(model, "out", rank=16, conditioning=prompts(), **SMALL)
    latent = sample(first)
    unload()
    with monkeypatch.context() as m:
        m.setattr(quantizing, "quantize_flux", lambda *_: pytest.fail("it quantised again"))
        again, text = run(dense(), "out.safetensors", rank=16, conditioning=prompts(), **SMALL)
        assert torch.equal(sample(again), latent) and "already" in text[1]
        others = (
            (model, {"rank": 32}), (model, {"precision": "nvfp4"}), (model, {"conditioning": prompts(3)}), (model, {"steps": 3}),
            (model, {"calibration_seed": 1}), (applied(model, unpacked_only()), {}), (model, {"mode": "data-free"}),
        )  # fmt: skip
        for other, changes in others:
            with pytest.raises(FileExistsError, match=r"out.safetensors is there already.*Choose another filename"):
                run(other, "out", **{"rank": 16, "conditioning": prompts(), **SMALL, **changes})


# -- refusals ----------------------------------------------------------------------------------------------------------------------------


def test_models_that_cannot_be(folder, quick):
    class Other(torch.nn.Module):
        pass

    network = Other()
    network.diffusion_model = Other()
    other = comfy.model_patcher.ModelPatcher(network, load_device=CPU, offload_device=CPU)
    torn = dense()
    del torn.model.diffusion_model.double_blocks[0].img_mod
    broken = dense()
    with torch.inference_mode():
        broken.model.diffusion_model.single_blocks[0].linear1.weight[3, 4] = torch.nan
    for model, words in (
        (loaded(made()), "4-bit already"), (other, r"This MODEL is Other \(Other\), and only FLUX.1"),
        (torn, r"no double_blocks.0.img_mod"),
        (broken, "single_blocks.0.linear1.weight of this MODEL holds NaN"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            run(model, "out", mode="data-free", rank=16)
    assert not (folder / "out.safetensors").exists()


def test_inputs_that_cannot_be(folder):
    model, narrow = dense(), [[torch.zeros(1, 4, 64), {"pooled_output": torch.zeros(1, 64)}]]
    for changes, words in (
        ({"filename": " "}, "filename is empty"), ({"filename": "a/b"}, "plain file name"),
        ({"conditioning": None}, "nothing is connected"), ({"conditioning": narrow}, "64 channels.*takes 96 and 64.*DualCLIPLoader"),
        ({"conditioning": [[torch.zeros(1, 4, 96), {}]]}, "no pooled"), ({"rank": 24}, "multiple of 16"),
        ({"mode": "naive"}, "mode is 'naive'"), ({"steps": 0}, "steps is 0"), ({"precision": "int8"}, "precision is 'int8'"),
        ({"mode": "data-free", "gptq": True}, "gptq needs calibration"), ({"mode": "data-free", "size_gb": 0.0001}, "too small"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            run(model, **{"filename": "out", "conditioning": prompts(), **changes})
    assert list(folder.iterdir()) == []


def test_a_model_whose_layers_do_not_run_is_named(folder):
    model = dense()
    block = model.model.diffusion_model.double_blocks[0]
    block.forward = lambda img, txt, **_: (img, txt)
    with pytest.raises(ValueError, match=r"8 layers did not run while sampling \(double_blocks.0.img_attn.proj"):
        run(model, "out", rank=16, conditioning=prompts(), **SMALL)


def test_what_is_not_in_weights_is_said(folder, caplog):
    model = dense()
    model.add_weight_wrapper("diffusion_model.img_in.weight", lambda weight: weight)
    with caplog.at_level(logging.WARNING, logger="tonfa"):
        open_model(model)
    assert "they are not in the file" in caplog.text


def test_few_prompts_are_warned_of(caplog):
    config = open_model(dense()).config
    with caplog.at_level(logging.WARNING, logger="tonfa"):
        assert len(quantizing.checked_prompts(prompts(8), config)) == 8
        assert "fewer than 8 prompts" not in caplog.text
        quantizing.checked_prompts(prompts(7), config)
    assert caplog.text.count("fewer than 8 prompts") == 1


# -- a real server -----------------------------------------------------------------------------------------------------------------------

DENSE_NODE = """
import comfy.model_management, comfy.model_patcher, comfy.supported_models, comfy.utils, os

class TestDense:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"path": ("STRING", {})}}

    def make(self, path):
        state, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
        import json
        config = comfy.supported_models.Flux(json.loads(metadata["fields"]))
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, device=torch.device("cpu"))
        model.diffusion_model.load_state_dict(state)
        return (comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu")),)

NODE_CLASS_MAPPINGS["TestDense"] = TestDense
"""


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(test_server, "CONDITIONING_NODE", test_server.CONDITIONING_NODE + DENSE_NODE)
        with Server() as running:
            yield running


def test_the_graph_of_a_user_on_a_server(server, tmp_path):
    """Two prompts through ConditioningCombine, the 4-bit MODEL straight into a sampler; then the file in the loader."""
    fields = {"image_model": "flux", **host_fields(CONFIG)}
    model = dense()
    save_file(named_for_host(dense_state(), model.model), tmp_path / "dense.safetensors", {"fields": json.dumps(fields)})
    posted = test_server.graph("x", "quantised")
    posted["1"] = {"class_type": "TestDense", "inputs": {"path": str(tmp_path / "dense.safetensors")}}
    posted["6"] = {"class_type": "TestConditioning", "inputs": {"seed": 4}}
    posted["7"] = {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["2", 0], "conditioning_2": ["6", 0]}}
    widgets = {"filename": "served", "precision": "int4", "rank": 32, "mode": "calibrated", **SMALL}
    posted["8"] = {"class_type": KEY, "inputs": {"model": ["1", 0], "conditioning": ["7", 0], **widgets}}
    posted["4"]["inputs"]["model"] = ["8", 0]
    entry = server.run(posted)
    got = latent(server, "quantised", entry)
    assert snr(got, sample(model, steps=8)) > 15
    path = server.base / "models" / "diffusion_models" / "served.safetensors"
    assert f"Saved as {path}" in entry["outputs"]["8"]["text"] and path.is_file()
    assert server.run(test_server.graph("served.safetensors", "loaded"))["status"]["status_str"] == "success"
    alone = {key: posted[key] for key in ("1", "2", "6", "7", "8")}  # it ends a graph by itself
    alone["8"] = {**alone["8"], "inputs": {**alone["8"]["inputs"], "rank": 16}}
    status = server.run(alone)["status"]
    assert status["status_str"] == "error" and "Choose another filename" in str(status["messages"])


def test_the_server_knows_the_node(server):
    info = server.get(f"/object_info/{KEY}")[KEY]
    assert info["output_node"] and info["output"] == ["MODEL"] and info["display_name"] == "Tonfa Quantize FLUX"
    assert server.get("/i18n")["zh"]["nodeDefs"][KEY]["inputs"]["mode"]["name"]
    assert b"ConditioningCombine" in server.request(f"/extensions/ComfyUI-Tonfa/docs/{KEY}.md")
