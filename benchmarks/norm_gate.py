"""norm_gate at Z-Image's size, beside torch's own operations and the time that its bytes need.

    python benchmarks/norm_gate.py [--rows 4128,1056] [--rounds 50] [--json FILE] [--cpu]

Rows of 3840 numbers, one batch, the gate in fp32, written in place as a block does it. The floor is what a copy of as many bytes takes
in the same run: x and y are read, out is written. Nothing is in the L2 cache before a call.
Limits: the result within rounding of the fp64 formula, at most 1.3 times the floor, and faster than torch. Exits 1 when one is missed.
"""

from __future__ import annotations

import argparse
import sys

import torch
from timing import Report, cold_us, heading, need_gpu, on_gpu
from tonfa.kernels.norm_gate import norm_gate, norm_gate_torch
from torch.nn import functional as F

K, EPS = 3840, 1e-5


def operands(rows: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator(device).manual_seed(rows)
    x, y = torch.randn(2, rows, K, generator=g, device=device).to(dtype)
    return x, y, torch.randn(1, K, generator=g, device=device)


def bytes_moved(x: torch.Tensor, gate: torch.Tensor) -> int:
    return 3 * x.numel() * x.element_size() + gate.numel() * gate.element_size()


def error(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> float:
    """Of the result against the formula in fp64."""
    v = y.double()
    want = x.double() + gate.double() * v / (v.square().mean(1, keepdim=True) + EPS).sqrt()
    return float((norm_gate(x, y, gate, x.shape[0], EPS).double() - want).norm() / want.norm())


def times(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, rounds: int, device: str) -> dict[str, float]:
    source = torch.empty(bytes_moved(x, gate) // 2, dtype=torch.uint8, device=device)  # read and written: both count
    target, narrow, out = torch.empty_like(source), gate.to(x.dtype), x.clone()
    works = {
        "copy of as many bytes": lambda: target.copy_(source),
        "norm_gate": lambda: norm_gate(out, y, gate, x.shape[0], EPS, out),
        "rms_norm and addcmul": lambda: torch.addcmul(x, F.rms_norm(y, (K,), None, EPS), narrow),
        "oracle": lambda: norm_gate_torch(x, y, gate, x.shape[0], EPS),
    }
    return cold_us(works, rounds, device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="4128,1056")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", help="also write rows and limits to this file")
    parser.add_argument("--cpu", action="store_true", help="try this script out without a GPU")
    o = parser.parse_args()
    device = need_gpu(o.cpu)
    report = Report(heading(), o.json)
    for dtype, rounding in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        for rows in map(int, o.rows.split(",")):
            x, y, gate = operands(rows, dtype, device)
            label, moved = f"{rows} x {K} {str(dtype).removeprefix('torch.')}", bytes_moved(x, gate)
            report.check(f"{label}: error", error(x, y, gate), rounding)
            found = times(x, y, gate, o.rounds, device)
            for name, us in found.items():
                floor = found["copy of as many bytes"]
                print(
                    f"{label:22} {moved / 1e6:6.1f} MB  {name:22}{us:9.1f} us {moved / us / 1e6:6.2f} TB/s {us / floor:6.2f} x floor",
                    flush=True,
                )
            report.rows.append({"rows": rows, "dtype": str(dtype), "bytes": moved, **found})
            if on_gpu():
                report.check(f"{label}: over the byte floor", found["norm_gate"] / found["copy of as many bytes"], 1.3)
                report.check(f"{label}: over torch", found["norm_gate"] / found["rms_norm and addcmul"], 1.0)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
