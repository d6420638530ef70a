"""The packed bytes of a 4-bit linear: the only file that knows how they lie.

A `LogicalLinear` holds one linear in plain tensors, as a checkpoint describes it. `plan` decides the layout of one host linear (one or
more quantised GEMMs, its *parts*), `pack` writes the parts into one flat uint8 tensor, `unpack` is its exact inverse, and `views` gives
the kernels typed windows on the same memory.

Layout: a 256-byte header, then for every part the fields below, each starting at a multiple of 256. Np and Kp are N and K rounded up to
multiples of 128, Rp is the rank rounded up to a multiple of 16, S the number of segments, G the quantisation group (64, NVFP4 16).

    codes          uint8  [Np, Kp/2]   byte j of the 128-wide slice s of K: low nibble k = 128s+j, high nibble k = 128s+64+j
    scales         16-bit or e4m3 [Kp/G, Np]                       padding: ones
    zeros          like scales [Kp/64, Np]                         w4a16 only, padding: zeros
    smooth         fp32   [Kp]                                     W4A4 only, padding: ones
    down           16-bit [Kp, S*Rp]                               rank > 0 only, bf16 or fp16 as in the file
    up             16-bit [Np, Rp]                                 rank > 0 only, the same type
    block_scale    like scales [ceil(Kp/1024), Np]                 code form e4m3 only (block_scale.py), padding: ones
    channel_scale  fp32   [Np]                                     NVFP4 only, padding: ones
    shift_bias     fp32   [Np]         SHIFT * rowsum(W4/smooth)   act_unsigned only

The K order lets a kernel take a whole 64-group from the low nibbles and the next from the high ones without moving anything between lanes.

Rows lie in the order of the outputs, except in *paired* parts, whose first N/2 outputs are values and whose last N/2 are their gates:
there 8 values and their 8 gates take turns, in every field that has rows. Matrix instructions leave rows r and r + 8 of 16 in one thread,
which so has a value and its gate. `in_pairs` and `in_order` change one order into the other; a LogicalLinear has the outputs' order.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_scale import BLOCK, block_scale

LAYOUT_VERSION = 4
SHIFT = 0.171875  # added to GELU outputs before they are quantised without a sign (INT4 files); exact in bf16 and fp16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
ALIGN = 256
TILE = 128  # N and K are padded to this
RUN = 8  # values, then as many gates, in the rows of a paired part

_MAGIC = b"TonfaW4\0"
_HEADER = struct.Struct("<8sIIQI")  # magic, version, number of parts, bytes, crc32 of the plan
_GROUP = {"int4": 64, "nvfp4": 16, "w4a16": 64}
_SCALE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn}
_PAIR_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SCALE_NAMES = {dtype: name for name, dtype in _SCALE_DTYPES.items()}


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, eq=False)
class LogicalLinear:
    """One 4-bit linear in plain, unpermuted tensors (N outputs, K inputs): what a checkpoint reader gives and `pack` takes.

    precision      "int4" | "nvfp4" (W4A4) | "w4a16" (modulation layers)
    codes          uint8 [N, K], values 0..15: two's complement nibble (int4), e2m1 code (nvfp4), unsigned code (w4a16)
    scales         [N, K/64] bf16 or fp16 (int4, w4a16); [N, K/16] float8_e4m3fn (nvfp4)
    zeros          [N, K/64], w4a16 only: W = code * scale + zero
    smooth         [K]; the 4-bit branch sees x DIVIDED by it
    down, up       [S*R, K], [N, R], S = len(segments): row n uses rows [i*R, (i+1)*R) of down, i the last segment with segments[i] <= n
    channel_scale  [N] fp32, nvfp4 only: wtscale * wcscales (None = 1)
    bias           [N]; not part of the packed bytes
    act_unsigned   INT4 layers fed by a GELU: activations get +SHIFT and unsigned codes
    Raises ValueError where the tensors do not fit together.
    """

    precision: str
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    smooth: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    channel_scale: Tensor | None = None
    bias: Tensor | None = None
    act_unsigned: bool = False
    segments: tuple[int, ...] = (0,)

    def __post_init__(self):
        if self.precision not in _GROUP:
            raise ValueError(f"precision is {self.precision!r}, expected one of {', '.join(_GROUP)}")
        if self.codes.dtype != torch.uint8 or self.codes.ndim != 2:
            raise ValueError(f"codes are {self.codes.dtype} {tuple(self.codes.shape)}, expected a uint8 matrix [N, K]")
        if self.k % self.group:
            raise ValueError(f"K is {self.k}, expected a multiple of the group size {self.group}")
        allowed = (torch.float8_e4m3fn,) if self.precision == "nvfp4" else (torch.bfloat16, torch.float16)
        if self.scales.dtype not in allowed:
            raise ValueError(f"{self.precision} scales are {self.scales.dtype}, expected {' or '.join(map(str, allowed))}")
        if (self.down is None) != (self.up is None):
            raise ValueError("one half of the low-rank pair is missing: give both down and up, or neither")
        if self.up is not None and (self.up.dtype not in _PAIR_DTYPES.values() or self.down.dtype != self.up.dtype):
            raise ValueError(f"the low-rank pair is {self.down.dtype} and {self.up.dtype}, expected bfloat16 or float16, both the same")
        if (self.zeros is not None) != (self.precision == "w4a16"):
            raise ValueError("zeros belong to w4a16 layers, and every w4a16 layer needs them")
        if self.zeros is not None and self.zeros.dtype != self.scales.dtype:
            raise ValueError(f"zeros are {self.zeros.dtype}, scales {self.scales.dtype}: expected the same type")
        if self.act_unsigned and self.precision != "int4":
            raise ValueError(f"act_unsigned is an INT4 property, this layer is {self.precision}")
        if self.precision == "w4a16" and (self.smooth is not None or self.down is not None):
            raise ValueError("a w4a16 layer has neither smooth nor a low-rank pair")
        self._check_segments()
        groups = (self.n, self.k // self.group)
        shapes = {"scales": groups, "zeros": groups, "smooth": (self.k,), "down": (len(self.segments) * self.rank, self.k)}
        shapes |= {"up": (self.n, self.rank), "channel_scale": (self.n,), "bias": (self.n,)}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")

    def _check_segments(self):
        starts = self.segments
        rising = all(a < b for a, b in zip(starts, starts[1:], strict=False))
        if not starts or starts[0] != 0 or not rising or starts[-1] >= self.n or any(s % TILE for s in starts):
            raise ValueError(f"segments are {starts}, expected rising multiples of {TILE} from 0, below N = {self.n}")

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    @property
    def rank(self) -> int:
        return 0 if self.up is None else self.up.shape[1]

    @property
    def group(self) -> int:
        """Width of a quantisation group along K."""
        return _GROUP[self.precision]


def code_values(codes: Tensor, precision: str) -> Tensor:
    """fp32 values of uint8 codes (any shape), before scales."""
    if precision == "nvfp4":
        return torch.tensor(E2M1, device=codes.device)[codes.to(torch.int32)]
    if precision == "w4a16":
        return codes.float()
    return ((codes.to(torch.int8) ^ 8) - 8).float()


def dense_weight4(layer: LogicalLinear) -> Tensor:
    """fp32 [N, K]: codes * scales (* channel_scale) (+ zeros). No smooth, no low rank."""
    w = code_values(layer.codes, layer.precision).view(layer.n, -1, layer.group)
    w *= layer.scales.float()[:, :, None]
    if layer.zeros is not None:
        w += layer.zeros.float()[:, :, None]
    w = w.view(layer.n, layer.k)
    return w if layer.channel_scale is None else w * layer.channel_scale.float()[:, None]


def dense_weight(layer: LogicalLinear) -> Tensor:
    """fp32 [N, K] of the 16-bit linear that this layer stands for: W4/smooth + up @ down, segment by segment."""
    w = dense_weight4(layer)
    if layer.smooth is not None:
        w /= layer.smooth.float()
    if layer.up is not None:
        ends = (*layer.segments[1:], layer.n)
        for i, (start, end) in enumerate(zip(layer.segments, ends, strict=True)):
            down = layer.down[i * layer.rank : (i + 1) * layer.rank]
            w[start:end] += layer.up[start:end].float() @ down.float()
    return w


def in_pairs(rows: Tensor) -> Tensor:
    """[N, ...], values first and gates last -> the same rows as a paired part stores them."""
    return rows.unflatten(0, (2, -1, RUN)).transpose(0, 1).flatten(0, 2)


def in_order(rows: Tensor) -> Tensor:
    """[N, ...] as a paired part stores them -> values first and gates last; the inverse of in_pairs."""
    return rows.unflatten(0, (-1, 2, RUN)).transpose(0, 1).flatten(0, 2)


def shift_bias(layer: LogicalLinear) -> Tensor:
    """fp32 [N]: SHIFT * rowsum(W4/smooth), what the file's bias of an act_unsigned layer has to gain when x is not shifted."""
    values = code_values(layer.codes, layer.precision).view(layer.n, -1, layer.group)
    inverse = torch.ones(layer.k, device=values.device) if layer.smooth is None else 1.0 / layer.smooth.float()
    groups = torch.einsum("ngk,gk->ng", values, inverse.view(-1, layer.group))
    return SHIFT * (groups * layer.scales.float()).sum(1)


