"""Whole steps of a FLUX.1 transformer: ours through the loader node, and the forms that users load today, in one process.

    COMFYUI_PATH=... PEERS=... python benchmarks/step.py --checkpoint FILE [--pixels 512,1024,1536,2048] [--batch 1,4]
        [--forms ours_fast,ours_exact,bf16,bf16_compile,fp8_fast,nf4,gguf_q4_k] [--graph] [--compile] [--json FILE]

FILE is a FLUX.1 that make_checkpoint.py writes; the peers get random weights of its shape (peers.py says what they need). A step is one
call of diffusion_model under inference_mode; ms is the median of CUDA-event timings of steps issued back to back, after warm-ups. One form
is in GPU memory at a time. Ours is timed first and again at the end; limits are held against the slower of the two.

    host ms   time until the call returns, the GPU idle before it: what the CPU needs to issue a step. The driver's queue holds about 1000
              launches, so where a step has more this is an upper bound; --pixels 256 shows the CPU's own time
    --graph   ours captured in a CUDA graph, replays timed
    --compile ours through torch.compile
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import (
    GIB,
    LONG_SLEEP,
    Report,
    Timer,
    gpu_sleep,
    heading,
    into_page_cache,
    load_ours,
    need_gpu,
    on_gpu,
    start_host,
    step_inputs,
    sync,
)
from torch import nn

FORMS = "ours_fast,ours_exact,bf16,bf16_compile,fp8_fast,nf4,gguf_q4_k"
AGAIN = " again"
Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    pixels: int
    batch: int


@dataclass
class Row:
    form: str
    pixels: int
    batch: int
    ms: float
    host_ms: float
    weights_gib: float
    peak_gib: float
    finite: bool


def allocated() -> float:
    return torch.cuda.memory_allocated() / GIB if on_gpu() else 0.0


def clean() -> None:
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


# -- one form, one size ------------------------------------------------------------------------------------------------------------


def time_steps(form: str, case: Case, step: Step, weights_gib: float, warmups: int, repeats: int) -> Row:
    for _ in range(warmups):
        out = step()
    sync()
    host = []
    for _ in range(3):
        start = time.perf_counter()
        out = step()
        host.append(time.perf_counter() - start)
        sync()
    repeats = repeats if time.perf_counter() - start < 0.5 else max(repeats // 2, 3)
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    gpu_sleep(LONG_SLEEP)
    timers = []
    for _ in range(repeats):
        with Timer() as timer:
            out = step()
        timers.append(timer)
    sync()
    peak = torch.cuda.max_memory_allocated() / GIB if on_gpu() else 0.0
    ms = statistics.median(t.ms() for t in timers)
    finite = bool(torch.isfinite(out).all())
    return Row(form, case.pixels, case.batch, ms, min(host) * 1e3, weights_gib, peak, finite)


def time_form(
    form: str, cases: list[Case], make: Callable[[Case], Step], weights_gib: float, warmups: int, repeats: int, report: Report
) -> None:
    """All sizes of a form; one that does not fit the memory is said and passed over."""
    for case in cases:
        try:
            row = time_steps(form, case, make(case), weights_gib, warmups, repeats)
        except torch.OutOfMemoryError:
            print(f"{form:24} {case.pixels:5} px batch {case.batch}: out of memory", flush=True)
        else:
            report.rows.append(dataclasses.asdict(row))
            print(line(row), flush=True)
        clean()


def line(r: Row) -> str:
    return (
        f"{r.form:24} {r.pixels:5} px batch {r.batch} {r.ms:9.2f} ms, host {r.host_ms:8.2f} ms, weights {r.weights_gib:6.2f} GiB, "
        f"peak {r.peak_gib:6.2f} GiB{'' if r.finite else '  NOT FINITE'}"
    )


def flux_params(checkpoint: str) -> object:
    """The host's FluxParams of a checkpoint."""
    from comfy.ldm.flux.model import FluxParams
    from tonfa.models.formats.checkpoint import open_checkpoint
    from tonfa.nodes.host.flux_shell import unet_config

    config = unet_config(open_checkpoint(checkpoint).config)
    return FluxParams(**{name: value for name, value in config.items() if name != "image_model"})


