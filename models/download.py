"""`python -m tonfa download`: one published file from the hub into ComfyUI's folder. Nothing else in this pack touches the network.

huggingface_hub finds the file, follows mirrors (HF_ENDPOINT) and log-ins, transfers and shows progress. Its hf_hub_download checks the
size only, deletes an older file before it has the new one, and since 1.0 starts from zero after an interruption. So its parts are used:
the bytes go to a .part file beside the target, which a later run goes on with, and get the final name once size and SHA-256 are right.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from .comfyui import find_comfyui
from .published import FP4, INT4, File

CHUNK = 4 << 20
DISK = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "EIO", "ENAMETOOLONG")
    if hasattr(errno, name)
}


class DownloadError(Exception):
    """The file could not be fetched. The message is a sentence or two for the person at the keyboard."""


def preferred_precision() -> tuple[str, str]:
    """(precision, why): fp4 where the GPU is a Blackwell, whose own format it is, else int4. Works without torch."""
    try:
        import torch

        blackwell = torch.version.cuda and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 10
    except Exception:  # a missing or broken torch is no reason not to fetch a file; `doctor` reports it
        blackwell = False
    return (FP4, "the GPU is a Blackwell") if blackwell else (INT4, "no Blackwell GPU here")


def target_folder(file: File, to: Path | None = None) -> Path:
    """`to`, else the folder of the ComfyUI that is found. Made if it is not there. DownloadError when it cannot be."""
    if to is None:
        host = find_comfyui()
        if host is None:
            raise DownloadError(
                "No ComfyUI was found. Say where the file goes with --to FOLDER, or set COMFYUI_PATH to the folder that holds ComfyUI's "
                "main.py."
            )
        to = host / "models" / file.folder
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"{to} cannot be used as a folder: {error.strerror or error}. Choose another with --to FOLDER.") from error
    return to


def download(file: File, folder: Path, say: Callable[[str], None] = print) -> Path:
    """Fetches `file` into `folder` and returns its path there; does nothing when it is there already and whole.

    What was fetched before an interruption is kept and gone on with. DownloadError when it cannot be had, what came is not what the hub
    announced, or another file has its name.
    """
    hub = _hub()
    target = folder / file.name
    url, headers, size, sha256, mark = _ask(hub, file)
    if target.exists():
        _check_present(target, size, sha256)
        say(f"{target} is there already and whole ({size / 1e9:.2f} GB); nothing to do.")
        return target
    part = target.with_name(f"{file.name}.{mark}.part")
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        part.unlink()
        have = 0
    free = shutil.disk_usage(folder).free
    if size - have > free:
        raise DownloadError(
            f"{target} needs {(size - have) / 1e9:.2f} GB more, but its disk has {free / 1e9:.2f} GB free; make room, or choose another "
            "folder with --to FOLDER."
        )
    say(f"{file.repo}/{file.path} -> {target} ({size / 1e9:.2f} GB" + (f", {have / 1e9:.2f} GB of it from before)" if have else ")"))
    _transfer(hub, file, url, headers, part, have, size)
    _check_whole(part, file, size, sha256, say)
    try:
        os.replace(part, target)
    except OSError as error:
        raise DownloadError(f"{target} cannot be written: {error.strerror or error}.") from error
    say(f"{target} is ready: press R in ComfyUI, then choose it.")
    return target


# -- the hub ------------------------------------------------------------------------------------------------------------------------


def _hub() -> SimpleNamespace:
    """What is used of huggingface_hub, from places that it has had since 0.23."""
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, utils
        from huggingface_hub.file_download import http_get
    except ImportError as error:
        raise DownloadError(
            f"huggingface_hub cannot be imported ({error}). Run: python -m pip install huggingface_hub, with the Python that runs ComfyUI."
        ) from error
    foreign = [c for c in utils.HfHubHTTPError.__mro__ if c.__module__.split(".")[0] not in ("huggingface_hub", "builtins")]
    return SimpleNamespace(
        metadata=get_hf_file_metadata, url=hf_hub_url, get=http_get, headers=utils.build_hf_headers, refused=utils.HfHubHTTPError,
        gated=utils.GatedRepoError, offline=utils.OfflineModeIsEnabled, network=foreign[-1],  # of its HTTP library: requests, then httpx
    )  # fmt: skip


def _ask(hub: SimpleNamespace, file: File) -> tuple[str, dict, int, str | None, str]:
    """(URL, headers, size, SHA-256, mark) of the file as the hub announces it; the hash is None where a mirror announces none.

    mark: a few characters that another version of the file does not share, so that no part of one is gone on with as the other.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or None
    url = hub.url(file.repo, file.path, endpoint=endpoint)
    try:
        facts = hub.metadata(url)
        headers = {**hub.headers(), "accept-encoding": "identity"}
    except (hub.refused, hub.offline, hub.network, OSError) as error:
        raise DownloadError(_sentence(hub, error, file, url)) from error
    if not facts.commit_hash or facts.size is None:
        raise DownloadError(f"{url} was answered, but not by a Hugging Face hub: check HF_ENDPOINT, proxy and firewall.")
    sha256 = facts.etag if facts.etag and re.fullmatch(r"[0-9a-f]{64}", facts.etag) else None
    return url, headers, facts.size, sha256, (sha256 or facts.commit_hash)[:12]


