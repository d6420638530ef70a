"""The loader's cpu_offload on a full-size model in the real host, on a GPU: peak memory and step time while blocks are streamed.

    COMFYUI_PATH=... python benchmarks/offload.py --checkpoint FILE [--resident 1] [--pixels 1024] [--json FILE] [--cpu]

FILE is a FLUX.1 that make_checkpoint.py writes. Limits: a step with one resident block peaks under 2.0 GiB and takes at most 1.10x of the
larger of a resident step and the streamed bytes over the bandwidth of pinned memory, which is measured; the host's own low-VRAM mode gives
the same output bit for bit. Exits 1 when one is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import torch
from timing import GIB, Report, Timer, heading, into_page_cache, load_ours, need_gpu, on_gpu, start_host, step_inputs, sync

COPY = 256 << 20


def bandwidth(device: str) -> float:
    """Bytes a second from pinned memory to the GPU: the best of ten copies."""
    host = torch.empty(COPY, dtype=torch.uint8, pin_memory=on_gpu())
    target = torch.empty(COPY, dtype=torch.uint8, device=device)
    times = []
    for _ in range(10):
        sync()
        with Timer() as timer:
            target.copy_(host, non_blocking=True)
        sync()
        times.append(timer.ms())
    return COPY / (min(times) / 1e3)


class Bench:
    def __init__(self, o: argparse.Namespace, device: str):
        self.o, self.device = o, device
        into_page_cache(os.path.abspath(o.checkpoint))
        self.base = load_ours(os.path.abspath(o.checkpoint), o.compute)
        self.network = self.base.model.diffusion_model
        self.inputs = step_inputs(self.network.params, o.pixels, 1, device, self.network.dtype)

    def clone(self, mode: str, resident: int = 1) -> object:
        from tonfa.nodes.host.offloading import Offload

        model = self.base.clone()
        model.set_offload(Offload(mode, resident))
        return model

    def step(self, model: object) -> torch.Tensor:
        return self.network(**self.inputs, transformer_options=dict(model.model_options["transformer_options"]))

    def measure(self, model: object, budget: float | None = None) -> tuple[float, float, torch.Tensor]:
        """(ms a step, GiB at its peak, output). budget: bytes that the host gives the model, as with --lowvram."""
        import comfy.model_management

        comfy.model_management.unload_all_models()
        if on_gpu():
            torch.cuda.empty_cache()
        if budget is None:
            comfy.model_management.load_models_gpu([model])
        else:
            model.partially_load(model.load_device, budget)
        out = self.step(model)
        sync()
        if on_gpu():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(self.o.repeats):  # by the clock on the wall: copies run on another stream
            start = time.perf_counter()
            out = self.step(model)
            sync()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times), torch.cuda.max_memory_allocated() / GIB if on_gpu() else 0.0, out


def run(o: argparse.Namespace, report: Report, device: str) -> None:
    from tonfa.nodes.host.offloading import streamed_blocks, streamed_nbytes

    bench = Bench(o, device)
    speed = bandwidth(device)
    resident_ms, resident_peak, want = bench.measure(bench.clone("disable"))
    model = bench.clone("enable", o.resident)
    moved, _ = streamed_nbytes(streamed_blocks(model.model, model.offload))
    bus_ms = moved / speed * 1e3
    print(
        f"pinned memory {speed / 1e9:.1f} GB/s, {moved / 1e9:.2f} GB a step: {bus_ms:.1f} ms; resident step {resident_ms:.1f} ms",
        flush=True,
    )
    took, peak, out = bench.measure(model)
    print(f"streamed, {o.resident} resident: {took:.1f} ms, peak {peak:.2f} GiB (resident: {resident_peak:.2f})", flush=True)
    report.check("peak of a streamed step", peak, 2.0, "GiB")
    report.check("streamed step over the larger of resident step and bus", took / max(resident_ms, bus_ms), 1.10)
    report.check("streamed: other bits", int(not torch.equal(out, want)), 0)
    took, peak, out = bench.measure(bench.clone("auto"), 0.1)
    print(f"the host's low-VRAM mode: {took:.1f} ms, peak {peak:.2f} GiB", flush=True)
    report.check("low VRAM: other bits", int(not torch.equal(out, want)), 0)
    report.rows.append({"bandwidth": speed, "moved": moved, "resident_ms": resident_ms, "resident_peak_gib": resident_peak})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--resident", type=int, default=1)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--compute", default="fast")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", help="also write rows and limits to this file")
    parser.add_argument("--cpu", action="store_true", help="try this script out without a GPU")
    o = parser.parse_args()
    device = need_gpu(o.cpu)
    report = Report(heading(start_host()), o.json)
    with torch.inference_mode():
        run(o, report, device)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