# -- ours --------------------------------------------------------------------------------------------------------------------------


class Ours:
    """The loaded checkpoint: in GPU memory between `on` and `off`."""

    def __init__(self, checkpoint: str):
        into_page_cache(checkpoint)
        start = time.time()
        self.patcher = load_ours(checkpoint, "fast")
        self.network = self.patcher.model.diffusion_model
        self.device = self.patcher.load_device.type
        print(f"{checkpoint} loaded in {time.time() - start:.1f} s")

    def on(self) -> float:
        """Brings the weights to the GPU; their GiB there."""
        import comfy.model_management

        clean()
        before = allocated()
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([self.patcher])
        return allocated() - before

    def off(self) -> None:
        import comfy.model_management

        comfy.model_management.unload_all_models()
        clean()

    def step(self, mode: str, case: Case, network: nn.Module | None = None) -> Step:
        inputs = step_inputs(self.network.params, case.pixels, case.batch, self.device, self.network.dtype)
        options = {**self.patcher.model_options["transformer_options"], "tonfa": {"compute": mode}}
        network = network or self.network
        return lambda: network(**inputs, transformer_options=dict(options))

    def compiled(self, mode: str, case: Case) -> Step:
        torch._dynamo.reset()
        return self.step(mode, case, torch.compile(self.network, dynamic=False))


