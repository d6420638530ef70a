"""Safetensors files: a header that is checked before anything is read, lazy memory-mapped tensors, and a writer that streams.

The header is parsed here, not only by the safetensors package, because a person needs to be told what is wrong with a file, and because
the package lets duplicate names pass.
"""

import codecs
import json
import logging
import math
import os
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

log = logging.getLogger(__name__)

# safetensors name -> bits of one element
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip
TORCH_NAMES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
}  # fmt: skip
_MAGIC = {
    b"\x1f\x8b": "a gzip archive", b"7z\xbc\xaf": "a 7-Zip archive", b"Rar!": "a RAR archive", b"\x28\xb5\x2f\xfd": "a Zstandard archive",
    b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"%PDF": "a PDF document", b"\x93NUMPY": "a NumPy array",
}  # fmt: skip
MAX_HEADER = 100_000_000  # the safetensors package's own limit


class CheckpointError(ValueError):
    """A file cannot be used. The message is one or two sentences for the person at the node."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its name there, safetensors dtype name and shape."""

    file: "TensorFile"
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPE_BITS[self.dtype] * math.prod(self.shape) // 8

    def load(self, device: str | torch.device = "cpu") -> Tensor:
        """The tensor, on `device`. On the CPU it may be a view of the memory-mapped file: do not write into it."""
        return self.file.load(self.key, device)


class TensorFile:
    """A safetensors file whose header has been checked. Raises CheckpointError when it is not one.

    `entries` maps names to Entry, `metadata` is the string map of the header. The file is mapped on the first tensor read and
    stays so until close().
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._handle = None
        header, data_bytes = _read_header(self.path)
        metadata = header.pop("__metadata__", None)
        self.metadata: dict[str, str] = _check_metadata(self.path, {} if metadata is None else metadata)
        self.entries = {key: Entry(self, key, *_check_entry(self.path, key, info)) for key, info in header.items()}
        _check_offsets(self.path, header, data_bytes)

    def load(self, key: str, device: str | torch.device = "cpu") -> Tensor:
        try:
            if self._handle is None:
                self._handle = safe_open(str(self.path), framework="pt", device="cpu")
            t = self._handle.get_tensor(key)
        except Exception as e:  # the package raises several unrelated types
            raise CheckpointError(f"{self.path}: tensor {key} cannot be read: {e}") from e
        return t.to(device)

    def close(self) -> None:
        """Drop the mapping (Windows cannot replace or delete a mapped file). The next load() maps it again."""
        self._handle = None


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"{twice!r} is there twice")
    return out


def _read_header(path: Path) -> tuple[dict, int]:
    """(header JSON object, number of data bytes behind it)."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            start = f.read(512)
            if why := what_instead(path, start, size):
                raise CheckpointError(why)
            length = struct.unpack("<Q", start[:8])[0]
            seems = _looks_like(start)
            if seems and 8 + length > min(size, MAX_HEADER):
                raise CheckpointError(f"{path} is not a safetensors file: it looks like {seems}. Download it again.")
            if length > MAX_HEADER:
                raise CheckpointError(
                    f"{path} is not a safetensors file: its first bytes would mean a header of {length} bytes. Download it again."
                )
            if 8 + length > size:
                raise CheckpointError(
                    f"{path} is cut off or not a safetensors file: its header should be {length} bytes long, the file has {size} bytes "
                    "in all. Download it again."
                )
            f.seek(8)
            raw = f.read(length)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}.") from e
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{path} is not a usable safetensors file: its header cannot be read ({e}). Download it again.") from e
    return header, size - 8 - length


def what_instead(path: Path, start: bytes, size: int) -> str | None:
    """A sentence when the first bytes show that this is no safetensors file, else None."""
    if size == 0:
        return f"{path} is empty (0 bytes): the download did not happen or was cut off. Download it again."
    if start[8:9] == b"{":  # a header; its length may start like anything, a pickle's mark included
        return None
    if start.startswith(b"GGUF"):
        return f"{path} is a GGUF file; load it with 'Unet Loader (GGUF)' of ComfyUI-GGUF, not here."
    if start.startswith(b"PK\x03\x04") and b"data.pkl" not in start:
        return f"{path} is a zip archive, not a safetensors file. Unpack it and choose what is in it, or download the model file itself."
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return (
            f"{path} is a PyTorch pickle (.pt, .ckpt or .bin), not a safetensors file. Such files can run code, so this pack never opens "
            "them; the stock loaders (Load Diffusion Model, Load Checkpoint) can."
        )
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the file itself. Fetch it with 'git lfs pull', or download it from the model page."
    if start.lstrip()[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"{path} is a web page, not a model: the download gave a log-in or error page. Download it again."
    if not any(start):
        return f"{path} holds zeros where its header should be, as a download does that was never finished. Download it again."
    if size < 10:
        return f"{path} is not a safetensors file: it has only {size} bytes. Download it again."
    return None


def _looks_like(start: bytes) -> str | None:
    """What the first bytes of a file show it to be, for a file that is not safetensors; None when they show nothing."""
    if known := next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None):
        return known
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # the last character may be cut
    except UnicodeDecodeError:
        return None
    if all(c.isprintable() or c in "\r\n\t" for c in text):
        return f"text, beginning {_short(' '.join(text.split())[:40])}"
    return None