def dense_bias(layer: LogicalLinear) -> Tensor | None:
    """fp32 [N] bias that belongs to `dense_weight`: for act_unsigned layers the file's bias with its compensation taken out."""
    bias = None if layer.bias is None else layer.bias.float()
    if not layer.act_unsigned:
        return bias
    shift = shift_bias(layer)
    return shift if bias is None else bias + shift


def stack_rows(a: LogicalLinear, b: LogicalLinear) -> LogicalLinear:
    """One layer whose outputs are those of a, then those of b (FLUX linear1 = qkv and fc1 on the same input).

    Raises ValueError when the two do not share their quantised input (precision, K, smooth, signedness), when a ends inside a tile, or when
    their low-rank pairs differ in type.
    """
    if (a.precision, a.k, a.act_unsigned, a.scales.dtype) != (b.precision, b.k, b.act_unsigned, b.scales.dtype):
        raise ValueError("the two layers differ in precision, K, scale type or signedness: they cannot share one quantised input")
    if (a.smooth is None) != (b.smooth is None) or (a.smooth is not None and not torch.equal(a.smooth.float(), b.smooth.float())):
        raise ValueError("the two layers have different smooth vectors: they cannot share one quantised input")
    if a.n % TILE:
        raise ValueError(f"the first layer has {a.n} outputs, expected a multiple of {TILE}")
    down, up = _stack_low_rank(a, b)
    return LogicalLinear(
        precision=a.precision,
        codes=torch.cat([a.codes, b.codes]),
        scales=torch.cat([a.scales.view(torch.uint8), b.scales.view(torch.uint8)]).view(a.scales.dtype),
        zeros=None if a.zeros is None else torch.cat([a.zeros, b.zeros]),
        smooth=a.smooth,
        down=down,
        up=up,
        channel_scale=_cat_optional(a, b, "channel_scale", 1.0),
        bias=_cat_optional(a, b, "bias", 0.0),
        act_unsigned=a.act_unsigned,
        segments=a.segments + tuple(a.n + start for start in b.segments),
    )


