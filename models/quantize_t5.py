"""Any T5-XXL text encoder that ComfyUI loads (16 or 32 bits, fp8, scaled fp8; also in shards) as a 4-bit one: formats/awq.py.

One linear is in memory at a time, beside the temporaries of its search. Linears behind a layer norm (q, k, v, wi_0, wi_1) are searched with
the squared norm weights as the importance of their columns: that is the mean square of what meets them, if the normalised
activations themselves have the same in every channel. Nothing is known of the inputs of o and wo, whose columns count alike.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .formats.awq import pack_linear, packed_slots
from .formats.output import check_place, check_room
from .formats.quantize_awq import quantize_groups
from .formats.shards import files_of, merged
from .formats.t5 import ATTENTION, EMBEDDINGS, GATES, T5Dims, t5_dims, what_encoder
from .formats.tensorfile import CheckpointError, Entry, Slot, TensorFile, stream_save

RESTS = {"keep": None, "fp16": torch.float16, "bf16": torch.bfloat16}
SCALE_TYPE = torch.float16  # holds a scale eight times more exactly than bf16, and T5's weights are far from its ends
_WEIGHTS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_EXPECTED = "A T5-XXL file such as t5xxl_fp16.safetensors is expected here, or a folder with its shards."
_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's name for it until 2025, and the one since then
_BESIDE = ("scale_input", "input_scale", "comfy_quant")  # about activations and types: nothing that changes the weight


def quantize_t5(path_in: str | os.PathLike, path_out: str | os.PathLike, device: str | torch.device = "cpu", rest: str = "keep",
                progress: Callable[[int, int], None] | None = None) -> None:  # fmt: skip
    """Write the 4-bit file of the T5 encoder in path_in: a .safetensors file, or a folder of shards (or one with `text_encoder_2` in it).

    device  where linears are searched
    rest    type of embedding and norms: "keep" as they are (fp8 e5m2, which files here never hold, becomes fp16), "fp16" or "bf16"
    The file appears under its name when it is complete. progress(done, total) counts written bytes. CheckpointError, before anything is
    written, when path_in is no T5 encoder or one that is not whole, or path_out cannot be written; ValueError for an unknown `rest`.
    """
    if rest not in RESTS:
        raise ValueError(f"rest is {rest!r}, expected one of {', '.join(RESTS)}")
    path_out = Path(path_out)
    source = open_t5(path_in)
    try:
        check_place([file.path for file in source.files], path_out)
        slots = list(_Writer(source, torch.device(device), RESTS[rest]).slots())
        check_room(path_out, sum(math.prod(s.shape) * s.dtype.itemsize for s in slots))
        stream_save(path_out, slots, source.dims.metadata(), progress)
    finally:
        source.close()


@dataclass(eq=False)
class SourceT5:
    """A T5 whose headers have been checked: weights in 16 or 32 bits, or fp8 with or without scales.

    path: what was opened. entries: every tensor by name. embedding: its name here.
    """

    path: Path
    files: list[TensorFile]
    entries: dict[str, Entry]
    dims: T5Dims
    embedding: str

    def close(self) -> None:
        """Drop the mappings, and with them the pages that were read; the next read maps again."""
        for file in self.files:
            file.close()

    def scale(self, prefix: str, device: torch.device) -> Tensor | None:
        """fp32 [1] or [N, 1]: what a linear's stored weight is multiplied by."""
        entry = next((self.entries[key] for s in _SCALES if (key := f"{prefix}.{s}") in self.entries), None)
        return None if entry is None else entry.load(device).float().reshape(-1, 1)

    def norm_before(self, prefix: str) -> str | None:
        """The name of the layer norm whose output a linear takes, None for o and wo."""
        block, _, name = prefix.partition(".layer.")
        if f"layer.{name}" in ATTENTION[:3]:
            return f"{block}.layer.0.layer_norm.weight"
        return f"{block}.layer.1.layer_norm.weight" if f"layer.{name}" in GATES else None


