"""FLUX.1's text encoders through our nodes in the real host: every form of file, memory, LoRA, saving, and what is refused."""

from __future__ import annotations

import ctypes
import functools
import gc
import logging
import os
import re
import threading
from pathlib import Path

import comfy.hooks
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import tonfa
import torch
from comfy_extras import nodes_cond, nodes_flux, nodes_hooks, nodes_model_merging
from safetensors.torch import load_file, save_file
from tonfa.kernels.t5_layout import T5Linear
from tonfa.models.formats.awq import pack_linear
from tonfa.models.formats.t5 import T5Dims
from tonfa.models.formats.tensorfile import CheckpointError
from tonfa.models.t5 import PackedT5Linear
from tonfa.nodes.host import text_encoders
from tonfa.nodes.host.patcher import TonfaPatcher
from torch import Tensor

import nodes

from . import encoders
from .lab import CPU, loaded, made, rel
from .loras import Random, counted, counted_loads, sizes, unload

TEXT = "a red fox, (very:1.3) small"
Q, WO = "encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.1.DenseReluDense.wo"
NEWER = hasattr(comfy.sd.CLIP, "state_dict_for_saving")


@pytest.fixture(scope="module", autouse=True)
def listed(base):
    """The folder of the small files is one of the host's."""
    folder_paths.add_model_folder_path("text_encoders", str(encoders.folder()))
    encoders.clip_l()


@pytest.fixture(scope="module")
def ours():
    return load(encoders.clip_l(), encoders.t5("4bit"))


@pytest.fixture(scope="module")
def twin():
    """The same codes, dense in fp32 in the host's own encoder."""
    return encoders.twin()


@pytest.fixture(scope="module")
def plain(ours):
    return encode(ours)


def node(key: str = "NunchakuTextEncoderLoaderV2"):
    return tonfa.NODE_CLASS_MAPPINGS[key]()


def load(first: Path, second: Path, length: object = 256, loader: object = None, **named: object):
    loader = loader or node()
    kind = loader.INPUT_TYPES()["required"]["model_type"][0][0]
    with torch.inference_mode():
        return loader.load_text_encoder(kind, name_of(first), name_of(second), length, **named)[0]


def name_of(path: Path) -> str:
    return os.path.relpath(path, encoders.folder())


def encode(clip, text: str = TEXT) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


def packed_of(clip) -> list[PackedT5Linear]:
    return [m for m in clip.cond_stage_model.modules() if isinstance(m, PackedT5Linear)]


# -- every form of file -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", encoders.KINDS)
def test_every_form_of_t5_gives_what_its_numbers_give(kind, plain, caplog):
    """Against the host's own T5 in fp32 with the file's numbers: for 4 bit the same codes, dequantised in fp32."""
    with caplog.at_level(logging.WARNING):
        clip = load(encoders.clip_l(), encoders.t5(kind))
    assert not [r.getMessage() for r in caplog.records if "missing" in r.getMessage()]
    wanted = encoders.reference(encoders.numbers(encoders.t5(kind)), encoders.dims_of(kind))(clip.tokenize(TEXT))
    cond, pooled = encode(clip)
    assert rel(cond, wanted) < 1e-4 and torch.equal(pooled, plain[1])
    awq = "bit" in kind or kind == "mixed"
    assert len(packed_of(clip)) == {"4bit, other sizes": 7, "mixed": 12}.get(kind, 14 if awq else 0)
    assert isinstance(clip.patcher, TonfaPatcher) == awq


def test_both_orders_and_the_error_is_that_of_the_codes(ours, plain):
    """The output's distance to the 16-bit encoder is the dequantised codes' own, and a small part of the output."""
    other = load(encoders.t5("4bit"), encoders.clip_l())
    sixteen = encode(load(encoders.t5("fp16"), encoders.clip_l()))
    assert all(torch.equal(a, b) for a, b in zip(encode(other), plain, strict=True))
    assert torch.equal(plain[1], sixteen[1])
    codes = encoders.reference(encoders.numbers(encoders.t5("4bit")))(ours.tokenize(TEXT))
    assert 0 < rel(plain[0], sixteen[0]) < 1.001 * rel(codes, sixteen[0]) < 0.15