def _cat_optional(a: LogicalLinear, b: LogicalLinear, name: str, missing: float) -> Tensor | None:
    x, y = getattr(a, name), getattr(b, name)
    if x is None and y is None:
        return None
    like = x if x is not None else y
    x = torch.full((a.n,), missing, dtype=like.dtype, device=like.device) if x is None else x
    y = torch.full((b.n,), missing, dtype=like.dtype, device=like.device) if y is None else y
    dtype = torch.promote_types(x.dtype, y.dtype)
    return torch.cat([x.to(dtype), y.to(dtype)])


def _stack_low_rank(a: LogicalLinear, b: LogicalLinear) -> tuple[Tensor | None, Tensor | None]:
    rank = max(a.rank, b.rank)
    if rank == 0:
        return None, None
    downs, ups = [], []
    dtypes = {t.dtype for t in (a.up, b.up) if t is not None}
    if len(dtypes) > 1:
        raise ValueError("the low-rank pairs of the two layers differ in type: they cannot be stacked")
    dtype = dtypes.pop()
    for layer in (a, b):
        if layer.up is None:
            downs.append(torch.zeros(len(layer.segments) * rank, layer.k, dtype=dtype, device=layer.codes.device))
            ups.append(torch.zeros(layer.n, rank, dtype=dtype, device=layer.codes.device))
            continue
        down = layer.down.view(len(layer.segments), layer.rank, layer.k)
        downs.append(F.pad(down, (0, 0, 0, rank - layer.rank)).reshape(-1, layer.k))
        ups.append(F.pad(layer.up, (0, rank - layer.rank)))
    return torch.cat(downs), torch.cat(ups)


