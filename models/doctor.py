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
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .comfyui import OLDEST, PACK, comfyui_version, find_comfyui, is_old, original_packs

OLDEST_TORCH = (2, 5)
TRITON_RANGE = ((3, 5), (3, 9))
# The same table as install.py's (which must run on its own); a test holds them together. Used where torch itself names no Triton.
TRITON_OF_TORCH = {(2, 9): (3, 5), (2, 10): (3, 6), (2, 11): (3, 6), (2, 12): (3, 7), (2, 13): (3, 7), (2, 14): (3, 8), (2, 15): (3, 9)}
TRITON_DISTRIBUTIONS = ("triton", "triton-windows", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton-xpu", "triton-xpu")
AMD_VARIABLES = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
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


def build_of(torch) -> str:
    """What this torch was built for: "CUDA", "ROCm", "XPU" or "CPU"."""
    version = torch.version
    return "CUDA" if version.cuda else "ROCm" if version.hip else "XPU" if getattr(version, "xpu", None) else "CPU"


def nvidia_driver() -> bool:
    """Whether an NVIDIA driver is installed: its kernel module, its library as WSL has it, or its tool."""
    places = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1")
    return any(Path(place).exists() for place in places) or shutil.which("nvidia-smi") is not None


def amd_driver() -> bool:
    return Path("/dev/kfd").exists()


def gpu_reason(torch) -> str:
    """Why torch.cuda.is_available() is False, in torch's own words."""
    try:
        torch.cuda.init()
    except Exception as error:  # RuntimeError from the driver, AssertionError from builds without CUDA
        return first_line(error)
    return "torch names no reason"


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def check_torch(torch) -> Check:
    """The version, and whether this build can use the GPU whose driver is installed."""
    build = build_of(torch)
    version = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}.get(build, "")
    found = f"torch {torch.__version__} ({f'{build} {version}'.strip()} build)"
    if series(torch.__version__) < OLDEST_TORCH:
        return Check("torch", "fail", found, f"Update torch to {dotted(OLDEST_TORCH)} or newer, the way your ComfyUI was installed.")
    if build == "XPU" or gpu_available(torch):
        return Check("torch", "ok", found)
    nvidia, driver = nvidia_driver(), amd_driver() if build == "ROCm" else build == "CUDA" and nvidia_driver()
    if driver:
        what, variables = ("NVIDIA", ("CUDA_VISIBLE_DEVICES",)) if build == "CUDA" else ("AMD", AMD_VARIABLES)
        hidden = ", ".join(f"{name} is {os.environ[name]!r}" for name in variables if name in os.environ)
        found += f", but it can use no GPU, although an {what} driver is here: {gpu_reason(torch)}" + (f" ({hidden})" if hidden else "")
        mend = f"Update the {what} driver, and check that {' or '.join(variables)} does not hide the GPU"
        return Check("torch", "fail", found, mend + (", and that you may open /dev/kfd (group render)." if what == "AMD" else "."))
    if nvidia:
        mend = "Install the CUDA build of torch that ComfyUI recommends (its README has the command) into this Python."
        return Check("torch", "fail", f"{found}, but an NVIDIA driver is here: {gpu_reason(torch)}", mend)
    if build != "CPU":
        return Check(
            "torch", "warn", f"{found}, but no GPU driver was found: {gpu_reason(torch)}", "If there is a GPU, install its driver."
        )
    return Check("torch", "ok", found)


def triton_requirement() -> tuple[str, str] | None:
    """(distribution, version) of the Triton that the installed torch itself requires; None when it names none."""
    try:
        requirements = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (re.match(r"((?:pytorch-)?triton(?:-\w+)*)\s*\(?==\s*(\d+\.\d+[\w.+]*)", requirement) for requirement in requirements)
    return next(((named[1], named[2]) for named in found if named), None)


def installed_triton() -> tuple[str, str] | None:
    """(distribution, version) of the Triton that is installed, or None; the one that torch requires goes first."""
    required = triton_requirement()
    for name in (*([required[0]] if required else []), *TRITON_DISTRIBUTIONS):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def triton_of(torch_version: str) -> tuple[int, int] | None:
    """The Triton series that belongs to the installed torch: what torch itself requires, else the table; None when neither knows."""
    required = triton_requirement()
    return series(required[1]) if required else TRITON_OF_TORCH.get(series(torch_version))


def triton_mend(build: str, torch_version: str, windows: bool) -> str:
    """How to get the Triton of this torch. ROCm and XPU builds have one of their own, which plain triton would overwrite."""
    required, wanted = triton_requirement(), triton_of(torch_version)
    if build in ("ROCm", "XPU"):
        if required is None:
            return f"Reinstall torch from its {build} index: its own Triton comes with it."
        return f'Run: python -m pip install "{required[0]}=={required[1]}", with the --index-url that this torch came from.'
    if windows and wanted:
        return f'Run: python -m pip install "triton-windows=={dotted(wanted)}.*"'
    if required:
        return f'Run: python -m pip install "{required[0]}=={required[1]}"'
    return f'Run: python -m pip install "triton=={dotted(wanted)}.*"' if wanted else "Install the Triton that belongs to your torch."


