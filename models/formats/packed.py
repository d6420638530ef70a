"""A checked SVDQuant checkpoint of any family, and how its linears come out of it: one at a time, from the mapped file, unpacked on the
device that is asked for. checkpoint.py opens them.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.layout import LogicalLinear, stack_rows
from . import nunchaku as nk
from .flux_names import FluxDims, HostLinear, LayerSpec
from .layout import Layout, Piece
from .qwen_names import QwenDims
from .tensorfile import CheckpointError, Entry, TensorFile
from .zimage_names import ZImageDims

log = logging.getLogger(__name__)


@dataclass
class PackedCheckpoint:
    """A checked SVDQuant checkpoint. Nothing of the weights is in memory until it is asked for.

    path           what was opened (file or folder)
    family         "flux" | "qwen-image" | "z-image"
    precision      "int4" | "nvfp4" of its W4A4 layers
    rank           the most common rank; `ranks` has all of them
    config         the host's unet_config (image_model, in_channels, hidden_size, depth, axes_dim, ...)
    model_class    the host's class of model: "Flux" | "FluxSchnell" | "QwenImage" | "ZImage"
    metadata       the file's metadata, as strings
    warnings       what was odd but bearable (logged when opened)
    dims           its sizes
    tensors        internal name (see layout.py; for FLUX.1 the v1 name) -> Entry of every tensor in the file
    layout         what the file holds, every linear marked with its precision
    """

    path: Path
    precision: str
    rank: int
    ranks: list[int]
    config: dict
    model_class: str
    metadata: dict[str, str]
    warnings: list[str]
    dims: FluxDims | QwenDims | ZImageDims
    tensors: dict[str, Entry]
    files: list[TensorFile]
    layout: Layout
    family: str = "flux"

    def host_linears(self) -> list[HostLinear]:
        """Every linear of the host's blocks, block by block. kind "plain" are those the file left in 16 bit (see plain_tensors)."""
        return list(self.layout.linears)

    def pieces(self, host: HostLinear) -> tuple[Piece, ...]:
        """The host's own linears that the rows of `host` are, top to bottom: itself, or q, k and v, or value and gate."""
        return self.layout.pieces(host)

    def load_linear(self, host: HostLinear, device: str | torch.device = "cpu") -> list[tuple[LogicalLinear, int, int]]:
        """The parts of one quantised host linear as (layer, row offset, column offset), unpacked on `device`.

        FLUX.1's linear1 is one stacked part when its two layers share their smoothing, else two row parts, each with its own bias rows.
        Its linear2 is two column parts; the sum of both biases is on the last. Everything else is one part; what its rows are, pieces()
        tells. W4A16 layers come in native row order with native biases (fp32, the +1 taken off); the bias is None where the family has
        none. CheckpointError names the key of a tensor with values that cannot be right.
        """
        if host.kind == "plain":
            raise ValueError(f"{host.name} is not quantised in this file; plain_tensors() gives it")
        parts = [(self.load_layer(prefix, device), row, col) for prefix, row, col in host.parts]
        if len(parts) == 1:
            return parts
        (a, row_a, col_a), (b, row_b, col_b) = parts
        if col_b:
            return [(_with_bias(a, None), row_a, col_a), (_with_bias(b, _sum_bias(a.bias, b.bias)), row_b, col_b)]
        if a.up.dtype == b.up.dtype:
            try:
                return [(stack_rows(a, b), 0, 0)]
            except ValueError as e:
                log.debug("%s: kept as two parts: %s", host.name, e)
        return parts

    def plain_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(native name, CPU tensor) of everything that is not quantised, under the names of the host's own class and in its order
        of rows: halves that the file swaps are swapped back, stacked linears taken apart.

        The tensors may be views of the mapped file: copy them, do not write into them.
        """
        for native, make in self.plain_loaders().items():
            yield native, make()

    def plain_loaders(self) -> dict[str, Callable[[], Tensor]]:
        """plain_tensors(), each loaded and checked when its function is called."""
        return {native: make for native, _, _, make in self._plain()}

    def outside_blocks(self) -> dict[str, Tensor]:
        """plain_tensors() around the blocks: embedders, final layer."""
        stacks = {host.name.partition(".")[0] for host in self.layout.linears}
        return {name: make() for name, make in self.plain_loaders().items() if name.partition(".")[0] not in stacks}

    def plain_specs(self) -> list[tuple[str, tuple[int, ...], str]]:
        """(native name, shape, safetensors dtype) of what plain_tensors yields, in its order, from the header alone."""
        return [(native, shape, dtype) for native, shape, dtype, _ in self._plain()]

    def close(self) -> None:
        """Let go of the file. Anything asked for later maps it again."""
        for f in self.files:
            f.close()

    def _plain(self) -> Iterator[tuple]:
        for native, key, shape in self.layout.plains:
            swap = bool(self.layout.swapped) and native.startswith(self.layout.swapped)
            yield native, shape, self.tensors[key].dtype, partial(_load_plain, [self.tensors[key]], swap)
        for host in self.layout.linears:
            if host.kind == "plain":
                yield from self._plain_columns(host) if host.parts[-1][2] else self._plain_rows(host)

    def _plain_columns(self, host: HostLinear) -> Iterator[tuple]:
        """A linear that the file left in 16 bit in two halves, side by side: their biases are added."""
        weights = [self.tensors[f"{p}.weight"] for p, _, _ in host.parts]
        biases = [self.tensors[f"{p}.bias"] for p, _, _ in host.parts]
        shape = (host.out_features, host.in_features)
        yield f"{host.name}.weight", shape, weights[0].dtype, partial(_load_plain, weights, False, dim=1)
        yield f"{host.name}.bias", shape[:1], biases[0].dtype, partial(_load_plain_sum, biases)

    def _plain_rows(self, host: HostLinear) -> Iterator[tuple]:
        """A linear that the file left in 16 bit, whole or in rows, under the host's names, whole or in rows."""
        sources = self.layout.plain_sources(host, self.tensors)
        for piece in self.layout.pieces(host):
            for suffix in ("weight", "bias") if self.layout.biases else ("weight",):
                shape = (piece.rows, host.in_features) if suffix == "weight" else (piece.rows,)
                entries = [(self.tensors[f"{s.name}.{suffix}"], s.first) for s in sources if _overlap(s, piece)]
                yield f"{piece.name}.{suffix}", shape, entries[0][0].dtype, partial(_load_rows, entries, piece)

    def load_layer(self, prefix: str, device: str | torch.device = "cpu") -> LogicalLinear:
        """One layer by its prefix ("transformer_blocks.0.qkv_proj"), as the file has it. KeyError when it is not quantised."""
        if f"{prefix}.qweight" not in self.tensors:
            raise KeyError(prefix)
        spec = self.layout.layers[prefix]
        load = partial(_load_layer_tensor, self.tensors, prefix, device)
        return _load_w4a16(spec, load) if spec.chunks else _load_w4a4(spec, self.precision, load)


