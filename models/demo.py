"""`python -m tonfa demo`: the miniature FLUX, quantised on the spot, draws eight captions in 16 and in 4 bit from the same noise.

In ComfyUI through a graph when one is found (in a process of its own), else through the same blocks without it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from .calibrate import Collector
from .comfyui import PACK, comfyui_version, find_comfyui
from .demo_picture import draw
from .dense_flux import dense_flux, open_dense
from .flux import Flux
from .formats.checkpoint import open_checkpoint
from .miniature import Miniature, load_miniature
from .quantize_flux import Options, quantize_flux
from .similarity import psnr, ssim

FILE = "svdq-int4_r32-tonfa-miniature.safetensors"
SEED, STEPS = 7, 12
DENSE = "16 bit"
RUNS = (DENSE, "fast", "exact")  # the first is what the others are compared with
SHOWN = "exact"  # the hardest: activations in 4 bit too
CAPTIONS = (
    "large red striped circle left of medium blue star on green",
    "yellow 7 above large purple plain square on black",
    "large orange dotted star top right on blue",
    "small yellow cross below large pink shaded ring on purple",
    "large cyan striped 3 left and medium red plain triangle right on yellow",
    "medium green plain ring centre on white",
    "large blue dotted square below small orange 9 on pink",
    "red 4 right of large yellow shaded cross on cyan",
)
CALIBRATING = (  # others than those that are drawn
    "large green dotted circle on red",
    "medium yellow striped star top left on purple",
    "small blue 5 right of large green plain ring on orange",
    "large pink shaded triangle below red cross on blue",
    "purple 8 left and large cyan dotted square right on black",
    "large orange plain cross bottom on white",
    "medium red striped ring above small green star on yellow",
    "large blue 2 centre on pink",
    "yellow triangle left of large purple striped circle on green",
    "small cyan shaded square bottom right on orange",
    "large purple 6 above medium red dotted cross on cyan",
    "medium orange star right on black",
)


@dataclass
class Run:
    """Eight pictures: name, compute type, bytes of weights in memory, seconds a step and picture, pictures fp32 [8, 3, 128, 128]."""

    name: str
    dtype: str
    nbytes: int
    seconds: float
    pictures: Tensor


def run(out: Path, use_comfyui: bool = True) -> None:
    """Quantises, draws in every way, writes out/demo.png, prints the table. OSError when `out` cannot be written; CheckpointError when
    the miniature's files are not there."""
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    miniature = load_miniature(device=device)
    with tempfile.TemporaryDirectory(prefix="tonfa-demo-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / FILE
        quantise(miniature, path)
        runs = (in_comfyui(path) if use_comfyui else None) or standalone(miniature, path)
    picture = out / "demo.png"
    by_name = {r.name: r for r in runs}
    draw(picture, CAPTIONS, by_name[DENSE].pictures, by_name[SHOWN].pictures, f"4 bit, compute {SHOWN}")
    print_table(runs)
    print(f"Picture: {picture.resolve()}")


def quantise(miniature: Miniature, path: Path) -> None:
    """SVDQuant of the miniature, INT4 and rank 32, calibrated by sampling twelve captions."""
    started = time.perf_counter()
    network = dense_flux(miniature.flux, torch.float32, miniature.device)
    with Collector(network) as seen:
        miniature.latents(network, CALIBRATING, range(1000, 1000 + len(CALIBRATING)), steps=8)
    with tqdm(desc="quantising", unit="layer") as bar, closing(open_dense(miniature.flux)) as source:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        quantize_flux(source, path, Options(mode="calibrated"), seen.statistics, miniature.device, show)
    sizes = " -> ".join(f"{file.stat().st_size / 2**20:.1f} MiB" for file in (miniature.flux, path))
    print(f"Quantised in {time.perf_counter() - started:.0f} s: {sizes} on disk.")


def print_table(runs: list[Run]) -> None:
    reference = next(r for r in runs if r.name == DENSE)
    print(f"\n{'':14}{'computes in':>12}{'weights':>12}{'PSNR':>11}{'SSIM':>9}{'a step':>11}")
    for r in runs:
        alike = f"{'reference':>20}"
        if r is not reference:
            alike = (
                f"{float(psnr(r.pictures, reference.pictures).mean()):>8.1f} dB{float(ssim(r.pictures, reference.pictures).mean()):>9.4f}"
            )
        print(f"{r.name:14}{r.dtype:>12}{r.nbytes / 2**20:>8.2f} MiB{alike}{r.seconds * 1e3:>8.0f} ms")
    print(
        f"{len(CAPTIONS)} captions, {STEPS} steps each. A miniature: its seconds say nothing about a real FLUX, whose steps are kernels.\n"
    )


def weight_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in (*model.parameters(), *model.buffers()))


