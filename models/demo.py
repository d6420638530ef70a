"""`python -m tonfa demo`: a small FLUX-shaped checkpoint in the real file format, sampled in 16 and in 4 bit from the same start.

In ComfyUI when one is found (the loader node and the host's sampler, in a process of their own), else through the same blocks without it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from .comfyui import PACK, comfyui_version, find_comfyui
from .demo_picture import draw
from .demo_weights import Inputs, inputs, write_checkpoint
from .flux import Flux
from .formats.checkpoint import open_checkpoint
from .linear import PackedLinear, PlainLinear

FILE = "svdq-int4_r32-tonfa-demo.safetensors"
STEPS, SIZE, SHIFT = 8, 64, 1.15
GUIDANCE = 4.0  # ComfyUI embeds 1000 x guidance in the compute type: 4000 is exact in bfloat16, 3500 (becoming 3504) is not
REFERENCE = "dense float32"  # what the others are compared with; the dense runs use the same 4-bit weights, expanded
RUNS = ("dense float32", "dense bfloat16", "weight_only", "fast", "exact")


@dataclass
class Run:
    """One sampled latent: name, compute type, bytes of weights in memory, seconds of sampling, latent fp32 [1, 16, h, w]."""

    name: str
    dtype: str
    nbytes: int
    seconds: float
    latent: Tensor


def run(out: Path, use_comfyui: bool = True) -> None:
    """Makes the checkpoint, samples it in every way, writes out/demo.png, prints the table. OSError when `out` cannot be written."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tonfa-demo-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / FILE
        with tqdm(desc="writing the checkpoint", unit="layer", delay=1) as bar:
            write_checkpoint(path, progress=lambda done, total: (setattr(bar, "total", total), bar.update(done - bar.n)))
        runs = (in_comfyui(path) if use_comfyui else None) or standalone(path)
    reference = next(r for r in runs if r.name == REFERENCE)
    picture = out / "demo.png"
    draw(picture, {r.name: r.latent for r in runs}, dense="dense bfloat16", compared=("exact", "fast"))
    print_table(runs, reference)
    print(f"Picture: {picture.resolve()}")


def snr(latent: Tensor, reference: Tensor) -> float:
    """Signal to noise of `latent` in dB, the reference being the signal."""
    noise = (latent.double() - reference.double()).square().mean()
    return float(10 * torch.log10(reference.double().square().mean() / noise)) if noise > 0 else float("inf")


def print_table(runs: list[Run], reference: Run) -> None:
    print(f"\n{'':16}{'computes in':>12}{'weights':>12}{'error (SNR)':>14}{f'{STEPS} steps':>10}")
    for r in runs:
        error = "reference" if r is reference else f"{snr(r.latent, reference.latent):.1f} dB"
        print(f"{r.name:16}{r.dtype:>12}{r.nbytes / 2**20:>8.2f} MiB{error:>14}{r.seconds:>8.2f} s")
    print("Random weights of a small network: the errors and the memory are of its kind, the seconds say nothing about a real FLUX.\n")


# -- without a host ---------------------------------------------------------------------------------------------------------------


def standalone(path: Path) -> list[Run]:
    """Every run through models/flux.py."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"Sampling without ComfyUI, on {device}: {STEPS} steps, {len(RUNS)} times")
    material, runs = inputs(SIZE), []
    with tqdm(total=STEPS * len(RUNS), unit="step", desc="sampling") as bar:
        for name in RUNS:
            dtype = torch.float32 if name == "dense float32" else torch.bfloat16
            checkpoint = open_checkpoint(path)
            model = Flux(checkpoint, dtype, device).eval()
            checkpoint.close()  # Windows removes no folder with a mapped file in it
            if name.startswith("dense"):
                make_dense(model, dtype)
            compute = "auto" if name.startswith("dense") else name
            started = time.perf_counter()
            latent = sample(model, material, compute, device, bar)
            seconds = time.perf_counter() - started
            runs.append(Run(name, str(dtype).removeprefix("torch."), weight_bytes(model), seconds, latent))
    return runs


def make_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts a dense linear in the place of every packed one: the 16-bit twin of the same weights."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PackedLinear):
                weight, bias = child.dense()
                setattr(module, name, PlainLinear(weight.to(dtype), None if bias is None else bias.to(dtype), child.runtime))


def weight_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in (*model.parameters(), *model.buffers()))


def schedule(steps: int) -> list[float]:
    """Noise levels 1 .. 0, shifted as for a small FLUX picture: s * e^m / (1 + (e^m - 1) * s)."""
    e = 2.718281828459045**SHIFT
    return [e * s / (1 + (e - 1) * s) for s in (1 - i / steps for i in range(steps + 1))]


@torch.inference_mode()
def sample(model: Flux, material: Inputs, compute: str, device: torch.device, bar: tqdm) -> Tensor:
    """Euler along the flow from pure noise: x <- x + (sigma_next - sigma) * v. Returns the latent, fp32 on the CPU."""
    x, context, pooled = (t.to(device) for t in (material.noise, material.context, material.pooled))
    context, guidance, options = context.to(model.dtype), torch.tensor([GUIDANCE], device=device), {"tonfa": {"compute": compute}}
    sigmas = schedule(STEPS)
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        velocity = model(x.to(model.dtype), torch.tensor([sigma], device=device), context, pooled, guidance, options)
        x = x + (following - sigma) * velocity.float()
        bar.update()
    return x.cpu()


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
        print("No ComfyUI found: the same blocks are sampled without it.")
        return None
    python = next((p for p in pythons(host) if can_import(p, host)), None)
    if python is None:
        print(f"ComfyUI {comfyui_version(host)} is in {host}, but no Python with its packages was found: going on without it.")
        return None
    print(f"Sampling inside ComfyUI {comfyui_version(host)} in {host}: {STEPS} steps, {len(RUNS)} times", flush=True)
    job, results = path.with_name("job.json"), path.with_name("results")
    results.mkdir()
    material = inputs(SIZE)
    save_file({"noise": material.noise, "context": material.context, "pooled": material.pooled}, path.with_name("inputs.safetensors"))
    job.write_text(
        json.dumps(
            {"host": str(host), "checkpoint": str(path), "inputs": str(path.with_name("inputs.safetensors")), "results": str(results)}
        )
    )
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
    facts = {name: value for name, value in asdict(result).items() if name != "latent"}
    (folder / f"{result.name}.json").write_text(json.dumps(facts))
    save_file({"latent": result.latent.float().contiguous()}, folder / f"{result.name}.safetensors")


def read_run(folder: Path, name: str) -> Run:
    facts = json.loads((folder / f"{name}.json").read_text())
    latent = load_file(folder / f"{name}.safetensors")["latent"].clone()  # not a view of the file, which is about to be removed
    return Run(latent=latent, **facts)
