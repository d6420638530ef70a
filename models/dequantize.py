"""A 4-bit checkpoint as the dense model it stands for, under the host's own names of its family.

W = W4 / smooth + up @ down; biases of shifted (INT4, GELU-fed) layers without their compensation; modulation in native order without the
folded 1; linears that only the file stacks (q, k and v; value and gate) apart. FLUX.1: linear2 = [out_proj | mlp_fc2] columns;
final_layer.adaLN_modulation.1 in native half order.
"""

import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.layout import dense_bias, dense_weight
from .formats.checkpoint import HostLinear, PackedCheckpoint, find_files, open_packed
from .formats.output import check_place, check_room
from .formats.tensorfile import Slot, stream_save


def dense_linear(checkpoint: PackedCheckpoint, host: HostLinear, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """(weight fp32 [out, in], bias fp32 [out]) of one quantised host linear, on `device`."""
    parts = checkpoint.load_linear(host, device)
    weight = torch.zeros(host.out_features, host.in_features, device=device)
    bias = torch.zeros(host.out_features, device=device)
    for layer, row, col in parts:
        weight[row : row + layer.n, col : col + layer.k] = dense_weight(layer)
        part = dense_bias(layer)
        if part is not None:
            bias[row : row + layer.n] += part
    return weight, bias


def dense_state_dict(
    checkpoint: PackedCheckpoint, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """(native name, tensor in `dtype`) of the whole dense model, one linear in memory at a time. dict(...) of it is a state dict.

    `device` is where the layers are computed and stay; values are computed in fp32 and rounded once.
    """
    for host in checkpoint.host_linears():
        if host.kind != "plain":
            weight, bias = dense_linear(checkpoint, host, device)
            for piece in checkpoint.pieces(host):
                rows = slice(piece.first, piece.first + piece.rows)
                yield f"{piece.name}.weight", weight[rows].to(dtype)
                if checkpoint.layout.biases:
                    yield f"{piece.name}.bias", bias[rows].to(dtype)
    for name, t in checkpoint.plain_tensors():
        yield name, t.to(device, dtype, copy=True)


def dequantize(path_in: str | os.PathLike, path_out: str | os.PathLike, progress: Callable[[int, int], None] | None = None,
               device: str | torch.device = "cpu") -> None:  # fmt: skip
    """Write the dense bf16 checkpoint that stock UNETLoader reads (when the sizes are a real model's).

    Tensors go to the file one by one under a temporary name that becomes `path_out` at the end, so a full FLUX.1 (24 GB) needs the
    memory of one linear. progress(done, total) counts written bytes. CheckpointError, before anything is written, when path_in is no
    SVDQuant checkpoint, or path_out is one of its files, a folder, in a folder that is not there, or on a disk without room for it.
    """
    path_out = Path(path_out)
    check_place(find_files(path_in), path_out)
    checkpoint = open_packed(path_in)
    try:
        tensors = dense_state_dict(checkpoint, torch.bfloat16, device)
        slots = [Slot(name, torch.bfloat16, shape, partial(_take, tensors, name)) for name, shape in _shapes(checkpoint)]
        check_room(path_out, sum(math.prod(s.shape) * s.dtype.itemsize for s in slots))
        stream_save(path_out, slots, {"format": "pt"}, progress)
    finally:
        checkpoint.close()


def _shapes(checkpoint: PackedCheckpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(native name, shape) in the order of dense_state_dict."""
    for host in checkpoint.host_linears():
        if host.kind != "plain":
            for piece in checkpoint.pieces(host):
                yield f"{piece.name}.weight", (piece.rows, host.in_features)
                if checkpoint.layout.biases:
                    yield f"{piece.name}.bias", (piece.rows,)
    for name, shape, _ in checkpoint.plain_specs():
        yield name, shape


def _take(tensors: Iterator[tuple[str, Tensor]], name: str) -> Tensor:
    found, t = next(tensors)
    if found != name:  # _shapes and dense_state_dict went out of step
        raise RuntimeError(f"tensor {found} came where {name} was to be written")
    return t
