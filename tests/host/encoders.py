"""Small files of FLUX.1's two text encoders for the host tests. CLIP-L has its real size, which the host fixes."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

import comfy.clip_model
import comfy.sd
import comfy.text_encoders.sd3_clip
import comfy.utils
import torch
from safetensors.torch import save_file
from tonfa.models.formats.awq import AwqT5, open_awq_t5, pack_linear
from tonfa.models.formats.t5 import EMBEDDINGS, T5Dims
from tonfa.models.quantize_t5 import quantize_t5
from tonfa.nodes.host.text_encoders import config_for
from torch import Tensor

from .lab import MADE

_path = Path(__file__).resolve().parent.parent / "models" / "formats" / "t5_files.py"
_spec = importlib.util.spec_from_file_location("t5_files_for_tests", _path)
t5_files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(t5_files)

DIMS = T5Dims(blocks=2, model=256, heads=4, inner=256, ff=512, vocab=32128, buckets=32)  # the host's tokenizer knows 32100 tokens
DEEP = T5Dims(blocks=24, model=128, heads=2, inner=128, ff=256, vocab=32128, buckets=32)  # the host looks for scales beside 24 blocks only
AS_CLIP_L = T5Dims(blocks=1, model=768, heads=12, inner=768, ff=256, vocab=32128, buckets=32)  # linears of CLIP-L's text projection's shape
PLAIN = ("encoder.block.0.layer.0.SelfAttention.k", "encoder.block.1.layer.1.DenseReluDense.wo")  # of the mixed file


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(dir=MADE.name))


def saved(name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = folder() / name
    path.parent.mkdir(exist_ok=True)
    save_file({key: t.contiguous() for key, t in tensors.items()}, path, metadata)
    return path


@functools.cache
def clip_l() -> Path:
    """Random weights, gentle enough that prompts still matter at the end."""
    config = json.loads(Path(comfy.clip_model.__file__).with_name("sd1_clip_config.json").read_text())
    with torch.device("meta"):
        shape = comfy.clip_model.CLIPTextModel(config, torch.float16, "meta", torch.nn).state_dict()
    g = torch.Generator().manual_seed(5)
    tensors = {}
    for name, t in shape.items():
        if not t.is_floating_point():
            continue
        noise = torch.randn(t.shape, generator=g) * (t.shape[-1] ** -0.5 if t.ndim > 1 else 0.1)
        tensors[name] = (noise + ("norm" in name and name.endswith("weight"))).half()
    return saved("clip_l.safetensors", tensors)


# -- T5 files -----------------------------------------------------------------------------------------------------------------------


@functools.cache
def weights(dims: T5Dims = DIMS) -> dict[str, Tensor]:
    """A T5 in fp16."""
    return t5_files.tiny_t5(torch.float16, dims=dims)


def as_type(dtype: torch.dtype) -> Path:
    return saved(f"t5xxl_{str(dtype)[6:]}.safetensors", {name: t.to(dtype) for name, t in weights().items()})


def four_bit() -> Path:
    path = folder() / "awq-int4-flux.1-t5xxl.safetensors"
    quantize_t5(t5("fp16"), path)
    return path


def four_bit_of(name: str, dims: T5Dims, kept: tuple[str, ...] = (), rest: torch.dtype = torch.float16) -> Path:
    """Quantised by our quantiser, some linears left plain, the rest in a type."""
    made = folder() / "made.safetensors"
    quantize_t5(saved("plain.safetensors", weights(dims)), made)
    awq = open_awq_t5(made)
    tensors = {key: awq.plain(key).to(rest) for key in awq.plain_names()}
    for prefix in awq.quantised:
        packed = pack_linear(awq.linear(prefix))
        tensors |= (
            {f"{prefix}.weight": weights(dims)[f"{prefix}.weight"].to(torch.bfloat16)}
            if prefix in kept
            else {f"{prefix}.{s}": t for s, t in packed.items()}
        )
    awq.close()
    return saved(name, {key: t.clone() for key, t in tensors.items()}, dims.metadata())


def embedding_of_another_name(source: str) -> Path:
    tensors = comfy.utils.load_torch_file(str(t5(source)), safe_load=True)
    tensors = {key: t for key, t in tensors.items() if key not in EMBEDDINGS} | {EMBEDDINGS[1]: tensors[EMBEDDINGS[0]]}
    return saved(f"embed_tokens_{source}.safetensors", tensors)


def pickled() -> Path:
    path = folder() / "pytorch_model.bin"
    torch.save(weights(), path)
    return path


def in_a_folder() -> Path:
    """The form of the deprecated node: a folder with the file and the original's other files."""
    path = folder() / "awq-int4-t5" / "model.safetensors"
    path.parent.mkdir()
    shutil.copy(t5("4bit"), path)
    path.with_name("config.json").write_text(json.dumps(DIMS.config()))
    return path


