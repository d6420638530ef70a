"""What a model file is: for the command line, and for anyone who wonders why a loader refuses it."""

import os
from collections import Counter

from .formats.checkpoint import PackedCheckpoint, open_packed, read_files, refusal
from .formats.identify import Kind, identify
from .formats.tensorfile import CheckpointError, Entry

_SUFFIX_KINDS = {
    "qweight": "codes",
    "wscales": "scales",
    "wzeros": "scales",
    "wtscale": "scales",
    "wcscales": "scales",
    "smooth": "smooth",
    "smooth_orig": "unused",
    "lora_down": "low rank",
    "lora_up": "low rank",
}
_FULL_DEPTH = {"flux": (19, 38), "qwen-image": (60,), "z-image": (30, 2, 2)}
_TITLES = {"flux": "FLUX.1", "qwen-image": "Qwen-Image", "z-image": "Z-Image"}
_MODELS = {16: "FLUX.1 (text to image or Kontext)", 32: "FLUX.1 Canny or Depth (control image)", 96: "FLUX.1 Fill (inpainting)"}

_QWEN = {
    None: "Qwen-Image or Qwen-Image-Edit",
    "index_timestep_zero": "Qwen-Image-Edit (index_timestep_zero, as 2511)",
    "negative_index": "Qwen-Image-Layered",
}


def inspect(path: str | os.PathLike) -> dict:
    """What `path` (file or legacy folder) is, as plain JSON values. Reads headers only; never raises for what the file contains.

    Always: path, family, usable (this pack has a loader for it, and it is whole), sentence, files, tensors, bytes, warnings. For whole
    SVDQuant files of FLUX.1, Qwen-Image and Z-Image also: model, precision, rank, ranks, layers, config, model_class, bytes_by_kind, names,
    metadata. A file that is no safetensors, or is damaged, has family "unreadable" or the family told by its names, and `sentence` says
    what is wrong.
    """
    report = {"path": str(path), "family": "unreadable", "usable": False, "sentence": "", "files": [], "tensors": 0, "bytes": 0}
    report["warnings"] = []
    try:
        files, entries, metadata = read_files(path)
    except CheckpointError as e:
        return report | {"sentence": str(e)}
    kind = identify(entries, metadata)
    report |= {
        "family": kind.family,
        "files": [str(f.path) for f in files],
        "tensors": len(entries),
        "bytes": sum(e.nbytes for e in entries.values()),
        "dtypes": dict(sorted(Counter(e.dtype for e in entries.values()).items())),
        "metadata": sorted(metadata),
    }
    if kind.family not in _TITLES:
        return report | {"sentence": refusal(path, kind)}
    try:
        return report | _packed(open_packed(path), kind)
    except CheckpointError as e:
        return report | {"sentence": f"{path} is a {_TITLES[kind.family]} SVDQuant checkpoint that cannot be used. {e}"}


def _packed(c: PackedCheckpoint, kind: Kind) -> dict:
    c.close()
    kinds = Counter(h.kind for h in c.host_linears())
    by_kind: Counter[str] = Counter()
    for key, entry in c.tensors.items():
        by_kind[_kind_of(c, key, entry)] += entry.nbytes
    blocks, model = _blocks(c), _model(c)
    deep = tuple(blocks.values())
    size = "" if deep == _FULL_DEPTH[c.family] else f", {'+'.join(map(str, deep))} blocks of {c.dims.hidden} channels"
    ranks = "/".join(map(str, c.ranks)) or "none"
    return {
        "usable": True,
        "sentence": f"{c.path} is a SVDQuant {model}{size}, {c.precision.upper()}, rank {ranks}. {kind.advice}",
        "model": model,
        "model_class": c.model_class,
        "precision": c.precision,
        "rank": c.rank,
        "ranks": c.ranks,
        "layers": blocks | {"linears": dict(sorted(kinds.items()))},
        "config": c.config,
        "bytes_by_kind": dict(by_kind.most_common()),
        "names": "v2" if any(k != e.key for k, e in c.tensors.items()) else "v1",
        "warnings": c.warnings,
    }


def _blocks(c: PackedCheckpoint) -> dict[str, int]:
    """How many blocks of each sort."""
    if c.family == "flux":
        return {"double_blocks": c.dims.depth, "single_blocks": c.dims.depth_single}
    if c.family == "qwen-image":
        return {"blocks": c.dims.depth}
    return {"layers": c.dims.depth, "noise_refiner": c.dims.refiners, "context_refiner": c.dims.refiners}


def _model(c: PackedCheckpoint) -> str:
    if c.family == "flux":
        model = _MODELS.get(c.config["in_channels"], f"FLUX.1 with {c.config['in_channels']} input channels")
        return model + (", schnell kind" if c.model_class == "FluxSchnell" else "")
    if c.family == "z-image":
        return "Z-Image"
    return _QWEN[c.config.get("default_ref_method")]


def _kind_of(c: PackedCheckpoint, key: str, entry: Entry) -> str:
    prefix, _, suffix = key.rpartition(".")
    if f"{prefix}.qweight" not in c.tensors:
        return "plain"
    if entry.dtype == "I32":
        return "modulation codes"
    return _SUFFIX_KINDS.get(suffix, "bias")


def format_report(report: dict) -> str:
    """The report of inspect() as lines for a terminal."""
    lines = [report["sentence"]]
    if report["tensors"]:
        lines.append(f"  tensors      {report['tensors']} in {len(report['files'])} file(s), {_size(report['bytes'])}")
        lines.append("  types        " + ", ".join(f"{n} {d}" for d, n in report["dtypes"].items()))
        lines.append("  metadata     " + (", ".join(report["metadata"]) or "none (shapes decide)"))
    if "precision" in report:
        layers, config = report["layers"], report["config"]
        linears = ", ".join(f"{n} {kind}" for kind, n in layers["linears"].items())
        lines.append(f"  precision    {report['precision']}, rank {', '.join(map(str, report['ranks']))}, {report['names']} names")
        blocks = ", ".join(f"{n} {sort.removesuffix('_blocks')}" for sort, n in layers.items() if sort != "linears")
        lines.append(f"  blocks       {blocks} ({linears} linears)")
        lines.append(f"  model class  {report['model_class']}")
        lines.append("  bytes        " + ", ".join(f"{kind} {_size(n)}" for kind, n in report["bytes_by_kind"].items()))
        lines += [f"  {key:<20} {value}" for key, value in config.items()]
    lines += [f"  warning: {w}" for w in report["warnings"]]
    return "\n".join(lines)


def _size(n: int) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}" if unit != "bytes" else f"{n} bytes"
        n /= 1024
    return f"{n:.2f} GiB"
