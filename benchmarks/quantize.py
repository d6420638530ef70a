"""A full-size FLUX.1-dev through the quantiser on a GPU: data-free and calibrated; seconds, GPU memory, main memory, what it gained.

    python benchmarks/quantize.py FOLDER [--file DENSE] [--precision int4] [--only data-free|calibrated] [--json FILE] [--tiny --cpu]

FOLDER takes the outputs (14 GB free: the file, and for a while its layers). Without --file the model has random weights that are made when
they are asked for, each from its own seed: 1 in 128 input channels has weights 8 times the others', and as many others are made 8 times
as large by the modulation, as trained models have them. Calibration samples 16 prompts in 8 steps at 1024 x 1024, one block on the GPU
at a time. Limits: data-free under 120 s, calibrated under 600 s with its sampling, GPU memory below 12 GiB. Exits 1 when one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import GIB, Report, heading, need_gpu, on_gpu, sync
from tonfa.models.calibrate import StatisticsFile, calibrate, drawn_conditioning, save_statistics
from tonfa.models.dense_flux import open_dense
from tonfa.models.formats.checkpoint import open_checkpoint
from tonfa.models.formats.flux_names import host_linears, plain_specs
from tonfa.models.formats.writer import dims_of
from tonfa.models.quantize_flux import Options, quantize_flux
from torch import Tensor

FULL = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768, "context_in_dim": 4096,
    "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "qkv_bias": True,
    "guidance_embed": True, "axes_dim": [16, 56, 56], "theta": 10000,
}  # fmt: skip
TINY = FULL | {"vec_in_dim": 64, "context_in_dim": 128, "hidden_size": 256, "num_heads": 2, "depth": 1, "depth_single_blocks": 2}
OUTLIER, EVERY = 8.0, 128


@dataclass
class Virtual:
    """A dense FLUX of random weights that nobody has to store: what quantize_flux and calibrate ask of a source."""

    config: dict
    device: str
    model_class: str = "Flux"

    def __post_init__(self):
        dims = dims_of(self.config)
        self.path = f"random weights, hidden size {dims.hidden}"
        self.shapes = {h.name: (h.out_features, h.in_features) for h in host_linears(dims)}
        self.plain = {name: shape for name, _, shape in plain_specs(dims)}

    def _draw(self, name: str, shape: tuple[int, ...], device: str | torch.device) -> Tensor:
        g = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, generator=g, device=device)

    def linear(self, name: str, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """As DenseFlux.linear, in bf16."""
        n, k = self.shapes[name]
        weight = self._draw(name, (n, k), device).mul_(k**-0.5)
        weight[:, ::EVERY] *= OUTLIER
        bias = self._draw(f"{name}.bias", (n,), device).mul_(0.05)
        if name.endswith(".lin"):  # shift, scale, gate, perhaps twice; gates of a tenth keep 57 blocks from running away
            weight *= 0.1
            chunks = bias.view(-1, 3, k)
            chunks[:, 1, EVERY // 2 :: EVERY] += OUTLIER - 1
            chunks[:, 2] += 0.1
        return weight.bfloat16(), bias.bfloat16()

    def tensor(self, name: str) -> Tensor:
        shape = self.plain[name]
        made = self._draw(name, shape, self.device)
        if name.endswith("_norm.scale"):
            return (1 + 0.1 * made).bfloat16().cpu()
        return (made * (shape[1] ** -0.5 if len(shape) == 2 else 0.05)).bfloat16().cpu()


class Measured:
    """`with Measured() as m: ...`, then m.seconds and m.gpu (largest bytes of tensors on it), m.ram (largest resident bytes of the process
    that are not pages of a file)."""

    def __enter__(self) -> Measured:
        import threading

        sync()
        if on_gpu():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.ram, self._done = 0, threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        sync()
        self.seconds = time.perf_counter() - self._start
        self._done.set()
        self._watch.join()
        self.gpu = torch.cuda.max_memory_allocated() if on_gpu() else 0

    def _look(self) -> None:
        status = Path("/proc/self/status")
        while status.exists() and not self._done.wait(0.2):
            line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
            self.ram = max(self.ram, int(line.split()[1]) * 1024)


def quantised(o: argparse.Namespace, source: object, mode: str, device: str, report: Report) -> None:
    """One file, made and opened; adds its rows and checks."""
    out, seconds, gpu = Path(o.folder) / f"{mode}.safetensors", 0.0, 0
    statistics, name = None, f"{mode} {o.precision}"
    if mode == "calibrated":
        seen = Path(o.folder) / "statistics.safetensors"
        with Measured() as m:
            conditioning = drawn_conditioning(source.config, o.prompts)
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            save_statistics(
                seen, calibrate(source, conditioning, o.steps, device, pixels=o.pixels, dtype=dtype, rows=o.rows, progress=dots("blocks"))
            )
        row(report, f"{name}: sampling", m, {"prompts": o.prompts, "steps": o.steps, "file bytes": seen.stat().st_size})
        statistics, seconds, gpu = StatisticsFile(seen), m.seconds, m.gpu
    options = Options(o.precision, o.rank, mode, gptq=o.gptq and mode == "calibrated")
    with Measured() as m:
        found = quantize_flux(source, out, options, statistics, device, dots("layers"))
    gains = [x.output_snr_db - x.naive_output_snr_db for x in found.w4a4() if x.output_snr_db is not None]
    facts = {
        "bytes": found.bytes,
        "snr measured on": found.measured,
        "snr": mean([found.snr(x) for x in found.w4a4()]),
        "gain": mean(gains),
    }
    row(report, f"{name}: quantising", m, facts)
    print("\n".join(found.lines()), flush=True)
    checkpoint = open_checkpoint(out)
    report.check(f"{name}: warnings of the file", len(checkpoint.warnings), 0)
    report.check(f"{name}: seconds", seconds + m.seconds, 120 if mode == "data-free" else 600, "s")
    report.check(f"{name}: GPU memory", max(gpu, m.gpu) / GIB, 12, "GiB")
    if gains:
        report.check(f"{name}: least gain of a layer over rounding to nearest", min(gains), 0, "dB", at_least=True)
    if not o.keep:
        for path in (out, Path(o.folder) / "statistics.safetensors"):
            path.unlink(missing_ok=True)


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def row(report: Report, name: str, m: Measured, facts: dict) -> None:
    report.rows.append({"what": name, "seconds": m.seconds, "gpu bytes": m.gpu, "ram bytes": m.ram, **facts})
    print(f"{name}: {m.seconds:.1f} s, GPU {m.gpu / GIB:.2f} GiB, RAM {m.ram / GIB:.2f} GiB, {json.dumps(facts)}", flush=True)


def dots(unit: str):
    """A progress call that prints a line every ten seconds."""
    start = last = time.perf_counter()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.perf_counter() - last > 10:
            last = time.perf_counter()
            print(f"  {done} of {total} {unit}, {last - start:.0f} s", flush=True)

    return progress


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--file", help="a dense FLUX.1 instead of random weights")
    parser.add_argument("--precision", choices=("int4", "nvfp4"), default="int4")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--only", choices=("data-free", "calibrated"))
    parser.add_argument("--gptq", action="store_true")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--keep", action="store_true", help="leave the files that were made")
    parser.add_argument("--json", help="also write rows and limits to this file")
    parser.add_argument("--tiny", action="store_true", help="a small model, and small pictures")
    parser.add_argument("--cpu", action="store_true", help="try this script out without a GPU")
    o = parser.parse_args()
    device = need_gpu(o.cpu)
    os.makedirs(o.folder, exist_ok=True)
    if o.tiny:
        o.pixels, o.prompts, o.steps = 64, 2, 2
    report = Report(heading(), o.json)
    if device == "cuda":
        torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")  # the context and cuBLAS are not what is measured
    for mode in (o.only,) if o.only else ("data-free", "calibrated"):
        if o.file:
            with closing(open_dense(o.file)) as source:
                quantised(o, source, mode, device, report)
        else:
            quantised(o, Virtual(TINY if o.tiny else FULL, device), mode, device, report)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