def _check_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path} is not a usable safetensors file: its __metadata__ is not a map of strings. Download it again.")
    return metadata


def _is_count(x: object) -> bool:
    return type(x) is int and 0 <= x < 2**63


def _check_entry(path: Path, key: str, info: object) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape) of one header entry, its byte range checked against them."""
    bad = f"{path} is not a usable safetensors file: the header entry of {key} "
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(bad + f"should have dtype, shape and data_offsets, found {_short(info)}.")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(bad + f"has an unknown dtype {_short(dtype)}.")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_count(x) for x in shape):
        raise CheckpointError(bad + f"has an impossible shape {_short(shape)}.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(x) for x in offsets):
        raise CheckpointError(bad + f"has impossible data_offsets {_short(offsets)}.")
    bits = DTYPE_BITS[dtype] * math.prod(shape)
    if bits != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(
            bad + f"contradicts itself: {dtype} {_short(shape)} needs {bits / 8:g} bytes, its range has {offsets[1] - offsets[0]}."
        )
    return dtype, tuple(shape)


def _check_offsets(path: Path, header: dict, data_bytes: int) -> None:
    """Byte ranges must follow each other without hole or overlap and end where the file ends."""
    at = 0
    for start, end, key in sorted((*info["data_offsets"], key) for key, info in header.items()):
        if start != at:
            raise CheckpointError(f"{path} is not a usable safetensors file: the data of {key} starts at byte {start}, expected {at}.")
        at = end
    if at > data_bytes:
        raise CheckpointError(
            f"{path} is cut off: its tensors need {at / 1e6:.1f} MB, {data_bytes / 1e6:.1f} MB are there. Download it again."
        )
    if at < data_bytes:
        raise CheckpointError(
            f"{path} is not a usable safetensors file: {data_bytes - at} bytes follow the last tensor. Download it again."
        )


def _short(x: object) -> str:
    text = repr(x)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class Slot:
    """A tensor still to be written: name, torch dtype, shape, and a call that makes it when its turn comes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def stream_save(path: str | os.PathLike, slots: Iterable[Slot], metadata: dict[str, str] | None = None,
                progress: Callable[[int, int], None] | None = None) -> None:  # fmt: skip
    """Write a safetensors file with one tensor in memory at a time.

    The file gets a temporary name beside `path` and is renamed when complete, so `path` is never half written; the temporary file
    is removed when anything fails. `progress(done, total)` counts bytes. ValueError when a tensor is not what its slot announced;
    CheckpointError when the file cannot be written.
    """
    slots = list(slots)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    total = 0
    for s in slots:
        if s.key in header:
            raise ValueError(f"tensor {s.key} would be written twice")
        end = total + math.prod(s.shape) * s.dtype.itemsize
        header[s.key] = {"dtype": TORCH_NAMES[s.dtype], "shape": list(s.shape), "data_offsets": [total, end]}
        total = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data start aligned to 8 bytes, as the package does
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            done = 0
            for s in slots:
                done += f.write(_bytes_of(s))
                if progress:
                    progress(done, total)
        os.replace(part, path)
    except BaseException as e:  # also a cancelled run must not leave 24 GB lying about
        with suppress(OSError):
            part.unlink()
        if isinstance(e, OSError):  # it names the temporary file, which says nothing to anybody
            raise CheckpointError(f"{path} cannot be written: {e.strerror or e}.") from e
        raise


def _bytes_of(slot: Slot) -> memoryview:
    t = slot.make().detach()
    if t.dtype != slot.dtype or tuple(t.shape) != tuple(slot.shape):
        raise ValueError(f"tensor {slot.key} is {t.dtype} {tuple(t.shape)}, announced as {slot.dtype} {tuple(slot.shape)}")
    return memoryview(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