def _transfer(hub: SimpleNamespace, file: File, url: str, headers: dict, part: Path, have: int, size: int) -> None:
    """Fetches what is missing of `part`. A lost connection is taken up again as long as bytes come; what came stays in `part`."""
    while have < size:
        try:
            with open(part, "r+b" if have else "wb") as f:
                f.seek(have)
                hub.get(url, f, resume_size=have, headers=headers, expected_size=size, displayed_filename=file.name)
            return
        except (hub.refused, hub.offline, hub.network, OSError, RuntimeError, ValueError) as error:  # the last two: its hf_transfer
            if getattr(error, "errno", None) in DISK:
                raise DownloadError(f"{part} cannot be written: {error.strerror}.") from error
            before, have = have, part.stat().st_size if part.exists() else 0
            if have > size or _status(error) == 416:  # 416: the hub's file ends before the size that it announced
                return  # _check_whole says what is wrong with it
            if have <= before:
                kept = f" {have / 1e6:.1f} of {size / 1e6:.1f} MB are kept: the same command goes on from there."
                raise DownloadError(_sentence(hub, error, file, url) + kept) from error


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _sentence(hub: SimpleNamespace, error: Exception, file: File, url: str) -> str:
    """What went wrong with a request, and what to do."""
    status = _status(error)
    page = url.split("/resolve/")[0]
    if isinstance(error, hub.gated) or status == 403:
        return f"{file.repo} is gated: accept its terms on {page} while logged in, then run `hf auth login` here and try again."
    if status == 401:
        return (
            f"The hub shows no {file.repo} to somebody who is not logged in (401): the name is wrong, or it is private or gated. If you "
            f"may see {page}, run `hf auth login` and try again."
        )
    if status == 404:
        return f"{file.repo} has no {file.path} (404). `download --list` shows the known names; {page} shows what is there."
    if status == 429:
        return "The hub asks for a pause (429, too many requests). Try again in some minutes."
    if status is not None:
        return f"The hub answered {status} for {url}. Try again later."
    if isinstance(error, hub.offline):
        return "HF_HUB_OFFLINE is set, so nothing can be fetched. Unset it and try again."
    why = next(iter(str(error).strip().splitlines()), "no message").rstrip(".")
    return f"The connection to {page} failed ({type(error).__name__}: {why}). Check the network; HF_ENDPOINT chooses a mirror."


# -- checks -------------------------------------------------------------------------------------------------------------------------


def _check_present(target: Path, size: int, sha256: str | None) -> None:
    """Raises DownloadError unless `target` is the published file."""
    found = target.stat().st_size if target.is_file() else None
    if found == size and sha256 in (None, digest(target)):
        return
    what = (
        "a folder" if found is None else f"{found} bytes, the published one {size}" if found != size else "of that size, but other content"
    )
    raise DownloadError(f"{target} is there already, but it is not the published file ({what}). Move it away or delete it, then try again.")


def _check_whole(part: Path, file: File, size: int, sha256: str | None, say: Callable[[str], None]) -> None:
    """Removes `part` and raises DownloadError when it is not what the hub announced."""
    found = part.stat().st_size
    wrong = f"it has {found} bytes in place of {size}" if found != size else ""
    if not wrong and sha256 is None:
        say("This mirror announces no SHA-256; only the size was checked.")
    elif not wrong and digest(part) != sha256:
        wrong = "its SHA-256 is not the one that the hub announces"
    if wrong:
        part.unlink(missing_ok=True)
        raise DownloadError(f"What came as {file.name} is damaged: {wrong}. It was deleted; try again.")


def digest(path: Path) -> str:
    """SHA-256 of a file, as hex, with a bar when that takes long."""
    from tqdm import tqdm

    total = hashlib.sha256()
    with open(path, "rb") as f, tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc="checking", delay=1, leave=False) as bar:
        while block := f.read(CHUNK):
            total.update(block)
            bar.update(len(block))
    return total.hexdigest()
