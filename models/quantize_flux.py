"""A dense FLUX.1 as a 4-bit checkpoint in the published layout: SVDQuant (arXiv 2411.05007), one linear on the device at a time.

Layers that share an input share its smoothing: linear1's two in single blocks. linear2's attention and MLP columns are two layers with an
input each. Finished linears wait in a folder beside the output, NAME.part, from which an interrupted run goes on; the output appears under
its name when it is whole, and the folder goes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.layout import LogicalLinear, dense_weight
from .calibrate import HOW_TO, StatisticsFile, calibrate, check_sampling, drawn_conditioning, read_conditioning, save_statistics
from .dense_flux import DenseFlux, open_dense
from .formats.flux_names import FluxDims, HostLinear, LayerSpec, host_linears, layer_specs, layer_tensors, plain_specs
from .formats.output import check_place, check_room
from .formats.quantize import quantize_modulation
from .formats.tensorfile import DTYPE_BITS, CheckpointError, Slot, TensorFile, stream_save
from .formats.writer import dims_of, file_metadata, pack_layer, plain_slots
from .quantize_report import LayerReport, Report, size
from .quantize_work import Work
from .rank_plan import RANKS, noise_by_rank, plan_ranks
from .svdquant import InputStatistics, LayerError, Recipe, choose_smoothing, svd_quantize

__all__ = ["Calibration", "CheckpointError", "Options", "quantize_file", "quantize_flux"]
log = logging.getLogger(__name__)

PRECISIONS, MODES = ("int4", "nvfp4"), ("data-free", "calibrated", "naive")

HEADER = 160  # bytes of a file's header for each tensor, at most

Statistics = Callable[[str], InputStatistics]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """How to quantise. rank: of the low-rank branch, a multiple of 16. size_budget: bytes of the file, instead of one rank for all layers.

    mode: "data-free" knows the weights only; "calibrated" the inputs too; "naive" rounds to nearest, for comparisons.
    gptq: calibrated only. dtype: of scales, branch and all that is not quantised. ValueError for what cannot be.
    """

    precision: str = "int4"
    rank: int = 32
    mode: str = "data-free"
    refinements: int = 2
    gptq: bool = False
    size_budget: int | None = None
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self):
        if self.precision not in PRECISIONS or self.mode not in MODES:
            raise ValueError(f"precision is {self.precision!r}, mode {self.mode!r}: expected one of {PRECISIONS} and one of {MODES}")
        if self.rank < 16 or self.rank % 16 or self.rank > 1024:
            raise ValueError(f"the rank is {self.rank}, expected a multiple of 16 up to 1024")
        if self.gptq and self.mode != "calibrated":
            raise ValueError("gptq needs calibration: it rounds by what the layers see")
        if self.size_budget is not None and self.mode == "naive":
            raise ValueError("naive rounding has no low-rank branch whose size could be chosen")

    def recipe(self, rank: int) -> Recipe:
        if self.mode == "naive":
            return Recipe.naive(self.precision, self.dtype)
        return Recipe(self.precision, rank, refinements=self.refinements, gptq=self.gptq, dtype=self.dtype)

    def as_json(self) -> dict:
        return asdict(self) | {"dtype": str(self.dtype)}


@dataclass(frozen=True)
class Calibration:
    """What to sample for calibration. file: see calibrate.HOW_TO; None draws prompts at random. pixels: side of the pictures. rows: of
    every linear's inputs that are kept. ValueError for what cannot be."""

    file: Path | None = None
    steps: int = 8
    pixels: int = 1024
    prompts: int = 16
    rows: int = 512
    seed: int = 0

    def __post_init__(self):
        check_sampling(self.steps, self.pixels)
        if self.prompts < 1 or self.rows < 1:
            raise ValueError(f"prompts is {self.prompts}, rows {self.rows}: expected at least one of each")

    def as_json(self) -> dict:
        """For telling one calibration from another: the file with its size and time."""
        stat = None if self.file is None else self.file.stat()
        file = None if stat is None else [str(self.file.resolve()), stat.st_size, stat.st_mtime_ns]
        return asdict(self) | {"file": file}


# ---- one linear -----------------------------------------------------------------------------------------------------------------------


