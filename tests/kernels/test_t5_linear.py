"""t5_linear: packed bytes, the oracle against the golden layer and fp64, the kernels (interpreter) against the oracle, compiled code."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tonfa.kernels import t5_layout
from tonfa.kernels.t5_layout import T5Linear, T5View, pack, read_spec, unpack, views
from tonfa.kernels.t5_linear import t5_linear
from tonfa.kernels.t5_linear_torch import t5_linear_torch, t5_weight

from .conftest import HAS_TRITON

GOLDEN = Path(__file__).parents[1] / "data" / "awq_t5_128x512.safetensors"
SHORT = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-6}  # rounding of one result, relative


@pytest.fixture
def kernels(interpreter, monkeypatch):
    """The module of Triton kernels, made for the interpreter (conftest.py does that for those it knows)."""
    return importlib.import_module("tonfa.kernels.t5_linear_triton")


def random_linear(n: int, k: int, dtype: torch.dtype = torch.float16) -> T5Linear:
    g = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
    scales = torch.rand(n, k // 128, generator=g) * 0.01 + 0.002
    zeros = -scales * (torch.rand(n, k // 128, generator=g) * 4 + 5.5)
    return T5Linear(codes, scales.to(dtype), zeros.to(dtype))


def viewed(layer: T5Linear) -> T5View:
    blob = pack(layer)
    return views(read_spec(blob), blob)


def dense(layer: T5Linear) -> torch.Tensor:
    """fp64 [N, K], written without the functions under test."""
    scale, zero = layer.scales.double().repeat_interleave(128, 1), layer.zeros.double().repeat_interleave(128, 1)
    return layer.codes.double() * scale + zero


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# -- bytes --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "dtype"), [(4, 128, torch.float16), (132, 384, torch.bfloat16), (256, 640, torch.float16)])
def test_bytes_and_back(n, k, dtype):
    layer = random_linear(n, k, dtype)
    blob = pack(layer)
    spec = read_spec(blob)
    assert (spec.n, spec.k, spec.scale_dtype, spec.nbytes) == (n, k, dtype, blob.numel())
    assert all(field.offset % 256 == 0 for field in spec.fields.values())
    back = unpack(views(spec, blob))
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(back, name), getattr(layer, name))
    at = spec.fields["codes"].offset + 3 * (k // 2) + (k // 128 - 1) * 64 + 5  # row 3, last slice, byte 5
    assert blob[at] == layer.codes[3, k - 123] | (layer.codes[3, k - 59] << 4)


def test_t5_xxl_takes_half_a_byte_a_weight_and_its_scales():
    for n, k in ((4096, 4096), (10240, 4096), (4096, 10240)):
        assert t5_layout.T5Spec(n, k, torch.float16).nbytes == 256 + n * k // 2 + n * k // 128 * 4


def test_misfits_are_refused():
    layer = random_linear(8, 256)
    with pytest.raises(ValueError, match="multiples of 4"):
        T5Linear(layer.codes[:6], layer.scales[:6], layer.zeros[:6])
    with pytest.raises(ValueError, match="scales and zeros alike"):
        T5Linear(layer.codes, layer.scales, layer.zeros.bfloat16())
    with pytest.raises(ValueError, match=r"zeros have shape \[8, 1\]"):
        T5Linear(layer.codes, layer.scales, layer.zeros[:, :1])
    blob = pack(layer)
    with pytest.raises(ValueError, match="no packed T5 linear"):
        read_spec(blob[8:])
    with pytest.raises(ValueError, match="expected"):
        read_spec(blob[:-256])
    old = blob.clone()
    old[8] = 99
    with pytest.raises(ValueError, match="load its file again"):
        read_spec(old)
    view = viewed(layer)
    with pytest.raises(ValueError, match=r"expected \[M, 256\]"):
        t5_linear(torch.zeros(1, 128), view)
    with pytest.raises(ValueError, match="expected float16"):
        t5_linear(torch.zeros(1, 256, dtype=torch.int32), view)
    with pytest.raises(ValueError, match=r"expected \[8\]"):
        t5_linear(torch.zeros(1, 256), view, torch.zeros(4))


# -- results ------------------------------------------------------------------------------------------------------------------------


def golden() -> tuple[T5Linear, torch.Tensor]:
    t = load_file(GOLDEN)
    groups = t["logical.codes"].shape[1] // 128
    return T5Linear(t["logical.codes"], t["packed.scales"][:groups].t(), t["packed.scaled_zeros"][:groups].t()), t["expected.w_dequant"]


def test_golden_weight():
    layer, weight = golden()
    torch.testing.assert_close(t5_weight(viewed(layer), 0, layer.n), weight, rtol=2e-3, atol=2e-4)  # theirs has unrounded zeros
    assert torch.equal(t5_weight(viewed(layer), 0, layer.n).double(), dense(layer).float().double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 128, 512), (2, 132, 384), (5, 64, 1024), (8, 36, 128), (9, 132, 384), (70, 260, 640)])
def test_kernels_oracle_and_formula_agree(kernels, rows, n, k, dtype):
    layer = random_linear(n, k, torch.bfloat16 if rows == 2 else torch.float16)
    view, g = viewed(layer), torch.Generator().manual_seed(rows)
    x, bias = torch.randn(rows, k, generator=g).to(dtype), torch.randn(n, generator=g).to(dtype)
    formula = x.double() @ dense(layer).t()
    oracle = t5_linear_torch(x, view, bias)
    got = t5_linear(x, view, bias)
    assert got.dtype == oracle.dtype == dtype and got.shape == (rows, n)
    assert relative(oracle, formula + bias.double()) < SHORT[dtype]
    assert relative(got, formula + bias.double()) < 2 * SHORT[dtype]  # many tokens: the weight is rounded too
    assert relative(t5_linear(x, view), formula) < 2 * SHORT[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_unpacked_weight_is_the_oracles_bits(kernels, dtype):
    view, x = viewed(random_linear(148, 384)), torch.randn(12, 384).to(dtype)
    same, weight, unit = kernels.operands(x, view)
    assert same is x and unit is None and torch.equal(weight, t5_weight(view, 0, 148, dtype))


def test_one_launch_halves_x_and_unpacks_the_weight(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "has_wide_product", lambda device: True)
    view, x = viewed(random_linear(148, 384)), torch.randn(12, 384, generator=torch.Generator().manual_seed(0))
    half, weight, unit = kernels.operands(x, view)
    assert half.dtype == weight.dtype == torch.float16 and torch.equal(weight, t5_weight(view, 0, 148, torch.float16))
    largest = half.float().abs().amax(1)
    assert ((largest >= 2**14) & (largest <= 2**15)).all() and torch.equal(torch.log2(unit), torch.log2(unit).round())
    torch.testing.assert_close(half.float() * unit, x, rtol=2**-11, atol=0)


@pytest.mark.parametrize("largest", [1.0, 3e5, 1e30, 1e-20, 1e-30])
def test_fp32_activations_beyond_fp16(kernels, monkeypatch, largest):
    """As on a GPU: fp16 with a power of two a row, multiplied into fp32 (which torch does on CUDA only)."""
    monkeypatch.setattr(kernels, "has_wide_product", lambda device: True)
    monkeypatch.setattr(kernels, "wide_product", lambda x, weight: x.float() @ weight.float().t())
    layer, x = random_linear(132, 384), torch.randn(20, 384, generator=torch.Generator().manual_seed(0))
    x[3] *= 1e-4
    x[4] = 0
    x = x / x.abs().max() * largest
    y, want = t5_linear(x, viewed(layer)), x.double() @ dense(layer).t()
    assert y.dtype == torch.float32 and torch.isfinite(y).all() and (y[4] == 0).all()
    assert max(relative(y[i], want[i]) for i in range(20) if i != 4) < 1e-3


def test_what_is_not_finite_stays_so(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "has_wide_product", lambda device: True)
    monkeypatch.setattr(kernels, "wide_product", lambda x, weight: x.float() @ weight.float().t())
    x = torch.ones(12, 128)
    x[1, 5], x[2, 7] = float("inf"), float("nan")
    y = t5_linear(x, viewed(random_linear(8, 128)))
    assert not torch.isfinite(y[1:3]).any() and torch.isfinite(y[3:]).all() and torch.isfinite(y[0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_autocast_changes_nothing(kernels, dtype):
    view, x = viewed(random_linear(64, 256)), torch.randn(12, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    for linear in (t5_linear, t5_linear_torch):
        want = linear(x, view)
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(x, view)
        assert y.dtype == dtype and torch.equal(y, want)


@pytest.mark.parametrize("rows", [3, 12])
def test_strided_input_and_no_rows(kernels, rows):
    view = viewed(random_linear(128, 128))
    x = torch.randn(128, 2 * rows, generator=torch.Generator().manual_seed(0)).t()[::2]
    torch.testing.assert_close(t5_linear(x, view), t5_linear_torch(x.contiguous(), view), rtol=1e-5, atol=1e-5)
    assert t5_linear(x[:0], view).shape == (0, 128)


def test_rounding_the_weight_costs_little_beside_the_codes():
    """The numbers in t5_linear_triton.py: the error of y by 4-bit codes, alone and with a weight and activations of 16 bits."""
    g = torch.Generator().manual_seed(0)
    layer, x = random_linear(256, 4096), torch.randn(64, 4096, generator=g)
    weight = dense(layer)
    want = x.double() @ weight.t()
    errors = {d: relative(x.to(d).double() @ weight.to(d).double().t(), want) for d in (torch.float16, torch.bfloat16)}
    assert 2e-4 < errors[torch.float16] < 3.5e-4 and 1.8e-3 < errors[torch.bfloat16] < 2.8e-3, errors


# -- compiled code ------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: pip install triton==3.6.0")
def test_kernels_compile_well(tmp_path):
    """For GPUs that are not here: no spills, shared memory that fits, and 16-bit weights that leave in stores of 16 bytes.

    A row's maximum goes from warp to warp through 16 bytes of shared memory, codes through none.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    names = ("sm_75", "sm_80", "sm_89", "sm_90", "sm_120", "gfx942")
    script = Path(__file__).with_name("t5_compile_targets.py")
    done = subprocess.run([sys.executable, str(script), *names], env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 6 * len(names)
    for row in rows:
        label = f"{row['target']} {row['kernel']}"
        assert row["error"] is None, f"{label}: {row['error']}"
        assert row["missing"] == [] and row["spilled"] == 0 and row["shared"] <= row["limit"], f"{label}: {row}"
        assert row["shared"] <= 16 or "operands" not in label or "float32" in label, f"{label}: codes change hands through shared memory"
