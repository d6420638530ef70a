"""Many prompts through the host's executor, with changing LoRA, resolution and cache settings: memory does not grow with them.

    COMFYUI_PATH=... python benchmarks/memory_held.py [--prompts 200] [--first 50] [--json FILE] [--cpu]

The golden mini model, our loader and LoRA nodes, the host's sampler: the executor that a server runs, in this process. Limit: the slope of
the driver's used memory and of anonymous main memory is under 0.05 MiB a prompt behind the first 50. Exits 1 when it is missed.
tests/host/test_memory_held.py does the same over HTTP on the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
from lora import lora_tensors
from safetensors.torch import save_file
from timing import MIB, Report, heading, need_gpu, on_gpu, start_host

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
MODEL = "mini_flux_int4_hd128.safetensors"
LORAS = (None, "a.safetensors", "b.safetensors")
SIZES = ((128, 64), (64, 64), (128, 128), (256, 128))
THRESHOLDS = (0.0, 0.1, 0.5)
LIMIT = 0.05  # MiB a prompt


class Conditioning:
    """A prompt without a text encoder."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "tonfa"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"seed": ("INT", {"default": 0}), "width": ("INT", {}), "pooled": ("INT", {})}}

    def make(self, seed: int, width: int, pooled: int) -> tuple:
        g = torch.Generator().manual_seed(seed)
        return ([[torch.randn(1, 24, width, generator=g), {"pooled_output": torch.randn(1, pooled, generator=g)}]],)


class End:
    """The output that a prompt is run for."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "end", True, "tonfa"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"samples": ("LATENT",)}}

    def end(self, samples: dict) -> dict:
        if not torch.isfinite(samples["samples"]).all():
            raise ValueError("the latent is not finite")
        return {}


def graph(i: int, lora: str | None, size: tuple[int, int], threshold: float, params: object) -> dict:
    model = ["1", 0] if lora is None else ["6", 0]
    sampler = {"seed": i, "steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    wires = {"model": model, "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0]}
    loader = {
        "model_path": MODEL, "cache_threshold": threshold, "attention": "nunchaku-fp16", "cpu_offload": "auto", "device_id": 0,
        "data_type": "bfloat16",
    }  # fmt: skip
    nodes = {
        "1": {"class_type": "NunchakuFluxDiTLoader", "inputs": loader},
        "2": {"class_type": "Conditioning", "inputs": {"seed": 3, "width": params.context_in_dim, "pooled": params.vec_in_dim}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": size[0], "height": size[1], "batch_size": 1}},
        "4": {"class_type": "KSampler", "inputs": {**sampler, **wires}},
        "5": {"class_type": "End", "inputs": {"samples": ["4", 0]}},
    }
    if lora is not None:
        strength = 0.3 + (i % 37) / 50
        nodes["6"] = {"class_type": "NunchakuFluxLoraLoader", "inputs": {"model": ["1", 0], "lora_name": lora, "lora_strength": strength}}
    return nodes


def executor() -> object:
    """The host's, with our nodes and the two above."""
    import execution
    from tonfa.nodes import NODE_CLASS_MAPPINGS

    import nodes

    nodes.NODE_CLASS_MAPPINGS |= {**NODE_CLASS_MAPPINGS, "Conditioning": Conditioning, "End": End}
    silent = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *a, **k: None, queue_updated=lambda: None)
    return execution.PromptExecutor(silent)


def held(device: str) -> tuple[float, float]:
    """MiB that the driver gave away, and anonymous MiB of this process."""
    free, total = torch.cuda.mem_get_info() if on_gpu() else (0, 0)
    status = Path("/proc/self/status").read_text()
    return (total - free) / MIB, next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024


def slope(values: list[float]) -> float:
    x, y = torch.arange(len(values)).double(), torch.tensor(values).double()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def run(o: argparse.Namespace, folder: Path, report: Report, device: str) -> None:
    import folder_paths
    from tonfa.nodes.flux import NunchakuFluxDiTLoader

    folder_paths.add_model_folder_path("diffusion_models", str(DATA))
    folder_paths.add_model_folder_path("loras", str(folder), is_default=True)
    with torch.inference_mode():
        network = NunchakuFluxDiTLoader().load_model(MODEL)[0].model.diffusion_model
    params = network.params
    for seed, name in enumerate(LORAS[1:]):
        save_file(lora_tensors(network, 16, bool(seed), seed), folder / name)
    del network
    host, kinds, found = executor(), list(product(LORAS, SIZES, THRESHOLDS)), []
    for i in range(o.prompts):
        prompt = graph(i, *kinds[i * 7 % len(kinds)], params)
        host.execute(prompt, str(i), {}, ["5"])
        if not host.success:
            raise SystemExit(f"prompt {i} failed: {host.status_messages[-1]}")
        found.append(held(device))
    gpu, main_memory = zip(*found, strict=True)
    report.rows.append({"gpu_mib": gpu, "anonymous_mib": main_memory})
    for name, values in (("GPU", gpu), ("anonymous", main_memory)):
        print(f"{name}: {values[0]:.0f} MiB at first, {values[o.first]:.0f} after {o.first}, {values[-1]:.0f} at last", flush=True)
        report.check(f"{name} memory a prompt", slope(values[o.first :]), LIMIT, "MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--first", type=int, default=50)
    parser.add_argument("--json", help="also write rows and limits to this file")
    parser.add_argument("--cpu", action="store_true", help="try this script out without a GPU")
    o = parser.parse_args()
    device = need_gpu(o.cpu)
    report = Report(heading(start_host()), o.json)
    with tempfile.TemporaryDirectory(prefix="tonfa-held-") as folder:
        os.environ.setdefault("TQDM_DISABLE", "1")
        run(o, Path(folder), report, device)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