@dataclass
class _Made:
    """The layers of one host linear: packed tensors by their full v1 names, and what was measured."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: list[LayerReport] = field(default_factory=list)


@dataclass(frozen=True)
class _Group:
    """Layers of one host linear that read the same inputs, with what is known of them. parts: (v1 name, weight [N, K], first row)."""

    parts: list[tuple[str, Tensor, int]]
    column: int
    seen: InputStatistics | None
    act_unsigned: bool


@dataclass(frozen=True)
class Quantizer:
    """Makes the layers of one host linear after the other.

    ranks: v1 name -> rank. statistics: of a host linear's inputs, by its name; None where nothing is known of them.
    """

    source: DenseFlux
    options: Options
    specs: dict[str, LayerSpec]
    ranks: dict[str, int]
    statistics: Statistics | None
    device: torch.device

    def make(self, host: HostLinear) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(packed tensors by their full v1 names, metadata with a LayerReport of each layer). CheckpointError names the linear that
        cannot be quantised."""
        weight, bias = self._dense(host)
        out = _Made()
        try:
            if host.kind == "w4a16":
                self._modulation(host, weight, bias, out)
            else:
                for group in self._groups(host, weight):
                    # published files have linear2's bias with its MLP columns, and zeros with the others
                    self._one_input(group, bias if group.column + group.parts[0][1].shape[1] == host.in_features else None, out)
        except ValueError as e:
            raise CheckpointError(f"{host.name} cannot be quantised: {e}") from e
        return out.tensors, {"layers": json.dumps([asdict(row) for row in out.rows])}

    def noise(self, host: HostLinear) -> dict[str, dict[int, float]]:
        """v1 name -> rank -> noise (see noise_by_rank) of the layers that have a branch."""
        if host.kind == "w4a16":
            return {}
        recipe, out = self.options.recipe(self.options.rank), {}
        for group in self._groups(host, self._dense(host)[0]):
            smooth = choose_smoothing([w for _, w, _ in group.parts], group.seen, recipe, group.act_unsigned)
            out |= {name: noise_by_rank(w, recipe, smooth, group.seen, group.act_unsigned) for name, w, _ in group.parts}
        return out

    def _dense(self, host: HostLinear) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.source.linear(host.name, self.device)
        if tuple(weight.shape) != (host.out_features, host.in_features):
            raise CheckpointError(f"{host.name}.weight is {list(weight.shape)}, expected {[host.out_features, host.in_features]}.")
        return weight, bias

    def _groups(self, host: HostLinear, weight: Tensor) -> Iterator[_Group]:
        """One group for each input: the rows of linear1 together, the columns of linear2 apart."""
        seen = None if self.statistics is None else self._seen(host.name)
        for column in dict.fromkeys(col for _, _, col in host.parts):
            specs = [(name, self.specs[name], row) for name, row, col in host.parts if col == column]
            k, gelu_fed = specs[0][1].k, specs[0][1].gelu_fed
            parts = [(name, weight[row : row + spec.n, column : column + k], row) for name, spec, row in specs]
            here = None if seen is None else moved(seen.columns(column, column + k), self.device)
            yield _Group(parts, column, here, gelu_fed and self.options.precision == "int4")

    def _seen(self, name: str) -> InputStatistics:
        try:
            return self.statistics(name)
        except KeyError:
            raise CheckpointError(f"nothing was seen of the inputs of {name}: calibrate with the whole model.") from None

    def _modulation(self, host: HostLinear, weight: Tensor, bias: Tensor | None, out: _Made) -> None:
        start, ((prefix, _, _),) = time.perf_counter(), host.parts
        layer = quantize_modulation(weight, bias, self.options.dtype)
        self._put(out, prefix, layer, LayerError(snr_db(dense_weight(layer), weight), None, None), None, start)

    def _one_input(self, group: _Group, bias: Tensor | None, out: _Made) -> None:
        start = time.perf_counter()
        recipe = self.options.recipe(self.ranks[group.parts[0][0]])  # of all of them: plan_ranks ties them
        smooth = choose_smoothing([w for _, w, _ in group.parts], group.seen, recipe, group.act_unsigned)
        for name, weight, row in group.parts:
            own = None if bias is None else bias[row : row + len(weight)]
            layer, error = svd_quantize(weight, own, recipe, smooth=smooth, statistics=group.seen, act_unsigned=group.act_unsigned)
            self._put(out, name, layer, error, layer.rank, start)
            start = time.perf_counter()

    def _put(self, out: _Made, prefix: str, layer: LogicalLinear, error: LayerError, rank: int | None, start: float) -> None:
        packed = pack_layer(layer, self.specs[prefix].chunks)
        out.tensors |= {f"{prefix}.{suffix}": t.cpu() for suffix, t in packed.items()}
        seconds = time.perf_counter() - start
        out.rows.append(
            LayerReport(prefix, layer.n, layer.k, rank, error.weight_snr_db, error.output_snr_db, error.naive_output_snr_db, seconds)
        )


def moved(s: InputStatistics, device: torch.device) -> InputStatistics:
    return InputStatistics(s.amax.to(device), s.square.to(device), s.sample.to(device), s.count)


