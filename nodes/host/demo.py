"""The demo's half inside ComfyUI, in a process of its own: the loader node and the host's sampler, on the checkpoint that the demo made."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...models.demo import FILE, GUIDANCE, RUNS, STEPS, Run, weight_bytes, write_run
from ...models.dequantize import dequantize


def work(job: Path) -> None:
    """Reads the job (host folder, checkpoint, inputs, results), samples every run and writes it into the results folder."""
    task = json.loads(job.read_text())
    start_host(Path(task["host"]))
    import folder_paths
    from tqdm import tqdm

    checkpoint, results = Path(task["checkpoint"]), Path(task["results"])
    folder_paths.add_model_folder_path("diffusion_models", str(checkpoint.parent))
    material = load_file(task["inputs"])
    dense = checkpoint.with_name("dense.safetensors")
    dequantize(checkpoint, dense)
    for name in tqdm(RUNS, desc="sampling", unit="run"):
        model = (
            load_dense(dense, checkpoint, torch.float32 if name.endswith("32") else torch.bfloat16) if "dense" in name else load_node(name)
        )
        started = time.perf_counter()
        latent = sample(model, material)
        seconds = time.perf_counter() - started
        dtype = str(model.model.get_dtype()).removeprefix("torch.")
        write_run(results, Run(name, dtype, weight_bytes(model.model.diffusion_model), seconds, latent))


def start_host(host: Path) -> None:
    """Makes the host importable as its main.py does: its folder first, --cpu when torch has no GPU."""
    sys.path.insert(0, str(host))
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.disable_dynamic_vram = True
    import comfy.model_management  # noqa: F401  (reads the arguments)


def load_node(compute: str):
    """The MODEL that the node gives for the demo's file."""
    from ..flux import NunchakuFluxDiTLoader

    node = NunchakuFluxDiTLoader()
    with torch.inference_mode():
        return getattr(node, node.FUNCTION)(model_path=FILE, data_type="bfloat16", compute=compute)[0]


def load_dense(path: Path, checkpoint: Path, dtype: torch.dtype):
    """The dequantised file in the host's own Flux, step by step: the stock loader's detection knows real FLUX sizes only."""
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    from ...models.formats.checkpoint import open_checkpoint
    from .shell import unet_config

    opened = open_checkpoint(checkpoint)
    config = comfy.supported_models.Flux(unet_config(opened))
    opened.close()
    config.set_inference_dtype(dtype, None)
    device = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    model = comfy.model_base.Flux(config, device=offload)
    # q/k norm parameters are called `scale` in files and in older hosts, `weight` in newer ones.
    ours = model.diffusion_model.state_dict()
    state = load_file(path)
    state = {name if name in ours else name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in state.items()}
    model.diffusion_model.load_state_dict(state)
    model.diffusion_model.eval()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def sample(model, material: dict[str, Tensor]) -> Tensor:
    """What KSampler calls: Euler, simple schedule, no CFG. Returns the latent, fp32 on the CPU."""
    import comfy.sample

    conditioning = [[material["context"], {"pooled_output": material["pooled"], "guidance": GUIDANCE}]]
    latent = torch.zeros_like(material["noise"])
    with torch.inference_mode():
        latent = comfy.sample.fix_empty_latent_channels(model, latent)
        arguments = (STEPS, 1.0, "euler", "simple", conditioning, conditioning, latent)
        return comfy.sample.sample(model, material["noise"], *arguments, denoise=1.0, disable_pbar=True, seed=0).float().cpu()