def test_a_whole_clip_without_a_text_projection(plain):
    """Its vision half is left out; the projection, which FLUX has no use for, has the shape of this T5's linears."""
    tensors = {name: t for name, t in load_file(encoders.clip_l()).items() if name != "text_projection.weight"}
    tensors = {"vision_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(4096, 1024).half()} | tensors
    clip = load(encoders.saved("whole_clip.safetensors", tensors), encoders.t5("4bit, other sizes"))
    assert torch.equal(encode(clip)[1], plain[1]) and len(packed_of(clip)) == 7


def test_the_deprecated_node_and_its_folder(plain):
    """The folder's T5 takes the place of the one in a slot, in either order; without the switch it is not looked at."""
    for key, switch in (("NunchakuTextEncoderLoader", "enable"), ("SVDQuantTextEncoderLoader", "INT4")):  # INT4: of March 2025
        loader, chosen = node(key), name_of(encoders.in_a_folder().parent) if key == "NunchakuTextEncoderLoader" else "awq-int4-t5"
        assert loader.INPUT_TYPES()["required"]["int4_model"][0] == ["none", "awq-int4-t5"]
        clip = load(encoders.t5("fp16"), encoders.clip_l(), loader=loader, use_4bit_t5=switch, int4_model=chosen)
        assert torch.equal(encode(clip)[0], plain[0])
    clip = load(encoders.t5("bf16"), encoders.clip_l(), loader=loader, use_4bit_t5="disable", int4_model="gone")
    assert not packed_of(clip)
    for none in ("none", ""):
        with pytest.raises(ValueError, match="use_4bit_t5 is 'enable', but int4_model names no folder"):
            load(encoders.t5("fp16"), encoders.clip_l(), loader=loader, use_4bit_t5="enable", int4_model=none)
    for gone in ("gone", ".", "awq-int4-t5/.."):
        with pytest.raises(FileNotFoundError, match=f"'{re.escape(gone)}' .* awq-int4-t5.* int4_model"):
            load(encoders.t5("fp16"), encoders.clip_l(), loader=loader, use_4bit_t5="enable", int4_model=gone)
    encoders.saved("plain-t5/model.safetensors", encoders.weights())
    with pytest.raises(CheckpointError, match="^int4_model: .*ordinary T5"):
        load(encoders.t5("fp16"), encoders.clip_l(), loader=loader, use_4bit_t5="enable", int4_model="plain-t5")


def test_names_of_another_machine(plain, caplog):
    with caplog.at_level(logging.WARNING, logger="tonfa"):
        with torch.inference_mode():
            (clip,) = node().load_text_encoder("flux.1", "flux\\Clip_L.safetensors", "t5/awq-int4-flux.1-t5xxl.pt", "256")
    assert torch.equal(encode(clip)[0], plain[0])
    said = [r.getMessage() for r in caplog.records if r.name == "tonfa.nodes.text_encoder"]
    assert [line.split(":")[0] for line in said] == ["text_encoder1", "text_encoder2"]


# -- the length of the T5's tokens ---------------------------------------------------------------------------------------------------------


def test_lengths_of_one_load(plain):
    """Every output has its own, and clones of it keep it; nothing is read a second time."""
    loader = node()
    with counted(text_encoders, "load_clip") as loads:
        clips = {length: load(encoders.clip_l(), encoders.t5("4bit"), length, loader) for length in (256, 512, 1024)}
        again = load(encoders.clip_l(), encoders.t5("4bit"), 512.0, loader)
    assert len(loads) == 1 and len({id(clip.cond_stage_model) for clip in clips.values()}) == 1
    for length, clip in clips.items():
        for one in (clip, clip.clone(), nodes.CLIPSetLastLayer().set_last_layer(clip, -1)[0]):
            assert len(one.tokenize(TEXT)["t5xxl"][0]) == length and len(one.tokenize(TEXT)["l"][0]) == 77
    assert encode(again)[0].shape[1] == 512 and torch.equal(encode(clips[256])[0], plain[0])
    options = nodes_cond.T5TokenizerOptions.execute(clips[512], min_padding=0, min_length=300).result[0]
    assert len(options.tokenize(TEXT)["t5xxl"][0]) == 300
    with counted(text_encoders, "load_clip") as loads:
        load(encoders.t5("4bit"), encoders.clip_l(), 256, loader)
        os.utime(encoders.t5("4bit"), ns=(1, 1))
        load(encoders.t5("4bit"), encoders.clip_l(), 256, loader)
    assert len(loads) == 2


@pytest.mark.parametrize("nonsense", ["long", None, float("nan"), float("inf")])
def test_a_length_that_is_none(nonsense):
    with pytest.raises(ValueError, match="t5_min_length is .* must be a number of tokens"):
        load(encoders.clip_l(), encoders.t5("4bit"), nonsense)


# -- what is refused -----------------------------------------------------------------------------------------------------------------------


def a_clip(layers: int, width: int) -> dict[str, Tensor]:
    return {f"text_model.encoder.layers.{i}.mlp.fc1.weight": torch.zeros(1, width) for i in range(layers)}


def torch_saved(name: str, content: object) -> Path:
    torch.save(content, encoders.folder() / name)
    return encoders.folder() / name


def a_module() -> Path:
    return torch_saved("module.pt", torch.nn.Linear(4, 4))


def an_nf4_t5() -> dict[str, Tensor]:
    weights = encoders.weights()
    packed = torch.zeros(weights[f"{Q}.weight"].numel() // 2, 1, dtype=torch.uint8)
    marks = {f"{Q}.weight.absmax": torch.zeros(16), f"{Q}.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}
    return weights | {f"{Q}.weight": packed} | marks


def a_umt5() -> dict[str, Tensor]:
    return encoders.weights() | {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": torch.zeros(32, 4)}


def an_old_t5() -> dict[str, Tensor]:
    return {name.replace("wi_0", "wi"): t for name, t in encoders.weights().items() if "wi_1" not in name}


def without(kind: str, name: str) -> dict[str, Tensor]:
    return {key: t for key, t in load_file(encoders.t5(kind)).items() if key != name}


def cut(path: Path) -> Path:
    short = path.with_name(f"cut_{path.name}")
    short.write_bytes(path.read_bytes()[:-3000])
    return short


def bytes_of(name: str, content: bytes) -> Path:
    path = encoders.folder() / name
    path.write_bytes(content)
    return path


GGUF = ["is a GGUF file", "DualCLIPLoader (GGUF)", "ComfyUI-GGUF"]
AGAIN = "Download it again"
REFUSED = {
    "missing": (lambda: Path("gone.safetensors"), ["'gone.safetensors' is not in ComfyUI's text_encoders folders"]),
    "missing gguf": (lambda: Path("t5.gguf"), ["'t5.gguf'", "DualCLIPLoader (GGUF)"]),
    "gguf": (lambda: bytes_of("t5.bin", b"GGUF" + b"\x03\0\0\0" * 20), GGUF),
    "gguf called safetensors": (lambda: bytes_of("t5_q.safetensors", b"GGUF" + b"\x03\0\0\0" * 20), GGUF),
    "no pickle": (lambda: bytes_of("t5.pt", b"nothing that torch wrote" * 9), ["t5.pt cannot be read", AGAIN]),
    "pickled module": (a_module, ["module.pt cannot be read", "something else than tensors", AGAIN]),
    "pickled list": (lambda: torch_saved("list.bin", [torch.zeros(4)]), ["list.bin cannot be read", "something else than tensors", AGAIN]),
    "safetensors called bin": (
        lambda: bytes_of("renamed.bin", encoders.t5("fp16").read_bytes()),
        ["is a safetensors file under another name", "end in .safetensors"],
    ),
    "4-bit pickle": (lambda: torch_saved("awq.bin", load_file(encoders.t5("4bit"))), ["is a 4-bit T5, which is read from a .safetensors"]),
    "one shard of a T5": (
        lambda: encoders.saved("model-00001-of-00002.safetensors", {k: t for k, t in encoders.weights().items() if "final" not in k}),
        ["is missing", "It is one of several files"],
    ),
    "bitsandbytes": (lambda: encoders.saved("nf4.safetensors", an_nf4_t5()), ["is quantised in a form that this ComfyUI cannot read"]),
    "numbers without a scale": (
        lambda: encoders.saved("int8.safetensors", encoders.weights() | {f"{Q}.weight": torch.ones(256, 256, dtype=torch.int8)}),
        [f"{Q}.weight is I8"],
    ),
    "CLIP-L without a layer": (
        lambda: encoders.saved("hole_l.safetensors", {k: t for k, t in load_file(encoders.clip_l()).items() if "layers.5.mlp" not in k}),
        ["is no whole CLIP-L: text_model.encoder.layers.5.mlp.fc1.weight is missing", AGAIN],
    ),
    "cut pickle": (lambda: cut(encoders.t5("pickle")), ["cannot be read", AGAIN]),
    "CLIP-G": (lambda: encoders.saved("g.safetensors", a_clip(32, 1280)), ["is a CLIP-G text encoder", "takes CLIP-L"]),
    "CLIP-H": (lambda: encoders.saved("h.safetensors", a_clip(24, 1024)), ["is a CLIP-H text encoder", "takes CLIP-L"]),
    "UMT5": (lambda: encoders.saved("umt5.safetensors", a_umt5()), ["is a UMT5 text encoder", "takes CLIP-L"]),
    "old T5": (lambda: encoders.saved("old.safetensors", an_old_t5()), ["is a T5 of the first version", "takes CLIP-L"]),
    "VAE": (lambda: encoders.saved("vae.safetensors", {"decoder.conv_in.weight": torch.zeros(4)}), ["is a VAE", "takes CLIP-L"]),
    "FLUX": (
        lambda: encoders.saved("flux.safetensors", {"transformer_blocks.0.qkv_proj.qweight": torch.zeros(4)}),
        ["is a FLUX.1 SVDQuant file", "takes CLIP-L"],
    ),
    "cut CLIP-L": (lambda: cut(encoders.clip_l()), ["is cut off", AGAIN]),
    "cut T5": (lambda: cut(encoders.t5("fp16")), ["is cut off", AGAIN]),
    "cut 4-bit T5": (lambda: cut(encoders.t5("4bit")), ["is cut off", AGAIN]),
    "T5 without a linear": (lambda: encoders.saved("hole.safetensors", without("fp16", f"{WO}.weight")), [f"{WO} is missing", AGAIN]),
    "4-bit T5 without scales": (lambda: encoders.saved("hole4.safetensors", without("4bit", f"{WO}.scales")), [f"{WO}.scales is missing"]),
    "4-bit T5 without a norm": (
        lambda: encoders.saved("norm4.safetensors", without("4bit", "encoder.final_layer_norm.weight")),
        ["final_layer_norm.weight is missing", AGAIN],
    ),
}  # fmt: skip


@functools.cache
def wrong_file(name: str) -> Path:
    return REFUSED[name][0]()


@pytest.mark.parametrize("second", [False, True], ids=["first slot", "second slot"])
@pytest.mark.parametrize("name", REFUSED)
def test_errors_name_the_slot_and_what_was_found(name, second):
    words = REFUSED[name][1]
    wrong, right = wrong_file(name), encoders.t5("4bit") if "CLIP" in name else encoders.clip_l()
    if wrong.is_absolute():
        wrong = Path(name_of(wrong))
    names = (str(name_of(right)), str(wrong)) if second else (str(wrong), str(name_of(right)))
    with pytest.raises((CheckpointError, FileNotFoundError)) as raised:
        node().load_text_encoder("flux.1", *names, 512)
    said = str(raised.value)
    assert said.startswith(f"text_encoder{1 + second}: ") and wrong.name in said and all(word in said for word in words), said
    assert "\n" not in said


def test_quantisation_that_an_older_host_cannot_read(monkeypatch):
    """Such a host would take the stored numbers for the weights."""
    monkeypatch.delattr(comfy.utils, "convert_old_quants", raising=False)
    scaled = encoders.t5_files.scaled_fp8(encoders.weights(), "weight_scale")
    for change in ({f"{Q}.weight": encoders.weights()[f"{Q}.weight"]}, {f"{Q}.weight_scale": torch.ones(256)}):
        path = encoders.saved("newer.safetensors", scaled | change)
        with pytest.raises(CheckpointError, match="^text_encoder1: newer.safetensors is quantised in a form .* Update ComfyUI"):
            load(path, encoders.clip_l())


@pytest.mark.parametrize(("kind", "what"), [(encoders.clip_l, "a CLIP-L text encoder"), (lambda: encoders.t5("4bit"), "a 4-bit T5")])
def test_two_of_a_kind(kind, what):
    with pytest.raises(CheckpointError, match=rf"^text_encoder2: .* is {what}.*, and so is {kind().name}. FLUX.1 takes CLIP-L"):
        load(kind(), kind())


@pytest.mark.parametrize("key", ["NunchakuTextEncoderLoaderV2", "NunchakuTextEncoderLoader"])
def test_another_family_is_refused(key):
    for family in ("sd3", "flux.2"):
        with pytest.raises(ValueError, match=f"model_type is '{family}'; this node loads the text encoders of FLUX.1"):
            node(key).load_text_encoder(family, "clip_l.safetensors", "t5.safetensors", 512)


def test_a_t5_of_another_size_is_named(caplog):
    """It loads; the log says once which slot has it."""
    load(encoders.clip_l(), encoders.t5("4bit"))
    load(encoders.t5("fp16"), encoders.clip_l())
    said = [record.getMessage() for record in caplog.records if "FLUX.1 takes T5-XXL" in record.getMessage()]
    assert len(said) == 2 and said[0].startswith("text_encoder2: ") and said[1].startswith("text_encoder1: ")
    assert all("is a T5 of 256 channels and 32128 tokens" in text for text in said)


def test_after_an_error_the_next_load_works(plain):
    """Also after one that comes in the middle of building: scales that are no numbers."""
    tensors = load_file(encoders.t5("4bit"))
    tensors[f"{WO}.scales"][0, 0] = float("nan")
    broken, loader = encoders.saved("nan.safetensors", tensors), node()
    for bad in (broken, encoders.clip_l(), broken):
        load(encoders.clip_l(), encoders.t5("4bit"), loader=loader)
        with pytest.raises(CheckpointError, match="^text_encoder2: "):
            load(encoders.clip_l(), bad, loader=loader)
    assert torch.equal(encode(load(encoders.clip_l(), encoders.t5("4bit"), loader=loader))[0], plain[0])


# -- stock nodes ---------------------------------------------------------------------------------------------------------------------------


def embedding(base: str, name: str) -> None:
    """A textual inversion for both encoders in the host's folder."""
    r, path = Random(3), Path(base, "models", "embeddings", f"{name}.safetensors")
    path.parent.mkdir(exist_ok=True)
    save_file({"clip_l": r(2, 768), "t5xxl": r(3, encoders.DIMS.model) * 5}, path)


def test_stock_nodes_on_our_clip(ours, twin, base):
    """CLIPTextEncode, CLIPTextEncodeFlux and ConditioningCombine, with prompt weights and an embedding, as on the dense twin."""
    embedding(base, "style")
    twin.tokenizer.t5xxl.embedding_directory = twin.tokenizer.clip_l.embedding_directory = folder_paths.get_folder_paths("embeddings")
    found = []
    for clip in (ours, twin):
        with torch.inference_mode():
            one, two, weighted = (
                nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a fox", "a fox embedding:style", "a (fox:1.6)")
            )
            flux = nodes_flux.CLIPTextEncodeFlux.execute(clip, "a fox", "a small fox", 2.5).result[0]
        found.append(nodes.ConditioningCombine().combine(one, two)[0] + weighted + flux)
    for (got, extra), (wanted, wanted_extra) in zip(*found, strict=True):
        assert rel(got, wanted) < 1e-4 and rel(extra["pooled_output"], wanted_extra["pooled_output"]) < 1e-4
        assert extra.get("guidance") == wanted_extra.get("guidance")
    assert found[0][3][1]["guidance"] == 2.5
    conds = [entry[0] for entry in found[0]]
    assert all(rel(a, conds[0]) > 1e-3 for a in conds[1:])


def test_beside_the_hosts_own_loader(ours, plain, monkeypatch):
    """DualCLIPLoader in the same process (told the small T5's sizes), taking turns."""
    real, sizes_of = comfy.sd.load_clip, text_encoders.config_for(encoders.DIMS)
    monkeypatch.setattr(comfy.sd, "load_clip", lambda *a, model_options, **k: real(*a, model_options=model_options | sizes_of, **k))
    with torch.inference_mode():
        (stock,) = nodes.DualCLIPLoader().load_clip("clip_l.safetensors", encoders.t5("fp16").name, "flux")
    wanted = encoders.reference(encoders.numbers(encoders.t5("fp16")))(stock.tokenize(TEXT))
    for _ in range(2):
        assert rel(encode(stock)[0], wanted) < 1e-4
        assert torch.equal(encode(ours)[0], plain[0])
    assert not packed_of(stock) and type(stock) is comfy.sd.CLIP


# -- LoRA ----------------------------------------------------------------------------------------------------------------------------------


def lora(seed: int = 1, t5: bool = True, clip_l: bool = True) -> dict[str, Tensor]:
    """For 4-bit linears of the T5 and for layers of CLIP-L, in one file."""
    r, tensors, dims = Random(seed), {}, encoders.DIMS
    layers = {f"lora_te2_{p.replace('.', '_')}": shape for p, shape in dims.linears().items() if p.endswith((".q", ".wi_1", ".wo"))}
    clip = {f"lora_te1_text_model_encoder_layers_{i}_mlp_fc1": (3072, 768) for i in (0, 7)}
    for name, (n, k) in (layers if t5 else {}).items() | (clip if clip_l else {}).items():
        tensors |= {f"{name}.lora_up.weight": r(n, 4), f"{name}.lora_down.weight": r(4, k), f"{name}.alpha": torch.tensor(2.0)}
    return tensors


@pytest.fixture(scope="module")
def files(base) -> dict[str, str]:
    """LoRA files in the host's folder."""
    made = {"both": lora(), "t5": lora(2, clip_l=False), "clip_l": lora(3, t5=False)}
    for name, tensors in made.items():
        save_file(tensors, Path(base, "models", "loras", f"te_{name}.safetensors"))
    return {name: f"te_{name}.safetensors" for name in made}


def with_lora(clip, file: str, strength: float = 0.7):
    """By the host's node."""
    return nodes.LoraLoader().load_lora(None, clip, file, 0.0, strength)[1]


@pytest.fixture(scope="module")
def effects(twin, files) -> dict:
    """(file, strength) -> what it adds on the dense twin."""
    before = encode(twin)[0]
    return {key: encode(with_lora(twin, files[key[0]], key[1]))[0] - before for key in (("both", 0.7), ("both", -0.5), ("t5", 0.7))}


def test_a_loras_contribution_is_that_on_the_dense_twin(ours, twin, plain, files, effects, caplog):
    with caplog.at_level(logging.WARNING):
        for (name, strength), wanted in effects.items():
            clip = with_lora(ours, files[name], strength)
            cond, pooled = encode(clip)
            assert rel(cond - plain[0], wanted) < 1e-3 and rel(plain[0] + wanted, plain[0]) > 1e-2
            assert torch.equal(pooled, plain[1]) == (name == "t5")
            sizes(clip.patcher, ours.patcher)
            assert clip.patcher.loaded_size() == clip.patcher.model_size() > ours.patcher.model_size()
    assert not [r.getMessage() for r in caplog.records if "lora key not loaded" in r.getMessage()]
    pooled = [encode(with_lora(clip, files["both"]))[1] - encode(clip)[1] for clip in (ours, twin)]
    assert rel(*pooled) < 2e-2  # CLIP-L's own weights are fp16, and the host rounds what it merges
    assert all(torch.equal(a, b) for a, b in zip(encode(ours), plain, strict=True))


def test_clones_with_different_loras_do_not_mix(ours, plain, files, effects):
    clips = {("both", 0.7): with_lora(ours, files["both"]), ("t5", 0.7): with_lora(ours, files["t5"])}
    for _ in range(2):
        for key, clip in clips.items():
            assert rel(encode(clip)[0] - plain[0], effects[key]) < 1e-3
            sizes(*(c.patcher for c in clips.values()), ours.patcher)
        assert all(torch.equal(a, b) for a, b in zip(encode(ours.clone()), plain, strict=True))
    stacked = with_lora(with_lora(ours, files["t5"], 0.3), files["t5"], 0.4)
    assert rel(encode(stacked)[0] - plain[0], effects["t5", 0.7]) < 2e-3


def test_another_strength_reloads_nothing(ours, files):
    encode(ours)
    places = [m.weight.data_ptr() for m in packed_of(ours)]
    with counted_loads() as loads:
        for strength in (0.7, -0.5, 0.0):
            encode(with_lora(ours, files["t5"], strength))
    assert not loads and places == [m.weight.data_ptr() for m in packed_of(ours)]


def test_patches_by_key(ours, plain, twin):
    """add_patches with a full difference, and one that does not fit."""
    key, found = f"t5xxl.transformer.{WO}.weight", []
    n, k = encoders.DIMS.linears()[WO]
    for clip in (ours.clone(), twin.clone()):
        before = encode(clip)[0]
        assert clip.add_patches({key: ("diff", (Random(9)(n, k) * 0.1,))}, 0.5) == [key]
        found.append(encode(clip)[0] - before)
    assert rel(*found) < 1e-2  # it may be given its best low-rank form
    unload()
    assert torch.equal(encode(ours)[0], plain[0])


def test_a_lora_by_hooks(ours, plain, files, effects, base):
    tensors = comfy.utils.load_torch_file(str(Path(base, "models", "loras", files["both"])), safe_load=True)
    hooks = comfy.hooks.create_hook_lora(tensors, 0.0, 0.7)
    (clip,) = nodes_hooks.SetClipHooks().apply_hooks(ours, False, False, hooks)
    with torch.inference_mode():
        cond = nodes.CLIPTextEncode().encode(clip, TEXT)[0][0][0]
    sizes(clip.patcher, ours.patcher)
    assert rel(cond - plain[0], effects["both", 0.7]) < 1e-3
    assert all(torch.equal(a, b) for a, b in zip(encode(ours), plain, strict=True))


def test_merged_encoders(ours, twin):
    """CLIPMergeSimple of two 4-bit encoders, as of their dense twins."""
    r, found, key = Random(5), [], f"t5xxl.transformer.{Q}.weight"
    n, k = encoders.DIMS.linears()[Q]
    patch = {key: ("diff", (r(n, k),))}
    for clip in (ours, twin):
        other = clip.clone()
        other.add_patches(patch)
        merged = clip.clone()
        merged.add_patches({key: other.get_key_patches()[key]}, 0.4, 0.6)
        found.append(encode(merged)[0] - encode(clip)[0])
        unload()
    assert rel(*found) < 1e-2
    with torch.inference_mode():
        whole = nodes_model_merging.CLIPMergeSimple().merge(ours, ours, 0.3)[0]
    assert rel(encode(whole)[0], encode(ours)[0]) < 1e-2


# -- memory --------------------------------------------------------------------------------------------------------------------------------


def as_it_is(clip) -> tuple[Tensor, Tensor]:
    """The encoder on a prompt as it is loaded now, without the manager's help."""
    model = clip.cond_stage_model
    model.reset_clip_options()
    model.set_clip_options({"execution_device": CPU})
    with torch.inference_mode():
        return model.encode_token_weights(clip.tokenize(TEXT))[:2]


@pytest.mark.parametrize("name", [None, "both"])
def test_partly_loaded_encoders_give_the_same(ours, files, name):
    """Half of it, and next to nothing: the linears are streamed by the host."""
    clip = ours if name is None else with_lora(ours, files[name])
    patcher, close = clip.patcher, 1e-6 if name is None else 2e-3  # CLIP-L's patched weights are rounded where they are merged
    unload()
    with torch.inference_mode():
        patcher.patch_model(CPU)
        wanted = as_it_is(clip)
        assert not any(m.comfy_cast_weights for m in packed_of(clip)), "layers that are there need no streaming"
        freed = patcher.partially_unload(CPU, patcher.model_size() // 2)
        assert patcher.model_size() // 2 <= freed == patcher.model_size() - patcher.loaded_size()
        assert rel(as_it_is(clip)[0], wanted[0]) < 1e-6
        patcher.unpatch_model(CPU)
        assert patcher.loaded_size() == 0 and not any(m.side_tensors() or m.comfy_cast_weights for m in packed_of(clip))
        for budget in (patcher.model_size() // 2, 1000):
            patcher.patch_model(CPU, lowvram_model_memory=budget)
            sizes(patcher)
            assert patcher.model.model_lowvram and patcher.loaded_size() <= budget
            got = as_it_is(clip)
            assert rel(got[0], wanted[0]) < 1e-6 and rel(got[1], wanted[1]) < close
            streamed = sum(m.comfy_cast_weights for m in packed_of(clip))
            patcher.unpatch_model(CPU)
        assert streamed == 14


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_what_loading_leaves_open_and_adds():
    """No mapping of the T5's file, and at no time more memory than both encoders and one linear unpacked: dense it would be 740 MB."""
    dims = T5Dims(blocks=16, model=1024, heads=16, inner=1024, ff=6144, vocab=512, buckets=32)
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.ones(shape, dtype=torch.float16) for name, shape in dims.plain().items()}
    for prefix, (n, k) in dims.linears().items():
        codes = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
        groups = torch.full((n, k // 128), 1e-3).half()
        tensors |= {f"{prefix}.{s}": t for s, t in pack_linear(T5Linear(codes, groups, -groups)).items()}
    path = encoders.saved("big.safetensors", tensors)
    del tensors, codes
    unload()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    done, start, peak = threading.Event(), anonymous(), [0]

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        clip = load(encoders.clip_l(), path)
    finally:
        done.set()
        watcher.join()
    assert str(path) not in Path("/proc/self/maps").read_text()
    files = sum(os.stat(p).st_size for p in (encoders.clip_l(), path))
    dense = sum(2 * n * k for n, k in dims.linears().values())
    one = max(n * k for n, k in dims.linears().values())
    print(f"peak {peak[0] / 1e6:.0f} MB, files {files / 1e6:.0f} MB, dense {dense / 1e6:.0f} MB")
    assert 0.8 * files < peak[0] < files + 28 * one < files + dense / 4
    assert len(packed_of(clip)) == 112


def anonymous() -> int:
    """Bytes of this process that lie in no file."""
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024  # noqa: SIM115


# -- saving --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "both"])
def test_a_saved_encoder_holds_real_numbers(ours, files, name, base):
    """CLIPSave's two files, the LoRA merged in, loaded again."""
    clip = ours if name is None else with_lora(ours, files[name])
    wanted = encode(clip)
    with torch.inference_mode():
        nodes_model_merging.CLIPSave().save(clip, f"clip/{name}")
    paths = {p: encoders.folder() / f"saved_{p}_{name}.safetensors" for p in ("clip_l", "t5xxl")}
    for part, path in paths.items():
        os.replace(Path(base, "output", "clip", f"{name}_{part}_00001_.safetensors"), path)
    found, dense = load_file(paths["t5xxl"]), encoders.numbers(encoders.t5("4bit"))
    assert {f"{p}.weight" for p in encoders.DIMS.linears()} | set(encoders.DIMS.plain()) <= set(found)
    for prefix in encoders.DIMS.linears():
        saved = found[f"{prefix}.weight"]
        assert saved.dtype == torch.float16
        if name is None:
            assert torch.equal(saved, dense[f"{prefix}.weight"].half()), prefix
    got = encode(load(paths["clip_l"], paths["t5xxl"]))
    assert rel(got[0], wanted[0]) < 1e-3 and rel(got[1], wanted[1]) < 1e-3
    assert all(torch.equal(a, b) for a, b in zip(encode(clip), wanted, strict=True))


def test_a_checkpoint_with_its_text_encoders(ours, files, tmp_path):
    """CheckpointSave's function."""
    clip, key = with_lora(ours, files["t5"]), f"text_encoders.t5xxl.transformer.{WO}.weight"
    n, k = encoders.DIMS.linears()[WO]
    with torch.inference_mode():
        comfy.sd.save_checkpoint(str(tmp_path / "whole.safetensors"), loaded(made()), clip)
    saved, before = load_file(tmp_path / "whole.safetensors")[key], encoders.numbers(encoders.t5("4bit"))[f"{WO}.weight"]
    tensors, name = lora(2, clip_l=False), f"lora_te2_{WO.replace('.', '_')}"
    delta = 0.7 * 2 / 4 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    assert saved.dtype == torch.float16 and saved.shape == (n, k) and rel(saved.float(), before + delta) < 1e-3


def test_the_state_dict_of_a_clip_is_dense(ours):
    """What nodes that save a checkpoint with its text encoders ask for; the layers stay packed."""
    for clip in (ours, ours.clone()):
        state = clip.get_sd()
        assert not [name for name, t in state.items() if t.dtype == torch.uint8]
        assert tuple(state[f"t5xxl.transformer.{WO}.weight"].shape) == encoders.DIMS.linears()[WO]
    assert all(m.weight.dtype == torch.uint8 for m in packed_of(ours))


# -- what the nodes show -------------------------------------------------------------------------------------------------------------------


def test_which_are_deprecated_and_what_they_offer():
    mappings = tonfa.NODE_CLASS_MAPPINGS
    assert not getattr(mappings["NunchakuTextEncoderLoaderV2"], "DEPRECATED", False)
    for key, types in (("NunchakuTextEncoderLoader", ["flux"]), ("SVDQuantTextEncoderLoader", ["flux"])):
        inputs = mappings[key].INPUT_TYPES()["required"]
        assert mappings[key].DEPRECATED and inputs["model_type"][0] == types and inputs["use_4bit_t5"][0] == ["disable", "enable"]
    inputs = mappings["NunchakuTextEncoderLoaderV2"].INPUT_TYPES()["required"]
    assert list(inputs) == ["model_type", "text_encoder1", "text_encoder2", "t5_min_length"] and inputs["model_type"][0] == ["flux.1"]
    assert inputs["text_encoder1"][0] == inputs["text_encoder2"][0] == folder_paths.get_filename_list("text_encoders")
    kind, options = inputs["t5_min_length"]
    wanted = {"default": 512, "min": 256, "max": 1024, "step": 128, "display": "number", "lazy": True}
    assert kind == "INT" and wanted.items() <= options.items()


def test_a_linked_length_is_asked_for():
    for key in ("NunchakuTextEncoderLoaderV2", "NunchakuTextEncoderLoader"):
        names = {"model_type": "flux", "text_encoder1": "a", "text_encoder2": "b"}
        assert node(key).check_lazy_status(**names, t5_min_length=None) == ["t5_min_length"]
        assert node(key).check_lazy_status(**names, t5_min_length=512, use_4bit_t5="disable", int4_model="none") == []


def test_a_built_again_patcher_is_ours(ours):
    """What newer hosts make of `cached_patcher_init`."""
    make, arguments = ours.patcher.cached_patcher_init[:2]
    fresh = make(*arguments, disable_dynamic=True)
    assert type(fresh) is type(ours.patcher) and fresh.model is not ours.patcher.model
    renamed = load(encoders.clip_l(), encoders.t5("fp16, embedding renamed"))
    if NEWER:
        make, arguments = renamed.patcher.cached_patcher_init[:2]
        assert make(*arguments).model is not renamed.patcher.model