# -- without a host ---------------------------------------------------------------------------------------------------------------


def standalone(miniature: Miniature, path: Path) -> list[Run]:
    """Every run through models/flux.py."""
    print(f"Drawing without ComfyUI, on {miniature.device}: {len(CAPTIONS)} captions, {STEPS} steps, {len(RUNS)} times")
    runs = []
    for name in tqdm(RUNS, desc="drawing", unit="run"):
        if name == DENSE:
            model = dense_flux(miniature.flux, torch.bfloat16, miniature.device)
        else:
            with closing(open_checkpoint(path)) as checkpoint:  # Windows removes no folder with a mapped file in it
                model = Flux(checkpoint, torch.bfloat16, miniature.device).eval()
        started = time.perf_counter()
        latents = miniature.latents(model, CAPTIONS, range(SEED, SEED + len(CAPTIONS)), STEPS, "auto" if name == DENSE else name)
        latents = latents.cpu()  # waits for a GPU
        seconds = (time.perf_counter() - started) / (STEPS * len(CAPTIONS))
        runs.append(Run(name, "bfloat16", weight_bytes(model), seconds, miniature.pictures(latents.to(miniature.device)).cpu()))
    return runs


# -- inside ComfyUI ---------------------------------------------------------------------------------------------------------------


def pythons(host: Path) -> Iterator[str]:
    """Interpreters that may have the host's packages: the one that make built, the one running, those beside the host."""
    bin_folder = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    yield str(PACK / f".venv-host-{comfyui_version(host)}" / bin_folder)
    yield sys.executable
    yield from (
        str(place) for place in (host / ".venv" / bin_folder, host / "venv" / bin_folder, host.parent / "python_embeded/python.exe")
    )


def can_import(python: str, host: Path) -> bool:
    """Whether `python` exists and has what ComfyUI imports first."""
    code = "import torch, torchsde, einops, aiohttp, transformers, safetensors, tqdm, psutil"
    return Path(python).exists() and subprocess.run([python, "-c", code], capture_output=True, cwd=host).returncode == 0


def in_comfyui(path: Path) -> list[Run] | None:
    """Every run inside the ComfyUI that is found; None, with one printed line, when there is none or it cannot run."""
    host = find_comfyui()
    if host is None:
        print("No ComfyUI found: the same blocks draw without it.")
        return None
    python = next((p for p in pythons(host) if can_import(p, host)), None)
    if python is None:
        print(f"ComfyUI {comfyui_version(host)} is in {host}, but no Python with its packages was found: going on without it.")
        return None
    print(
        f"Drawing inside ComfyUI {comfyui_version(host)} in {host}: {len(CAPTIONS)} captions, {STEPS} steps, {len(RUNS)} times", flush=True
    )
    job, results = path.with_name("job.json"), path.with_name("results")
    results.mkdir()
    job.write_text(json.dumps({"host": str(host), "checkpoint": str(path), "results": str(results)}))
    shim = PACK / "tests" / "host" / "shim"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(shim) if shim.is_dir() else "", os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run([python, str(PACK), "demo", "--inside-comfyui", str(job)], env=environment, cwd=path.parent)
    if done.returncode:
        print(f"ComfyUI could not run the demo (exit status {done.returncode}, reason above): going on without it.")
        return None
    return [read_run(results, name) for name in RUNS]


def write_run(folder: Path, result: Run) -> None:
    facts = {name: value for name, value in asdict(result).items() if name != "pictures"}
    (folder / f"{result.name}.json").write_text(json.dumps(facts))
    save_file({"pictures": result.pictures.float().contiguous()}, folder / f"{result.name}.safetensors")


def read_run(folder: Path, name: str) -> Run:
    facts = json.loads((folder / f"{name}.json").read_text())
    pictures = load_file(folder / f"{name}.safetensors")["pictures"].clone()  # not a view of the file, which is about to be removed
    return Run(pictures=pictures, **facts)