def _check_values(entry: Entry, t: Tensor, divisor: bool = False) -> Tensor:
    """`t` itself; CheckpointError when it holds NaN or infinity (or zeros where it divides, or scales that are no positive e4m3)."""
    if t.dtype == torch.float8_e4m3fn:
        bits = t.view(torch.uint8)
        bad, found = (bits > 0x7E) & (bits != 0x80), "NaN or negative scales"
    elif divisor:
        bad, found = ~torch.isfinite(t) | (t == 0), "NaN, infinite or zero values in a vector to divide by"
    else:
        bad, found = ~torch.isfinite(t), "NaN or infinite values"
    if bad.any():
        raise CheckpointError(f"{entry.file.path}: {entry.key} holds {found} ({int(bad.sum())} of {t.numel()}): the file is damaged.")
    return t


def _load_layer_tensor(tensors: dict[str, Entry], prefix: str, device: str | torch.device, suffix: str) -> Tensor | None:
    entry = tensors.get(f"{prefix}.{suffix}")
    if entry is None:
        return None
    t = entry.load(device)
    return t if suffix == "qweight" else _check_values(entry, t, divisor=suffix == "smooth")


def _load_w4a4(spec: LayerSpec, precision: str, load) -> LogicalLinear:
    n, k = spec.n, spec.k
    down, up, bias = load("lora_down"), load("lora_up"), load("bias")
    rank = down.shape[1]
    unpack_scales = nk.unpack_int4_scales if precision == "int4" else nk.unpack_nvfp4_scales
    channel_scale = None
    if precision == "nvfp4":
        per_tensor, per_channel = load("wtscale"), load("wcscales")
        if per_tensor is not None or per_channel is not None:
            channel_scale = torch.ones(n, device=down.device)
            if per_channel is not None:
                channel_scale = channel_scale * nk.unpack_vector(per_channel, n).float()
            if per_tensor is not None:
                channel_scale = channel_scale * per_tensor.float().reshape(1)
    return LogicalLinear(
        precision=precision,
        codes=nk.unpack_qweight(load("qweight"), n, k),
        scales=unpack_scales(load("wscales"), n, k),
        smooth=nk.unpack_vector(load("smooth"), k),
        down=nk.unpack_down(down, k, rank),
        up=nk.unpack_up(up, n, rank),
        channel_scale=channel_scale,
        bias=None if bias is None else nk.unpack_vector(bias, n),
        act_unsigned=spec.gelu_fed and precision == "int4",
    )


