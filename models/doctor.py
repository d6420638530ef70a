"""`python -m tonfa doctor`: what this machine is, what will run on it, and how to mend what is wrong.

Everything is tried rather than assumed: Triton by a real launch, every kernel against its torch oracle. Nothing of ComfyUI is imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .comfyui import OLDEST, PACK, comfyui_version, find_comfyui, is_old, original_packs

OLDEST_TORCH = (2, 5)
TRITON_RANGE = ((3, 5), (3, 9))
# The same table as install.py's (which must run on its own); a test holds them together. Used where torch itself names no Triton.
TRITON_OF_TORCH = {(2, 9): (3, 5), (2, 10): (3, 6), (2, 11): (3, 6), (2, 12): (3, 7), (2, 13): (3, 7), (2, 14): (3, 8), (2, 15): (3, 9)}
TRITON_DISTRIBUTIONS = ("triton", "triton-windows", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton-xpu", "triton-xpu")
MARKS = {"ok": " ok ", "warn": "note", "fail": "FAIL"}


@dataclass(frozen=True)
class Check:
    """One thing looked at. state: "ok", "warn" (works, but worth knowing) or "fail"; mend: what to do, empty when nothing."""

    name: str
    state: str
    found: str
    mend: str = ""


def series(version: str) -> tuple[int, int]:
    """(major, minor) of a version string such as "2.11.0+cu128"; (0, 0) when it has none."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def dotted(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"


# -- environment ------------------------------------------------------------------------------------------------------------------


def check_python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.release()} ({platform.machine()})")


def check_torch(torch) -> Check:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    found = f"torch {torch.__version__} ({build} build)"
    if series(torch.__version__) < OLDEST_TORCH:
        return Check("torch", "fail", found, f"Update torch to {dotted(OLDEST_TORCH)} or newer, the way your ComfyUI was installed.")
    nvidia = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if build == "CPU" and nvidia:
        return Check("torch", "warn", f"{found}, but there is an NVIDIA driver", "Install a CUDA build of torch to use the GPU.")
    return Check("torch", "ok", found)


def installed_triton() -> tuple[str, str] | None:
    """(distribution, version) of the Triton that is installed, or None."""
    for name in TRITON_DISTRIBUTIONS:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def triton_of(torch_version: str) -> tuple[int, int] | None:
    """The Triton series that belongs to the installed torch: what torch itself requires, else the table; None when neither knows."""
    try:
        requirements = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    for requirement in requirements:
        named = re.match(r"(?:pytorch-)?triton[\w-]*\s*\(?==\s*(\d+)\.(\d+)", requirement)
        if named:
            return int(named[1]), int(named[2])
    return TRITON_OF_TORCH.get(series(torch_version))


def check_triton(torch_version: str, found: tuple[str, str] | None, wanted: tuple[int, int] | None, gpu: bool, windows: bool) -> Check:
    """Whether the Triton `found` belongs to this torch. Without a GPU that Triton can use nothing about it is wrong."""
    package = "triton-windows" if windows else "triton"
    install = f'Run: python -m pip install "{package}=={dotted(wanted)}.*"' if wanted else "Install the Triton that belongs to your torch."
    if found is None:
        if gpu:
            return Check("triton", "fail", "no Triton: the slower torch code is used", install)
        return Check("triton", "ok", "no Triton (not needed without a GPU)")
    text, version = f"{found[0]} {found[1]}", series(found[1])
    if not gpu:
        return Check("triton", "ok", f"{text} (not used without a GPU)")
    if wanted and version != wanted:
        return Check("triton", "fail", f"{text}, but torch {torch_version} belongs to Triton {dotted(wanted)}", install)
    if not TRITON_RANGE[0] <= version <= TRITON_RANGE[1]:
        return Check(
            "triton",
            "warn",
            f"{text}: tested are {dotted(TRITON_RANGE[0])} to {dotted(TRITON_RANGE[1])}",
            "If the launch below fails: " + install,
        )
    return Check("triton", "ok", f"{text}, which belongs to torch {torch_version}" if wanted else text)


def check_compiler(gpu: bool, windows: bool) -> Check:
    """Triton builds a small launcher with a C compiler (on Windows it brings its own)."""
    asked = os.environ.get("CC")
    compiler = shutil.which(asked) if asked else next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    if windows:
        return Check("C compiler", "ok", "triton-windows brings its own")
    if compiler:
        return Check("C compiler", "ok", compiler)
    found = f"CC is {asked}, which is not there" if asked else "no C compiler (gcc, clang)"
    if not gpu:
        return Check("C compiler", "ok", f"{found}; not needed without a GPU")
    return Check(
        "C compiler", "fail", found, "Install one (Debian, Ubuntu: sudo apt install gcc; Fedora: sudo dnf install gcc) or set CC to yours."
    )


def check_headers(gpu: bool, windows: bool) -> Check:
    """The same launcher includes Python.h, which distributions and ComfyUI's Windows portable leave out."""
    folder = Path(sysconfig.get_paths()["include"])
    if (folder / "Python.h").exists():
        return Check("Python headers", "ok", str(folder))
    found = f"no Python.h in {folder}"
    if not gpu:
        return Check("Python headers", "ok", f"{found}; not needed without a GPU")
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    mend = f"Install them (Debian, Ubuntu: sudo apt install {name}-dev; Fedora: sudo dnf install python3-devel)."
    if windows:
        mend = f"Copy the folders include and libs of a normal Python {platform.python_version()} into {sys.prefix}."
    return Check("Python headers", "fail", found, mend)


# -- GPU and kernels --------------------------------------------------------------------------------------------------------------


def devices(torch) -> list:
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [torch.device("cpu")]


