"""The kernels on a real GPU at FLUX.1 and Z-Image shapes: error against the torch oracle, same bits twice, speed against cuBLAS bf16.

    python benchmarks/kernels_gpu.py [--json FILE] [--quick]

Weights and inputs are random, outputs are poisoned with NaN first, oracles run on the same GPU with TF32 off. `error` is the relative
error of the matmul kernel on the oracle's quantised input; `both` that of both kernels against both oracles; `codes` the share of equal
activation codes. Times are medians of CUDA events; cuBLAS of the same shape and type is timed beside every kernel. Exits with 1 when
an error is above 3e-3 or two runs differ in a bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import torch
from tonfa.kernels.layout import Columns, LogicalLinear, PartView, pack, plan, views
from tonfa.kernels.norm_modulate import Norm, norm_modulate, norm_modulate_torch
from tonfa.kernels.qk_norm_rope import qk_norm_rope_
from tonfa.kernels.qk_norm_rope_torch import qk_norm_rope_torch
from tonfa.kernels.row_statistics_triton import row_statistics_triton
from tonfa.kernels.smooth_quantize_torch import smooth_quantize_torch
from tonfa.kernels.targets import code_form, target_for, triton_reason
from tonfa.kernels.w4_matmul import Finish, Peak, finds_peak, quantize_for, w4_matmul
from tonfa.kernels.w4_matmul_torch import w4_matmul_torch
from tonfa.kernels.w4a16_linear import w4a16_linear
from tonfa.kernels.w4a16_linear_torch import w4a16_linear_torch

LIMIT = 3e-3
SHAPES = [(9216, 3072, (0,)), (3072, 3072, (0,)), (12288, 3072, (0,)), (3072, 12288, (0,)), (21504, 3072, (0, 9216))]
# Z-Image: (N, K) with 4096 tokens of picture and 32 of text, what precedes and what follows, on inputs that are a SwiGLU's at K 10240.
ZIMAGE = {(11520, 3840): "rms norm", (3840, 3840): "plain", (20480, 3840): "rms norm, swiglu", (3840, 10240): "plain"}


@dataclass
class Row:
    what: str
    mode: str
    rows: int
    n: int
    k: int
    error: float
    both: float
    codes: float
    same_bits: bool
    quantize_us: float
    matmul_us: float
    tflops: float
    cublas_us: float
    ratio: float  # cuBLAS bf16 time over quantise + matmul time

    @property
    def good(self) -> bool:
        return self.same_bits and self.error <= LIMIT and self.both <= LIMIT


def random_linear(precision: str, n: int, k: int, segments=(0,), rank=32, unsigned=False, seed=0) -> LogicalLinear:
    g = torch.Generator("cuda").manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=g, device="cuda")

    def randn(*shape):
        return torch.randn(*shape, generator=g, device="cuda").bfloat16()

    codes = torch.randint(0, 16, (n, k), generator=g, device="cuda", dtype=torch.uint8)
    if precision == "w4a16":
        scales = (rand(n, k // 64) * 0.01 + 0.002).bfloat16()
        return LogicalLinear("w4a16", codes, scales, zeros=-7 * scales, bias=randn(n))
    nvfp4 = precision == "nvfp4"
    scales = (rand(n, k // 16) * 300 + 20).to(torch.float8_e4m3fn) if nvfp4 else (rand(n, k // 64) * 0.01 + 0.002).bfloat16()
    return LogicalLinear(
        precision,
        codes,
        scales,
        smooth=(rand(k) * 1.5 + 0.25).bfloat16(),
        down=randn(len(segments) * rank, k) * k**-0.5,
        up=randn(n, rank),
        channel_scale=rand(n) * 1e-4 + 1e-5 if nvfp4 else None,
        bias=randn(n),
        act_unsigned=unsigned,
        segments=segments,
    )


def packed(layer: LogicalLinear, lora: tuple[int, ...] = (), dtype: torch.dtype = torch.bfloat16, paired: bool = False) -> PartView:
    """The layer's view; lora: a rank and where its segments begin, for further columns. paired: its rows in pairs, for SwiGLU."""
    spec = plan(layer.n, layer.k, [(layer, 0, 0)], code_form("cuda"), paired)
    view = views(spec, pack(spec, [layer]))[0]
    if lora:
        rank, *segments = lora
        g = torch.Generator("cuda").manual_seed(rank)
        down = torch.randn(view.spec.k_padded, len(segments) * rank, generator=g, device="cuda") * layer.k**-0.5
        view.extra = Columns(down.to(dtype), torch.randn(view.spec.n_padded, rank, generator=g, device="cuda").to(dtype), tuple(segments))
    return view


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a.float() - b.float()).norm() / b.float().norm()
    return float("inf") if not torch.isfinite(error) else float(error)


