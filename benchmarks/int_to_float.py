"""The two ways in which the int8 product turns its sums into floats: the loader's `i2f_mode`.

    python benchmarks/int_to_float.py [--rounds 20] [--json FILE] [--cpu]

On a GPU whose own form is e4m3 the int8 form is timed all the same. Limits: both ways give the same bits, and the default, the hardware's
conversion, is not slower than the magic number (3 % of noise allowed). Exits 1 when one is missed.
"""

from __future__ import annotations

import argparse
import sys

import torch
from linear import Shape, random_layer
from timing import Report, Work, heading, need_gpu, round_robin_us
from tonfa.kernels import int_to_float, layout, w4_matmul_triton
from tonfa.kernels.smooth_quantize import smooth_quantize
from tonfa.kernels.w4_matmul import Finish

SHAPES = ((4608, 9216, 3072), (4608, 3072, 12288), (512, 12288, 3072))


def product(m: int, n: int, k: int, device: str, magic: bool) -> Work:
    """One int8 product of m tokens with an n x k weight, converted by magic or not; returns its output."""
    layer = random_layer("int4", Shape(m, n, k, 32), device)
    spec = layout.plan(n, k, [(layer, 0, 0)], "int8")
    (part,) = layout.views(spec, layout.pack(spec, [layer]))
    g = torch.Generator(device).manual_seed(1)
    x = torch.randn(m, k, generator=g, device=device).bfloat16()
    q, out = smooth_quantize(x, part, "exact"), torch.empty(m, n, dtype=torch.bfloat16, device=device)

    def work() -> torch.Tensor:
        w4_matmul_triton.by_magic = lambda: magic
        try:
            return w4_matmul_triton.w4_matmul_triton(q, part, None, out, Finish())
        finally:
            w4_matmul_triton.by_magic = int_to_float.by_magic

    return work


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", help="also write rows and limits to this file")
    parser.add_argument("--cpu", action="store_true", help="try this script out without a GPU (TRITON_INTERPRET=1)")
    o = parser.parse_args()
    device = need_gpu(o.cpu)
    report = Report(heading(), o.json)
    for m, n, k in ((16, 128, 128),) if o.cpu else SHAPES:
        works = {name: product(m, n, k, device, name == "magic") for name in ("magic", "hardware")}
        report.check(f"M {m} N {n} K {k}: other bits", int(not torch.equal(works["magic"]().clone(), works["hardware"]())), 0)
        times = round_robin_us(works, o.rounds)
        print(f"M {m} N {n} K {k}: magic {times['magic']:.1f} us, hardware {times['hardware']:.1f} us", flush=True)
        report.rows.append({"m": m, "n": n, "k": k, **times})
        report.check(f"M {m} N {n} K {k}: hardware over magic", times["hardware"] / times["magic"], 1.03)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
