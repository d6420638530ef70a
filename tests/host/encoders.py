"""Small files of FLUX.1's two text encoders for the host tests. CLIP-L has its real size, which the host fixes."""

from __future__ import annotations

import functools
import importlib.util
import json
import tempfile
from pathlib import Path

import comfy.text_encoders.t5
import comfy.clip_model
import torch
from safetensors.torch import save_file
from tonfa.models.formats.t5 import T5Dims
from tonfa.models.quantize_t5 import quantize_t5
from torch import Tensor

from .lab import MADE

_path = Path(__file__).resolve().parent.parent / "models" / "formats" / "t5_files.py"
_spec = importlib.util.spec_from_file_location("t5_files_for_tests", _path)
t5_files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(t5_files)

DIMS = T5Dims(blocks=2, model=256, heads=4, inner=256, ff=512, vocab=32128, buckets=32)  # the host's tokenizer knows 32100 tokens


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(dir=MADE.name))


def saved(name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = folder() / name
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


@functools.cache
def t5(kind: str = "fp16") -> Path:
    """kind: fp16, bf16, fp8, "scaled fp8", 4bit, mixed (its last layers plain)."""
    plain = t5_files.tiny_t5(torch.float16, dims=DIMS)
    # as a trained T5: every block adds something of the size of what is there
    if kind == "4bit":
        path = folder() / "awq-int4-flux.1-t5xxl.safetensors"
        quantize_t5(t5("fp16"), path)
        return path
    if kind == "scaled fp8":
        return saved("t5xxl_fp8_scaled.safetensors", t5_files.scaled_fp8(plain))
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[kind]
    return saved(f"t5xxl_{kind}.safetensors", {name: t.to(dtype) for name, t in plain.items()})
