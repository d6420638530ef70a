"""A checkpoint of the old form, a folder of two files, as the single file that is published today: the same tensors, one header."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from .formats.checkpoint import CheckpointError, FluxCheckpoint, find_files, open_checkpoint
from .formats.output import check_place, check_room
from .formats.tensorfile import TORCH_NAMES, Entry, Slot, stream_save
from .formats.writer import file_metadata

TYPES = {name: dtype for dtype, name in TORCH_NAMES.items()}


def merge(folder: str | os.PathLike, path_out: str | os.PathLike, progress: Callable[[int, int], None] | None = None) -> FluxCheckpoint:
    """Write the SVDQuant FLUX folder as one file under v1 names, and return what was read (closed).

    Every tensor is checked before and copied bit for bit, one in memory at a time; progress(done, total) counts bytes. The file appears
    under its name only when it is complete. CheckpointError, before anything is written, when the folder is no whole checkpoint, or
    path_out is one of its files, a folder, in a folder that is not there, or on a disk without room.
    """
    path_out = Path(path_out)
    sources = find_files(folder)
    check_place(sources, path_out)
    checkpoint = open_checkpoint(folder)
    try:
        check_room(path_out, sum(entry.nbytes for entry in checkpoint.tensors.values()))
        slots = [_slot(key, entry) for key, entry in checkpoint.tensors.items()]
        stream_save(path_out, slots, merged_metadata(checkpoint), progress)
    finally:
        checkpoint.close()
    return checkpoint


def merged_metadata(checkpoint: FluxCheckpoint) -> dict[str, str]:
    """What a single file's header says: as the folder's own config files have it, and what they lack told from the tensors."""
    built = file_metadata(checkpoint.config, checkpoint.precision, checkpoint.rank, checkpoint.model_class)
    return built | {key: text for key, text in checkpoint.metadata.items() if key in ("config", "comfy_config") and _is_object(text)}


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _slot(key: str, entry: Entry) -> Slot:
    if entry.dtype not in TYPES:
        raise CheckpointError(f"{entry.file.path}: {entry.key} is {entry.dtype}, which no SVDQuant FLUX layer has; it cannot be merged.")
    return Slot(key, TYPES[entry.dtype], entry.shape, entry.load)
