"""A dense FLUX.1 file as the linears that a host has: what the quantiser reads, and the 16-bit network that its result is held against.

Files: native names (black-forest-labs, ComfyUI; alone or inside a whole checkpoint) or diffusers names (one file or a folder of shards); 16
or 32 bits, fp8 with or without scales. Opening reads headers only and checks every tensor's presence, shape and type.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .flux import DoubleBlock, Flux, QKNorm, RMSNorm, SingleBlock
from .formats import flux_config
from .formats.flux_names import FluxDims, HostLinear, host_linears, plain_specs, to_v2
from .formats.identify import identify
from .formats.shards import files_of, merged
from .formats.tensorfile import CheckpointError, Entry, TensorFile
from .linear import PlainLinear
from .runtime import Runtime

__all__ = ["CheckpointError", "DenseFlux", "dense_flux", "load_block", "open_dense"]
log = logging.getLogger(__name__)

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")
_WEIGHTS = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's name for it until 2025, and the one since then
_BESIDE = ("scale_input", "input_scale", "comfy_quant")  # about activations and types: nothing that changes the weight
_EXPECTED = "A dense FLUX.1 file (16 or 32 bits, or fp8) is expected here."
# native linear of a block -> diffusers linears, whose rows follow each other
_DIFFUSERS_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_DIFFUSERS_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")


@dataclass(eq=False)
class DenseFlux:
    """A checked dense FLUX. Nothing of the weights is in memory until it is asked for.

    path           what was opened (file or folder)
    config         the host's unet_config (hidden_size, depth, axes_dim, ...)
    model_class    "Flux" | "FluxSchnell"
    metadata       the file's metadata, as strings
    warnings       what was odd but bearable (logged when opened)
    """

    path: Path
    config: dict
    model_class: str
    metadata: dict[str, str]
    warnings: list[str]
    dims: FluxDims
    files: list[TensorFile]
    _pieces: dict[str, list[Entry]]  # native name of a tensor -> what its rows are stored as
    _scales: dict[str, Entry]  # stored name of a weight -> what multiplies it
    _swapped: bool = False  # final_layer.adaLN_modulation.1 is stored as (scale, shift)
    _linears: dict[str, HostLinear] = field(default_factory=dict)

    def linear(self, name: str, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor | None]:
        """(weight [N, K], bias [N] or None) of a linear of the host's blocks, such as "double_blocks.0.img_attn.qkv", on `device`.

        16- and 32-bit files give their own type, fp8 bf16 (which is exact), scaled fp8 fp32. On the CPU a tensor may be a view of the
        mapped file: do not write into it. KeyError for another name; CheckpointError when a number is not finite.
        """
        bias = f"{name}.bias"
        try:
            return self._load(f"{self._linears[name].name}.weight", device), self._load(bias, device) if bias in self._pieces else None
        finally:
            self.close()  # and with it the pages of the file that were read

    def tensor(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """Any other tensor by its native name, final_layer.adaLN_modulation.1 in native half order. As `linear` in all else."""
        return self._load(name, device)

    def identity(self) -> list:
        """What tells this source from another one, as JSON: path, size and time of every file."""
        stats = [(str(f.path.resolve()), f.path.stat()) for f in self.files]
        return [[path, s.st_size, s.st_mtime_ns] for path, s in stats]

    def close(self) -> None:
        """Let go of the files. Anything asked for later maps them again."""
        for f in self.files:
            f.close()

    def _load(self, name: str, device: str | torch.device) -> Tensor:
        parts = [self._piece(entry, device) for entry in self._pieces[name]]
        t = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not torch.isfinite(t).all():
            raise CheckpointError(f"{self._pieces[name][0].file.path}: {name} holds NaN or infinite values: the file is damaged.")
        swap = self._swapped and name.startswith("final_layer.adaLN_modulation.1.")
        return torch.cat(t.chunk(2)[::-1]) if swap else t

    def _piece(self, entry: Entry, device: str | torch.device) -> Tensor:
        t = entry.load(device)
        scale = self._scales.get(entry.key)
        if scale is not None:
            return t.float() * scale.load(device).float().reshape(-1, *([1] * (t.ndim - 1)))
        return t.bfloat16() if entry.dtype.startswith("F8") else t


# ---- opening ------------------------------------------------------------------------------------------------------------------------


def open_dense(path: str | os.PathLike) -> DenseFlux:
    """Open a dense FLUX.1: a .safetensors file, or a diffusers folder (the model's or its `transformer`).

    Raises CheckpointError that says what the file is if it is something else, or which tensor is missing, misshapen or mistyped.
    """
    path = Path(path)
    files = [TensorFile(p) for p in files_of(path, "transformer", _EXPECTED)]
    entries, metadata = merged(files)
    _refuse_others(path, entries, metadata)
    prefix = next((p for p in PREFIXES if f"{p}img_in.weight" in entries or f"{p}x_embedder.weight" in entries), None)
    if prefix is None:
        raise CheckpointError(f"{path} cannot be used: it has blocks of a FLUX model, but no img_in.weight. Download it again.")
    bare = {key.removeprefix(prefix): entry for key, entry in entries.items() if key.startswith(prefix)}
    diffusers, warnings = "x_embedder.weight" in bare, []
    config = flux_config.read_json(metadata | _config_beside(path), "config", warnings)
    ours, theirs = (config, {}) if "hidden_size" in config else ({}, config)
    names = _Names(path, bare, diffusers)
    dims = names.dims()
    pieces = names.checked(dims)
    out = DenseFlux(
        path=path, config=flux_config.unet_config(dims, ours, theirs, warnings),
        model_class=flux_config.model_class(None, dims.guidance, warnings), metadata=metadata, warnings=warnings, dims=dims, files=files,
        _pieces=pieces, _scales=names.scales(pieces), _swapped=diffusers, _linears={h.name: h for h in host_linears(dims)},
    )  # fmt: skip
    for w in warnings:
        log.warning("%s: %s", path, w)
    return out


def _config_beside(path: Path) -> dict[str, str]:
    """The config.json of a diffusers folder, as metadata."""
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    beside = folder / "config.json"
    return {"config": beside.read_text(encoding="utf-8", errors="replace")} if path.is_dir() and beside.is_file() else {}


def _refuse_others(path: Path, entries: dict[str, Entry], metadata: dict[str, str]) -> None:
    kind = identify(entries, metadata)
    if kind.quantised:
        raise CheckpointError(f"{path} is {kind.what}: it is 4-bit already. {_EXPECTED}")
    if kind.family not in ("flux-plain", "flux-diffusers"):
        raise CheckpointError(f"{path} is {kind.what}. {_EXPECTED}")
    if any("distilled_guidance_layer." in key for key in entries):
        raise CheckpointError(f"{path} is a Chroma model, whose modulation is not FLUX.1's. {_EXPECTED}")


@dataclass
class _Names:
    """The tensors of a file (prefix taken off) under native names."""

    path: Path
    entries: dict[str, Entry]
    diffusers: bool

    def stored(self, name: str) -> list[str]:
        """The names in the file of a native tensor that lies in a block or is a linear outside."""
        if not self.diffusers:
            newer = name.removesuffix(".scale") + ".weight"  # ComfyUI since 2026 calls a norm's scale its weight
            return [newer if name.endswith("_norm.scale") and name not in self.entries and newer in self.entries else name]
        block = _BLOCK.fullmatch(name)
        linear, _, suffix = block[3].rpartition(".") if block else (name, "", "")
        theirs = (_DIFFUSERS_DOUBLE if block and block[1] == "double" else _DIFFUSERS_SINGLE).get(linear)
        if theirs is not None:
            stack = "transformer_blocks" if block[1] == "double" else "single_transformer_blocks"
            return [f"{stack}.{block[2]}.{t}.{suffix}" for t in theirs]
        return [self._plain[name]]

    def __post_init__(self):
        depth, single = (self._depth(s) for s in ("double", "single"))
        guidance = any(k.startswith(("guidance_in.", "time_text_embed.guidance_embedder.")) for k in self.entries)
        self._counts = FluxDims(128, 128, 128, depth, single, 64, 64, 128, 128, guidance)  # sizes are found when names are known
        self._plain = {native: to_v2(v1) for native, v1, _ in plain_specs(self._counts)}

    def _depth(self, kind: str) -> int:
        theirs = "transformer_blocks" if kind == "double" else "single_transformer_blocks"
        pattern = re.compile((theirs if self.diffusers else f"{kind}_blocks") + r"\.(\d{1,6})\.")
        return max((int(m[1]) for key in self.entries if (m := pattern.match(key))), default=-1) + 1

    def entry(self, key: str) -> Entry:
        if key not in self.entries:
            raise CheckpointError(f"{self.path}: tensor {key} is missing, so this is no complete FLUX.1 model. Download it again.")
        return self.entries[key]

    def shape(self, name: str, ndim: int = 2) -> tuple[int, ...]:
        """Shape of a native tensor, rows of its pieces added up."""
        found = [self.entry(key) for key in self.stored(name)]
        if any(len(e.shape) != ndim or 0 in e.shape for e in found):
            raise CheckpointError(f"{self.path}: {found[0].key} has shape {list(found[0].shape)}, expected {ndim} dimensions, none empty.")
        return (sum(e.shape[0] for e in found), *found[0].shape[1:])

    def dims(self) -> FluxDims:
        c = self._counts
        if not c.depth:
            raise CheckpointError(f"{self.path} cannot be used: it has no double block. {_EXPECTED}")
        hidden, in_width = self.shape("img_in.weight")
        (head_dim,) = self.shape("double_blocks.0.img_attn.norm.query_norm.scale", 1)
        mlp, out_width = self.shape("double_blocks.0.img_mlp.0.weight")[0], self.shape("final_layer.linear.weight")[0]
        for what, value, multiple in (
            ("hidden size", hidden, 128), ("MLP size", mlp, 128), ("hidden size", hidden, head_dim), ("head size", head_dim, 2),
            ("input width", in_width, 4), ("output width", out_width, 4),
        ):  # fmt: skip
            if value % multiple:
                raise CheckpointError(f"{self.path}: the {what} is {value} by the tensor shapes, expected a multiple of {multiple}.")
        return FluxDims(hidden, head_dim, mlp, c.depth, c.depth_single, in_width, out_width, self.shape("txt_in.weight")[1],
                        self.shape("vector_in.in_layer.weight")[1], c.guidance)  # fmt: skip

    def checked(self, d: FluxDims) -> dict[str, list[Entry]]:
        """Native name -> pieces of every tensor of the model, shapes and types as they must be. Biases of block linears may be absent."""
        expected = {name: shape for name, _, shape in plain_specs(d)}
        for h in host_linears(d):
            expected[f"{h.name}.weight"] = (h.out_features, h.in_features)
            if all(key in self.entries for key in self.stored(f"{h.name}.bias")):
                expected[f"{h.name}.bias"] = (h.out_features,)
        out = {}
        for name, shape in expected.items():
            out[name] = [self.entry(key) for key in self.stored(name)]
            found = self.shape(name, len(shape))
            if found != shape or any(e.shape[1:] != shape[1:] for e in out[name]):
                raise CheckpointError(f"{self.path}: {self.stored(name)[0]} has shape {list(found)}, expected {list(shape)}.")
            for e in out[name]:
                if e.dtype not in _WEIGHTS:
                    raise CheckpointError(f"{self.path} cannot be used: {e.key} is {e.dtype}, expected 16 or 32 bits, or fp8.")
        return out

    def scales(self, pieces: dict[str, list[Entry]]) -> dict[str, Entry]:
        """Stored name of a weight -> its scale. CheckpointError for a scale whose meaning is not known."""
        beside: dict[str, list[tuple[str, Entry]]] = {}
        for key, entry in self.entries.items():
            prefix, _, suffix = key.rpartition(".")
            beside.setdefault(prefix, []).append((suffix, entry))
        out = {}
        for key in (key for name in pieces if name.endswith(".weight") for key in self.stored(name)):
            entry = self.entries[key]
            for suffix, other in beside[key.rpartition(".")[0]]:
                if suffix in _SCALES and math.prod(other.shape) in (1, entry.shape[0]) and other.dtype in _WEIGHTS:
                    out[entry.key] = other
                elif suffix not in ("weight", "bias", *_BESIDE):
                    raise CheckpointError(
                        f"{self.path} cannot be used: {other.key} ({other.dtype} {list(other.shape)}) is nothing that a FLUX linear in 16 "
                        "bits or in scaled fp8 has."
                    )
        return out


# ---- the network --------------------------------------------------------------------------------------------------------------------


def load_block(source: DenseFlux, name: str, dtype: torch.dtype, device: str | torch.device) -> DoubleBlock | SingleBlock:
    """One block ("double_blocks.0") with linears in `dtype`. source: anything with config, linear() and tensor().

    CheckpointError where a weight is beyond float16's range and `dtype` is that.
    """
    runtime = Runtime()

    def cast(t: Tensor | None, what: str) -> Tensor | None:
        if t is None or t.dtype == dtype:
            return t
        if dtype == torch.float16 and t.abs().max() > torch.finfo(dtype).max:
            raise CheckpointError(f"{name}.{what} has values beyond float16's range: compute in bfloat16 or float32.")
        return t.to(dtype)

    def leaf(inner: str) -> PlainLinear:
        weight, bias = source.linear(f"{name}.{inner}", device)
        return PlainLinear(cast(weight, inner), cast(bias, inner), runtime)

    def norm(inner: str) -> QKNorm:
        scales = (source.tensor(f"{name}.{inner}.{k}_norm.scale").to(device, torch.float32, copy=True) for k in ("query", "key"))
        return QKNorm(*(RMSNorm(scale, "scale", runtime) for scale in scales))

    kind = DoubleBlock if name.startswith("double_blocks.") else SingleBlock
    with torch.inference_mode(False), torch.no_grad():
        block = kind(leaf, norm, source.config["num_heads"], runtime)
    return block


@dataclass
class _Outside:
    """What models/flux.py's Flux is built from, without blocks."""

    source: DenseFlux

    @property
    def path(self) -> object:
        return getattr(self.source, "path", "the model")

    @property
    def config(self) -> dict:
        return self.source.config | {"depth": 0, "depth_single_blocks": 0}

    def host_linears(self) -> list[HostLinear]:
        return []

    def outside_blocks(self) -> dict[str, Tensor]:
        return {name: self.source.tensor(name) for name in outside_names(self.source.config)}

    def plain_loaders(self) -> dict[str, Callable[[], Tensor]]:
        return {}  # of blocks, of which it has none


def outside_names(config: dict) -> list[str]:
    """Native names of everything that is in no block."""
    counts = FluxDims(128, 128, 128, 0, 0, 64, 64, 128, 128, config["guidance_embed"])
    return [native for native, _, _ in plain_specs(counts)]


def assemble(source: DenseFlux, dtype: torch.dtype, device: str | torch.device, block: Callable[[str], nn.Module]) -> Flux:
    """The standalone Flux around block(name) for every block of the source."""
    network = Flux(_Outside(source), dtype, device)
    network.config = source.config
    network.double_blocks = nn.ModuleList(block(f"double_blocks.{i}") for i in range(source.config["depth"]))
    network.single_blocks = nn.ModuleList(block(f"single_blocks.{i}") for i in range(source.config["depth_single_blocks"]))
    return network.eval()


def dense_flux(path: str | os.PathLike, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu") -> Flux:
    """The whole network of a dense file, every linear in `dtype` on `device` (FLUX.1 in 16 bits: 24 GB). CheckpointError as open_dense."""
    with closing(open_dense(path)) as source:
        return assemble(source, dtype, device, lambda name: load_block(source, name, dtype, device))
