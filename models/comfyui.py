"""Where ComfyUI is, for the command line, the demo and the tests. Reads files only: nothing of ComfyUI is imported here."""

from __future__ import annotations

import os
import re
from pathlib import Path

PACK = Path(__file__).absolute().parent.parent
OLDEST = (0, 3, 64)


def is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy" / "sd.py").is_file()


def find_comfyui(pack: Path = PACK) -> Path | None:
    """COMFYUI_PATH, else two levels up when the pack sits in custom_nodes/, else ~/comfy/ComfyUI (comfy-cli's place), else None.

    Raises FileNotFoundError when COMFYUI_PATH is set and is no ComfyUI: what somebody asked for is not passed over in silence.
    """
    asked = os.environ.get("COMFYUI_PATH", "").strip()
    if asked:
        folder = Path(asked).expanduser()
        if not is_comfyui(folder):
            raise FileNotFoundError(f"COMFYUI_PATH is {asked}, but no ComfyUI is there (main.py and comfy/sd.py were looked for)")
        return folder.resolve()
    places = [pack.parent.parent] if pack.parent.name == "custom_nodes" else []
    places.append(Path("~/comfy/ComfyUI").expanduser())
    return next((place.resolve() for place in places if is_comfyui(place)), None)


def comfyui_version(folder: Path) -> str:
    """The version that comfyui_version.py states ("unknown" when that file is missing or unreadable)."""
    try:
        text = (folder / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text)
    return found[1] if found else "unknown"


def is_old(version: str) -> bool:
    """Whether a ComfyUI version is older than the oldest that is supported; an unreadable one is not called old."""
    numbers = re.findall(r"\d+", version)[:3]
    return bool(numbers) and tuple(int(n) for n in numbers) < OLDEST


def original_packs(folder: Path) -> list[str]:
    """Names of the enabled packs in `folder` (a custom_nodes) that register our node names too: the original pack and its copies.

    ComfyUI lets the pack that it loads last win, in silence.
    """
    found = []
    for pack in sorted(folder.iterdir()) if folder.is_dir() else []:
        entry = pack / "__init__.py"
        if pack.name.startswith(".") or pack.name.endswith(".disabled") or not entry.is_file():
            continue
        if pack.resolve() == PACK.resolve() or "comfyui-tonfa" in read(pack / "pyproject.toml").lower():
            continue
        if "NunchakuFluxDiTLoader" in read(entry):
            found.append(pack.name)
    return found


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
