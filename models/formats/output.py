"""Whether a file can be written, asked before the work that it is to hold."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from .tensorfile import CheckpointError


def check_place(sources: Iterable[Path], path_out: Path) -> None:
    """Raises CheckpointError where path_out is a folder, one of the files to read, or in no folder."""
    if path_out.is_dir():
        raise CheckpointError(f"{path_out} is a folder; give the name of the .safetensors file to write in it.")
    if path_out.exists() and any(path_out.samefile(p) for p in sources):
        raise CheckpointError(f"{path_out} is the file to read; choose another name for the output.")
    if not path_out.absolute().parent.is_dir():
        raise CheckpointError(f"{path_out} cannot be written: there is no folder {path_out.absolute().parent}; make it first.")


def check_room(path_out: Path, need: int) -> None:
    """Raises CheckpointError where the disk has less than `need` bytes free."""
    free = shutil.disk_usage(path_out.absolute().parent).free
    if need > free:
        raise CheckpointError(
            f"{path_out} needs {need / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free; make room or choose another disk."
        )