def has_matrix_units(device) -> bool:
    """Whether Triton is of use here: without matrix units the torch path runs, and nothing about Triton is wrong."""
    from ..kernels.targets import target_for

    return target_for(device).has_dot


def describe_device(torch, device) -> Check:
    from ..kernels.targets import resolve_compute, target_for

    target, compute = target_for(device).name, resolve_compute("auto", device)
    forced = os.environ.get("TONFA_COMPUTE")
    how = f"target {target}, compute {compute}" + (f" (TONFA_COMPUTE={forced})" if forced else "")
    if device.type == "cpu":
        return Check("GPU", "ok", f"none that this torch can use; the CPU runs everything: {how}")
    facts = torch.cuda.get_device_properties(device)
    return Check(f"GPU {device.index}", "ok", f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB, {how}")


def check_launch(device) -> Check:
    """A real Triton launch on `device`: importing Triton proves nothing."""
    from ..kernels.targets import triton_reason

    reason = triton_reason(device)
    if reason is None:
        return Check("launch", "ok", f"a Triton kernel runs on {device}")
    if not has_matrix_units(device):
        return Check("launch", "ok", f"{reason}; torch code is used")
    return Check(
        "launch", "fail", f"{reason}; the slower torch code is used.", "Mend what is marked above; if nothing is, report this line."
    )


def self_tests(torch, device) -> Iterator[Check]:
    """Every op against its torch oracle (where Triton runs) and against the dense product."""
    try:
        from . import selftest
    except Exception as error:
        yield Check("self-test", "fail", f"cannot be imported ({type(error).__name__}: {error})", "Install the pack again.")
        return
    for name, test in selftest.TESTS.items():
        try:
            yield self_test_result(name, test(device))
        except Exception as error:  # whatever a driver or compiler raises belongs in the report
            yield Check(name, "fail", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", selftest.MEND)


def self_test_result(name: str, errors: list) -> Check:
    from . import selftest

    worst = "; ".join(f"{e.what} {e.error:.1e} (at most {e.limit:.0e})" for e in errors)
    wrong = [e for e in errors if not e.error <= e.limit]
    return Check(name, "fail" if wrong else "ok", worst, selftest.MEND if wrong else "")


# -- host -------------------------------------------------------------------------------------------------------------------------


def check_comfyui() -> Check:
    try:
        folder = find_comfyui()
    except FileNotFoundError as error:
        return Check("ComfyUI", "fail", str(error), "Set COMFYUI_PATH to the folder that holds ComfyUI's main.py, or unset it.")
    if folder is None:
        return Check("ComfyUI", "warn", "none found", "Put this pack into ComfyUI's custom_nodes folder, or set COMFYUI_PATH.")
    version, oldest = comfyui_version(folder), ".".join(map(str, OLDEST))
    if is_old(version):
        return Check("ComfyUI", "fail", f"{version} in {folder}", f"Update ComfyUI to {oldest} or newer.")
    return Check("ComfyUI", "ok", f"{version} in {folder}")


def check_original() -> Check:
    """The original pack registers the same node names; ComfyUI silently keeps whichever pack it loads last."""
    try:
        host = find_comfyui()
    except FileNotFoundError:
        host = None
    folders = {PACK.parent.resolve()} if PACK.parent.name == "custom_nodes" else set()
    if host is not None:
        folders.add((host / "custom_nodes").resolve())
    found = sorted({name for folder in folders for name in original_packs(folder)})
    if found:
        mend = "Disable one of the two in ComfyUI-Manager: both register the same node names, and ComfyUI keeps the one loaded last."
        return Check("original pack", "fail", f"{', '.join(found)} is installed beside this pack", mend)
    return Check("original pack", "ok", "ComfyUI-nunchaku is not installed beside this pack")


# -- report -----------------------------------------------------------------------------------------------------------------------


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """The check's result; a check that itself breaks is a failed one, so that the rest is still reported."""
    try:
        return check()
    except Exception as error:
        return Check(name, "fail", f"{type(error).__name__}: {error}", "Report this line.")


def checks() -> Iterator[Check]:
    """All checks, in the order in which one mends what is wrong."""
    yield check_python()
    try:
        import torch
    except Exception as error:
        mend = "Run this with the Python that runs ComfyUI, or install ComfyUI's requirements into this one."
        yield Check("torch", "fail", f"cannot be imported ({type(error).__name__}: {error})", mend)
        yield check_comfyui()
        return
    windows = platform.system() == "Windows"
    gpu = any(has_matrix_units(device) for device in devices(torch))
    yield check_torch(torch)
    yield check_triton(torch.__version__, installed_triton(), triton_of(torch.__version__), gpu, windows)
    yield check_compiler(gpu, windows)
    yield check_headers(gpu, windows)
    for device in devices(torch):
        yield guarded("GPU", lambda d=device: describe_device(torch, d))
        yield guarded("launch", lambda d=device: check_launch(d))
    yield from self_tests(torch, devices(torch)[0])
    yield check_comfyui()
    yield check_original()


def report(as_json: bool = False) -> int:
    """Prints every check as it is done; returns 1 when one failed, else 0."""
    done = []
    for check in checks():
        done.append(check)
        if not as_json:
            print(f"[{MARKS[check.state]}] {check.name}: {check.found}" + (f"\n       -> {check.mend}" if check.mend else ""), flush=True)
    wrong = sum(check.state == "fail" for check in done)
    if as_json:
        print(json.dumps({"ok": not wrong, "checks": [asdict(check) for check in done]}, indent=2))
    else:
        print(f"{wrong} of {len(done)} checks failed: mend them from the top." if wrong else "Nothing is wrong.")
    return 1 if wrong else 0
