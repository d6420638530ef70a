"""What the benchmarks share: the heading, timing by CUDA events, limits with ok or MISS, and starting the host.

On a machine without a GPU the same calls time by the clock on the wall, so that a script can be tried out (--cpu); such times mean nothing.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone

import torch

MIB, GIB = 1024**2, 1024**3
LONG_SLEEP, SHORT_SLEEP = 4_000_000, 600_000  # GPU cycles, about 2 ms and 0.3 ms
FLUSH_BYTES = 256 << 20  # more than any L2

Work = Callable[[], object]


def on_gpu() -> bool:
    return torch.cuda.is_available()


def need_gpu(cpu_wanted: bool) -> str:
    """ "cuda", or "cpu" where that was asked for; ends the program where neither fits."""
    if on_gpu() and not cpu_wanted:
        return "cuda"
    if cpu_wanted and not on_gpu():
        return "cpu"
    if cpu_wanted:
        why = "--cpu tries a script out on a machine without a GPU; here is one"
    else:
        why = "this benchmark needs a GPU, and torch finds none"
    print(why, file=sys.stderr)
    raise SystemExit(2)


def heading(host: str | None = None) -> dict[str, str]:
    """Prints and returns device, versions and date."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    about = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if on_gpu() else "cpu",
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
    }
    if host is not None:
        about["ComfyUI"] = host
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    return about


# -- timing ------------------------------------------------------------------------------------------------------------------------


def sync() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def gpu_sleep(cycles: int) -> None:
    """Keeps the GPU busy while the CPU issues what is to be timed."""
    if on_gpu():
        torch.cuda._sleep(cycles)


class Timer:
    """One timed stretch of the current stream: `with Timer() as t: work()`, then `t.ms()` after a synchronisation."""

    def __enter__(self) -> Timer:
        if on_gpu():
            self.start, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.start.record()
        else:
            self.start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if on_gpu():
            self.end.record()
        else:
            self.end = time.perf_counter()

    def ms(self) -> float:
        return self.start.elapsed_time(self.end) if on_gpu() else (self.end - self.start) * 1e3


def round_robin_us(contenders: dict[str, Work], rounds: int) -> dict[str, float]:
    """Median time of one call of each. They take turns call by call, so that a drifting clock hits all alike, and so that each finds the L2
    cache as another left it, as in a model."""
    for work in contenders.values():
        work(), work()
    timers: dict[str, list[Timer]] = {name: [] for name in contenders}
    sync()
    gpu_sleep(LONG_SLEEP)
    for _ in range(rounds):
        for name, work in contenders.items():
            gpu_sleep(SHORT_SLEEP)
            with Timer() as timer:
                work()
            timers[name].append(timer)
    sync()
    return {name: statistics.median(t.ms() for t in found) * 1e3 for name, found in timers.items()}


def cold_us(contenders: dict[str, Work], rounds: int, device: str) -> dict[str, float]:
    """As round_robin_us, with everything that the L2 cache held pushed out before each call."""
    junk = torch.empty(FLUSH_BYTES if device == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
    for work in contenders.values():
        work(), work()
    timers: dict[str, list[Timer]] = {name: [] for name in contenders}
    sync()
    for _ in range(rounds):
        for name, work in contenders.items():
            gpu_sleep(SHORT_SLEEP)
            junk.fill_(len(timers[name]) & 255)
            with Timer() as timer:
                work()
            timers[name].append(timer)
    sync()
    return {name: statistics.median(t.ms() for t in found) * 1e3 for name, found in timers.items()}


# -- limits and files --------------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Rows and limits of one run. `close` writes them and gives the exit code: 1 when a limit was missed."""

    about: dict[str, str]
    path: str | None = None
    rows: list[dict] = field(default_factory=list)
    checks: list[dict] = field(default_factory=list)

    def check(self, name: str, value: float, limit: float, unit: str = "", at_least: bool = False) -> None:
        """A value that may not exceed its limit, or may not stay below it. Not a number is a miss."""
        ok = value >= limit if at_least else value <= limit
        self.checks.append({"name": name, "value": value, "limit": limit, "unit": unit, "ok": ok})
        bound = "at least" if at_least else "at most"
        print(f"{'ok  ' if ok else 'MISS'} {name}: {value:.4g} {unit}".rstrip() + f" ({bound} {limit:.4g})", flush=True)

    def close(self) -> int:
        missed = [c["name"] for c in self.checks if not c["ok"]]
        print(f"{len(self.checks)} limits, {len(missed)} missed" + (": " + "; ".join(missed) if missed else ""))
        if self.path:
            with open(self.path, "w", encoding="utf-8") as file:
                json.dump({"about": self.about, "rows": self.rows, "checks": self.checks}, file, indent=1)
        return 1 if missed else 0


# -- the host ----------------------------------------------------------------------------------------------------------------------


def start_host() -> str:
    """Makes ComfyUI's modules importable and returns its version.

    COMFYUI_PATH, else PEERS/ComfyUI, else where `tonfa` looks for it. A folder PEERS/site is searched for packages last.
    """
    peers = os.environ.get("PEERS", "")
    if peers and "COMFYUI_PATH" not in os.environ and os.path.isdir(os.path.join(peers, "ComfyUI")):
        os.environ["COMFYUI_PATH"] = os.path.join(peers, "ComfyUI")
    from tonfa.models.comfyui import comfyui_version, find_comfyui

    folder = find_comfyui()
    if folder is None:
        raise SystemExit("no ComfyUI found: set COMFYUI_PATH to one")
    sys.path.insert(0, str(folder))
    if peers and os.path.isdir(os.path.join(peers, "site")):
        sys.path.append(os.path.abspath(os.path.join(peers, "site")))
    sys.argv = sys.argv[:1]  # the host reads it
    if not on_gpu():
        from comfy.cli_args import args

        args.cpu = True
    return comfyui_version(folder)


def into_page_cache(path: str) -> None:
    with open(path, "rb") as file:
        while file.read(1 << 26):
            pass


def load_ours(checkpoint: str, compute: str) -> object:
    """The MODEL that the loader node makes of a checkpoint, not yet on the GPU."""
    import folder_paths
    from tonfa.nodes.flux import NunchakuFluxDiTLoader

    folder_paths.add_model_folder_path("diffusion_models", os.path.dirname(os.path.abspath(checkpoint)))
    with torch.inference_mode():
        return NunchakuFluxDiTLoader().load_model(os.path.basename(checkpoint), 0, "nunchaku-fp16", "auto", 0, "bfloat16", compute=compute)[
            0
        ]


def step_inputs(params: object, pixels: int, batch: int, device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Arguments of one call of a FLUX transformer: 512 text tokens and a picture of pixels x pixels. params: the model's FluxParams."""
    g = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device).to(dtype)

    inputs = {
        "x": draw(batch, 16, pixels // 8, pixels // 8),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "context": draw(batch, 512, params.context_in_dim) * 0.1,
        "y": draw(batch, params.vec_in_dim),
    }
    if params.guidance_embed:
        inputs["guidance"] = torch.full((batch,), 3.5, device=device, dtype=dtype)
    return inputs
