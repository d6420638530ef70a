"""Many prompts on one server with changing LoRA, resolution and cache settings: the server's memory does not grow with them.

TONFA_PROMPTS=200 is the measurement that a release is held to (0.05 MiB a prompt behind the first 50); the default is a short form of it.
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from .lab import made
from .loras import packed_only
from .test_server import Server, graph

PROMPTS = int(os.environ.get("TONFA_PROMPTS", "24"))
FIRST = min(50, PROMPTS // 3)
MOST = 0.05 if PROMPTS >= 200 else 0.5  # MiB a prompt; few prompts leave the allocator's noise in the slope
LORAS = (None, "a.safetensors", "b.safetensors")
SIZES = ((96, 64), (64, 64), (64, 128), (128, 96))
THRESHOLDS = (0, 0.1, 0.5)
MODEL = "svdq-int4_r16-made.safetensors"


def anonymous_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")) / 1024


def prompts() -> list[dict]:
    """All combinations, over and over, each time with another seed and strength."""
    kinds, found = list(product(LORAS, SIZES, THRESHOLDS)), []
    for i in range(PROMPTS):
        lora, (width, height), threshold = kinds[i * 7 % len(kinds)]
        posted = graph(MODEL, "held", cache_threshold=threshold)
        posted["3"]["inputs"].update(width=width, height=height)
        posted["4"]["inputs"].update(seed=i, steps=3)
        if lora:
            inputs = {"model": ["1", 0], "lora_name": lora, "lora_strength": 0.3 + i / PROMPTS}
            posted["6"] = {"class_type": "NunchakuFluxLoraLoader", "inputs": inputs}
            posted["4"]["inputs"]["model"] = ["6", 0]
        found.append(posted)
    return found


@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, where Linux tells a process's anonymous memory")
def test_memory_does_not_grow_with_prompts():
    with Server() as server:
        models = server.base / "models"
        (models / "diffusion_models" / MODEL).symlink_to(made())
        (models / "loras").mkdir(exist_ok=True)
        for seed, name in enumerate(LORAS[1:]):
            save_file(packed_only(seed=seed), models / "loras" / name)
        held = []
        for posted in prompts():
            entry = server.run(posted)
            assert entry["status"]["status_str"] == "success", entry["status"]
            held.append(anonymous_mib(server.process.pid))
    x, y = torch.arange(len(held) - FIRST).double(), torch.tensor(held[FIRST:]).double()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    print(f"{PROMPTS} prompts: {held[0]:.0f} MiB at first, {held[-1]:.0f} at last, {slope:.3f} MiB a prompt after {FIRST}")
    assert slope < MOST, [round(mib) for mib in held]