KINDS = {
    "fp16": lambda: as_type(torch.float16),
    "bf16": lambda: as_type(torch.bfloat16),
    "fp8": lambda: as_type(torch.float8_e4m3fn),
    "scaled fp8": lambda: saved("t5xxl_fp8_scaled.safetensors", t5_files.scaled_fp8(weights(DEEP))),
    "scaled fp8, new name": lambda: saved("t5xxl_fp8_2026.safetensors", t5_files.scaled_fp8(weights(DEEP), "weight_scale")),
    "4bit": four_bit,
    "mixed": lambda: four_bit_of("mixed.safetensors", DIMS, PLAIN, torch.bfloat16),
    "4bit, other sizes": lambda: four_bit_of("sizes.safetensors", AS_CLIP_L),
    "fp16, embedding renamed": lambda: embedding_of_another_name("fp16"),
    "4bit, embedding renamed": lambda: embedding_of_another_name("4bit"),
    "scaled fp8, embedding renamed": lambda: embedding_of_another_name("scaled fp8"),
    "pickle": pickled,
}


@functools.cache
def t5(kind: str = "fp16") -> Path:
    return KINDS[kind]()


def dims_of(kind: str) -> T5Dims:
    return DEEP if kind.startswith("scaled") else AS_CLIP_L if kind.endswith("sizes") else DIMS


def numbers(path: Path) -> dict[str, Tensor]:
    """What a file means, in fp32 under the host's names. 4-bit linears come from the file's codes, not from our packed bytes."""
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    if any(name.endswith(".qweight") for name in tensors):
        awq = open_awq_t5(path)
        found = {name: awq.plain(name).float() for name in awq.plain_names()} | dequantised(awq)
        awq.close()
    else:
        found = {name: t.float() for name, t in tensors.items() if name.endswith(".weight")}
        for name in tensors:
            if name.endswith((".scale_weight", ".weight_scale")):
                found[f"{name.rpartition('.')[0]}.weight"] *= tensors[name].float()
    found.setdefault(EMBEDDINGS[0], found.get(EMBEDDINGS[1]))
    return found


def dequantised(awq: AwqT5) -> dict[str, Tensor]:
    """code * scale + zero of every 4-bit linear."""
    found = {}
    for prefix in awq.quantised:
        layer = awq.linear(prefix)
        groups = layer.codes.float().view(layer.n, -1, 128)
        found[f"{prefix}.weight"] = (groups * layer.scales.float()[..., None] + layer.zeros.float()[..., None]).view(layer.n, layer.k)
    return found


# -- the host's own encoders in fp32 ---------------------------------------------------------------------------------------------------


def reference(tensors: dict[str, Tensor], dims: T5Dims = DIMS):
    """The host's own T5 in fp32: tokens -> the T5's output."""
    model = comfy.text_encoders.sd3_clip.T5XXLModel(device="cpu", dtype=torch.float32, model_options=config_for(dims))
    missing = model.load_sd(tensors).missing_keys
    assert not missing, missing

    def encode(tokens: dict) -> Tensor:
        with torch.inference_mode():
            return model.encode_token_weights(tokens["t5xxl"])[0]

    return encode


def twin() -> comfy.sd.CLIP:
    """CLIP-L and the 4-bit T5's numbers, dense in fp32 under the host's own patcher."""
    files = [comfy.utils.load_torch_file(str(clip_l()), safe_load=True), numbers(t5("4bit"))]
    options = {"dtype": torch.float32, **config_for(DIMS)}
    with torch.inference_mode():
        return comfy.sd.load_text_encoder_state_dicts(files, clip_type=comfy.sd.CLIPType.FLUX, model_options=options)
