"""How far apart two files of one FLUX.1 are, layer by layer: two 4-bit checkpoints, or one and the dense file that it was made of.

Signal to noise of the dense weights that the layers stand for, in dB: 10 log10(|W|^2 / |W - W'|^2), W those of the reference.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.layout import dense_weight
from .dense_flux import DenseFlux, open_dense
from .formats.checkpoint import FluxCheckpoint, open_checkpoint, read_files
from .formats.flux_names import layer_specs, plain_specs
from .formats.identify import identify
from .formats.tensorfile import CheckpointError
from .quantize_report import size

Source = FluxCheckpoint | DenseFlux


@dataclass(frozen=True)
class Distance:
    """One layer by its v1 name. snr_db: None where there is no difference. ranks: of file and reference, None where it has none."""

    name: str
    snr_db: float | None
    ranks: tuple[int | None, int | None]


@dataclass(frozen=True)
class Comparison:
    """path against reference. layers in file order; plain: native names of the tensors that are not quantised and differ."""

    path: str
    reference: str
    bytes: tuple[int, int]
    layers: list[Distance]
    plain: list[str]

    def worst(self, count: int = 10) -> list[Distance]:
        found = [x for x in self.layers if x.snr_db is not None]
        return sorted(found, key=lambda x: x.snr_db)[:count]

    def as_json(self) -> dict:
        return asdict(self) | {"mean_snr_db": self.mean(), "worst": [x.name for x in self.worst()]}

    def mean(self) -> float | None:
        found = [x.snr_db for x in self.layers if x.snr_db is not None]
        return sum(found) / len(found) if found else None

    def lines(self) -> list[str]:
        """For a terminal: sizes, a row for each kind of layer, the worst layers."""
        lines = [f"{self.path}: {size(self.bytes[0])}", f"{self.reference}: {size(self.bytes[1])} (reference)", ""]
        lines.append(f"{'layer':<28}{'count':>6}{'mean':>10}{'worst':>10}   weights, signal to noise in dB")
        kinds: dict[str, list[Distance]] = {}
        for x in self.layers:
            stack, _, rest = x.name.partition(".")
            kinds.setdefault(f"{stack.split('_')[0] if 'single' in stack else 'double'} {rest.partition('.')[2]}", []).append(x)
        for kind, found in kinds.items():
            values = [math.inf if x.snr_db is None else x.snr_db for x in found]
            lines.append(f"{kind:<28}{len(found):>6}{sum(values) / len(values):>10.1f}{min(values):>10.1f}")
        lines += ["", *(f"worst: {x.name:<48}{x.snr_db:>6.1f} dB, rank {_ranks(x)}" for x in self.worst(5))]
        differ = f"{len(self.plain)} differ, the first is {self.plain[0]}" if self.plain else "all equal in bf16"
        return [*lines, f"tensors that are not quantised: {differ}"]


def _ranks(x: Distance) -> str:
    return " and ".join("none" if r is None else str(r) for r in dict.fromkeys(x.ranks))


def compare(path: str | os.PathLike, reference: str | os.PathLike, device: str | torch.device = "cpu",
            progress: Callable[[int, int], None] | None = None) -> Comparison:  # fmt: skip
    """Holds a 4-bit checkpoint against another one or against a dense file. progress(done, total) counts layers.

    The reference is the second file, or the dense one of the two. CheckpointError when a file is no FLUX.1, none of them is 4-bit, or
    they are of different sizes.
    """
    with closing(_open(path)) as a, closing(_open(reference)) as b:
        if isinstance(a, DenseFlux):
            a, b = b, a
        if isinstance(a, DenseFlux):
            raise CheckpointError(f"{path} and {reference} are both dense: one of them has to be a 4-bit checkpoint.")
        if a.dims != b.dims:
            raise CheckpointError(f"{a.path} and {b.path} are not the same model: the first is {a.dims}, the second {b.dims}.")
        return _compared(a, b, torch.device(device), progress)


def _open(path: str | os.PathLike) -> Source:
    path = Path(path)
    if path.is_dir() and not (path / "transformer_blocks.safetensors").is_file():
        return open_dense(path)
    _, entries, metadata = read_files(path)
    return open_dense(path) if identify(entries, metadata).family in ("flux-plain", "flux-diffusers") else open_checkpoint(path)


def _compared(a: FluxCheckpoint, b: Source, device: torch.device, progress: Callable[[int, int], None] | None) -> Comparison:
    places = {prefix: (host, row, col) for host in a.host_linears() for prefix, row, col in host.parts}
    layers = []
    for i, (prefix, spec) in enumerate(layer_specs(a.dims).items()):
        if progress is not None:
            progress(i, len(places))
        host, row, col = places[prefix]
        (mine, rank), (theirs, other) = _weight(a, prefix, device), (None, None)
        if isinstance(b, DenseFlux):
            theirs = b.linear(host.name, device)[0][row : row + spec.n, col : col + spec.k].float()
        else:
            theirs, other = _weight(b, prefix, device)
        noise, signal = float((mine - theirs).square().sum()), float(theirs.square().sum())
        snr = None if noise == 0 else 10 * math.log10(max(signal, 1e-45) / noise)
        layers.append(Distance(prefix, snr, (rank, other)))
    if progress is not None:
        progress(len(places), len(places))
    return Comparison(str(a.path), str(b.path), (_bytes(a), _bytes(b)), layers, _plain(a, b))


def _weight(c: FluxCheckpoint, prefix: str, device: torch.device) -> tuple[Tensor, int | None]:
    """(fp32 weight of a layer, quantised or left in 16 bit; its rank where it has a branch)."""
    if f"{prefix}.qweight" not in c.tensors:
        return c.tensors[f"{prefix}.weight"].load(device).float(), None
    layer = c.load_layer(prefix, device)
    c.close()  # and with it the pages of the file that were read
    return dense_weight(layer), layer.rank or None


def _plain(a: FluxCheckpoint, b: Source) -> list[str]:
    names = {name for name, _, _ in plain_specs(a.dims)}
    others = None if isinstance(b, DenseFlux) else dict(b.plain_tensors())
    found = []
    for name, t in a.plain_tensors():
        if name in names and not torch.equal(t.bfloat16(), (b.tensor(name) if others is None else others[name]).bfloat16()):
            found.append(name)
    return found


def _bytes(source: Source) -> int:
    return sum(entry.nbytes for f in source.files for entry in f.entries.values())
