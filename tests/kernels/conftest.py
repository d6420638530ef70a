"""Kernel tests run the Triton kernels in Triton's interpreter, on CPU tensors.

The interpreter is chosen when a kernel is defined, so the variable is set while the kernel modules are imported, here, before any test.
It is then taken away again, because the tests of other folders in the same process want the quick torch path; the tests of this
folder get it back one by one.
"""

from __future__ import annotations

import importlib
import os

import pytest

KERNEL_MODULES = (
    "rounding",
    "qk_norm_rope_triton",
    "row_statistics_triton",
    "norm_modulate_triton",
    "norm_gate_triton",
    "smooth_quantize_triton",
    "w4_matmul_triton",
    "expand_weight_triton",
    "w4_matmul_wide",
    "w4a16_linear_triton",
    "t5_linear_triton",
    "attention_fp16_triton",
    "probe_triton",
)


def _import_interpreted() -> bool:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        for name in KERNEL_MODULES:
            importlib.import_module(f"tonfa.kernels.{name}")
    except ImportError:  # no Triton here
        return False
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    return True


HAS_TRITON = _import_interpreted()


@pytest.fixture
def interpreter(monkeypatch):
    """Ask for this to run Triton kernels on CPU tensors."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed: pip install triton==3.6.0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