@dataclass(frozen=True)
class Field:
    """Where one tensor of a part lies inside the blob."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True)
class PartSpec:
    """One quantised GEMM inside one host linear. n, k and rank are the true, unpadded sizes.

    code_form: int4 "int8" (two's complement nibbles) or "e4m3" (sign-magnitude nibbles, the spare code 0b1000 is -8); nvfp4 "e2m1";
    w4a16 "u4". scale_dtype: "bf16", "fp16" or "e4m3". pair_dtype (low rank): "bf16" or "fp16". row_offset and col_offset: where its
    rows and columns lie inside the host linear. paired: its rows are stored in pairs (see the file's docstring).
    """

    precision: str
    n: int
    k: int
    rank: int
    segments: tuple[int, ...]
    act_unsigned: bool
    code_form: str
    scale_dtype: str
    pair_dtype: str
    has_channel_scale: bool
    row_offset: int = 0
    col_offset: int = 0
    paired: bool = False

    @property
    def group(self) -> int:
        return _GROUP[self.precision]

    @property
    def n_padded(self) -> int:
        return _round_up(self.n, TILE)

    @property
    def k_padded(self) -> int:
        return _round_up(self.k, TILE)

    @property
    def rank_padded(self) -> int:
        return _round_up(self.rank, 16)

    def _shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        np, kp, rp = self.n_padded, self.k_padded, self.rank_padded
        scale = _SCALE_DTYPES[self.scale_dtype]
        shapes = {"codes": (torch.uint8, (np, kp // 2)), "scales": (scale, (kp // self.group, np))}
        if self.precision == "w4a16":
            shapes["zeros"] = (scale, (kp // self.group, np))
        else:
            shapes["smooth"] = (torch.float32, (kp,))
        if self.rank:
            pair = _PAIR_DTYPES[self.pair_dtype]
            shapes["down"] = (pair, (kp, len(self.segments) * rp))
            shapes["up"] = (pair, (np, rp))
        if self.code_form == "e4m3":
            shapes["block_scale"] = (scale, (-(-kp // BLOCK), np))
        if self.has_channel_scale:
            shapes["channel_scale"] = (torch.float32, (np,))
        if self.act_unsigned:
            shapes["shift_bias"] = (torch.float32, (np,))
        return shapes


@dataclass(frozen=True)
class PackSpec:
    """The layout of one host linear's `weight`. Hashable; equal specs describe equal bytes."""

    out_features: int
    in_features: int
    parts: tuple[PartSpec, ...]

    @property
    def nbytes(self) -> int:
        return _lay_out(self)[1]

    def offsets(self, i: int) -> dict[str, Field]:
        """Fields of part i by name."""
        return _lay_out(self)[0][i]


@lru_cache(maxsize=4096)
def _lay_out(spec: PackSpec) -> tuple[tuple[dict[str, Field], ...], int]:
    at, parts = ALIGN, []
    for part in spec.parts:
        fields = {}
        for name, (dtype, shape) in part._shapes().items():
            fields[name] = Field(at, dtype, shape)
            at = _round_up(at + fields[name].nbytes, ALIGN)
        parts.append(fields)
    return tuple(parts), at


def _header(spec: PackSpec) -> bytes:
    crc = zlib.crc32(repr(spec).encode())
    return _HEADER.pack(_MAGIC, LAYOUT_VERSION, len(spec.parts), spec.nbytes, crc).ljust(ALIGN, b"\0")


@dataclass(frozen=True, eq=False)
class Columns:
    """Further columns of a part's low-rank branch, beside the blob (LoRA). down [Kp, S * R], up [Np, R], both of one float type.

    R is a multiple of 16. segments: where each of the S stretches of rows begins that have columns of their own, multiples of TILE.
    The rows of up lie as the part's do.
    """

    down: Tensor
    up: Tensor
    segments: tuple[int, ...] = (0,)


@dataclass(eq=False)
class PartView:
    """Typed, zero-copy windows on one part of a blob, padded sizes (see the file's docstring); absent fields are None.

    extra: what belongs beside them, from elsewhere.
    """

    spec: PartSpec
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    smooth: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    block_scale: Tensor | None = None
    channel_scale: Tensor | None = None
    shift_bias: Tensor | None = None
    extra: Columns | None = None


def plan(
    out_features: int, in_features: int, parts: list[tuple[LogicalLinear, int, int]], code_form: str, paired: bool = False
) -> PackSpec:
    """Layout of a host linear [out_features, in_features] made of parts (layer, row_offset, col_offset).

    code_form ("int8" or "e4m3") is what the device multiplies INT4 codes in; other precisions have one form only.
    paired: the linear ends in SwiGLU; its rows are stored in pairs.
    Raises ValueError when a part lies outside the host linear, the code form is unknown or the rows cannot be paired.
    """
    if code_form not in ("int8", "e4m3"):
        raise ValueError(f"code form is {code_form!r}, expected 'int8' or 'e4m3'")
    if paired:
        _check_paired(out_features, parts)
    specs = []
    for layer, row, col in parts:
        if row < 0 or col < 0 or row + layer.n > out_features or col + layer.k > in_features:
            raise ValueError(
                f"a part of {layer.n} x {layer.k} at row {row}, column {col} does not fit a linear of {out_features} x {in_features}"
            )
        specs.append(
            PartSpec(
                precision=layer.precision,
                n=layer.n,
                k=layer.k,
                rank=layer.rank,
                segments=tuple(layer.segments),
                act_unsigned=layer.act_unsigned,
                code_form={"int4": code_form, "nvfp4": "e2m1", "w4a16": "u4"}[layer.precision],
                scale_dtype=_SCALE_NAMES[layer.scales.dtype],
                pair_dtype=_pair_name(layer),
                has_channel_scale=layer.channel_scale is not None,
                row_offset=row,
                col_offset=col,
                paired=paired,
            )
        )
    return PackSpec(out_features, in_features, tuple(specs))


def _check_paired(out_features: int, parts: list[tuple[LogicalLinear, int, int]]) -> None:
    layer = parts[0][0]
    whole = len(parts) == 1 and layer.n == out_features and layer.segments == (0,)
    if not whole or layer.n % (2 * RUN) or layer.act_unsigned or layer.precision == "w4a16":
        found = f"{len(parts)} parts, the first {layer.precision}{' unsigned' if layer.act_unsigned else ''} with {layer.n} rows"
        raise ValueError(
            f"a linear whose values and gates are paired is one signed W4A4 part in one segment, its rows a multiple of {2 * RUN}: "
            f"this one has {out_features} rows and {found} in {len(layer.segments)} segments"
        )


def _pair_name(layer: LogicalLinear) -> str:
    return "fp16" if layer.up is not None and layer.up.dtype == torch.float16 else "bf16"


def _sign_magnitude(codes: Tensor) -> Tensor:
    """Two's complement nibbles to sign-magnitude ones and back: its own inverse, -8 is 0b1000 in both. uint8 in, uint8 out."""
    return torch.where(codes >= 8, ((0 - codes) & 7) | 8, codes)


def _pack_nibbles(codes: Tensor, spec: PartSpec) -> Tensor:
    if spec.code_form == "e4m3":
        codes = _sign_magnitude(codes)
    if spec.k != spec.k_padded:
        codes = F.pad(codes, (0, spec.k_padded - spec.k))
    halves = codes.reshape(spec.n, -1, 2, 64)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).view(spec.n, -1)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, Kp/2] of a part's `codes` field -> uint8 [N, Kp], one nibble a byte in natural K order, code form kept."""
    halves = packed.reshape(packed.shape[0], -1, 1, 64)
    return torch.cat([halves & 15, halves >> 4], dim=2).view(packed.shape[0], -1)


