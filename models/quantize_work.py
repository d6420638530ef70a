"""Where a long piece of work keeps what is finished: a folder beside its output, from which an interrupted run goes on."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from torch import Tensor

from .formats.tensorfile import CheckpointError, Slot, TensorFile, stream_save

log = logging.getLogger(__name__)

RESUME = 1  # goes up when what waits in a folder can no longer be gone on with
_OURS = re.compile(r"(job\.json|\d{4}\.kept|calibration\.kept|plan\.json|whole\.kept)(\.\w+)*")


class Work:
    """The folder NAME.part. job: JSON that says what is being made; None for what cannot be gone on with."""

    def __init__(self, path_out: Path, job: object = None):
        self.folder = path_out.with_name(f"{path_out.name}.part")
        self._text = None if job is None else json.dumps({"resume": RESUME, "job": job}, indent=1, sort_keys=True)

    def open(self) -> None:
        """Makes the folder, or goes on in it; one of another job is emptied. CheckpointError where it holds somebody else's files."""
        job = self.folder / "job.json"
        try:
            if self.folder.exists():
                self._check_ours()
                same = self._text is not None and job.is_file() and job.read_text(encoding="utf-8") == self._text
                for path in self.folder.iterdir():
                    if not same or path.name.endswith(".part"):  # a process that was killed leaves these
                        path.unlink()
                log.info("%s in %s", "going on" if same else "starting afresh", self.folder)
            self.folder.mkdir(exist_ok=True)
            part = self.folder / "job.json.part"
            part.write_text(self._text or "", encoding="utf-8")
            part.replace(job)
        except OSError as e:
            raise CheckpointError(f"{self.folder}, where finished layers wait, cannot be used: {e.strerror or e}.") from e

    def _check_ours(self) -> None:
        other = None if self.folder.is_dir() else self.folder.name
        if other is None:
            other = next((p.name for p in self.folder.iterdir() if not _OURS.fullmatch(p.name) or p.is_dir()), None)
        if other is not None:
            raise CheckpointError(f"{self.folder} is where finished layers would wait, but {other} is there, which is none: move it away.")

    def path(self, name: str) -> Path:
        return self.folder / name

    def finished(self, number: int) -> TensorFile | None:
        """What finish() kept under this number, else None."""
        path = self._file(number)
        if not path.exists():
            return None
        try:
            return TensorFile(path)
        except CheckpointError as e:  # power went off while it was written
            log.warning("%s is made again: %s", path.name, e)
            path.unlink()
            return None

    def finish(self, number: int, tensors: dict[str, Tensor], metadata: dict[str, str]) -> TensorFile:
        """Keeps the tensors of a host linear, and metadata with them."""
        stream_save(self._file(number), [Slot(key, t.dtype, tuple(t.shape), lambda t=t: t) for key, t in tensors.items()], metadata)
        return TensorFile(self._file(number))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:04d}.kept"  # no ending that ComfyUI would list among its models

    def size(self) -> int:
        """Bytes that lie in it."""
        return sum(p.stat().st_size for p in self.folder.iterdir()) if self.folder.is_dir() else 0

    def remove(self) -> None:
        for path in sorted(self.folder.iterdir(), key=lambda p: p.name == "job.json"):
            path.unlink()
        self.folder.rmdir()
