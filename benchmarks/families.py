"""Qwen-Image and Z-Image through their loader nodes in the real host, on a GPU: memory, steps beside the host's own class in bf16, LoRA.

    COMFYUI_PATH=... python benchmarks/families.py qwen-image|z-image CHECKPOINT.safetensors [--pixels 1024] [--compute auto]
        [--repeats 10] [--json FILE] [--cpu]

CHECKPOINT is one that make_checkpoint.py writes; the host's class gets random weights of its sizes. A step is one call of diffusion_model
with a text of 256 tokens, timed as in step.py: ours before and after the host's, and the slower of the two is held against it. One form is
in GPU memory at a time. Limits, of a 1024 x 1024 step:

    qwen-image  peak 13 GiB, 0.65x of the host's; with one resident block and pinned memory 3.0 GiB, the same output bit for bit, and
                1.10x of the larger of a resident step and the streamed bytes over the bandwidth of pinned memory, which is measured
    z-image     peak 5 GiB, 0.7x of the host's; needs a host that has Z-Image (0.29)

Hosts of 2026 leave the rotary embedding to comfy_kitchen. Where that has no CUDA kernels here, the host is timed with its Triton ones too,
and the faster step counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import logging
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from full_model import PeakRss
from offload import bandwidth
from step import AGAIN, Case, Row, Step, allocated, clean, line, time_steps
from timing import GIB, LONG_SLEEP, Report, Timer, gpu_sleep, heading, into_page_cache, need_gpu, on_gpu, start_host, sync
from torch import nn

TEXT, LORA_RANK, LORA_TURNS, WARMUPS = 256, 32, 3, 3


@dataclass(frozen=True)
class Limits:
    """peak and streamed_peak in GiB (None: not measured), of_bf16 as a share of the time of the host's step."""

    peak: float
    of_bf16: float
    streamed_peak: float | None = None


LIMITS = {"qwen-image": Limits(13.0, 0.65, 3.0), "z-image": Limits(5.0, 0.7)}
STREAMED_TIME = 1.10


# -- what differs between the families ---------------------------------------------------------------------------------------------


def loader(family: str) -> object:
    if family == "qwen-image":
        from tonfa.nodes.qwen_image import NunchakuQwenImageDiTLoader

        return NunchakuQwenImageDiTLoader()
    from tonfa.nodes.z_image import NunchakuZImageDiTLoader

    return NunchakuZImageDiTLoader()


def host_class(family: str, version: str) -> type[nn.Module]:
    """The host's own class of the transformer. Ends the program where the host is too old."""
    if family == "qwen-image":
        from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel
    from comfy.ldm.lumina.model import NextDiT

    if "z_image_modulation" not in inspect.signature(NextDiT.__init__).parameters:
        raise SystemExit(f"this host (ComfyUI {version}) has no Z-Image: its NextDiT knows no z_image_modulation. Use 0.29.")
    return NextDiT


