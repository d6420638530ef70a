"""The loader's first-block cache on a full-size model in the real host, on a GPU: a whole sampling with every second step reused.

    COMFYUI_PATH=... python benchmarks/cache.py --checkpoint FILE [--steps 28] [--pixels 1024] [--json FILE] [--cpu]

FILE is a FLUX.1 that make_checkpoint.py writes. Random weights say nothing about which threshold is good, so the largest one and a cap of
one reuse in a row make half of the steps reused. Limits: time falls by at least 45 %; threshold 0 gives the same bits as no cache and takes
no longer (1 % of noise allowed). Exits 1 when one is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import torch
from timing import Report, heading, into_page_cache, need_gpu, start_host, sync


class Bench:
    def __init__(self, o: argparse.Namespace):
        import folder_paths
        from tonfa.nodes.flux import NunchakuFluxDiTLoader

        self.o, self.node = o, NunchakuFluxDiTLoader()
        into_page_cache(os.path.abspath(o.checkpoint))
        folder_paths.add_model_folder_path("diffusion_models", os.path.dirname(os.path.abspath(o.checkpoint)))
        params = self.model(0).model.diffusion_model.params
        g = torch.Generator().manual_seed(1)
        pooled = torch.randn(1, params.vec_in_dim, generator=g)
        self.cond = [[torch.randn(1, 512, params.context_in_dim, generator=g) * 0.1, {"pooled_output": pooled, "guidance": 3.5}]]
        self.noise = torch.randn(1, 16, o.pixels // 8, o.pixels // 8, generator=g)

    def model(self, threshold: float, most: int = 0) -> object:
        name = os.path.basename(self.o.checkpoint)
        return self.node.load_model(name, threshold, "nunchaku-fp16", "auto", 0, "bfloat16", compute=self.o.compute, cache_max_reuses=most)[
            0
        ]

    def sample(self, model: object) -> tuple[float, torch.Tensor]:
        """(seconds, latent) of one sampling."""
        import comfy.sample

        sync()
        start = time.perf_counter()
        latent = comfy.sample.sample(
            model, self.noise, self.o.steps, 1.0, "euler", "simple", self.cond, self.cond, torch.zeros_like(self.noise), seed=1,
            disable_pbar=True,
        )  # fmt: skip
        sync()
        return time.perf_counter() - start, latent.float()

    def measure(self, *models: object) -> list[tuple[float, torch.Tensor]]:
        """Medians of samplings in turns, after one of each that compiles and records."""
        for model in models:
            self.sample(model)
        found = [[self.sample(model) for model in models] for _ in range(self.o.rounds)]
        return [(statistics.median(s for s, _ in column), column[-1][1]) for column in zip(*found, strict=True)]


def run(o: argparse.Namespace, report: Report) -> None:
    bench = Bench(o)
    (full, want), (off, same), (half, _) = bench.measure(bench.model(0), bench.model(0.0, 5), bench.model(1.0, 1))
    print(f"{o.steps} steps: {full:.2f} s without, {half:.2f} s with every second step reused", flush=True)
    report.rows.append({"full_s": full, "off_s": off, "half_s": half})
    report.check("time with half of the steps reused, over all computed", half / full, 0.55)
    report.check("threshold 0, over no cache", off / full, 1.01)
    report.check("threshold 0: other bits", int(not torch.equal(want, same)), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--compute", default="fast")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="also write rows and limits to this file")
    parser.add_argument("--cpu", action="store_true", help="try this script out without a GPU")
    o = parser.parse_args()
    need_gpu(o.cpu)
    report = Report(heading(start_host()), o.json)
    with torch.inference_mode():
        run(o, report)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