def graphed(step: Step) -> Step:
    """The step as a CUDA graph, and its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def time_ours(ours: Ours, modes: list[str], cases: list[Case], o: argparse.Namespace, report: Report, suffix: str = "") -> None:
    weights = ours.on()
    for mode in modes:
        form = f"ours_{mode}"
        time_form(form + suffix, cases, lambda c, mode=mode: ours.step(mode, c), weights, 2, o.repeats, report)
        if suffix:
            continue
        if o.graph:
            tried(f"{form} graph", lambda f, m=mode: time_form(f, cases, lambda c: graphed(ours.step(m, c)), weights, 2, o.repeats, report))
        if o.compile:
            tried(f"{form} compile", lambda f, m=mode: time_form(f, cases, lambda c: ours.compiled(m, c), weights, 4, o.repeats, report))
    ours.off()


def tried(form: str, work: Callable[[str], None]) -> None:
    """Runs `work`; what a library raises is said, and the run goes on."""
    try:
        work(form)
    except torch.OutOfMemoryError:
        print(f"{form:24} out of memory", flush=True)
    except Exception as error:
        text = str(error).strip()
        print(f"{form:24} did not run ({type(error).__name__}: {text.splitlines()[0][:160] if text else ''})", flush=True)
    clean()


# -- peers -------------------------------------------------------------------------------------------------------------------------


def time_peer(form: str, params: object, device: str, cases: list[Case], o: argparse.Namespace, report: Report) -> None:
    import peers

    compiled = form.endswith("_compile")
    before, start = allocated(), time.time()
    config = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
    network = peers.build(form.removesuffix("_compile"), config, device)
    weights = allocated() - before
    print(f"{form:24} built in {time.time() - start:.1f} s", flush=True)

    def make(case: Case) -> Step:
        inputs = step_inputs(params, case.pixels, case.batch, device)
        if not compiled:
            return lambda: network(**inputs, transformer_options={})
        torch._dynamo.reset()
        run = torch.compile(network, dynamic=False)
        return lambda: run(**inputs, transformer_options={})

    time_form(form, cases, make, weights, 4 if compiled else 2, o.repeats, report)


# -- results -----------------------------------------------------------------------------------------------------------------------


def found(report: Report, form: str, case: Case) -> dict | None:
    """The row of a form and size; of two, that of the slower run."""
    rows = [r for r in report.rows if (r["pixels"], r["batch"]) == (case.pixels, case.batch) and r["form"] in (form, form + AGAIN)]
    return max(rows, key=lambda r: r["ms"]) if rows else None


def table(cases: list[Case], report: Report) -> None:
    for case in cases:
        bf16 = found(report, "bf16", case)
        print(f"\n{case.pixels} x {case.pixels}, batch {case.batch}")
        print(f"{'form':24} {'ms':>9} {'of bf16':>8} {'host ms':>8} {'weights':>8} {'peak':>6}")
        for r in report.rows:
            if (r["pixels"], r["batch"]) == (case.pixels, case.batch):
                ratio = f"{r['ms'] / bf16['ms']:8.3f}" if bf16 else f"{'-':>8}"
                print(f"{r['form']:24} {r['ms']:9.2f} {ratio} {r['host_ms']:8.2f} {r['weights_gib']:8.2f} {r['peak_gib']:6.2f}")


def limits(report: Report) -> None:
    """At 1024 x 1024, batch 1; bounds on ours_fast's time are shares of each peer's."""
    small, large = Case(1024, 1), Case(2048, 1)
    ours = found(report, "ours_fast", small)
    if ours is None:
        return
    print()
    for form, limit in (("bf16", 0.65), ("bf16_compile", 1.0), ("fp8_fast", 1.0), ("nf4", 0.6), ("gguf_q4_k", 0.36)):
        peer = found(report, form, small)
        if peer is None:
            print(f"---- 1024 px: ours_fast of {form}: not measured (at most {limit})")
        else:
            report.check(f"1024 px: ours_fast of {form}", ours["ms"] / peer["ms"], limit)
    peak = max(
        r["peak_gib"] for r in report.rows if r["form"] in ("ours_fast", "ours_fast" + AGAIN) and r["pixels"] == 1024 and r["batch"] == 1
    )
    report.check("1024 px: peak of ours_fast", peak, 7.0, "GiB")
    rows = [found(report, form, case) for case in (small, large) for form in ("ours_fast", "bf16")]
    if all(rows):
        report.check("2048 px: ours_fast of bf16, no worse than at 1024", rows[2]["ms"] / rows[3]["ms"], rows[0]["ms"] / rows[1]["ms"])
    for r in report.rows:
        if not r["finite"]:
            report.check(f"{r['form']} {r['pixels']} px batch {r['batch']}: not finite", 1, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--pixels", default="512,1024,1536,2048")
    parser.add_argument("--batch", default="1,4")
    parser.add_argument("--forms", default=FORMS)
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", help="also write rows and limits to this file")
    parser.add_argument("--cpu", action="store_true", help="try this script out without a GPU")
    o = parser.parse_args()
    forms = o.forms.split(",")
    unknown = set(forms) - set(FORMS.split(","))
    if unknown:
        parser.error(f"unknown forms: {', '.join(sorted(unknown))}. Known: {FORMS}")
    cases = [Case(int(p), int(b)) for b, p in itertools.product(o.batch.split(","), o.pixels.split(","))]
    device, checkpoint = need_gpu(o.cpu), os.path.abspath(o.checkpoint)
    report = Report(heading(start_host()), o.json)
    modes = [f.removeprefix("ours_") for f in forms if f.startswith("ours_")]
    theirs = [f for f in forms if not f.startswith("ours_")]
    ours, params = Ours(checkpoint) if modes else None, flux_params(checkpoint)
    with torch.inference_mode():
        if ours:
            time_ours(ours, modes, cases, o, report)
        for form in theirs:
            tried(form, lambda f: time_peer(f, params, device, cases, o, report))
        if ours and theirs:
            time_ours(ours, modes, cases, o, report, AGAIN)
    table(cases, report)
    limits(report)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
