"""What the device at hand can do, and which compute mode that makes the default.

Nothing here touches a device at import. `triton_reason` launches one small kernel the first time it is asked about a device and keeps
the answer, because `import triton` succeeds on machines where the first launch fails (no C compiler, no Python headers).
"""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

log = logging.getLogger(__name__)

COMPUTE_MODES = ("auto", "exact", "fast", "weight_only")


@dataclass(frozen=True)
class Target:
    """One kind of device.

    has_dot     Triton makes matrix instructions for int8 and 16-bit operands here
    e4m3_dot    and for e4m3 (the OCP kind, not gfx942's own)
    shared      bytes of shared memory one thread block may use
    copy_engine tensor descriptors go through hardware (TMA)
    multiprocessors  of the very device at hand; 0 where none was asked
    """

    name: str
    has_dot: bool
    e4m3_dot: bool
    shared: int
    copy_engine: bool = False
    multiprocessors: int = 0


_CPU = Target("cpu", has_dot=False, e4m3_dot=False, shared=0)

# Compute capabilities, with the shared memory a block may opt in to (CUDA programming guide, technical specifications per capability).
_CUDA_SHARED = {75: 65536, 80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376, 121: 101376}


def cuda_target(capability: int) -> Target:
    """capability as one number, 90 for 9.0. Below 8.0 Triton emits no matrix instruction; e4m3 ones start at 8.9."""
    shared = _CUDA_SHARED.get(capability, 101376 if capability >= 80 else 49152)
    return Target(f"sm_{capability}", has_dot=capability >= 80, e4m3_dot=capability >= 89, shared=shared, copy_engine=capability >= 90)


def hip_target(arch: str) -> Target:
    """arch like "gfx1100". Matrix units: CDNA (gfx908 on), RDNA 3 and 4 (gfx11, gfx12).

    e4m3 is left unused on AMD: gfx942 has another e4m3 (bias 8, no negative zero), and where the OCP kind exists int8 is as fast.
    """
    base = arch.split(":")[0]
    has_dot = base in ("gfx908", "gfx90a") or base.startswith(("gfx94", "gfx95", "gfx11", "gfx12"))
    return Target(base, has_dot, e4m3_dot=False, shared=163840 if base.startswith("gfx95") else 65536)


@lru_cache(maxsize=64)
def _target_of(kind: str, index: int) -> Target:
    if kind != "cuda":
        return _CPU if kind == "cpu" else Target(kind, has_dot=False, e4m3_dot=False, shared=0)
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return replace(hip_target(properties.gcnArchName), multiprocessors=properties.multi_processor_count)
    return replace(cuda_target(properties.major * 10 + properties.minor), multiprocessors=properties.multi_processor_count)


def _key(device: torch.device | str) -> tuple[str, int]:
    device = torch.device(device)
    if device.type != "cuda":
        return device.type, device.index or 0
    return "cuda", torch.cuda.current_device() if device.index is None else device.index


def target_for(device: torch.device | str) -> Target:
    """The target behind a torch device; ROCm devices are "cuda" to torch and gfx... here. Anything else has no matrix units."""
    return _target_of(*_key(device))


def code_form(device: torch.device | str) -> str:
    """How INT4 codes are stored for this device: "e4m3" (sign-magnitude nibbles) where it multiplies e4m3, else "int8"."""
    return "e4m3" if target_for(device).e4m3_dot else "int8"


def interpreting() -> bool:
    """True when kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def triton_reason(device: torch.device | str, needs_dot: bool = True) -> str | None:
    """None when our Triton kernels run on this device, else one sentence that says why not.

    needs_dot=False asks for kernels without matrix instructions only (the modulation layers): those run below sm_80 too.
    """
    kind, index = _key(device)
    if kind == "cpu":
        return _import_reason() if interpreting() else "the device is the CPU: Triton kernels need a GPU"
    if kind not in ("cuda", "xpu"):
        return f"there are no Triton kernels for a {kind} device"
    target = _target_of(kind, index)
    if needs_dot and not target.has_dot:
        return f"Triton makes no matrix instructions for {target.name}"
    return _launch_reason(kind, index)


def launch_device(device: torch.device):
    """Context in which a kernel launch goes to `device`: Triton launches on torch's current device, whatever its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=1)
def _import_reason() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken install raises anything from ImportError to RuntimeError
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    return None


@lru_cache(maxsize=64)
def _launch_reason(kind: str, index: int) -> str | None:
    reason = _import_reason()
    if reason is not None:
        return reason
    try:
        from .probe_triton import probe

        right = probe(torch.device(kind, index))
    except torch.OutOfMemoryError:  # says nothing about Triton: raised, so that lru_cache keeps no answer
        raise
    except Exception as error:  # the compiler, the linker, the driver: whatever stops a launch stops every launch
        text = str(error).strip()
        return f"a Triton launch fails here ({type(error).__name__}: {text.splitlines()[-1] if text else 'no message'})"
    return None if right else "a Triton launch works here but gives a wrong result"


# Default compute mode by what the device has. `fast` is at most half as wrong as `exact` at x50 and x100 outlier channels in both of its
# forms (e4m3 with one scale a row, int8 with a scale per 64) and needs no more matrix instructions, so it is the default wherever the
# kernels run. On the torch path rounding activations only costs time, so there the weights alone are 4-bit.
_AUTO = {"matrix units": "fast", "torch path": "weight_only"}


def resolve_compute(requested: str, device: torch.device | str) -> str:
    """ "auto" | "exact" | "fast" | "weight_only" -> one of the last three. TONFA_COMPUTE takes the place of "auto".

    Raises ValueError for an unknown mode, naming where it came from.
    """
    source = "compute"
    if requested == "auto" and os.environ.get("TONFA_COMPUTE"):
        requested, source = os.environ["TONFA_COMPUTE"].strip().lower(), "the environment variable TONFA_COMPUTE"
    if requested not in COMPUTE_MODES:
        raise ValueError(f"{source} is {requested!r}, expected one of {', '.join(COMPUTE_MODES)}")
    if requested != "auto":
        return requested
    return _AUTO["matrix units" if triton_reason(device) is None else "torch path"]
