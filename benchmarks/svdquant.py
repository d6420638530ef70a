"""How long quantising takes, stage by stage, at FLUX.1's sizes, and what each stage gains.

    python benchmarks/svdquant.py [--precisions int4,nvfp4] [--rank 32] [--rows 512] [--json FILE] [--cpu]

Weights and inputs are random: heavy tails and a part of low rank, a falling spectrum and channels of different size, so decibels here say
that a stage works, not what a real model has. Times of the four shapes, each 76 times in FLUX.1-dev, make the estimate for a whole model
(smoothing once for every input: the two linears of a linear1 share theirs). Limits: data-free in 60 s, calibrated in 360 s. GPTQ is timed
too, without a limit. Exits 1 when one is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from timing import Report, heading, need_gpu, sync
from tonfa.kernels.smooth_quantize_torch import e2m1_round
from tonfa.models.formats.quantize import group_scales, low_rank, nearest_codes
from tonfa.models.svdquant import CLIPS, InputStatistics, Recipe, choose_smoothing, svd_quantize

# name, N, K, behind a GELU, how many linears of FLUX.1-dev, how many inputs that are their own
FLUX = [
    ("qkv", 9216, 3072, False, 76, 76),
    ("proj", 3072, 3072, False, 76, 76),
    ("mlp fc1", 12288, 3072, False, 76, 38),
    ("mlp fc2", 3072, 12288, True, 76, 76),
]
TINY = [("proj", 256, 256, False, 2, 2), ("mlp fc2", 256, 384, True, 2, 2)]


def operands(n: int, k: int, gelu: bool, rows: int, device: str) -> tuple[torch.Tensor, InputStatistics]:
    g = torch.Generator(device).manual_seed(n + k)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device)

    weight = (draw(n, k) * draw(n, k).abs() + draw(n, 24) @ draw(24, k) / 4) / k**0.5
    sources = min(k, 256)
    x = draw(rows, sources) * torch.linspace(1, -2, sources, device=device).exp() @ draw(sources, k) / sources**0.5 + 0.3 * draw(rows, k)
    x = x * torch.exp(0.7 * draw(k))
    x = torch.nn.functional.gelu(x, approximate="tanh") if gelu else x
    return weight.bfloat16(), InputStatistics(x.abs().amax(0), x.square().mean(0), x.bfloat16(), rows)


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    """Of one call on the clock of the wall, waits included, after one that is not counted."""
    work()
    sync()
    start = time.perf_counter()
    result = work()
    sync()
    return time.perf_counter() - start, result


def pieces(weight: torch.Tensor, recipe: Recipe, report: Report, name: str) -> None:
    """What a linear is made of, each alone."""
    w = weight.float()
    scales, top = group_scales(w, recipe.precision, recipe.dtype)
    works = {
        "low rank": lambda: low_rank(w, recipe.rank),
        "low rank, one step": lambda: low_rank(w, recipe.rank, steps=1),
        "scales searched": lambda: group_scales(w, recipe.precision, recipe.dtype, CLIPS[recipe.precision]),
        "codes": lambda: nearest_codes(w, scales, top, recipe.precision),
        "rounding alone": lambda: e2m1_round(w) if recipe.precision == "nvfp4" else w.round().clamp(-8, 7),
    }
    times = {stage: seconds(work)[0] * 1e3 for stage, work in works.items()}
    print(f"{recipe.precision:6} {name:8} " + ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in times.items()), flush=True)
    report.rows.append({"precision": recipe.precision, "layer": name, "pieces_ms": times})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", default="int4,nvfp4")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--json", help="also write rows and limits to this file")
    parser.add_argument("--cpu", action="store_true", help="try this script out without a GPU, on small linears")
    o = parser.parse_args()
    device = need_gpu(o.cpu)
    report = Report(heading(), o.json)
    for precision in o.precisions.split(","):
        recipe = Recipe(precision, o.rank)
        ways = {"data-free": (recipe, False), "calibrated": (recipe, True), "with GPTQ": (replace(recipe, gptq=True), True)}
        whole = dict.fromkeys(ways, 0.0)
        for name, n, k, gelu, count, own in TINY if o.cpu else FLUX:
            weight, known = operands(n, k, gelu, o.rows, device)
            pieces(weight, recipe, report, name)
            unsigned = gelu and precision == "int4"
            for way, (chosen, sampled) in ways.items():
                given = known if sampled else None
                search, smooth = seconds(lambda w=weight, g=given, r=chosen, u=unsigned: choose_smoothing([w], g, r, u))
                make, (_, error) = seconds(lambda w=weight, g=given, r=chosen, u=unsigned, s=smooth: svd_quantize(w, None, r, s, g, u))
                whole[way] += own * search + count * make
                out = (
                    "" if error.output_snr_db is None else f", output {error.output_snr_db:.2f} (naive {error.naive_output_snr_db:.2f}) dB"
                )
                print(f"{precision:6} {name:8} {way:10} smoothing {search * 1e3:8.1f} ms, linear {make * 1e3:8.1f} ms, "
                      f"weight {error.weight_snr_db:.2f}{out}", flush=True)  # fmt: skip
                report.rows.append({"precision": precision, "layer": name, "way": way, "smoothing_ms": search * 1e3,
                                    "linear_ms": make * 1e3, **vars(error)})  # fmt: skip
        for way, limit in (("data-free", 60.0), ("calibrated", 360.0)):
            report.check(f"{precision} {way}: a whole FLUX.1-dev", whole[way], limit, "s")
        print(f"     {precision} with GPTQ: a whole FLUX.1-dev: {whole['with GPTQ']:.1f} s", flush=True)
        report.rows.append({"precision": precision, "whole_s": whole})
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
