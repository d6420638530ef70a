"""Run by ComfyUI-Manager after `pip install -r requirements.txt`. Says in one line what was found, and never fails an install.

On Linux nothing is installed: torch brings its own Triton (ROCm and XPU builds too). On Windows it does not, so the `triton-windows` that
belongs to the torch found is installed. Without any Triton the pack still works, on slower torch code.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys

# torch (major, minor) -> the Triton series that belongs to it. models/doctor.py holds a copy, because this file must run on its own.
TRITON_OF_TORCH = {
    (2, 9): (3, 5),
    (2, 10): (3, 6),
    (2, 11): (3, 6),
    (2, 12): (3, 7),
    (2, 13): (3, 7),
    (2, 14): (3, 8),
    (2, 15): (3, 9),
}
TRITON_DISTRIBUTIONS = ("triton", "triton-windows", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton-xpu", "triton-xpu")


def series(version: str) -> tuple[int, int]:
    """(major, minor) of a version string such as "2.11.0+cu128"; (0, 0) when it has none."""
    parts = version.split("+")[0].split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) > 1 and parts[0].isdigit() and parts[1].isdigit() else (0, 0)


def installed_triton() -> tuple[str, str] | None:
    """(distribution, version) of the Triton that is installed, or None."""
    for name in TRITON_DISTRIBUTIONS:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def describe_gpu(torch) -> str:
    """The first GPU's name, or why there is none."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return torch.cuda.get_device_name(0) + (f" and {count - 1} more" if count > 1 else "")
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return "no GPU that this torch can use (it is a CPU build)"
    return "no GPU that this torch can use"


def pip_command() -> list[str]:
    """How packages are installed into this interpreter: its pip, or uv where it has none."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return [sys.executable, "-m", "pip", "install"]
    return [shutil.which("uv") or "uv", "pip", "install", "--python", sys.executable]


def windows_triton(torch_version: str) -> str:
    """Installs the triton-windows that belongs to `torch_version`; returns what was done, in a few words."""
    wanted = TRITON_OF_TORCH.get(series(torch_version))
    found = installed_triton()
    if wanted is None:
        held = f"{found[0]} {found[1]} is kept" if found else "no Triton"
        return f"{held}; no triton-windows is known for this torch (known are those of torch 2.9 to 2.15)"
    if found and series(found[1]) == wanted:
        return f"{found[0]} {found[1]}, which belongs to this torch"
    requirement = f"triton-windows>={wanted[0]}.{wanted[1]},<{wanted[0]}.{wanted[1] + 1}"
    done = subprocess.run([*pip_command(), requirement], capture_output=True, text=True)
    if done.returncode == 0:
        return f"installed {requirement}" + (f" in place of {found[0]} {found[1]}" if found else "")
    last = (done.stderr or done.stdout or "no message").strip().splitlines()[-1]
    return f'could not install "{requirement}" ({last}); install it by hand, until then the slower torch code is used'


def find() -> str:
    """One line: GPU, torch, Triton or why not."""
    try:
        import torch
    except Exception as error:
        return f"torch could not be imported ({type(error).__name__}: {error}); install ComfyUI's own requirements first"
    gpu, found = describe_gpu(torch), installed_triton()
    if platform.system() == "Windows" and torch.version.cuda is not None:
        triton = windows_triton(torch.__version__)
    elif found:
        triton = f"{found[0]} {found[1]}"
    else:
        triton = "no Triton, so the slower torch code is used (this torch did not bring one)"
    return f"{gpu}; torch {torch.__version__}; {triton}"


def main() -> int:
    try:
        print(f"[ComfyUI-Tonfa] {find()}")
    except Exception as error:  # an unforeseen machine must not stop the install
        print(f"[ComfyUI-Tonfa] could not look at this machine ({type(error).__name__}: {error}); run the doctor: python -m tonfa doctor")
    return 0


if __name__ == "__main__":
    sys.exit(main())