def snr_db(approximate: Tensor, weight: Tensor) -> float:
    """Signal to noise of a weight in dB; infinite without noise."""
    weight = weight.float()
    noise, signal = float((approximate - weight).square().sum()), float(weight.square().sum())
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-45) / noise)


# ---- the whole model ------------------------------------------------------------------------------------------------------------------


def quantize_flux(source: DenseFlux, path_out: str | os.PathLike, options: Options, statistics: Statistics | None = None,
                  device: str | torch.device = "cpu", progress: Progress | None = None, identity: object = None) -> Report:  # fmt: skip
    """Quantise a dense FLUX and write it as one checkpoint, its report beside it.

    source      anything with config, model_class, linear(name, device) and tensor(name), as DenseFlux has them
    statistics  host linear name -> InputStatistics; needed in mode "calibrated", not looked at in the others
    identity    JSON that tells this source and these statistics from others. With it a second call goes on where the first was
                interrupted, and the output comes out the same; None always starts afresh
    progress    progress(done, total) counts layers; what it raises ends the work, and no output is left
    Memory: on the device one linear and what quantising it takes; in RAM the packed layers of one linear. The disk holds the file twice for
    a while. CheckpointError says what cannot be quantised or written; ValueError that statistics are lacking.
    """
    path_out, device, begun = Path(path_out), torch.device(device), time.perf_counter()
    if options.mode == "calibrated" and statistics is None:
        raise ValueError("mode is calibrated, but there are no statistics")
    used = statistics if options.mode == "calibrated" else None
    check_place([], path_out)
    dims = dims_of(source.config)
    hosts, specs = host_linears(dims), layer_specs(dims)
    work = Work(path_out, None if identity is None else {"identity": identity, "options": options.as_json()})
    check_room(path_out, max(0, 2 * _size_wanted(dims, options) - work.size()))
    work.open()
    quantizer = Quantizer(source, options, specs, dict.fromkeys(specs, options.rank), used, device)
    steps = _Steps(progress, len(specs) * (1 if options.size_budget is None else 2))
    with torch.no_grad():
        if options.size_budget is not None:
            quantizer = replace(quantizer, ranks=_planned_ranks(quantizer, dims, work, steps))
        files = []
        for number, host in enumerate(hosts):
            files.append(work.finished(number) or work.finish(number, *quantizer.make(host)))
            steps.take(len(host.parts))
    rows = {row["name"]: LayerReport(**row) for f in files for row in json.loads(f.metadata["layers"])}
    whole = work.path("whole.kept")
    layers = [rows[prefix] for prefix in specs]
    _write(whole, source, options, files, layers, lambda *_: steps.take(0))
    os.replace(whole, path_out)
    work.remove()
    report = Report(
        str(path_out), str(getattr(source, "path", "")), options.mode, options.precision, path_out.stat().st_size, layers=layers
    )
    report.seconds = time.perf_counter() - begun
    report.save(path_out)
    return report


@dataclass
class _Steps:
    """Counts for a progress call, which is told of nothing done first. What it raises ends the work."""

    progress: Progress | None
    total: int
    done: int = 0

    def __post_init__(self):
        self.take(0)

    def take(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)