def signed_codes(view: PartView) -> Tensor:
    """int8 [Np, Kp]: the values -8..7 of an int4 part, whatever its code form."""
    nibbles = unpack_nibbles(view.codes)
    if view.spec.code_form == "e4m3":
        nibbles = _sign_magnitude(nibbles)
    return (nibbles.to(torch.int8) ^ 8) - 8


def pack(spec: PackSpec, layers: list[LogicalLinear], out: Tensor | None = None) -> Tensor:
    """The layers of `spec.parts`, in order, as one uint8 [spec.nbytes] on the layers' device (or written into `out`, on any device).

    Raises ValueError when a layer is not what the plan was made for.
    """
    if len(layers) != len(spec.parts):
        raise ValueError(f"{len(layers)} layers given, the plan has {len(spec.parts)} parts")
    if out is None:
        out = torch.zeros(spec.nbytes, dtype=torch.uint8, device=layers[0].codes.device)
    elif tuple(out.shape) != (spec.nbytes,) or out.dtype != torch.uint8:
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, expected uint8 [{spec.nbytes}]")
    else:
        out.zero_()
    out[:ALIGN].copy_(torch.frombuffer(bytearray(_header(spec)), dtype=torch.uint8))
    for view, layer in zip(views(spec, out), layers, strict=True):
        _check_layer(view.spec, layer)
        _fill(view, _reordered(layer, in_pairs) if view.spec.paired else layer)
    return out


