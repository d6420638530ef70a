"""Open a SVDQuant FLUX.1 checkpoint: one file or the older folder, either name generation, INT4 or NVFP4, with or without metadata.

Opening reads headers only and checks every tensor's presence, dtype and shape. Weights come one linear at a time, from the mapped file,
unpacked on the device that is asked for.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.layout import LogicalLinear, stack_rows
from . import flux_config, flux_names
from . import nunchaku as nk
from .flux_names import FLOATS, FluxDims, HostLinear, LayerSpec
from .identify import Kind, identify
from .tensorfile import CheckpointError, Entry, TensorFile

__all__ = ["CheckpointError", "FluxCheckpoint", "HostLinear", "open_checkpoint", "find_files"]
log = logging.getLogger(__name__)

BLOCKS_FILE, REST_FILE = "transformer_blocks.safetensors", "unquantized_layers.safetensors"
MAX_RANK = 1024


@dataclass
class FluxCheckpoint:
    """A checked FLUX checkpoint. Nothing of the weights is in memory until it is asked for.

    path           what was opened (file or folder)
    precision      "int4" | "nvfp4" of its W4A4 layers
    rank           the most common rank; `ranks` has all of them
    config         the host's unet_config (image_model, in_channels, hidden_size, depth, axes_dim, ...)
    model_class    "Flux" | "FluxSchnell"
    metadata       the file's metadata, as strings
    warnings       what was odd but bearable (logged when opened)
    tensors        v1 name -> Entry of every tensor in the file
    """

    path: Path
    precision: str
    rank: int
    ranks: list[int]
    config: dict
    model_class: str
    metadata: dict[str, str]
    warnings: list[str]
    dims: FluxDims
    tensors: dict[str, Entry]
    files: list[TensorFile]
    family: str = "flux"
    _linears: list[HostLinear] = field(default_factory=list)
    _specs: dict[str, LayerSpec] = field(default_factory=dict)

    def host_linears(self) -> list[HostLinear]:
        """Every linear of the host's blocks, block by block. kind "plain" are those the file left in 16 bit (see plain_tensors)."""
        return list(self._linears)

    def load_linear(self, host: HostLinear, device: str | torch.device = "cpu") -> list[tuple[LogicalLinear, int, int]]:
        """The parts of one quantised host linear as (layer, row offset, column offset), unpacked on `device`.

        linear1 is one stacked part when its two layers share their smoothing, else two row parts, each with its own bias rows.
        linear2 is two column parts; the sum of both biases is on the last. Modulation layers come in native row order with native
        biases (fp32, the +1 taken off). CheckpointError names the key of a tensor with values that cannot be right.
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
        """(native name, CPU tensor) of everything that is not quantised, final_layer.adaLN_modulation.1 in native half order.

        The tensors may be views of the mapped file: copy them, do not write into them.
        """
        for native, _, _, make in self._plain():
            yield native, make()

    def plain_specs(self) -> list[tuple[str, tuple[int, ...], str]]:
        """(native name, shape, safetensors dtype) of what plain_tensors yields, in its order, from the header alone."""
        return [(native, shape, dtype) for native, shape, dtype, _ in self._plain()]

    def close(self) -> None:
        """Let go of the file. Anything asked for later maps it again."""
        for f in self.files:
            f.close()

    def _plain(self) -> Iterator[tuple]:
        for native, key, shape in flux_names.plain_specs(self.dims):
            swap = native.startswith("final_layer.adaLN_modulation.1.")
            yield native, shape, self.tensors[key].dtype, partial(_load_plain, [self.tensors[key]], swap)
        for host in self._linears:
            if host.kind != "plain":
                continue
            weights = [self.tensors[f"{p}.weight"] for p, _, _ in host.parts]
            biases = [self.tensors[f"{p}.bias"] for p, _, _ in host.parts]
            columns = host.parts[-1][2] > 0
            shape = (host.out_features, host.in_features)
            yield f"{host.name}.weight", shape, weights[0].dtype, partial(_load_plain, weights, False, dim=1 if columns else 0)
            make = partial(_load_plain_sum, biases) if columns else partial(_load_plain, biases, False)
            yield f"{host.name}.bias", shape[:1], biases[0].dtype, make

    def load_layer(self, prefix: str, device: str | torch.device = "cpu") -> LogicalLinear:
        """One layer by its v1 prefix ("transformer_blocks.0.qkv_proj"), as the file has it. KeyError when it is not quantised."""
        spec = self._specs[prefix]
        load = partial(_load_layer_tensor, self.tensors, prefix, device)
        return _load_w4a16(spec, load) if spec.chunks else _load_w4a4(spec, self.precision, load)


# ---- opening ------------------------------------------------------------------------------------------------------------------------


def find_files(path: str | os.PathLike) -> list[Path]:
    """The files behind what a person picked: the file itself, or the two of a legacy folder (also when one of the two was picked)."""
    path = Path(path)
    if path.name in (BLOCKS_FILE, REST_FILE) and (path.parent / BLOCKS_FILE).is_file() and (path.parent / REST_FILE).is_file():
        path = path.parent
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{path} does not exist.")
        return [path]
    files = [path / BLOCKS_FILE, path / REST_FILE]
    missing = [f.name for f in files if not f.is_file()]
    if len(missing) == 2:
        raise CheckpointError(
            f"{path} is a folder without {BLOCKS_FILE} and {REST_FILE}, so it is no SVDQuant FLUX folder. Choose a .safetensors file, or "
            "load a diffusers folder's weights with the stock 'Load Diffusion Model' node."
        )
    if missing:
        raise CheckpointError(f"{path} is an SVDQuant FLUX folder without {missing[0]}. Download the whole folder again.")
    return files


def read_files(path: str | os.PathLike) -> tuple[list[TensorFile], dict[str, Entry], dict[str, str]]:
    """(files, tensors by their names in the files, metadata) of a checkpoint of any kind. CheckpointError when unreadable."""
    paths = find_files(path)
    files = [TensorFile(p) for p in paths]
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for f in files:
        metadata |= f.metadata
        for key, entry in f.entries.items():
            if key in entries:
                raise CheckpointError(f"{key} is in both {paths[0].name} and {paths[1].name} of {paths[0].parent}; expected it once.")
            entries[key] = entry
    if len(paths) == 2:
        for name, key in (("config.json", "config"), ("comfy_config.json", "comfy_config")):
            beside = paths[0].with_name(name)
            if beside.is_file():
                try:
                    metadata[key] = beside.read_text(encoding="utf-8", errors="replace")
                except OSError as e:
                    raise CheckpointError(f"{beside} cannot be read: {e.strerror or e}.") from e
    return files, entries, metadata


def refusal(path: str | os.PathLike, kind: Kind) -> str:
    """One sentence on a file that is not for the FLUX loader, and where it belongs."""
    return f"{path} is {kind.what}, not a SVDQuant FLUX.1 checkpoint. {kind.advice}"


def open_checkpoint(path: str | os.PathLike) -> FluxCheckpoint:
    """Open and check a SVDQuant FLUX.1 checkpoint: a .safetensors file or a legacy folder.

    Raises CheckpointError with a sentence: what the file is and which loader takes it, or which tensor is missing, misshapen or
    mistyped, what was found and what was expected.
    """
    files, entries, metadata = read_files(path)
    kind = identify(entries, metadata)
    if kind.family != "flux":
        raise CheckpointError(refusal(path, kind))
    where = str(path)
    tensors = _by_v1_name(entries)
    warnings: list[str] = []
    comfy_outer = flux_config.read_json(metadata, "comfy_config", warnings)
    comfy = comfy_outer.get("model_config")
    if "model_config" in comfy_outer and not isinstance(comfy, dict):
        warnings.append("metadata comfy_config.model_config is not an object and is not used; tensor shapes decide")
    comfy = comfy if isinstance(comfy, dict) else {}
    config = flux_config.read_json(metadata, "config", warnings)
    dims = flux_config.read_dims(tensors, where, comfy, config, warnings)
    told = flux_config.told_precision(flux_config.read_json(metadata, "quantization_config", warnings), where, warnings)
    linears = _decide_kinds(flux_names.host_linears(dims), tensors, where)
    specs = {p: s for p, s in flux_names.layer_specs(dims).items() if f"{p}.qweight" in tensors}
    precision = _precision(specs, tensors, told, where)
    check = _Checker(where, tensors, v2=any(flux_names.to_v1(k) != k for k in entries), warnings=warnings)
    ranks = check.everything(dims, linears, specs, precision)
    out = FluxCheckpoint(
        path=Path(path), precision=precision, rank=Counter(ranks).most_common(1)[0][0] if ranks else 0, ranks=sorted(set(ranks)),
        config=flux_config.unet_config(dims, comfy, config, warnings),
        model_class=flux_config.model_class(comfy_outer.get("model_class"), dims.guidance, warnings),
        metadata=metadata, warnings=warnings, dims=dims, tensors=tensors, files=files, _linears=linears, _specs=specs,
    )  # fmt: skip
    for w in warnings:
        log.warning("%s: %s", path, w)
    return out


def _by_v1_name(entries: dict[str, Entry]) -> dict[str, Entry]:
    out: dict[str, Entry] = {}
    for key, entry in entries.items():
        v1 = flux_names.to_v1(key)
        if v1 in out:
            raise CheckpointError(f"{entry.file.path}: {key} and {out[v1].key} are two names of the same tensor; expected one of them.")
        out[v1] = entry
    return out


def _decide_kinds(linears: list[HostLinear], tensors: dict[str, Entry], where: str) -> list[HostLinear]:
    """Mark host linears that the file left unquantised (`P.weight` instead of `P.qweight`) as plain."""
    out = []
    for host in linears:
        plain = [p for p, _, _ in host.parts if f"{p}.qweight" not in tensors and f"{p}.weight" in tensors]
        if plain and len(plain) < len(host.parts):
            raise CheckpointError(
                f"{where}: {plain[0]} is not quantised but the other half of {host.name} is; this pack needs both halves alike."
            )
        out.append(HostLinear(host.name, host.out_features, host.in_features, "plain", host.parts) if plain else host)
    return out


def _precision(specs: dict[str, LayerSpec], tensors: dict[str, Entry], told: str | None, where: str) -> str:
    """INT4 or NVFP4, by the majority of the W4A4 scale types. CheckpointError when the metadata says the other."""
    scales = [tensors.get(f"{p}.wscales") for p, s in specs.items() if not s.chunks]
    fp8 = sum(e is not None and e.dtype == "F8_E4M3" for e in scales)
    if not scales:
        return told or "int4"
    found = "nvfp4" if 2 * fp8 > len(scales) else "int4"
    if told and told != found:
        raise CheckpointError(f"{where}: its metadata says {told.upper()}, its scales are those of {found.upper()}: the file is damaged or "
                              "was put together from two files. Download it again.")  # fmt: skip
    return found


@dataclass
class _Checker:
    """Every expected tensor against presence, dtype and shape; the rest is listed in one warning."""

    where: str
    tensors: dict[str, Entry]
    v2: bool
    warnings: list[str]
    expected: set[str] = field(default_factory=set)

    def everything(self, dims: FluxDims, linears: list[HostLinear], specs: dict[str, LayerSpec], precision: str) -> list[int]:
        """Returns the rank of every W4A4 layer."""
        all_specs = flux_names.layer_specs(dims)
        for host in linears:
            if host.kind == "plain":
                for prefix, _, _ in host.parts:
                    spec = all_specs.pop(prefix)
                    self.tensor(f"{prefix}.weight", FLOATS, (spec.n, spec.k))
                    self.tensor(f"{prefix}.bias", FLOATS, (spec.n,))
        ranks = [r for prefix, spec in all_specs.items() if (r := self.layer(prefix, spec, precision))]
        for _, key, shape in flux_names.plain_specs(dims):
            self.tensor(key, FLOATS, shape)
        self._top_scales(specs, precision)
        self._mixed_halves()
        self._unknown()
        return ranks

    def layer(self, prefix: str, spec: LayerSpec, precision: str) -> int:
        rank = 0
        if not spec.chunks:
            down = self.tensors.get(f"{prefix}.lora_down")
            rank = down.shape[-1] if down and down.shape else 16
            if rank % nk.RANK_TILE or not 0 < rank <= MAX_RANK:
                raise self._wrong(down, f"[{spec.k}, rank] with a rank that is a multiple of 16 up to {MAX_RANK}")
        halves: dict[str, Entry] = {}
        for suffix, (dtypes, shape, required) in flux_names.layer_tensors(spec, precision, rank).items():
            entry = self.tensor(f"{prefix}.{suffix}", dtypes, shape, required)
            if entry and entry.dtype in flux_names.HALVES and suffix != "wtscale":
                halves.setdefault(entry.dtype, entry)
        if len(halves) == 2:
            a, b = halves.values()
            raise CheckpointError(f"{b.file.path}: {a.key} is {a.dtype} but {b.key} is {b.dtype}, expected one 16-bit type in a layer: "
                                  "the file is damaged.")  # fmt: skip
        if precision == "int4":
            for top in ("wtscale", "wcscales"):
                if entry := self.tensors.get(f"{prefix}.{top}"):
                    raise CheckpointError(f"{entry.file.path}: {entry.key} is there, but INT4 layers have no such scale, only NVFP4 ones.")
        return rank

    def tensor(self, key: str, dtypes: tuple[str, ...], shape: tuple[int, ...], required: bool = True) -> Entry | None:
        self.expected.add(key)
        entry = self.tensors.get(key)
        want = f"{' or '.join(dtypes)} {list(shape)}"
        if entry is None:
            if not required:
                return None
            name = flux_names.to_v2(key) if self.v2 else key
            raise CheckpointError(f"{self.where}: tensor {name} is missing, expected {want}. The file is incomplete; download it again.")
        scalar = key.endswith(".wtscale") and entry.shape == ()  # one element is one element
        if entry.dtype not in dtypes or (entry.shape != shape and not scalar):
            raise self._wrong(entry, want)
        return entry

    def _wrong(self, entry: Entry, want: str) -> CheckpointError:
        return CheckpointError(f"{entry.file.path}: {entry.key} is {entry.dtype} {list(entry.shape)}, expected {want}.")

    def _top_scales(self, specs: dict[str, LayerSpec], precision: str) -> None:
        if precision != "nvfp4":
            return
        bare = [p for p, s in specs.items() if not s.chunks and not {f"{p}.wtscale", f"{p}.wcscales"} & self.tensors.keys()]
        if bare:
            self.warnings.append(f"{_listed(bare)} have neither wtscale nor wcscales; both are taken as 1")

    def _mixed_halves(self) -> None:
        kinds = {d: [e.key for k, e in self.tensors.items() if e.dtype == d and k in self.expected] for d in flux_names.HALVES}
        few, many = sorted(kinds, key=lambda d: len(kinds[d]))
        if kinds[few]:
            self.warnings.append(
                f"{_listed(kinds[few])} are {few}, all other 16-bit tensors {many}; if pictures look wrong the file is damaged"
            )

    def _unknown(self) -> None:
        unknown = [e.key for k, e in self.tensors.items() if k not in self.expected]
        if unknown:
            self.warnings.append(f"not used, because no FLUX.1 layer has them: {_listed(unknown)}")


def _listed(names: list[str]) -> str:
    """The first ten names, and how many there are."""
    return ", ".join(names[:10]) + (f", ... ({len(names)} tensors)" if len(names) > 10 else "")


# ---- loading ------------------------------------------------------------------------------------------------------------------------


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
    down, up = load("lora_down"), load("lora_up")
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
        bias=nk.unpack_vector(load("bias"), n),
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