def check_triton(torch_version: str, found: tuple[str, str] | None, wanted: tuple[int, int] | None, gpu: bool, install: str) -> Check:
    """Whether the Triton `found` belongs to this torch; `install` says how to get the right one. Without a GPU that Triton can use
    nothing about it is wrong."""
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
        python = f"Python {platform.python_version()}"
        mend = f"Copy the `include` and `libs` folders of the same Python version ({python}) into python_embeded ({sys.prefix})."
    return Check("Python headers", "fail", found, mend)


# -- GPU and kernels --------------------------------------------------------------------------------------------------------------


def gpu_available(torch) -> bool:
    with warnings.catch_warnings():  # what it warns of is in check_torch's sentence
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def devices(torch) -> list:
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if gpu_available(torch) else [torch.device("cpu")]


def has_matrix_units(device) -> bool:
    """Whether Triton is of use here: without matrix units the torch path runs, and nothing about Triton is wrong."""
    from ..kernels.targets import target_for

    return target_for(device).has_dot


def check_compute() -> Check:
    """TONFA_COMPUTE, which takes the place of compute auto: a wrong one stops every workflow that leaves compute at auto."""
    from ..kernels.targets import COMPUTE_MODES

    asked = os.environ.get("TONFA_COMPUTE", "")
    if asked and asked.strip().lower() not in COMPUTE_MODES:
        return Check("TONFA_COMPUTE", "fail", f"it is {asked!r}, which is no compute mode", "Unset it or set exact, fast or weight_only.")
    return Check("TONFA_COMPUTE", "ok", f"it is {asked!r}" if asked else "not set")


def describe_device(torch, device) -> Check:
    """What the device is, which operands INT4 layers are multiplied in there, by which kernels, and what compute auto means."""
    from ..kernels.targets import code_form, resolve_compute, target_for, triton_reason

    path = "Triton kernels"
    if triton_reason(device) is not None:
        some = triton_reason(device, needs_dot=False) is None
        path = "torch path, Triton kernels for the modulation layers only" if some else "torch path"
    try:
        compute = resolve_compute("auto", device)
    except ValueError:
        compute = "not decided (see TONFA_COMPUTE)"
    how = f"target {target_for(device).name}, {code_form(device)} operands for INT4, {path}, compute {compute}"
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


def self_tests(device, where: str = "") -> Iterator[Check]:
    """Every op against its torch oracle (where Triton runs) and against the dense product; `where` goes behind the name."""
    try:
        from . import selftest
    except Exception as error:
        yield Check(f"self-test{where}", "fail", f"cannot be imported ({type(error).__name__}: {error})", "Install the pack again.")
        return
    for name, test in selftest.TESTS.items():
        try:
            yield self_test_result(name + where, test(device))
        except Exception as error:  # whatever a driver or compiler raises belongs in the report
            yield Check(name + where, "fail", f"{type(error).__name__}: {first_line(error)}", selftest.MEND)


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


def checks(announce: Callable[[str], None] = lambda text: None) -> Iterator[Check]:
    """All checks, in the order in which one mends what is wrong. `announce` is told what is about to take long."""
    yield check_python()
    try:
        import torch

        build = build_of(torch)  # a torch that was half removed imports as an empty package
    except Exception as error:
        mend = "Run this with the Python that runs ComfyUI, or install ComfyUI's requirements into this one."
        yield Check("torch", "fail", f"cannot be imported ({type(error).__name__}: {first_line(error)})", mend)
        yield check_comfyui()
        yield check_original()
        return
    windows, here = platform.system() == "Windows", devices(torch)
    gpu = any(has_matrix_units(device) for device in here)
    yield guarded("torch", lambda: check_torch(torch))
    install = triton_mend(build, torch.__version__, windows)
    yield check_triton(torch.__version__, installed_triton(), triton_of(torch.__version__), gpu, install)
    yield check_compiler(gpu, windows)
    yield check_headers(gpu, windows)
    yield guarded("TONFA_COMPUTE", check_compute)
    for device in here:
        announce(f"testing kernels on {device} ...")
        yield guarded("GPU", lambda d=device: describe_device(torch, d))
        yield guarded("launch", lambda d=device: check_launch(d))
        yield from self_tests(device, f" on {device}" if len(here) > 1 else "")
    yield check_comfyui()
    yield check_original()


def report(as_json: bool = False) -> int:
    """Prints every check as it is done; returns 1 when one failed, else 0."""
    done = []
    for check in checks((lambda text: None) if as_json else lambda text: print(f"       {text}", flush=True)):
        done.append(check)
        if not as_json:
            print(f"[{MARKS[check.state]}] {check.name}: {check.found}" + (f"\n       -> {check.mend}" if check.mend else ""), flush=True)
    wrong = sum(check.state == "fail" for check in done)
    if as_json:
        print(json.dumps({"ok": not wrong, "checks": [asdict(check) for check in done]}, indent=2))
    else:
        print(f"{wrong} of {len(done)} checks failed: mend them from the top." if wrong else "Nothing is wrong.")
    return 1 if wrong else 0