def file_bytes(dims: FluxDims, precision: str, ranks: Mapping[str, int]) -> int:
    """At least the bytes of a file whose layers (v1 names) have these ranks. 0 leaves a layer's branch out."""
    total = 4096 + sum(2 * math.prod(shape) + HEADER for _, _, shape in plain_specs(dims))
    for name, spec in layer_specs(dims).items():
        tensors = layer_tensors(spec, precision, ranks[name]).values()
        total += sum(DTYPE_BITS[dtypes[0]] * math.prod(shape) // 8 + HEADER for dtypes, shape, _ in tensors)
    return total


def _size_wanted(dims: FluxDims, options: Options) -> int:
    """Bytes that the file will have, at most. CheckpointError when it cannot be as small as that, or holds no such model."""
    if dims.hidden % 128 or dims.mlp % 128:
        raise CheckpointError(f"the hidden size is {dims.hidden}, the MLP's {dims.mlp}: 4-bit files hold multiples of 128.")
    layers = layer_specs(dims)
    if options.size_budget is None:
        return file_bytes(dims, options.precision, dict.fromkeys(layers, options.rank))
    least = file_bytes(dims, options.precision, dict.fromkeys(layers, min(RANKS)))
    if options.size_budget < least:
        raise CheckpointError(
            f"a file of {size(options.size_budget)} is too small: with rank {min(RANKS)} in every layer it has {size(least)}."
        )
    return options.size_budget


def _planned_ranks(quantizer: Quantizer, dims: FluxDims, work: Work, steps: _Steps) -> dict[str, int]:
    """v1 name -> rank, such that the file stays below the size that is asked for."""
    specs, budget, plan = quantizer.specs, quantizer.options.size_budget, work.path("plan.json")
    if not plan.exists():
        noise: dict[str, dict[int, float]] = {}
        for host in host_linears(dims):
            noise |= quantizer.noise(host)
            steps.take(len(host.parts))
        sizes = {name: (specs[name].n, specs[name].k) for name in noise}
        tied = [[name for name, _, _ in h.parts] for h in host_linears(dims) if h.name.endswith(".linear1")]
        pairs = budget - file_bytes(dims, quantizer.options.precision, dict.fromkeys(specs, 0))
        part = plan.with_name("plan.json.part")
        part.write_text(json.dumps(dict.fromkeys(specs, 0) | plan_ranks(noise, sizes, pairs, tied)), encoding="utf-8")
        part.replace(plan)
    steps.take(len(specs) - steps.done)
    return json.loads(plan.read_text(encoding="utf-8"))


def _write(path: Path, source: DenseFlux, options: Options, files: list[TensorFile], layers: list[LayerReport],
           progress: Progress | None) -> None:  # fmt: skip
    """The whole checkpoint, from the files of its linears."""
    ranks = Counter(x.rank for x in layers if x.rank is not None)
    metadata = file_metadata(source.config, options.precision, ranks.most_common(1)[0][0], source.model_class)
    slots = [*_slots(files, layers), *plain_slots(source.config, source.tensor, options.dtype)]
    try:
        stream_save(path, slots, metadata, progress)
    finally:
        for f in files:
            f.close()


def _slots(files: list[TensorFile], layers: list[LayerReport]) -> Iterator[Slot]:
    dtypes = {"I8": torch.int8, "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
    entries = {key: entry for f in files for key, entry in f.entries.items()}
    of_layer: dict[str, list[str]] = {}
    for key in entries:
        of_layer.setdefault(key.rpartition(".")[0], []).append(key)
    for layer in layers:
        for key in of_layer[layer.name]:
            entry = entries[key]
            yield Slot(key, dtypes[entry.dtype], entry.shape, partial(_taken, entry))


def _taken(entry) -> Tensor:
    t = entry.load()
    entry.file.close()  # hundreds of files need not be open at a time
    return t


# ---- from a file ----------------------------------------------------------------------------------------------------------------------


def quantize_file(path_in: str | os.PathLike, path_out: str | os.PathLike, options: Options, calibration: Calibration | None = None,
                  device: str | torch.device = "cpu", progress: Callable[[str, int, int], None] | None = None) -> Report:  # fmt: skip
    """Quantise a dense FLUX file, in mode "calibrated" after sampling it as `calibration` says.

    progress(stage, done, total): "calibrating" counts blocks, "quantising" layers. An interrupted run goes on when it is started again with
    the same files and options, calibration included. CheckpointError, before any work, when path_in is no dense FLUX, the calibration file
    does not fit it, or path_out cannot be written.
    """
    path_out, calibration = Path(path_out), calibration or Calibration()

    def told(stage: str) -> Progress | None:
        return None if progress is None else partial(progress, stage)

    with closing(open_dense(path_in)) as source:
        check_place([f.path for f in source.files], path_out)
        identity = {"source": source.identity()}
        if options.mode != "calibrated":
            return quantize_flux(source, path_out, options, None, device, told("quantising"), identity)
        if calibration.file is not None and not calibration.file.is_file():
            raise CheckpointError(f"There is no file {calibration.file}. {HOW_TO}")
        identity["calibration"] = calibration.as_json()
        statistics = _calibrated(source, path_out, options, calibration, device, told("calibrating"), identity)
        with closing(statistics):
            return quantize_flux(source, path_out, options, statistics, device, told("quantising"), identity)


def _calibrated(source: DenseFlux, path_out: Path, options: Options, c: Calibration, device: str | torch.device, progress: Progress | None,
                identity: object) -> StatisticsFile:  # fmt: skip
    """The statistics that wait in the work folder, sampled where they do not yet."""
    if c.file is None:
        conditioning = drawn_conditioning(source.config, c.prompts, c.seed)
    else:
        conditioning = read_conditioning(c.file, source.config)
    work = Work(path_out, {"identity": identity, "options": options.as_json()})
    work.open()
    path = work.path("calibration.kept")
    if not path.exists():
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        seen = calibrate(source, conditioning, c.steps, device, pixels=c.pixels, dtype=dtype, rows=c.rows, seed=c.seed, progress=progress)
        save_statistics(path, seen)
    return StatisticsFile(path)
