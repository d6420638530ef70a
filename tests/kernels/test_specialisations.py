"""How many kernels a model has compiled for it: few, and all of them by the warm-up while the file loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton==3.6.0")

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", ["mini_flux_int4_hd128", "mini_flux_nvfp4"])
def test_a_model_asks_for_few_kernels_whatever_the_size_of_the_picture(name):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "specialisations.py"), str(HERE.parent / "data" / f"{name}.safetensors")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for compute, counts in json.loads(done.stdout.splitlines()[-1]).items():
        warm, sizes, batch = (sum(counts[key].values()) for key in ("warm-up", "all sizes", "batch of 4"))
        assert {"_quantize", "_w4_matmul_wide", "_w4a16_linear", "qk_norm_rope_kernel"} <= set(counts["warm-up"])
        assert 12 <= warm <= 23, f"{compute}: {counts['warm-up']}; with the probe 24 may be compiled for a model"
        assert counts["all sizes"] == counts["warm-up"], f"{compute}: not everything was compiled while the file was loaded"
        assert batch <= sizes + 2, f"{compute}: {counts}"
