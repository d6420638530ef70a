"""One 4-bit linear at FLUX.1 shapes against cuBLAS and others: time, TFLOP/s, ratio to cuBLAS bf16 of the same run.

    python benchmarks/linear.py [--json FILE] [--shapes 4608:9216x3072:32,...] [--precisions int4,nvfp4] [--rounds 30] [--cpu]

    product       the 4-bit GEMM with low rank and bias, the weight 4-bit in memory, its input quantised before
    no low rank   the same without the low-rank branch
    linear        PackedLinear: quantisation and product
    quantise      quantisation with the low-rank product behind it, and with row maxima that are known; L2 flushed before every call;
                  "of copy" is its bandwidth (input, codes and scales once each) over that of a device copy of the input, flushed likewise

A shape is M:NxK:rank. All contenders of a shape take turns call by call; a time is the median. Before timing, 64 rows of every product are
held against fp64 with the dequantised weight: `error` is mostly the rounding of activations. Exits 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from timing import Report, Work, cold_us, heading, need_gpu, round_robin_us
from tonfa.kernels import layout
from tonfa.kernels.layout import LogicalLinear, PartView
from tonfa.kernels.smooth_quantize_torch import divided_by_smooth
from tonfa.kernels.targets import code_form, triton_reason
from tonfa.kernels.w4_matmul import Peak, finds_peak, quantize_for, w4_matmul
from tonfa.models.linear import PackedLinear
from tonfa.models.runtime import Runtime

SHAPES = (
    "4608:9216x3072:32,4608:9216x3072:128,4608:12288x3072:32,4608:3072x12288:32,4608:3072x3072:32,4608:21504x3072:32,"
    "512:9216x3072:32,512:12288x3072:32,512:3072x12288:32"
)
MODES = ("fast", "exact")
ERROR_LIMIT = {("int4", "fast"): 0.05, ("int4", "exact"): 0.15, ("nvfp4", "fast"): 0.01, ("nvfp4", "exact"): 0.15}
LIMITED = {(9216, 3072), (12288, 3072), (3072, 12288)}  # the shapes with limits, at M 4608 and rank 32


@dataclass(frozen=True)
class Shape:
    m: int
    n: int
    k: int
    rank: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        m, nk, rank = text.split(":")
        return cls(int(m), *map(int, nk.split("x")), int(rank))

    def __str__(self) -> str:
        return f"M {self.m} N {self.n} K {self.k} rank {self.rank}"

    @property
    def first(self) -> bool:
        return (self.m, self.n, self.k) == (4608, 9216, 3072)

    @property
    def behind_gelu(self) -> bool:
        """The second linear of an MLP. In a block the product before it leaves the maximum of every row, so that nothing looks for it."""
        return self.k == 12288

    @property
    def limited(self) -> bool:
        return self.m == 4608 and self.rank == 32 and (self.n, self.k) in LIMITED


def random_layer(precision: str, s: Shape, device: str) -> LogicalLinear:
    """Random codes and scales, smooth in .25 to 1.75. The low-rank part adds about as much as the 4-bit one."""
    g = torch.Generator(device).manual_seed(s.n + s.k)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=g, device=device)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device)

    nvfp4 = precision == "nvfp4"
    codes = torch.randint(0, 16, (s.n, s.k), generator=g, device=device, dtype=torch.uint8)
    scales = (rand(s.n, s.k // 16) * 300 + 20).to(torch.float8_e4m3fn) if nvfp4 else (rand(s.n, s.k // 64) * 0.01 + 0.002).bfloat16()
    return LogicalLinear(
        precision,
        codes,
        scales,
        smooth=(rand(s.k) * 1.5 + 0.25).bfloat16(),
        down=(randn(s.rank, s.k) * s.k**-0.5).bfloat16(),
        up=(randn(s.n, s.rank) * (s.k / s.rank) ** 0.5 * 0.03).bfloat16(),
        channel_scale=rand(s.n) * 1e-4 + 1e-5 if nvfp4 else None,
        bias=randn(s.n).bfloat16(),
    )


def packed(layer: LogicalLinear, device: str) -> tuple[layout.PackSpec, torch.Tensor]:
    spec = layout.plan(layer.n, layer.k, [(layer, 0, 0)], code_form(device))
    return spec, layout.pack(spec, [layer])


# -- contenders --------------------------------------------------------------------------------------------------------------------


def ours(precision: str, s: Shape, x: torch.Tensor, report: Report) -> dict[str, Work]:
    """Our contenders of one precision, each checked once."""
    device = x.device.type
    layer = random_layer(precision, s, device)
    bias = layer.bias
    spec, blob = packed(layer, device)
    part = layout.views(spec, blob)[0]
    linear = PackedLinear(spec, blob, bias, Runtime())
    bare_spec, bare_blob = packed(replace(layer, down=None, up=None), device)
    bare = layout.views(bare_spec, bare_blob)[0]
    out = torch.empty(s.m, s.n, dtype=x.dtype, device=device)
    found: dict[str, Work] = {}
    for mode in MODES:
        q, q_bare = quantize_for(x, part, mode), quantize_for(x, bare, mode)
        name = f"{precision} {mode}"
        found[f"{name} product"] = lambda q=q: w4_matmul(q, part, bias, out)
        found[f"{name} no low rank"] = lambda q=q_bare: w4_matmul(q, bare, bias, out)
        found[f"{name} linear"] = lambda mode=mode: linear.run(x[None], mode)
        if s.behind_gelu and finds_peak(part.spec, x.device, mode, s.m):
            peak = Peak(row_maxima(x, part), part.smooth)
            found[f"{name} linear, maxima known"] = lambda mode=mode, peak=peak: linear.run(x[None], mode, peak=peak)
        out.fill_(float("nan"))
        error = dense_error(found[f"{name} product"](), x, part, bias)
        apart = float((linear.run(x[None], mode)[0] != out).float().mean())
        print(f"  {name}: error {error:.2e} against fp64, {apart:.1e} of the outputs differ between product and linear")
        report.check(f"{s} {name}: error", error, ERROR_LIMIT[precision, mode])
    return found


def row_maxima(x: torch.Tensor, part: PartView) -> torch.Tensor:
    """fp32 [M]: the largest |x / smooth| of every row."""
    return divided_by_smooth(x, part.smooth[: x.shape[1]], shifted=False).abs().amax(1)


def dense_error(out: torch.Tensor, x: torch.Tensor, part: PartView, bias: torch.Tensor) -> float:
    """Relative error of 64 rows from both ends against fp64 with the dequantised weight."""
    rows = [*range(min(32, len(x))), *range(max(len(x) - 32, 0), len(x))]
    weight = layout.dense_weight(layout.unpack_view(part)).double()
    want = x[rows].double() @ weight.t() + bias.double()
    return float((out[rows].double() - want).norm() / want.norm())


def tried(name: str, make: Callable[[], Work]) -> dict[str, Work]:
    """The contender, or nothing and a line that says why, where this machine or this torch has no such product."""
    try:
        work = make()
        work()
    except Exception as error:  # whatever a library raises where it does not support a device
        print(f"  {name}: not here ({type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''})")
        return {}
    return {name: work}


def cublas(s: Shape, x: torch.Tensor) -> dict[str, Work]:
    """bf16, fp8 with a scale a tensor and with a scale a row, int8: x [M, K] by a random weight."""
    device = x.device
    dense = torch.randn(s.n, s.k, dtype=x.dtype, device=device)
    out = torch.empty(s.m, s.n, dtype=x.dtype, device=device)

    def fp8(per_row: bool) -> Work:
        a, b = x.to(torch.float8_e4m3fn), dense.to(torch.float8_e4m3fn).t()
        scale_a = torch.ones(s.m, 1, device=device) if per_row else torch.ones((), device=device)
        scale_b = torch.ones(1, s.n, device=device) if per_row else torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)

    def int8() -> Work:
        a = torch.randint(-127, 128, (s.m, s.k), device=device, dtype=torch.int8)
        b = torch.randint(-127, 128, (s.n, s.k), device=device, dtype=torch.int8).t()
        return lambda: torch._int_mm(a, b)

    return {
        "cuBLAS bf16": lambda: torch.mm(x, dense.t(), out=out),
        **tried("cuBLAS fp8, scale a tensor", lambda: fp8(False)),
        **tried("cuBLAS fp8, scale a row", lambda: fp8(True)),
        **tried("cuBLAS int8", int8),
    }


def kitchen(s: Shape, x: torch.Tensor) -> dict[str, Work]:
    """comfy-kitchen's SVDQuant W4A4, where it is installed: natural row-major storage, signed codes."""
    try:
        import comfy_kitchen
    except Exception as error:
        print(f"  comfy-kitchen: not installed ({type(error).__name__})")
        return {}
    device = x.device
    weight = torch.randint(-128, 128, (s.n, s.k // 2), device=device, dtype=torch.int8)
    scales = (torch.rand(s.k // 64, s.n, device=device) * 0.01 + 0.002).to(x.dtype)
    smooth = (torch.rand(s.k, device=device) + 0.5).to(x.dtype)
    down, up = torch.randn(s.k, s.rank, device=device).to(x.dtype) * s.k**-0.5, torch.randn(s.n, s.rank, device=device).to(x.dtype)
    bias = torch.randn(s.n, device=device).to(x.dtype)

    def quantise() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return comfy_kitchen.quantize_svdquant_w4a4(x, smooth, down)

    def product(codes: torch.Tensor, x_scales: torch.Tensor, lowrank: torch.Tensor) -> torch.Tensor:
        return comfy_kitchen.scaled_mm_svdquant_w4a4(codes, weight, x_scales, scales, lowrank, up, bias)

    def product_alone() -> Work:
        q = quantise()
        return lambda: product(*q)

    return {
        **tried("comfy-kitchen W4A4 product", product_alone),
        **tried("comfy-kitchen W4A4 linear", lambda: lambda: product(*quantise())),
    }


# -- one shape ---------------------------------------------------------------------------------------------------------------------


def measure(s: Shape, precisions: list[str], rounds: int, device: str, report: Report) -> None:
    print(f"\n{s}")
    x = torch.randn(s.m, s.k, generator=torch.Generator(device).manual_seed(s.m), device=device).bfloat16()
    contenders = cublas(s, x)
    for precision in precisions:
        contenders |= ours(precision, s, x, report)
    if s.limited:
        contenders |= kitchen(s, x)
    times = round_robin_us(contenders, rounds)
    bf16 = times["cuBLAS bf16"]
    print(f"  {'what':28} {'us':>9} {'TFLOP/s':>9} {'x bf16':>7}")
    for name, us in times.items():
        tflops = 2e-6 * s.m * s.n * s.k / us
        report.rows.append({"shape": str(s), "what": name, "us": us, "tflops": tflops, "x_bf16": bf16 / us})
        print(f"  {name:28} {us:9.1f} {tflops:9.1f} {bf16 / us:7.3f}", flush=True)
    limits(s, precisions, times, report)
    measure_quantise(s, precisions, x, rounds, report)


def limits(s: Shape, precisions: list[str], times: dict[str, float], report: Report) -> None:
    bf16 = times["cuBLAS bf16"]
    if s.limited and "int4" in precisions:
        report.check(f"{s} int4 fast product, x bf16", bf16 / times["int4 fast product"], 1.15, at_least=True)
        report.check(f"{s} int4 exact product, x bf16", bf16 / times["int4 exact product"], 0.8, at_least=True)
        report.check(f"{s} int4 fast linear, x bf16", bf16 / times["int4 fast linear"], 1.05, at_least=True)
        known = "int4 fast linear, maxima known"
        if known in times:
            report.check(f"{s} {known}, x bf16", bf16 / times[known], 1.05, at_least=True)
    if s.limited and "nvfp4" in precisions:
        report.check(f"{s} nvfp4 fast product, x bf16", bf16 / times["nvfp4 fast product"], 0.65, at_least=True)
    if s.first and s.rank in (32, 128):
        for precision in precisions:
            for mode in MODES:
                added = times[f"{precision} {mode} product"] / times[f"{precision} {mode} no low rank"] - 1
                report.check(f"{s} {precision} {mode}: low rank on top of the product", 100 * added, 5 if s.rank == 32 else 15, "%")


def measure_quantise(s: Shape, precisions: list[str], x: torch.Tensor, rounds: int, report: Report) -> None:
    copy = torch.empty_like(x)
    work: dict[str, Work] = {"copy": lambda: copy.copy_(x)}
    bytes_of = {"copy": 2 * x.nbytes}
    for precision in precisions:
        spec, blob = packed(random_layer(precision, s, x.device.type), x.device.type)
        part = layout.views(spec, blob)[0]
        for mode in MODES:
            name = f"{precision} {mode}"
            q = quantize_for(x, part, mode)
            written = [t for field, t in vars(q).items() if isinstance(t, torch.Tensor) and field != "lowrank"]
            bytes_of[name] = x.nbytes + sum(t.nbytes for t in written)
            work[name] = lambda part=part, mode=mode: quantize_for(x, part, mode)
            if s.behind_gelu and finds_peak(part.spec, x.device, mode, s.m):
                bytes_of[f"{name}, maxima known"] = bytes_of[name]
                amax = row_maxima(x, part)
                work[f"{name}, maxima known"] = lambda part=part, mode=mode, amax=amax: quantize_for(x, part, mode, row_amax=amax)
    times = cold_us(work, rounds, x.device.type)
    rate = bytes_of["copy"] / times["copy"]
    print(f"  {'quantise, cold L2':28} {'us':>9} {'TB/s':>9} {'of copy':>7}")
    for name, us in times.items():
        share = bytes_of[name] / us / rate
        report.rows.append({"shape": str(s), "what": f"quantise {name}", "us": us, "bytes": bytes_of[name], "of_copy": share})
        print(f"  {name:28} {us:9.1f} {bytes_of[name] / us * 1e-6:9.2f} {share:7.3f}", flush=True)
    if (s.m, s.k, s.rank) == (4608, 12288, 32) and "int4" in precisions:
        share = bytes_of["int4 fast"] / times["int4 fast, maxima known"] / rate
        report.check(
            "quantise with low rank (4608, 12288) fast, maxima known, share of a copy's bandwidth", 100 * share, 70, "%", at_least=True
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write rows and limits to this file")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--precisions", default="int4,nvfp4")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cpu", action="store_true", help="try this script out without a GPU")
    o = parser.parse_args()
    device = need_gpu(o.cpu)
    reason = triton_reason(device)
    if device == "cuda" and reason is not None:
        print(f"the kernels do not run here: {reason}", file=sys.stderr)
        return 2
    report = Report(heading(), o.json)
    with torch.inference_mode():
        for text in o.shapes.split(","):
            measure(Shape.parse(text), o.precisions.split(","), o.rounds, device, report)
    print()
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
