"""The environment of the host tests: ComfyUI's own requirements beside the torch of .venv, in .venv-host-<ComfyUI version>.

    python tests/host_env.py find     prints the ComfyUI folder that is used, or why there is none
    python tests/host_env.py build    builds the environment and prints its python; prints one line when no ComfyUI is found
    python tests/host_env.py test     builds it and runs tests/host in it; skips with one line when no ComfyUI is found

A ComfyUI that is found but whose requirements cannot be installed is an error, not a skip.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from env import ROOT, create_venv, pip, recent_torch, share_packages, site_packages, venv_python, version_in  # noqa: E402
from tonfa.models.comfyui import comfyui_version, find_comfyui  # noqa: E402

SHIM = ROOT / "tests" / "host" / "shim"
SKIPPED = (
    "Host tests SKIPPED: no ComfyUI found. To run them: git clone https://github.com/comfyanonymous/ComfyUI ~/comfy/ComfyUI, "
    "or set COMFYUI_PATH to yours, then make test again."
)
OPTIONAL = ("playwright",)  # for tests/host/test_browser.py, which says so and is skipped where one is missing
TORCH_FAMILY = ("torch", "torchvision", "torchaudio")


def host_requirements(host: Path) -> list[str]:
    """The host's requirements.txt without the torch family (shared from .venv), plus what 2025 hosts use and do not list."""
    lines = (line.split("#")[0].strip() for line in (host / "requirements.txt").read_text(encoding="utf-8").splitlines())
    kept = [line for line in lines if line and re.split(r"[\s\[<>=!~;]", line)[0].lower() not in TORCH_FAMILY]
    return [*kept, "requests"]


def companions(torch_version: str) -> list[str]:
    """torchvision and torchaudio of a torch version: torchvision 0.(15 + minor); torchaudio has ended at 2.11."""
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    if major != 2:
        raise SystemExit(f"Host tests: no torchvision is known for torch {torch_version}. Known are those of torch 2.x.")
    return [f"torchvision==0.{15 + minor}.*", f"torchaudio==2.{min(minor, 11)}.*"]


def install(python: Path, host: Path) -> None:
    """Installs everything that the host needs into `python`'s environment; exits with pip's reason when that fails."""
    torch = recent_torch(python)
    if torch is None:
        raise SystemExit("Host tests: torch is missing from .venv. Remove .venv and run make test again.")
    # A constraint, so that no requirement of the host brings a second torch or the numpy that Triton 3.6's interpreter cannot use.
    constraints = python.parent.parent / "constraints.txt"
    constraints.write_text(f"torch=={torch}\nnumpy<2.4\n", encoding="utf-8")
    pip(python, "--constraint", str(constraints), *host_requirements(host))
    missing = [wanted for wanted in companions(torch) if version_in(python, wanted.split("=")[0]) is None]
    if missing:
        pip(python, "--no-deps", *missing)
    try:
        pip(python, *OPTIONAL)
    except SystemExit as failed:
        print(f"{failed}. The tests that need it are skipped.", file=sys.stderr, flush=True)
    cuda = subprocess.check_output([str(python), "-c", "import torch; print(torch.version.cuda or torch.version.hip or '')"], text=True)
    if not cuda.strip():
        # torchaudio's wheel is a CUDA build. Without its libraries it takes its "no extension" branch, which is all that the host needs.
        for library in Path(site_packages(python), "torchaudio", "lib").glob("*.so"):
            library.unlink()


def build(host: Path) -> Path:
    """The python of the host's environment, built if it is not there or the requirements have changed."""
    venv = ROOT / f".venv-host-{comfyui_version(host)}"
    python = venv_python(venv)
    wanted = hashlib.sha256(
        "\n".join([sys.executable, str(version_in(sys.executable, "torch")), *host_requirements(host), *OPTIONAL]).encode()
    ).hexdigest()
    stamp = venv / ".tonfa-ready"
    if python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"Building {venv.name} for ComfyUI {comfyui_version(host)} in {host} (minutes the first time)", file=sys.stderr, flush=True)
    system_packages = "include-system-site-packages = true" in Path(sys.prefix, "pyvenv.cfg").read_text(encoding="utf-8")
    create_venv(venv, system_packages)
    share_packages(python, site_packages(sys.executable))
    install(python, host)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def test(host: Path, arguments: list[str]) -> int:
    """Runs tests/host in the host's environment; the exit status is pytest's."""
    python = build(host)
    path = os.pathsep.join(filter(None, [str(SHIM), os.environ.get("PYTHONPATH", "")]))
    print(f"Host tests with ComfyUI {comfyui_version(host)} in {host}", flush=True)
    command = [str(python), "-m", "pytest", str(ROOT / "tests" / "host"), *arguments]
    return subprocess.call(command, env={**os.environ, "COMFYUI_PATH": str(host), "PYTHONPATH": path}, cwd=ROOT)


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in ("find", "build", "test"):
        raise SystemExit(__doc__)
    host = find_comfyui()
    if host is None:
        print(SKIPPED if arguments[0] == "test" else "No ComfyUI found (COMFYUI_PATH, two levels up, ~/comfy/ComfyUI).")
        return 0
    if arguments[0] == "test":
        return test(host, arguments[1:])
    print(host if arguments[0] == "find" else build(host))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
