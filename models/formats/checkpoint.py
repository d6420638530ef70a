"""Open a SVDQuant checkpoint: FLUX.1, Qwen-Image or Z-Image; one file or FLUX.1's older folder, either name generation, INT4 or NVFP4,
with or without metadata.

Opening reads headers only and checks every tensor's presence, dtype and shape. packed.py is what comes of it.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import flux_config, flux_names, qwen_names, zimage_names
from .flux_names import FluxDims, HostLinear
from .identify import Kind, identify
from .layout import Layout, v1_suffix
from .packed import PackedCheckpoint
from .packed_checks import Checker, listed, precision_of
from .tensorfile import CheckpointError, Entry, TensorFile

__all__ = ["CheckpointError", "FluxCheckpoint", "HostLinear", "PackedCheckpoint", "find_files", "open_checkpoint", "open_packed"]
log = logging.getLogger(__name__)

BLOCKS_FILE, REST_FILE = "transformer_blocks.safetensors", "unquantized_layers.safetensors"
FluxCheckpoint = PackedCheckpoint  # with dims of FLUX.1: what open_checkpoint gives


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
    return _open(Path(path), files, entries, metadata, _flux)


def open_packed(path: str | os.PathLike) -> PackedCheckpoint:
    """Open and check a SVDQuant checkpoint of any family that this pack reads: FLUX.1, Qwen-Image or Z-Image. Else as open_checkpoint."""
    files, entries, metadata = read_files(path)
    kind = identify(entries, metadata)
    read = {"flux": _flux, "qwen-image": _qwen_image, "z-image": _z_image}.get(kind.family)
    if read is None:
        raise CheckpointError(f"{path} is {kind.what}, not a SVDQuant checkpoint of FLUX.1, Qwen-Image or Z-Image. {kind.advice}")
    return _open(Path(path), files, entries, metadata, read)


@dataclass(frozen=True)
class _Model:
    """What a family's reader tells of a file: fields as in PackedCheckpoint."""

    family: str
    dims: FluxDims | qwen_names.QwenDims | zimage_names.ZImageDims
    tensors: dict[str, Entry]
    layout: Layout
    config: dict
    model_class: str


def _open(path: Path, files: list[TensorFile], entries: dict[str, Entry], metadata: dict[str, str],
          read: Callable[[dict[str, Entry], Mapping[str, str], str, list[str]], _Model]) -> PackedCheckpoint:  # fmt: skip
    where, warnings = str(path), []
    model = read(entries, metadata, where, warnings)
    told = flux_config.told_precision(flux_config.read_json(metadata, "quantization_config", warnings), where, warnings)
    layout = model.layout.as_found(model.tensors, where)
    if turned := [prefix for prefix, spec in layout.layers.items() if spec != model.layout.layers[prefix]]:
        warnings.append(f"{listed(turned)} are modulation layers in W4A4, which no known converter writes: their rows are taken for the "
                        "host's order and their bias for the host's own; if pictures look wrong, that is why")  # fmt: skip
    precision = precision_of(layout, model.tensors, told, where)
    ranks = Checker(where, layout, model.tensors, warnings).everything(precision)
    out = PackedCheckpoint(
        path=path, precision=precision, rank=Counter(ranks).most_common(1)[0][0] if ranks else 0, ranks=sorted(set(ranks)),
        config=model.config, model_class=model.model_class, metadata=metadata, warnings=warnings, dims=model.dims, tensors=model.tensors,
        files=files, layout=layout, family=model.family,
    )  # fmt: skip
    for w in warnings:
        log.warning("%s: %s", path, w)
    return out


def _flux(entries: dict[str, Entry], metadata: Mapping[str, str], where: str, warnings: list[str]) -> _Model:
    tensors = _by_internal_name(entries, flux_names.to_v1)
    comfy_outer = flux_config.read_json(metadata, "comfy_config", warnings)
    comfy = comfy_outer.get("model_config")
    if "model_config" in comfy_outer and not isinstance(comfy, dict):
        warnings.append("metadata comfy_config.model_config is not an object and is not used; tensor shapes decide")
    comfy = comfy if isinstance(comfy, dict) else {}
    config = flux_config.read_json(metadata, "config", warnings)
    dims = flux_config.read_dims(tensors, where, comfy, config, warnings)
    v2 = any(flux_names.to_v1(key) != key for key in entries)
    layout = Layout("FLUX.1", flux_names.host_linears(dims), flux_names.layer_specs(dims), flux_names.plain_specs(dims),
                    disk_name=flux_names.to_v2 if v2 else str, swapped="final_layer.adaLN_modulation.1.")  # fmt: skip
    unet_config = flux_config.unet_config(dims, comfy, config, warnings)
    model_class = flux_config.model_class(comfy_outer.get("model_class"), dims.guidance, warnings)
    return _Model("flux", dims, tensors, layout, unet_config, model_class)


def _qwen_image(entries: dict[str, Entry], metadata: Mapping[str, str], where: str, warnings: list[str]) -> _Model:
    tensors = _by_internal_name(entries, v1_suffix)
    config = flux_config.read_json(metadata, "config", warnings)
    dims = qwen_names.read_dims(tensors, where, config)
    layout = qwen_names.layout(dims)
    return _Model("qwen-image", dims, tensors, layout, qwen_names.unet_config(dims, config, warnings), "QwenImage")


def _z_image(entries: dict[str, Entry], metadata: Mapping[str, str], where: str, warnings: list[str]) -> _Model:
    tensors = _by_internal_name(entries, v1_suffix)
    config = flux_config.read_json(metadata, "config", warnings)
    dims = zimage_names.read_dims(tensors, where, config)
    layout = zimage_names.layout(dims)
    return _Model("z-image", dims, tensors, layout, zimage_names.unet_config(dims, config, warnings), "ZImage")


def _by_internal_name(entries: dict[str, Entry], rename: Callable[[str], str]) -> dict[str, Entry]:
    out: dict[str, Entry] = {}
    for key, entry in entries.items():
        name = rename(key)
        if name in out:
            raise CheckpointError(f"{entry.file.path}: {key} and {out[name].key} are two names of the same tensor; expected one of them.")
        out[name] = entry
    return out
