"""The smallest real launch: does Triton compile, load and run a kernel on this device?"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .targets import launch_device


@triton.jit
def _double(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at) * 2)


def probe(device: torch.device) -> bool:
    """Launches a kernel on `device` and compares its result. Raises whatever the compiler or the driver raises."""
    x = torch.arange(64, dtype=torch.float32, device=device)
    y = torch.full_like(x, -1.0)
    with launch_device(device):
        _double[(1,)](x, y, N=64)
    return torch.equal(y, x * 2)
