"""The packed bytes of a linear of the 4-bit T5 encoder: the only file that knows how they lie.

Weights are W[n, k] = code * scale + zero, code 0..15, a scale and a zero for every 128 inputs of an output. One uint8 tensor holds it all,
each field at a multiple of 256, N outputs, K inputs, G = K/128; nothing is padded (N is a multiple of 4, K of 128):

    header   256 bytes: magic, version, N, K, type of the scales, bytes
    codes    uint8  [N, K/2]   byte j of a slice of 128 inputs: low nibble k = 128s+j, high nibble k = 128s+64+j
    scales   16-bit [N, G]
    zeros    16-bit [N, G]     the same type

Slice i of the codes (64 bytes) belongs to element i of scales and zeros, so rows n to m are a contiguous piece of each field.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .layout import ALIGN, Field, unpack_nibbles

T5_LAYOUT_VERSION = 1
GROUP = 128  # inputs that share a scale and a zero

_MAGIC = b"TonfaT5\0"
_HEADER = struct.Struct("<8sIIII Q")  # magic, version, N, K, type of the scales, bytes
_SCALE_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class T5Linear:
    """One linear in plain tensors: codes uint8 [N, K], values 0..15; scales and zeros [N, K/128], both fp16 or both bf16.

    Raises ValueError where the tensors do not fit together, N is no multiple of 4 or K none of 128.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __post_init__(self):
        if self.codes.dtype != torch.uint8 or self.codes.ndim != 2:
            raise ValueError(f"codes are {self.codes.dtype} {list(self.codes.shape)}, expected a uint8 matrix [N, K]")
        check_size(self.n, self.k)
        for name in ("scales", "zeros"):
            found = getattr(self, name)
            if found.dtype not in _SCALE_DTYPES or found.dtype != self.scales.dtype:
                raise ValueError(f"{name} are {found.dtype}, expected float16 or bfloat16, scales and zeros alike")
            if tuple(found.shape) != (self.n, self.k // GROUP):
                raise ValueError(f"{name} have shape {list(found.shape)}, expected {[self.n, self.k // GROUP]}")

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]


def check_size(n: int, k: int) -> None:
    """Raises ValueError for a linear that neither the file format nor the kernels can hold."""
    if n < 4 or n % 4 or k < GROUP or k % GROUP or n * k >= 2**31:
        raise ValueError(
            f"a linear of {n} x {k}: expected outputs in multiples of 4, inputs in multiples of {GROUP}, fewer than 2^31 weights"
        )


@dataclass(frozen=True)
class T5Spec:
    """The layout of one linear. Hashable.

    The constants are what a LoRA's columns are planned by: the linear is its own only part, and nothing is padded.
    """

    n: int
    k: int
    scale_dtype: torch.dtype

    row_offset: ClassVar[int] = 0
    col_offset: ClassVar[int] = 0
    act_unsigned: ClassVar[bool] = False
    paired: ClassVar[bool] = False

    @property
    def parts(self) -> tuple[T5Spec]:
        return (self,)

    @property
    def out_features(self) -> int:
        return self.n

    @property
    def in_features(self) -> int:
        return self.k

    @property
    def n_padded(self) -> int:
        return self.n

    @property
    def k_padded(self) -> int:
        return self.k

    @property
    def fields(self) -> dict[str, Field]:
        groups = (self.n, self.k // GROUP)
        shapes = {"codes": (torch.uint8, (self.n, self.k // 2)), "scales": (self.scale_dtype, groups), "zeros": (self.scale_dtype, groups)}
        at, found = ALIGN, {}
        for name, (dtype, shape) in shapes.items():
            found[name] = Field(at, dtype, shape)
            at += -(-found[name].nbytes // ALIGN) * ALIGN
        return found

    @property
    def nbytes(self) -> int:
        last = self.fields["zeros"]
        return last.offset + -(-last.nbytes // ALIGN) * ALIGN


@dataclass(frozen=True, eq=False)
class T5View:
    """Typed, zero-copy windows on a blob."""

    spec: T5Spec
    codes: Tensor
    scales: Tensor
    zeros: Tensor


def pack(layer: T5Linear) -> Tensor:
    """The blob, uint8 [nbytes], on the device of the layer's codes."""
    spec = T5Spec(layer.n, layer.k, layer.scales.dtype)
    blob = torch.zeros(spec.nbytes, dtype=torch.uint8, device=layer.codes.device)
    header = _HEADER.pack(_MAGIC, T5_LAYOUT_VERSION, spec.n, spec.k, _SCALE_DTYPES.index(spec.scale_dtype), spec.nbytes)
    blob[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    view = views(spec, blob)
    low, high = layer.codes.view(layer.n, -1, 2, 64).unbind(2)
    view.codes.copy_((low | (high << 4)).view(layer.n, -1))
    view.scales.copy_(layer.scales)
    view.zeros.copy_(layer.zeros)
    return blob


def read_spec(blob: Tensor) -> T5Spec:
    """The spec in a blob's header (fetched from the GPU if it lies there). Raises ValueError for other bytes and other versions."""
    start = bytes(blob.reshape(-1).view(torch.uint8)[: _HEADER.size].tolist())
    if len(start) < _HEADER.size or not start.startswith(_MAGIC):
        raise ValueError("these bytes are no packed T5 linear")
    _, version, n, k, kind, nbytes = _HEADER.unpack(start)
    if version != T5_LAYOUT_VERSION or kind >= len(_SCALE_DTYPES):
        raise ValueError(f"this T5 linear was packed in version {version} of the layout, expected {T5_LAYOUT_VERSION}: load its file again")
    spec = T5Spec(n, k, _SCALE_DTYPES[kind])
    if not spec.nbytes == nbytes == blob.numel():
        raise ValueError(f"this packed T5 linear has {blob.numel()} bytes, expected {spec.nbytes}")
    return spec


def views(spec: T5Spec, blob: Tensor) -> T5View:
    """The windows of a blob. Raises ValueError when it has another type or size than the spec's."""
    if blob.dtype != torch.uint8 or tuple(blob.shape) != (spec.nbytes,):
        raise ValueError(f"the blob is {blob.dtype} {list(blob.shape)}, expected uint8 [{spec.nbytes}]")
    found = {name: blob[f.offset : f.offset + f.nbytes].view(f.dtype).view(f.shape) for name, f in spec.fields.items()}
    return T5View(spec, **found)


def unpack(view: T5View) -> T5Linear:
    """Exact inverse of `pack` and `views`; scales and zeros stay windows."""
    return T5Linear(unpack_nibbles(view.codes), view.scales, view.zeros)