def _reordered(layer: LogicalLinear, order: Callable[[Tensor], Tensor]) -> LogicalLinear:
    """The layer with its rows in another order; the bias, which is not packed, stays."""
    fields = ("codes", "scales", "up", "channel_scale")
    return replace(layer, **{name: order(t) for name in fields if (t := getattr(layer, name)) is not None})


def _check_layer(part: PartSpec, layer: LogicalLinear) -> None:
    found = (layer.precision, layer.n, layer.k, layer.rank, tuple(layer.segments), layer.act_unsigned)
    found += (_SCALE_NAMES[layer.scales.dtype], _pair_name(layer), layer.channel_scale is not None)
    planned = (part.precision, part.n, part.k, part.rank, part.segments, part.act_unsigned)
    planned += (part.scale_dtype, part.pair_dtype, part.has_channel_scale)
    if found != planned:
        raise ValueError(
            f"the layer (precision, N, K, rank, segments, unsigned, scales, pair, channel scale) is {found}, planned was {planned}"
        )


def _fill(view: PartView, layer: LogicalLinear) -> None:
    part = view.spec
    n, k, groups, rank = part.n, part.k, part.k // part.group, part.rank
    view.codes[:n].copy_(_pack_nibbles(layer.codes, part))
    if (n, k) != (part.n_padded, part.k_padded):
        view.scales.copy_(torch.ones((), dtype=torch.float32).expand(view.scales.shape))
    view.scales[:groups, :n].copy_(layer.scales.t())
    if view.zeros is not None:
        view.zeros[:groups, :n].copy_(layer.zeros.t())
    if view.smooth is not None:
        view.smooth.fill_(1.0)
        if layer.smooth is not None:
            view.smooth[:k].copy_(layer.smooth)
    if view.down is not None:
        for i in range(len(part.segments)):
            at = i * part.rank_padded
            view.down[:k, at : at + rank].copy_(layer.down[i * rank : (i + 1) * rank].t())
        view.up[:n, :rank].copy_(layer.up)
    if view.block_scale is not None:
        view.block_scale.fill_(1.0)
        view.block_scale[:, :n].copy_(block_scale(layer.scales).t())
    if view.channel_scale is not None:
        view.channel_scale.fill_(1.0)
        view.channel_scale[:n].copy_(layer.channel_scale)
    if view.shift_bias is not None:
        view.shift_bias[:n].copy_(shift_bias(layer))