def _load_w4a16(spec: LayerSpec, load) -> LogicalLinear:
    n, k, s = spec.n, spec.k, spec.chunks
    bias = nk.deinterleave_rows(load("bias").float(), s).view(s, -1)
    bias[sorted({1, s - 2})] -= 1  # the file folds the 1 of (1 + scale) into the bias of the scale chunks
    scales, zeros = load("wscales"), load("wzeros")
    return LogicalLinear(
        precision="w4a16",
        codes=nk.deinterleave_rows(nk.unpack_w4a16_qweight(load("qweight"), n, k), s),
        scales=nk.deinterleave_rows(nk.unpack_w4a16_scales(scales, n, k), s),
        zeros=nk.deinterleave_rows(nk.unpack_w4a16_scales(zeros, n, k), s),
        bias=bias.view(-1),
    )


def _with_bias(layer: LogicalLinear, bias: Tensor | None) -> LogicalLinear:
    return replace(layer, bias=bias)


def _sum_bias(a: Tensor, b: Tensor) -> Tensor:
    """a + b in the file's type where that is exact (the converter writes zeros in one of them), else in fp32."""
    total = a.float() + b.float()
    rounded = total.to(b.dtype)
    return rounded if torch.equal(rounded.float(), total) else total


def _load_plain(entries: list[Entry], swap_halves: bool, dim: int = 0) -> Tensor:
    tensors = [_check_values(e, e.load()) for e in entries]
    t = tensors[0] if len(tensors) == 1 else torch.cat([t.to(tensors[0].dtype) for t in tensors], dim)
    return torch.cat(t.chunk(2)[::-1]) if swap_halves else t  # diffusers order is (scale, shift), the native one (shift, scale)


def _load_plain_sum(entries: list[Entry]) -> Tensor:
    a, b = (_check_values(e, e.load()) for e in entries)
    return (a.float() + b.float()).to(a.dtype)


def _overlap(a: Piece, b: Piece) -> bool:
    return a.first < b.first + b.rows and b.first < a.first + a.rows


def _load_rows(sources: list[tuple[Entry, int]], piece: Piece) -> Tensor:
    """The rows of `piece` out of (tensor, its first row) that hold them, top to bottom."""
    end = piece.first + piece.rows
    rows = [_check_values(e, e.load())[max(piece.first - first, 0) : end - first] for e, first in sources]
    return rows[0] if len(rows) == 1 else torch.cat([t.to(rows[0].dtype) for t in rows])
