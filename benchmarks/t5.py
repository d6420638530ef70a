"""The 4-bit linear of the T5 encoder at T5-XXL's shapes against torch.mm with a resident fp16 weight: time, ratio, error.

    python benchmarks/t5.py [--json FILE] [--shapes 256:4096x4096,...] [--rounds 30] [--cpu]

    mm fp16         x fp16, weight fp16: what a 16-bit encoder would take at best
    host fp32       x fp32, the fp16 weight cast to fp32 before torch.mm: what ComfyUI's own T5 does (it runs in fp32 activations)
    t5 fp16, bf16, fp32   t5_linear with x of this type
    unpack          the weight unpacked to fp16, nothing multiplied; GB/s are the bytes read and written

A shape is M:NxK. Contenders take turns call by call; a time is the median. Errors are against the same codes in fp64. Exits 1 when a limit
is missed: t5 at 256 and 512 tokens at most 1.3x of the host's own linear of the same activations (fp32), and, as a goal, of mm fp16.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
from timing import Report, Work, heading, need_gpu, round_robin_us
from tonfa.kernels import t5_layout
from tonfa.kernels.t5_layout import T5Linear, T5View
from tonfa.kernels.t5_linear import t5_linear
from tonfa.kernels.t5_linear_torch import t5_weight
from tonfa.kernels.targets import triton_reason

SHAPES = ",".join(f"{m}:{nk}" for nk in ("4096x4096", "10240x4096", "4096x10240") for m in (1, 77, 256, 512))
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ERROR_LIMIT = {"fp16": 6e-4, "bf16": 4e-3, "fp32": 4e-4}


@dataclass(frozen=True)
class Shape:
    m: int
    n: int
    k: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        m, nk = text.split(":")
        return cls(int(m), *map(int, nk.split("x")))

    def __str__(self) -> str:
        return f"M {self.m} N {self.n} K {self.k}"


def random_view(s: Shape, device: str) -> T5View:
    g = torch.Generator(device).manual_seed(s.n + s.k)
    codes = torch.randint(0, 16, (s.n, s.k), generator=g, device=device, dtype=torch.uint8)
    scales = (torch.rand(s.n, s.k // 128, generator=g, device=device) * 0.01 + 0.002).half()
    blob = t5_layout.pack(T5Linear(codes, scales, (-7.5 * scales.float()).half()))
    return t5_layout.views(t5_layout.read_spec(blob), blob)


def error_of(y: torch.Tensor, x: torch.Tensor, view: T5View) -> float:
    rows = slice(0, 32)
    want = x[rows].double() @ t5_weight(view, 0, view.spec.n).double().t()
    return float((y[rows].double() - want).norm() / want.norm())


def contenders(s: Shape, view: T5View, x: dict[str, torch.Tensor], device: str) -> dict[str, Work]:
    weight = t5_weight(view, 0, s.n, torch.float16)
    found: dict[str, Work] = {
        "mm fp16": lambda: torch.mm(x["fp16"], weight.t()),
        "host fp32": lambda: torch.mm(x["fp32"], weight.float().t()),
    }
    found |= {f"t5 {name}": lambda name=name: t5_linear(x[name], view) for name in TYPES}
    if triton_reason(device, needs_dot=False) is None:
        from tonfa.kernels.t5_linear_triton import operands

        found["unpack"] = lambda: operands(x["fp16"], view)
    return found


def measure(s: Shape, rounds: int, device: str, report: Report) -> None:
    print(f"\n{s}")
    view = random_view(s, device)
    wide = torch.randn(s.m, s.k, generator=torch.Generator(device).manual_seed(s.m), device=device)
    x = {name: wide.to(dtype) for name, dtype in TYPES.items()}
    work = contenders(s, view, x, device)
    for name in TYPES:
        report.check(f"{s} t5 {name}: error", error_of(work[f"t5 {name}"](), x[name], view), ERROR_LIMIT[name])
    times = round_robin_us(work, rounds)
    moved = s.n * s.k * 2.5 + s.n * s.k // 128 * 4
    print(f"  {'what':12} {'us':>9} {'x mm fp16':>10} {'GB/s':>7}")
    for name, us in times.items():
        report.rows.append({"shape": str(s), "what": name, "us": us, "of_mm_fp16": us / times["mm fp16"]})
        print(
            f"  {name:12} {us:9.1f} {us / times['mm fp16']:10.2f} " + (f"{moved / us * 1e-3:7.0f}" if name == "unpack" else ""), flush=True
        )
    if s.m in (256, 512):
        report.check(f"{s} t5 fp32, x host fp32", times["t5 fp32"] / times["host fp32"], 1.3)
        report.check(f"{s} t5 fp16, x mm fp16", times["t5 fp16"] / times["mm fp16"], 1.3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write rows and limits to this file")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cpu", action="store_true", help="try this script out without a GPU")
    o = parser.parse_args()
    device = need_gpu(o.cpu)
    reason = triton_reason(device, needs_dot=False)
    if device == "cuda" and reason is not None:
        print(f"the kernels do not run here: {reason}", file=sys.stderr)
        return 2
    report = Report(heading(), o.json)
    with torch.inference_mode():
        for text in o.shapes.split(","):
            measure(Shape.parse(text), o.rounds, device, report)
    print()
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
