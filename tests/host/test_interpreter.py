"""The `exact` mode through its Triton kernels, under Triton's interpreter, against the same mode through the torch oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tonfa.models.comfyui import find_comfyui

from .lab import DATA, loaded, rel, sample, snr, twin

HERE = Path(__file__).resolve().parent
# TRITON_INTERPRET is read when kernels are defined, so it needs a process of its own.
SCRIPT = """
import sys, tempfile
host, here, file, steps, out = sys.argv[1:]
sys.path[:0] = [host, here]
base = tempfile.TemporaryDirectory()
sys.argv = ["main.py", "--cpu", "--base-directory", base.name]
import comfy.options
comfy.options.enable_args_parsing()
import torch
import lab
from pathlib import Path
from tonfa.kernels.targets import triton_reason
assert triton_reason("cpu") is None, triton_reason("cpu")
torch.save(lab.sample(lab.loaded(Path(file), "exact"), steps=int(steps)), out)
"""


def interpreted(file: Path, steps: int, out: Path) -> torch.Tensor:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", SCRIPT, str(find_comfyui()), str(HERE), str(file), str(steps), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "steps", "least"), [("mini_flux_int4", 8, 17), ("mini_flux_nvfp4", 2, 24)])
def test_kernels_come_as_close_to_the_dense_model_as_the_oracle(name, steps, least, tmp_path):
    file = DATA / f"{name}.safetensors"
    wanted, oracle = sample(twin(file), steps=steps), sample(loaded(file, "exact"), steps=steps)
    kernels = interpreted(file, steps, tmp_path / "latent.pt")
    found = [snr(kernels, wanted), snr(oracle, wanted)]
    print(f"SNR {name} exact: kernels {found[0]:.1f} dB, oracle {found[1]:.1f}, between them {snr(kernels, oracle):.1f}")
    assert found[0] >= least
    assert abs(found[0] - found[1]) <= 3
    assert rel(kernels, oracle) > 0, "the kernels did not run: not a bit differs from the oracle"
