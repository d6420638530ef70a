"""The demo's half inside ComfyUI, in a process of its own: a graph for each run, through the host's executor."""

from __future__ import annotations

import inspect
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from ...models.demo import CAPTIONS, DENSE, FILE, RUNS, SEED, STEPS, Run, weight_bytes, write_run
from ...models.miniature import SIZE
from ..miniature import TonfaMiniatureCaption


class TonfaDemoKeep:
    """The output that the demo's graphs are run for."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "keep", True, "Nunchaku"
    kept: dict[str, object] = {}  # noqa: RUF012  (one demo a process)

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802 (the host's name)
        anything = {name: (name.upper(),) for name in ("model", "latent", "image")}
        return {"required": {"key": ("STRING", {})}, "optional": anything}

    def keep(self, key: str, **values: object) -> dict:
        self.kept[key] = next(iter(values.values()))
        return {}


class TonfaDemoBatch(TonfaMiniatureCaption):
    """The lines of a caption as one batch, a picture each."""

    def encode(self, caption: str) -> tuple:
        (entries,) = super().encode(caption)
        context, pooled = (torch.cat(parts) for parts in zip(*((c, more["pooled_output"]) for c, more in entries), strict=True))
        return ([[context, {"pooled_output": pooled}]],)


def work(job: Path) -> None:
    """Reads the job (host folder, checkpoint, results), draws every run and writes it into the results folder."""
    task = json.loads(job.read_text())
    start_host(Path(task["host"]))
    import folder_paths
    from tqdm import tqdm

    folder_paths.add_model_folder_path("diffusion_models", str(Path(task["checkpoint"]).parent))
    host = executor()
    for name in tqdm(RUNS, desc="drawing", unit="run"):
        write_run(Path(task["results"]), drawn(host, name))


def start_host(host: Path) -> None:
    """Makes the host importable as its main.py does: its folder first, --cpu when torch has no GPU."""
    sys.path.insert(0, str(host))
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.disable_dynamic_vram = True
    import comfy.model_management  # noqa: F401  (reads the arguments)


def executor() -> object:
    """The host's, with our nodes."""
    import execution

    import nodes

    from .. import NODE_CLASS_MAPPINGS

    nodes.NODE_CLASS_MAPPINGS |= {**NODE_CLASS_MAPPINGS, "TonfaDemoKeep": TonfaDemoKeep, "TonfaDemoBatch": TonfaDemoBatch}
    silent = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *a, **k: None, queue_updated=lambda: None)
    asked = inspect.signature(execution.PromptExecutor).parameters  # newer hosts read these at every prompt
    more = {"cache_args": {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}} if "cache_args" in asked else {}
    return execution.PromptExecutor(silent, **more)


def drawn(host: object, name: str) -> Run:
    """One run: the model first, then the sampling, which is timed, then the decoding; the executor keeps what is done."""
    kept, everything = TonfaDemoKeep.kept, graph(name)
    execute(host, everything, ["kept_model"])
    started = time.perf_counter()
    execute(host, everything, ["kept_latent"])
    seconds = (time.perf_counter() - started) / (STEPS * len(CAPTIONS))
    execute(host, everything, ["kept_image"])
    pictures, model = kept["image"].permute(0, 3, 1, 2).float().cpu(), kept["model"].model
    computes = str(model.manual_cast_dtype or model.get_dtype()).removeprefix("torch.")
    return Run(name, computes, weight_bytes(model.diffusion_model), seconds, pictures)


def execute(host: object, prompt: dict, outputs: list[str]) -> None:
    host.execute(prompt, "demo", {}, outputs)
    if not host.success:
        raise SystemExit(f"the demo's graph failed in ComfyUI: {host.status_messages[-1]}")


def graph(name: str) -> dict:
    """What a user would wire: loader, captions, sampler, VAE."""
    four = {"model_path": FILE, "cache_threshold": 0, "attention": "nunchaku-fp16", "cpu_offload": "auto", "device_id": 0,
            "data_type": "bfloat16", "compute": name}  # fmt: skip
    model = ["miniature", 0] if name == DENSE else ["four", 0]
    wires = {"model": model, "positive": ["captions", 0], "negative": ["captions", 0], "latent_image": ["empty", 0]}
    sampler = {"seed": SEED, "steps": STEPS, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    nodes = {
        "miniature": ("TonfaMiniatureLoader", {}),
        "four": ("NunchakuFluxDiTLoader", four),
        "captions": ("TonfaDemoBatch", {"caption": "\n".join(CAPTIONS)}),
        "empty": ("EmptyLatentImage", {"width": SIZE, "height": SIZE, "batch_size": len(CAPTIONS)}),
        "sampler": ("KSampler", {**sampler, **wires}),
        "decoder": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["miniature", 1]}),
        "kept_model": ("TonfaDemoKeep", {"key": "model", "model": model}),
        "kept_latent": ("TonfaDemoKeep", {"key": "latent", "latent": ["sampler", 0]}),
        "kept_image": ("TonfaDemoKeep", {"key": "image", "image": ["decoder", 0]}),
    }
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}
