"""Builds the development environment: `python tests/env.py .venv`. Needs Python 3.10+ and a package index, nothing else.

A torch >= 2.5 that the interpreter already has is used as it is; otherwise torch is installed. A Triton that torch brought is kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
OLDEST_TORCH = (2, 5)
ROOT = Path(__file__).resolve().parent.parent


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(*command: str | Path) -> None:
    """Runs a command; a failure ends this script with the command and its exit status (pip has printed why)."""
    done = subprocess.run([str(part) for part in command])
    if done.returncode:
        raise SystemExit(f"Failed with exit status {done.returncode}: {' '.join(str(part) for part in command)}")


def pip(python: Path, *arguments: str) -> None:
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)


def version_in(python: Path | str, distribution: str) -> str | None:
    """The version of an installed distribution as `python` sees it, or None."""
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def recent_torch(python: Path | str) -> str | None:
    """The version of torch as `python` sees it when that is 2.5 or newer, else None."""
    version = version_in(python, "torch")
    return version if version and tuple(int(p) for p in version.split(".")[:2]) >= OLDEST_TORCH else None


def site_packages(python: Path | str) -> str:
    return subprocess.check_output([str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], text=True).strip()


def share_packages(python: Path, source: str) -> None:
    """Makes the packages in site folder `source`, editable ones too, importable by `python`, behind its own."""
    line = f"import site; site.addsitedir({source!r})\n"
    Path(site_packages(python), "zz_tonfa_shared.pth").write_text(line, encoding="utf-8")


def create_venv(venv: Path, system_packages: bool) -> Path:
    """An empty venv with a current pip and setuptools (the pack is installed without build isolation)."""
    python = venv_python(venv)
    if not python.exists():
        run(sys.executable, "-m", "venv", *(["--system-site-packages"] if system_packages else []), venv)
    pip(python, "--upgrade", "pip", "setuptools>=77")
    return python


def build(venv: Path) -> None:
    if sys.version_info < (3, 10):  # noqa: UP036  (this script is what says so)
        raise SystemExit(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}. Choose one with: make PYTHON=python3.12 ...")
    torch = recent_torch(sys.executable)
    in_venv = sys.prefix != sys.base_prefix
    print(f"Building {venv} with {'torch ' + torch + ' of ' + sys.executable if torch else TORCH} (minutes the first time)", flush=True)
    python = create_venv(venv, system_packages=bool(torch) and not in_venv)
    if torch and in_venv:  # a venv made from a venv sees only the base interpreter's packages
        share_packages(python, site_packages(sys.executable))
    if recent_torch(python) is None:
        pip(python, TORCH, "numpy<2.4")
    has_triton = any(version_in(python, name) for name in ("triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows"))
    pip(python, "--no-build-isolation", "--editable", f"{ROOT}[{'test' if has_triton else 'dev'}]")
    run(python, "-c", "import torch, tonfa; print('Ready: Python', __import__('platform').python_version(), 'torch', torch.__version__)")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tests/env.py FOLDER")
    build(Path(sys.argv[1]).resolve())
