"""The 4-bit T5 text encoder of `awq-int4-flux.1-t5xxl.safetensors`, read and written bit for bit.

Metadata `config` (a T5Config as JSON) and `model_class` = NunchakuT5EncoderModel, names as in Hugging Face's T5EncoderModel. A linear is
4-bit where `P.qweight` is there:

    P.qweight       int16 [N/4, K]      codes, ordered as in nunchaku.pack_w4a16_qweight
    P.scales        16-bit [rows, N]    rows = K/128 rounded up to a multiple of 8, zeros behind K/128
    P.scaled_zeros  the same            W = code * scale + scaled_zero

Everything else is plain, the embedding there twice (shared.weight, encoder.embed_tokens.weight).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.t5_layout import GROUP, T5Linear, check_size
from . import nunchaku as nk
from .shards import files_of, merged
from .t5 import EMBEDDINGS, MODEL_CLASS, T5Dims, t5_dims, what_encoder
from .tensorfile import CheckpointError, Entry, TensorFile

SUFFIXES = ("qweight", "scales", "scaled_zeros")
_SCALE_TYPES = ("F16", "BF16")
_PLAIN_TYPES = ("F16", "BF16", "F32", "F8_E4M3", "F8_E5M2")


def is_awq_t5(names: Mapping[str, object] | list[str], metadata: Mapping[str, str]) -> bool:
    """Whether a file with these tensor names and this header is a 4-bit T5: 4-bit linears of T5 decide, else the header."""
    if any(n.startswith("encoder.block.") and n.endswith(".scaled_zeros") for n in names):
        return True
    return metadata.get("model_class") == MODEL_CLASS


def pack_linear(layer: T5Linear) -> dict[str, Tensor]:
    """Suffix -> tensor of a linear, as the file has them."""
    return {
        "qweight": nk.pack_w4a16_qweight(layer.codes, torch.int16),
        "scales": nk.pack_w4a16_scales(layer.scales, layer.k, GROUP),
        "scaled_zeros": nk.pack_w4a16_scales(layer.zeros, layer.k, GROUP),
    }


def unpack_linear(packed: Mapping[str, Tensor]) -> T5Linear:
    """Exact inverse of pack_linear; sizes come from qweight. ValueError where the tensors do not fit together."""
    n, k = 4 * packed["qweight"].shape[0], packed["qweight"].shape[1]
    scales, zeros = (nk.unpack_w4a16_scales(packed[suffix], n, k, GROUP) for suffix in SUFFIXES[1:])
    return T5Linear(nk.unpack_w4a16_qweight(packed["qweight"], n, k), scales, zeros)


def packed_slots(n: int, k: int, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of what pack_linear makes of a linear of N x K with scales of this type."""
    groups = (nk.w4a16_scale_rows(k, GROUP), n)
    return {"qweight": (torch.int16, (n // 4, k)), "scales": (dtype, groups), "scaled_zeros": (dtype, groups)}


@dataclass(eq=False)
class AwqT5:
    """An open 4-bit T5 file whose header has been checked. Linears may be 4-bit or plain, one by one.

    quantised: prefixes of the 4-bit linears. entries: every tensor by name.
    """

    path: Path
    dims: T5Dims
    entries: dict[str, Entry]
    quantised: list[str]
    files: list[TensorFile]
    metadata: dict[str, str]

    def linear(self, prefix: str, device: str | torch.device = "cpu") -> T5Linear:
        """A 4-bit linear in plain tensors. Raises CheckpointError when its numbers are not finite."""
        layer = unpack_linear({suffix: self.entries[f"{prefix}.{suffix}"].load(device) for suffix in SUFFIXES})
        if not (torch.isfinite(layer.scales).all() and torch.isfinite(layer.zeros).all()):
            raise CheckpointError(f"{self.path}: the scales of {prefix} are not all finite numbers. Download it again.")
        return layer

    def plain_names(self) -> list[str]:
        """Every tensor that belongs to no 4-bit linear."""
        taken = {f"{prefix}.{suffix}" for prefix in self.quantised for suffix in SUFFIXES}
        return [name for name in self.entries if name not in taken]

    def plain(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """A plain tensor. On the CPU it may be a view of the memory-mapped file: do not write into it."""
        return self.entries[name].load(device)

    def close(self) -> None:
        """Drop the mapping of the file; the next read maps it again."""
        for file in self.files:
            file.close()


def open_awq_t5(path: str | os.PathLike) -> AwqT5:
    """Open a 4-bit T5: a file, or a folder with one model's .safetensors files (the form of the deprecated loader).

    Raises CheckpointError when there is none, it is something else (and says what), or tensors are missing or of another shape or type.
    """
    path = Path(path)
    found = [TensorFile(file) for file in files_of(path, "text_encoder_2", "A 4-bit T5 is expected in it.")]
    files = [file for file in found if is_awq_t5(file.entries, file.metadata)]  # other encoders may lie beside it
    if not any(name in file.entries for file in files for name in EMBEDDINGS):
        files = found
    entries, metadata = merged(files)
    shapes = {key: entry.shape for key, entry in entries.items()}
    if other := what_encoder(shapes, metadata):
        raise CheckpointError(f"{path} is {other}; a 4-bit T5 such as awq-int4-flux.1-t5xxl.safetensors is expected here.")
    if not is_awq_t5(entries, metadata):
        raise CheckpointError(f"{path} is an ordinary T5 text encoder, not a 4-bit one. `tonfa quantize-t5` makes one of it.")
    quantised = [key.removesuffix(".qweight") for key in entries if key.endswith(".qweight") and key.startswith("encoder.block.")]
    for prefix in quantised:
        _check_linear(str(path), prefix, entries)
        rows, k = shapes.pop(f"{prefix}.qweight")
        shapes[f"{prefix}.weight"] = (4 * rows, k)
    dims = t5_dims(shapes, str(path))
    if unknown := set(quantised) - dims.linears().keys():
        raise CheckpointError(f"{path} cannot be used: {min(unknown)} is no linear of a T5 encoder. Download it again.")
    _check_plain(str(path), dims, entries, set(quantised))
    return AwqT5(path, dims, entries, quantised, files, metadata)


def _check_linear(where: str, prefix: str, entries: Mapping[str, Entry]) -> None:
    """Raises CheckpointError unless the three tensors of a 4-bit linear fit each other."""
    missing = [suffix for suffix in SUFFIXES if f"{prefix}.{suffix}" not in entries]
    if missing:
        raise CheckpointError(f"{where} cannot be used: {prefix}.{missing[0]} is missing beside its qweight. Download it again.")
    codes, scales, zeros = (entries[f"{prefix}.{suffix}"] for suffix in SUFFIXES)
    if codes.dtype != "I16" or len(codes.shape) != 2:
        raise CheckpointError(f"{where} cannot be used: {codes.key} is {codes.dtype} {list(codes.shape)}, expected I16 [N/4, K].")
    n, k = 4 * codes.shape[0], codes.shape[1]
    try:
        check_size(n, k)
    except ValueError as error:
        raise CheckpointError(f"{where} cannot be used: {prefix} is {error}.") from error
    want = (nk.w4a16_scale_rows(k, GROUP), n)
    for entry in (scales, zeros):
        if entry.dtype not in _SCALE_TYPES or entry.dtype != scales.dtype or entry.shape != want:
            raise CheckpointError(
                f"{where} cannot be used: {entry.key} is {entry.dtype} {list(entry.shape)}, expected F16 or BF16 {list(want)} "
                f"(groups of {GROUP} inputs)."
            )


def _check_plain(where: str, dims: T5Dims, entries: Mapping[str, Entry], quantised: set[str]) -> None:
    """Raises CheckpointError for a plain tensor of a type that no weight has, and for two embeddings of different shapes."""
    plain = [f"{prefix}.weight" for prefix in dims.linears() if prefix not in quantised]
    for key in (*plain, *dims.plain(), *EMBEDDINGS):
        entry = entries.get(key)
        if entry is not None and entry.dtype not in _PLAIN_TYPES:
            raise CheckpointError(f"{where} cannot be used: {key} is {entry.dtype}, expected a 16-bit type.")
    tables = [entries[key].shape for key in EMBEDDINGS if key in entries]
    if len(set(tables)) != 1:
        raise CheckpointError(f"{where} cannot be used: its two copies of the embedding are {list(tables[0])} and {list(tables[1])}.")