def largest_weight(spec: PackSpec, blob: Tensor) -> float:
    """An upper bound of any |dense weight| in a blob, from its scales and low-rank pair alone."""
    bound = 0.0
    for view in views(spec, blob):
        code = {"int4": 8.0, "nvfp4": 6.0, "w4a16": 15.0}[view.spec.precision]
        weight = code * view.scales.float().abs().max()
        if view.zeros is not None:
            weight = weight + view.zeros.float().abs().max()
        if view.channel_scale is not None:
            weight = weight * view.channel_scale.abs().max()
        if view.smooth is not None:
            weight = weight / view.smooth.abs().min()
        if view.up is not None:
            weight = weight + view.spec.rank * view.up.float().abs().max() * view.down.float().abs().max()
        bound = max(bound, float(weight))
    return bound


def views(spec: PackSpec, blob: Tensor) -> list[PartView]:
    """Typed windows on the parts of a blob; nothing is copied and the header is not read (that would wait for the device).

    Raises ValueError when the blob is not a contiguous uint8 [spec.nbytes].
    """
    if blob.dtype != torch.uint8 or tuple(blob.shape) != (spec.nbytes,) or not blob.is_contiguous():
        raise ValueError(f"the packed weight is {blob.dtype} {list(blob.shape)}, expected contiguous uint8 [{spec.nbytes}]")
    result = []
    for i, part in enumerate(spec.parts):
        fields = {name: blob[f.offset : f.offset + f.nbytes].view(f.dtype).view(f.shape) for name, f in spec.offsets(i).items()}
        result.append(PartView(part, **fields))
    return result


def check_header(spec: PackSpec, blob: Tensor) -> None:
    """Raises ValueError when the blob was not written by this version of `pack` for this plan. Reads 28 bytes from the device."""
    if blob.dtype != torch.uint8 or tuple(blob.shape) != (spec.nbytes,):
        found = f"the packed weight is {blob.dtype} {list(blob.shape)}, expected uint8 [{spec.nbytes}]"
        raise ValueError(f"{found}: it was packed for another layer, another kind of GPU or by another Tonfa. Load the checkpoint again")
    magic, version, parts, nbytes, crc = _HEADER.unpack(bytes(blob[: _HEADER.size].tolist()))
    if magic != _MAGIC:
        raise ValueError("the packed weight does not start with Tonfa's mark: it was overwritten, or is not a packed weight")
    if version != LAYOUT_VERSION:
        raise ValueError(f"the packed weight has layout version {version}, this Tonfa reads {LAYOUT_VERSION}: load the checkpoint again")
    _, _, want_parts, want_nbytes, want_crc = _HEADER.unpack(_header(spec)[: _HEADER.size])
    if (parts, nbytes, crc) != (want_parts, want_nbytes, want_crc):
        raise ValueError("the packed weight belongs to another layer or was packed for another kind of GPU: load the checkpoint again")


def unpack(spec: PackSpec, blob: Tensor) -> list[LogicalLinear]:
    """Exact inverse of `pack` (bias None; smooth comes back as fp32). Raises ValueError as `check_header`."""
    check_header(spec, blob)
    return [unpack_view(view) for view in views(spec, blob)]


def unpack_view(view: PartView) -> LogicalLinear:
    """One part as a LogicalLinear (bias None, smooth fp32). Unlike `unpack` it does not wait for the device."""
    part = view.spec
    n, k, groups, rank = part.n, part.k, part.k // part.group, part.rank
    codes = unpack_nibbles(view.codes)[:n, :k]
    down = None
    if view.down is not None:
        down = view.down[:k].view(k, len(part.segments), part.rank_padded)[:, :, :rank].permute(1, 2, 0).reshape(-1, k)
    layer = LogicalLinear(
        precision=part.precision,
        codes=(_sign_magnitude(codes) if part.code_form == "e4m3" else codes).contiguous(),
        scales=view.scales[:groups, :n].t().contiguous(),
        zeros=None if view.zeros is None else view.zeros[:groups, :n].t().contiguous(),
        smooth=None if view.smooth is None else view.smooth[:k].clone(),
        down=down,
        up=None if view.up is None else view.up[:n, :rank].contiguous(),
        channel_scale=None if view.channel_scale is None else view.channel_scale[:n].clone(),
        act_unsigned=part.act_unsigned,
        segments=part.segments,
    )
    return _reordered(layer, in_order) if part.paired else layer