def step_of(network: nn.Module, family: str, config: dict, case: Case, device: str, options: dict) -> Step:
    """One call of a transformer, with the arguments that the host's model_base gives it. config: the host's unet_config."""
    g = torch.Generator(device).manual_seed(1)
    side = case.pixels // 8

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device).to(network.dtype)

    if family == "qwen-image":  # its latent has a frame
        x, width, more = draw(case.batch, config["in_channels"] // 4, 1, side, side), config["joint_attention_dim"], {}
    else:
        x, width, more = draw(case.batch, config["in_channels"], side, side), config["cap_feat_dim"], {"num_tokens": TEXT}
    context = draw(case.batch, TEXT, width)
    t = torch.full((case.batch,), 0.5, device=device)
    return lambda: network(x, t, context=context, control=None, transformer_options=dict(options), **more)


def lora_tensors(checkpoint: object, seed: int = 1) -> dict[str, torch.Tensor]:
    """A LoRA on every linear of the blocks that the format quantises; q, k and v and the SwiGLU's two apart, as in published files."""
    g, tensors = torch.Generator().manual_seed(seed), {}
    for host in checkpoint.host_linears():
        prefix = host.parts[0][0]
        for piece in checkpoint.layout.splits.get(prefix, checkpoint.pieces(host)):
            for suffix, shape in (("lora_B", (piece.rows, LORA_RANK)), ("lora_A", (LORA_RANK, host.in_features))):
                tensors[f"diffusion_model.{piece.name}.{suffix}.weight"] = (torch.rand(shape, generator=g) - 0.5).mul_(0.02).bfloat16()
    return tensors


# -- the host's own ----------------------------------------------------------------------------------------------------------------


def dense(kind: type[nn.Module], config: dict, device: str) -> nn.Module:
    """The host's class in bf16: weights and biases of 0.02, norms of one."""
    import comfy.ops

    network = kind(**config, dtype=torch.bfloat16, device=device, operations=comfy.ops.disable_weight_init)
    for name, p in network.eval().requires_grad_(False).named_parameters():
        if p.ndim == 1 and name.endswith(".weight"):
            p.fill_(1.0)
        else:
            p.normal_(std=0.02)
    return network


def say_host(report: Report) -> None:
    """What the host's step depends on besides its weights: its attention, and who does its rotary embedding."""
    import comfy.ldm.modules.attention as attention

    name = attention.optimized_attention.__name__
    print(f"host's attention: {name}", flush=True)
    report.about["attention"] = name
    if on_gpu():
        report.check("the host's attention is another than attention_pytorch, its default", int(name != "attention_pytorch"), 0)
    registry = kitchen()
    if registry is None:
        return  # an older host: torch operations
    about = []
    for backend, state in sorted(registry.list_backends().items()):
        why = "disabled" if state["disabled"] else "used" if state["available"] else f"not there: {state['unavailable_reason']}"
        about.append(f"{backend} {why}")
    report.about["comfy_kitchen"] = "; ".join(about)
    print(f"host's comfy_kitchen: {report.about['comfy_kitchen']}", flush=True)


def kitchen() -> object | None:
    """The backends of the comfy_kitchen that does the host's rotary embedding; None where the host has none."""
    try:
        from comfy.quant_ops import ck

        return ck.registry
    except (ImportError, AttributeError):
        return None


def only_in_torch(registry: object) -> bool:
    """Whether comfy_kitchen runs torch operations here, though it has Triton kernels: without its CUDA part the host is slower than it is
    for most people, and Triton is what the host can be told to use then."""
    usable = {name: s["available"] and not s["disabled"] for name, s in registry.list_backends().items()}
    there = registry.list_backends().get("triton", {}).get("available", False)
    return there and not usable.get("cuda", False) and not usable["triton"]


# -- ours --------------------------------------------------------------------------------------------------------------------------


class Warnings(logging.Handler):
    """What is logged as a warning meanwhile."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> Warnings:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)


class Bench:
    """The loaded checkpoint, not yet on the GPU."""

    def __init__(self, o: argparse.Namespace, report: Report, device: str):
        import folder_paths
        from tonfa.models.formats.checkpoint import open_packed

        self.o, self.report, self.device, self.limits = o, report, device, LIMITS[o.family]
        path = os.path.abspath(o.checkpoint)
        self.checkpoint = open_packed(path)
        self.config, self.name, self.node = self.checkpoint.config, os.path.basename(path), loader(o.family)
        folder_paths.add_model_folder_path("diffusion_models", os.path.dirname(path))
        torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)  # CUDA's own memory is not the loader's
        into_page_cache(path)
        watch, start = PeakRss(), time.time()
        self.model = self.load(cpu_offload="disable")
        sync()
        took, grown = time.time() - start, watch.stop() / GIB
        self.network = self.model.model.diffusion_model
        self.steps: list[Row] = []
        size = self.model.model_size() / GIB
        report.rows.append({"form": "load", "load_s": took, "rss_anon_gib": grown, "model_size_gib": size})
        print(f"loaded from page cache in {took:.1f} s, RssAnon + {grown:.2f} GiB at its highest, {size:.2f} GiB of weights", flush=True)

    def load(self, **inputs: object) -> object:
        return getattr(self.node, self.node.FUNCTION)(model_name=self.name, compute=self.o.compute, **inputs)[0]

    def ready(self, model: object) -> float:
        """Brings a model to the GPU as the host does before a sampling; what memory grew by, in GiB."""
        import comfy.model_management

        before = allocated()
        comfy.model_management.load_models_gpu([model])
        sync()
        return allocated() - before

    def off(self) -> None:
        import comfy.model_management

        comfy.model_management.unload_all_models()
        clean()

    def step(self, model: object, batch: int = 1) -> Step:
        options = model.model_options["transformer_options"]
        return step_of(self.network, self.o.family, self.config, Case(self.o.pixels, batch), self.device, options)

    def time(self, form: str, step: Step, batch: int, weights_gib: float) -> Row:
        row = time_steps(form, Case(self.o.pixels, batch), step, weights_gib, WARMUPS, self.o.repeats)
        self.steps.append(row)
        self.report.rows.append(dataclasses.asdict(row))
        print(line(row), flush=True)
        if not row.finite:
            self.report.check(f"{form} batch {batch}: not finite", 1, 0)
        clean()
        return row

    def wall(self, model: object) -> tuple[float, float, torch.Tensor]:
        """(ms a step by the clock on the wall, as copies run on another stream; GiB at its peak; output)."""
        self.off()
        self.ready(model)
        step = self.step(model)
        for _ in range(WARMUPS):
            out = step()
        sync()
        if on_gpu():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(self.o.repeats):
            start = time.perf_counter()
            out = step()
            sync()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times), torch.cuda.max_memory_allocated() / GIB if on_gpu() else 0.0, out


# -- what is measured --------------------------------------------------------------------------------------------------------------


def resident(bench: Bench) -> None:
    weights = bench.ready(bench.model)
    row = bench.time("ours", bench.step(bench.model), 1, weights)
    bench.report.check(f"{bench.o.pixels} px: peak of a step", row.peak_gib, bench.limits.peak, "GiB")
    if getattr(type(bench.network.blocks()[0]), "text_beside", False):
        beside(bench, weights)
    two = bench.time("ours", bench.step(bench.model, 2), 2, weights)
    print(f"batch 2: {two.ms / row.ms:.2f}x the time of batch 1", flush=True)


def beside(bench: Bench, weights: float) -> None:
    """What it brings that a recorded block runs its text stream beside its image stream; the bits must be the same."""
    kind, graphs, step = type(bench.network.blocks()[0]), bench.network.runtime.graphs, bench.step(bench.model)
    both = step().clone()
    kind.text_beside = False
    graphs.release()
    try:
        bench.time("ours, text and image in turn", step, 1, weights)
        report_bits = int(not torch.equal(step(), both))
    finally:
        kind.text_beside = True
        graphs.release()
    bench.report.check("text beside image: other bits than in turn", report_bits, 0)


def beside_bf16(bench: Bench, kind: type[nn.Module]) -> None:
    bench.off()
    before = allocated()
    network = dense(kind, bench.config, bench.device)
    weights = allocated() - before
    step = step_of(network, bench.o.family, bench.config, Case(bench.o.pixels, 1), bench.device, {})
    theirs = [bench.time("bf16", step, 1, weights).ms]
    registry = kitchen()
    if registry is not None and only_in_torch(registry):
        registry.enable("triton")
        try:
            theirs.append(bench.time("bf16, kitchen in Triton", step, 1, weights).ms)
        except Exception:
            traceback.print_exc()
        finally:
            registry.disable("triton")
    del network, step
    clean()
    bench.time("ours" + AGAIN, bench.step(bench.model), 1, bench.ready(bench.model))
    slower = max(row.ms for row in bench.steps if row.form in ("ours", "ours" + AGAIN) and row.batch == 1)
    bench.report.check(f"{bench.o.pixels} px: ours of the host's bf16", slower / min(theirs), bench.limits.of_bf16)


def with_lora(bench: Bench) -> None:
    """One LoRA of rank 32 through the stock function, steps in turns with the model alone: clocks drift as the board warms."""
    import comfy.sd

    report, alone = bench.report, bench.step(bench.model)
    bench.ready(bench.model)
    want = alone().clone()
    tensors = lora_tensors(bench.checkpoint)
    with Warnings() as told:
        start = time.perf_counter()
        model = comfy.sd.load_lora_for_models(bench.model, None, tensors, 1.0, 0.0)[0]
        bench.ready(model)
        took = time.perf_counter() - start
    for text in told.lines[:5]:
        print(f"  {text}")
    report.check(f"LoRA on {len(tensors) // 2} linears: warnings", len(told.lines), 0)
    step = bench.step(model)
    report.check("LoRA: the output is what it was", int(torch.equal(step(), want)), 0)
    turns = []
    for _ in range(LORA_TURNS):
        bench.ready(bench.model)
        base = median_ms(alone, bench.o.repeats)
        bench.ready(model)
        turns.append(100 * (median_ms(step, bench.o.repeats) / base - 1))
    longer = statistics.median(turns)
    finite = bool(torch.isfinite(step()).all())
    report.check("LoRA: not finite", int(not finite), 0)
    report.rows.append({"form": "lora", "rank": LORA_RANK, "ready_s": took, "longer_percent": longer})
    print(f"LoRA of rank {LORA_RANK}: ready in {took:.2f} s, a step takes {longer:+.1f} %", flush=True)
    bench.ready(bench.model)
    report.check("LoRA removed: other bits", int(not torch.equal(alone(), want)), 0)


def median_ms(step: Step, repeats: int) -> float:
    for _ in range(WARMUPS):
        step()
    sync()
    gpu_sleep(LONG_SLEEP)
    timers = []
    for _ in range(repeats):
        with Timer() as timer:
            step()
        timers.append(timer)
    sync()
    return statistics.median(t.ms() for t in timers)


def streamed(bench: Bench) -> None:
    """One resident block, the others through pinned memory."""
    from tonfa.nodes.host.offloading import streamed_blocks, streamed_nbytes

    report, speed = bench.report, bandwidth(bench.device)
    resident_ms, resident_peak, want = bench.wall(bench.model)
    want = want.clone()
    model = bench.load(cpu_offload="enable", num_blocks_on_gpu=1, use_pin_memory="enable")
    moved, _ = streamed_nbytes(streamed_blocks(model.model, model.offload))
    bus_ms = moved / speed * 1e3
    took, peak, out = bench.wall(model)
    print(f"pinned memory {speed / 1e9:.1f} GB/s, {moved / 1e9:.2f} GB a step: {bus_ms:.1f} ms; resident {resident_ms:.1f} ms, ", end="")
    print(f"streamed {took:.1f} ms; peaks {resident_peak:.2f} and {peak:.2f} GiB", flush=True)
    report.check("streamed step: peak", peak, bench.limits.streamed_peak, "GiB")
    report.check("streamed step: other bits than resident", int(not torch.equal(out, want)), 0)
    report.check("streamed step over the larger of resident step and bus", took / max(resident_ms, bus_ms), STREAMED_TIME)
    row = {"bandwidth": speed, "moved": moved, "resident_ms": resident_ms, "streamed_ms": took, "streamed_peak_gib": peak}
    report.rows.append({"form": "streamed", **row})


def stage(report: Report, name: str, work: Callable[[], None]) -> None:
    """Runs `work`; what goes wrong in it is a miss, and the stages after it still run."""
    try:
        work()
    except Exception:
        traceback.print_exc()
        report.check(f"{name}: did not run to its end", 1, 0)
    clean()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=LIMITS)
    parser.add_argument("checkpoint")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--compute", default="auto")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", help="also write rows and limits to this file")
    parser.add_argument("--cpu", action="store_true", help="try this script out without a GPU, on a file of --depth 2 and --pixels 64")
    o = parser.parse_args()
    device, version = need_gpu(o.cpu), start_host()
    report, kind = Report(heading(version), o.json), host_class(o.family, version)
    say_host(report)
    with torch.inference_mode():
        bench = Bench(o, report, device)
        stage(report, "resident", lambda: resident(bench))
        stage(report, "bf16", lambda: beside_bf16(bench, kind))
        stage(report, "LoRA", lambda: with_lora(bench))
        if bench.limits.streamed_peak is not None:
            stage(report, "streamed", lambda: streamed(bench))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