def median_us(work, repeats: int = 15) -> float:
    """Median over event timings of single calls, after a warm-up, the GPU kept busy so that launch gaps do not count."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)
        start.record()
        work()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1000 for a, b in times)


def measure(what: str, layer: LogicalLinear, rows: int, mode: str, dtype=torch.bfloat16, ending: str = "plain", lora=()) -> Row:
    swiglu = ending.endswith("swiglu")
    view, g = packed(layer, lora, dtype, swiglu), torch.Generator("cuda").manual_seed(rows)
    x = torch.randn(rows, layer.k, generator=g, device="cuda").to(dtype)
    if layer.k == 10240:
        x = x * torch.nn.functional.silu(torch.randn(x.shape, generator=g, device="cuda")).to(dtype)
    if layer.act_unsigned:
        x = torch.nn.functional.gelu(x, approximate="tanh")
    norm, options = None, {}
    if ending == "norm, gelu":
        norm = Norm(*torch.randn(2, 1, layer.k, generator=g, device="cuda").to(dtype), rows_per_batch=rows)
        options = {"gelu_from": layer.segments[-1]}
    if ending.startswith("rms norm"):
        norm = Norm(None, torch.rand(1, layer.k, generator=g, device="cuda") + 0.5, rows_per_batch=rows, eps=1e-5, rms=True)
    if swiglu:
        options = {"swiglu": True}
    if ending == "accumulate":
        options = {"accumulate": True}
    if ending == "gate":
        options = {"gate": torch.randn(1, layer.n, generator=g, device="cuda").to(dtype), "rows_per_batch": rows}
        options["residual"] = torch.randn(rows, layer.n, generator=g, device="cuda").to(dtype)

    width = layer.n // 2 if swiglu else layer.n
    before, smooth = torch.randn(rows, width, generator=g, device="cuda").to(dtype), torch.rand(width, generator=g, device="cuda") + 0.5
    leaves_peak = swiglu and finds_peak(view.spec, x.device, mode, rows)

    def finish() -> Finish:
        return Finish(**options, peak=Peak(torch.zeros(rows, device="cuda"), smooth) if leaves_peak else None)

    def poisoned():
        return before.clone() if ending == "accumulate" else torch.full_like(before, float("nan"))

    got_q, again_q = quantize_for(x, view, mode, norm), quantize_for(x, view, mode, norm)
    want_q = smooth_quantize_torch(x, view, mode, norm, wide=got_q.kind == "half")
    same = torch.equal(got_q.codes, again_q.codes) and torch.equal(got_q.lowrank, again_q.lowrank)
    same = same and (not lora or torch.equal(got_q.extra, again_q.extra))
    want = w4_matmul_torch(want_q, view, layer.bias, poisoned(), finish())
    alone = w4_matmul(want_q, view, layer.bias, poisoned(), finish())
    first, second = finish(), finish()
    both = w4_matmul(got_q, view, layer.bias, poisoned(), first)
    same = same and torch.equal(both, w4_matmul(got_q, view, layer.bias, poisoned(), second))
    if leaves_peak:  # what the next layer's own statistics find in the result, and no other bit
        found = row_statistics_triton(both, None, smooth)[1]
        same = same and all(torch.equal(end.peak.amax, found) for end in (first, second))
    out = poisoned()
    quantize_us = median_us(lambda: quantize_for(x, view, mode, norm))
    matmul_us = median_us(lambda: w4_matmul(got_q, view, layer.bias, out, first))
    dense, plain = torch.randn(layer.n, layer.k, device="cuda", dtype=dtype), x.to(dtype)
    cublas_us = median_us(lambda: torch.nn.functional.linear(plain, dense))
    return Row(
        f"{what}{lora_label(lora)} {str(dtype).removeprefix('torch.')} {ending}", mode, rows, layer.n, layer.k,
        relative(alone, want), relative(both, want), float((got_q.codes == want_q.codes).float().mean()), same, quantize_us, matmul_us,
        2e-6 * rows * layer.n * layer.k / matmul_us, cublas_us, cublas_us / (quantize_us + matmul_us),
    )  # fmt: skip


def measure_w4a16(rows: int, lora: tuple[int, ...] = ()) -> Row:
    layer = random_linear("w4a16", 18432, 3072)
    view = packed(layer, lora)
    x = torch.randn(rows, layer.k, device="cuda", dtype=torch.bfloat16)
    want, got = w4a16_linear_torch(x, view, layer.bias), w4a16_linear(x, view, layer.bias)
    same = torch.equal(got, w4a16_linear(x, view, layer.bias))
    ours = median_us(lambda: w4a16_linear(x, view, layer.bias))
    dense = torch.randn(layer.n, layer.k, device="cuda", dtype=torch.bfloat16)
    cublas = median_us(lambda: torch.nn.functional.linear(x, dense))
    error = relative(got, want)
    return Row(
        f"w4a16{lora_label(lora)} bfloat16 plain", "-", rows, layer.n, layer.k, error, error, 1.0, same, 0.0, ours,
        2e-6 * rows * layer.n * layer.k / ours, cublas, cublas / ours,
    )  # fmt: skip


def lora_label(lora: tuple[int, ...]) -> str:
    return f" +{len(lora) - 1} x {lora[0]}" if lora else ""


def measure_elementwise(name: str, dtype: torch.dtype) -> Row:
    """norm_modulate and qk_norm_rope_ at FLUX size, batch 2, against their oracles."""
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, 2304, 9216, generator=g, device="cuda").to(dtype)
    if name == "norm_modulate":
        x = x[..., :3072].reshape(-1, 3072)
        norm = Norm(*torch.randn(2, 2, 3072, generator=g, device="cuda").to(dtype), rows_per_batch=2304)
        run, oracle = lambda: norm_modulate(x, norm), lambda: norm_modulate_torch(x, norm)
    else:
        angle = torch.rand(1, 1, 2304, 64, generator=g, device="cuda") * 6
        pe = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).unflatten(-1, (2, 2))
        scales = torch.rand(2, 128, generator=g, device="cuda") + 0.5
        run, oracle = lambda: qk_norm_rope_(x.clone(), *scales, pe, 24), lambda: qk_norm_rope_torch(x.clone(), *scales, pe, 24)
    error, same, ours = relative(run(), oracle()), torch.equal(run(), run()), median_us(run)
    return Row(f"{name} {str(dtype).removeprefix('torch.')}", "-", 4608, x.shape[-1], 0, error, error, 1.0, same, 0.0, ours, 0.0, 0.0, 0.0)


def cases(quick: bool):
    """Every (label, layer, rows, mode, dtype, ending, lora) to measure; layers are made once and used for all their cases."""
    for (n, k), ending in {} if quick else ZIMAGE.items():
        for precision in ("int4", "nvfp4"):
            layer = random_linear(precision, n, k)
            for mode in ("exact", "fast"):
                for rows in (4128, 1056, 1) if ending.endswith("swiglu") else (4128,):
                    yield precision, layer, rows, mode, torch.bfloat16, ending
                if ending.endswith("swiglu"):
                    yield precision, layer, 4128, mode, torch.float16, ending
                    yield precision, layer, 4128, mode, torch.bfloat16, ending, (32, 0)
    for n, k, segments in SHAPES[:2] if quick else SHAPES:
        ending = "norm, gelu" if len(segments) > 1 else "plain"
        kinds = [("int4", False), ("nvfp4", False)] + ([("int4", True)] if k == 12288 else [])
        for precision, unsigned in kinds:
            layer = random_linear(precision, n, k, segments, unsigned=unsigned)
            for mode in ("exact", "fast"):
                for rows in (4608, 512, 1):
                    yield f"{precision}{' unsigned' if unsigned else ''}", layer, rows, mode, torch.bfloat16, ending
            if (n, k) == (3072, 3072):
                for mode in ("exact", "fast"):
                    yield precision, layer, 4608, mode, torch.float16, "gate"
                    yield precision, layer, 4095, mode, torch.bfloat16, "gate"
                    yield precision, layer, 4608, mode, torch.bfloat16, "accumulate"
                    for rank in (16, 128):
                        yield f"{precision} rank {rank}", random_linear(precision, n, k, rank=rank), 4608, mode, torch.bfloat16, "plain"
            if len(segments) > 1 and precision == "int4":
                for mode in ("exact", "fast"):
                    yield "int4", layer, 4608, mode, torch.float16, ending
            if not unsigned and (n, k) in ((9216, 3072), (3072, 3072)):
                for mode in ("exact", "fast"):
                    for lora in ((32, 0), (32, 0, n // 3 // 128 * 128), (64, 0), (160, 0)):
                        for rows in (4608, 1):
                            yield precision, layer, rows, mode, torch.bfloat16, "gate" if n == 3072 else ending, lora
                    yield precision, layer, 512, mode, torch.float16, ending, (32, 0)


HEADER = (
    f"{'what':38} {'mode':6} {'M':>5} {'N':>6} {'K':>6} {'error':>9} {'both':>9} {'codes':>7} bits "
    f"{'quant us':>9} {'matmul us':>10} {'TFLOP/s':>8} {'x bf16':>7}"
)


def line(r: Row) -> str:
    bits = "same" if r.same_bits else "DIFF"
    return (
        f"{r.what:38} {r.mode:6} {r.rows:5} {r.n:6} {r.k:6} {r.error:9.2e} {r.both:9.2e} {r.codes:7.4f} {bits} "
        f"{r.quantize_us:9.1f} {r.matmul_us:10.1f} {r.tflops:8.1f} {r.ratio:7.2f}{'' if r.good else '  <-- WRONG'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU, and torch finds none", file=sys.stderr)
        return 2
    reason = triton_reason("cuda")
    if reason is not None:
        print(f"the kernels do not run here: {reason}", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    start = time.time()
    print(f"{torch.cuda.get_device_name()} ({target_for('cuda').name}), torch {torch.__version__}, codes as {code_form('cuda')}\n{HEADER}")
    rows = []
    for case in cases(args.quick):
        rows.append(measure(*case))
        print(line(rows[-1]), flush=True)
    for m, lora in ((1, ()), (4, ()), (1, (32, 0)), (4, (48, 0, 3072))):
        rows.append(measure_w4a16(m, lora))
        print(line(rows[-1]), flush=True)
    for name in ("norm_modulate", "qk_norm_rope"):
        for dtype in (torch.bfloat16, torch.float16):
            rows.append(measure_elementwise(name, dtype))
            print(line(rows[-1]), flush=True)
    wrong = sum(not r.good for r in rows)
    print(f"{len(rows)} cases, {wrong} wrong (limit {LIMIT}), {time.time() - start:.0f} s")
    if args.json:
        with open(args.json, "w") as file:
            about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
            json.dump(about | {"rows": [asdict(r) for r in rows]}, file, indent=1)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
