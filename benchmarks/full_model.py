"""A full-size checkpoint through the real loader in the real host, on a GPU: load time and memory, the manager's books, a partial load.

    COMFYUI_PATH=... python benchmarks/full_model.py CHECKPOINT.safetensors [--json FILE] [--compute auto] [--pixels 1024] [--steps 2]

Prints one line a check with the limit it is held to, and exits 1 if any is missed. The limits:
load under 20 s from page cache, RssAnon + 7.3 GiB, peak of a 1024 x 1024 step 6.8 GiB (INT4 rank 32) or 7.2 (NVFP4), loaded size within 3 %
of the growth of memory_allocated, under 100 MiB after unloading, the same latent when 4 GiB are free.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time

GIB = 1024**3


def rss_anon() -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


class PeakRss(threading.Thread):
    """Highest RssAnon while running, sampled every 5 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_value = self.peak = rss_anon()
        self.running = True
        self.start()

    def run(self) -> None:
        while self.running:
            self.peak = max(self.peak, rss_anon())
            time.sleep(0.005)

    def stop(self) -> int:
        self.running = False
        self.join()
        return self.peak - self.start_value


def main() -> None:
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("checkpoint")
    a.add_argument("--json")
    a.add_argument("--compute", default="auto")
    a.add_argument("--pixels", type=int, default=1024)
    a.add_argument("--steps", type=int, default=2)
    o = a.parse_args()
    checkpoint = os.path.abspath(o.checkpoint)
    sys.argv = sys.argv[:1]
    sys.path.insert(0, os.environ.get("COMFYUI_PATH", os.path.expanduser("~/comfy/ComfyUI")))
    report = Report(o.json)
    run(checkpoint, o.compute, o.pixels, o.steps, report)
    sys.exit(report.close())


class Report:
    def __init__(self, path: str | None):
        self.path, self.rows, self.failed = path, {}, 0

    def add(self, name: str, value: float, limit: float | None = None, unit: str = "") -> None:
        ok = limit is None or value <= limit
        self.failed += not ok
        self.rows[name] = {"value": value, "limit": limit, "unit": unit, "ok": ok}
        print(f"{'ok  ' if ok else 'MISS'} {name}: {value:.4g} {unit}" + ("" if limit is None else f" (limit {limit:g})"), flush=True)

    def close(self) -> int:
        if self.path:
            with open(self.path, "w") as f:
                json.dump(self.rows, f, indent=1)
        return 1 if self.failed else 0


def run(checkpoint: str, compute: str, pixels: int, steps: int, report: Report) -> None:
    import comfy.model_management as mm
    import comfy.sample
    import folder_paths
    import torch
    from tonfa.models.formats.checkpoint import open_checkpoint
    from tonfa.nodes.flux import NunchakuFluxDiTLoader

    torch.cuda.init()
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
    torch.cuda.synchronize()
    folder_paths.add_model_folder_path("diffusion_models", os.path.dirname(checkpoint))
    with open(checkpoint, "rb") as f:  # into the page cache
        while f.read(1 << 26):
            pass
    precision = open_checkpoint(checkpoint).precision
    base = torch.cuda.memory_allocated()
    watch, start = PeakRss(), time.time()
    with torch.inference_mode():
        (model,) = NunchakuFluxDiTLoader().load_model(
            os.path.basename(checkpoint), 0, "nunchaku-fp16", "auto", 0, "bfloat16", compute=compute
        )
    torch.cuda.synchronize()
    report.add("load seconds from page cache", time.time() - start, 20, "s")
    report.add("RssAnon added while loading", watch.stop() / GIB, 7.3, "GiB")
    report.add("weights as the host counts them", model.model_size() / GIB, None, "GiB")

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    report.add("GPU memory left over by loading", (before - base) / 2**20, 100, "MiB")
    start = time.time()
    with torch.inference_mode():
        mm.load_models_gpu([model])
    torch.cuda.synchronize()
    report.add("move to GPU seconds", time.time() - start, None, "s")
    grown = torch.cuda.memory_allocated() - before
    report.add("loaded size against memory_allocated", abs(model.loaded_size() / grown - 1) * 100, 3, "%")

    g = torch.Generator().manual_seed(1)
    side = pixels // 8
    noise = torch.randn(1, 16, side, side, generator=g)
    cond = [[torch.randn(1, 512, 4096, generator=g) * 0.1, {"pooled_output": torch.randn(1, 768, generator=g) * 0.1, "guidance": 3.5}]]

    def sample() -> torch.Tensor:
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, steps, 1.0, "euler", "simple", cond, cond, torch.zeros_like(noise), seed=1, disable_pbar=True
            ).float()

    sample()  # compiles
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.time()
    want = sample()
    torch.cuda.synchronize()
    report.add("sampling seconds a step (host loop included)", (time.time() - start) / steps, None, "s")
    report.add("peak memory_allocated of a step", torch.cuda.max_memory_allocated() / GIB, 6.8 if precision == "int4" else 7.2, "GiB")
    report.add("latent not finite", float(not torch.isfinite(want).all()), 0)
    report.add("same seed, other bits", float(not torch.equal(want, sample())), 0)

    mm.unload_all_models()
    mm.soft_empty_cache()
    report.add("memory_allocated after unloading", torch.cuda.memory_allocated() / 2**20, 100, "MiB")
    report.add("reloaded: other bits", float(not torch.equal(want, sample())), 0)
    mm.unload_all_models()
    partial(mm, model, sample, want, report)


def partial(mm, model, sample, want, report: Report) -> None:
    """A host told that 4 GiB are free."""
    import torch

    real = mm.get_free_memory

    def told(dev=None, torch_free_too=False):
        free = max(4 * GIB - torch.cuda.memory_allocated(), 0)
        return (free, free) if torch_free_too else free

    mm.get_free_memory = told
    try:
        got = sample()
    finally:
        mm.get_free_memory = real
    report.add("4 GiB free: model not partially loaded", float(not model.model.model_lowvram), 0)
    report.add("4 GiB free: loaded", model.loaded_size() / GIB, 4, "GiB")
    report.add("4 GiB free: latent's relative difference", float((got - want).norm() / want.norm()), 0)
    mm.unload_all_models()


if __name__ == "__main__":
    main()