def open_t5(path: str | os.PathLike) -> SourceT5:
    """Open a T5 text encoder to quantise. Raises CheckpointError that says what the file is if it is something else, or what is missing."""
    path = Path(path)
    files = [TensorFile(file) for file in files_of(path, "text_encoder_2", _EXPECTED)]
    entries, metadata = merged(files)
    shapes = {key: entry.shape for key, entry in entries.items()}
    if other := what_encoder(shapes, metadata):
        raise CheckpointError(f"{path} is {other}. {_EXPECTED}")
    if any(key.endswith(".qweight") for key in shapes):
        raise CheckpointError(f"{path} is a T5 text encoder that is 4-bit already.")
    dims = t5_dims(shapes, str(path))
    embedding = next(key for key in EMBEDDINGS if key in shapes)
    for key in (*(f"{prefix}.weight" for prefix in dims.linears()), *_plain(dims, embedding).values()):
        if entries[key].dtype not in _WEIGHTS:
            raise CheckpointError(f"{path} cannot be used: {key} is {entries[key].dtype}, expected 16 or 32 bits, or fp8.")
    _check_linears(path, dims, entries)
    return SourceT5(path, files, entries, dims, embedding)


def _check_linears(path: Path, dims: T5Dims, entries: Mapping[str, Entry]) -> None:
    """Raises CheckpointError for a linear that the format cannot hold, and for scales of which the meaning is not known."""
    for prefix, (n, k) in dims.linears().items():
        if n % 4 or k % 128:
            raise CheckpointError(f"{path} cannot be 4-bit: {prefix} is {n} x {k}, expected multiples of 4 and of 128.")
        unknown = [key for key in entries if key.startswith(f"{prefix}.") and key[len(prefix) + 1 :] not in ("weight", *_SCALES, *_BESIDE)]
        if unknown:
            raise CheckpointError(f"{path} cannot be used: {unknown[0]} is nothing that a T5 linear in 16 bits or scaled fp8 has.")
        for suffix in _SCALES:
            entry = entries.get(f"{prefix}.{suffix}")
            if entry is not None and (math.prod(entry.shape) not in (1, n) or entry.dtype not in _WEIGHTS):
                raise CheckpointError(
                    f"{path} cannot be used: {entry.key} is {entry.dtype} {list(entry.shape)}, expected a number, or {n}."
                )


def _plain(dims: T5Dims, embedding: str) -> dict[str, str]:
    """Name in the output -> name in the source of everything that is no linear; the embedding under both of its names."""
    return dict.fromkeys(EMBEDDINGS, embedding) | {name: name for name in dims.plain() if name not in EMBEDDINGS}


class _Writer:
    """The tensors of the new file, in an order in which one linear at a time is held."""

    def __init__(self, source: SourceT5, device: torch.device, rest: torch.dtype | None):
        self.source, self.device, self.rest = source, device, rest
        self.prefix, self.packed = "", {}

    def slots(self) -> Iterator[Slot]:
        for name, key in _plain(self.source.dims, self.source.embedding).items():
            entry = self.source.entries[key]
            dtype = self.rest or (torch.float16 if entry.dtype == "F8_E5M2" else _WEIGHTS[entry.dtype])
            yield Slot(name, dtype, entry.shape, partial(self.plain, key, dtype))
        for prefix, (n, k) in self.source.dims.linears().items():
            for suffix, (dtype, shape) in packed_slots(n, k, SCALE_TYPE).items():
                yield Slot(f"{prefix}.{suffix}", dtype, shape, partial(self.linear, prefix, suffix))

    def plain(self, key: str, dtype: torch.dtype) -> Tensor:
        stored = self.source.entries[key].load()
        t = stored.to(dtype)
        if t.dtype != stored.dtype and not torch.isfinite(t.float()).all():
            raise CheckpointError(f"{self.source.path}: {key} does not fit into {dtype}. Keep its type, or take bf16.")
        return t

    def linear(self, prefix: str, suffix: str) -> Tensor:
        """One tensor of a 4-bit linear, which is made when its first is asked for."""
        if prefix != self.prefix:
            self.prefix, self.packed = prefix, {}  # the last one goes before the next is made
            self.packed = {name: t.cpu() for name, t in self._made(prefix).items()}
            self.source.close()
        return self.packed.pop(suffix)

    def _made(self, prefix: str) -> dict[str, Tensor]:
        norm = self.source.norm_before(prefix)
        importance = None if norm is None else self.source.entries[norm].load(self.device).float().square()
        weight = self.source.entries[f"{prefix}.weight"].load(self.device)
        try:
            layer = quantize_groups(weight, importance, SCALE_TYPE, self.source.scale(prefix, self.device))
        except ValueError as error:
            raise CheckpointError(f"{self.source.path}: {prefix} cannot be 4-bit: {error}.") from error
        return pack_linear(layer)
