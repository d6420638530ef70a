"""kernels/rounding.py: the emulated roundings equal torch's, on every kind of number; the PTX of a division is one."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from tonfa.kernels.targets import cuda_target, hip_target, target_for

tl = pytest.importorskip("triton.language", reason="Triton is not installed: pip install triton==3.6.0")
triton = pytest.importorskip("triton")
rounding = pytest.importorskip("tonfa.kernels.rounding")  # conftest.py has imported it for the interpreter


def numbers() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(3000, generator=g) * torch.exp2(torch.randint(-30, 16, (3000,), generator=g).float())
    ties = torch.arange(-500, 500).float() / 1024  # halfway cases of e4m3 subnormals and of bf16
    exact = torch.tensor([0.0, -0.0, 448.0, -448.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 65504.0])
    x = torch.cat([wide, ties, exact, 1 + ties / 64])
    return torch.nn.functional.pad(x, (0, -len(x) % 1024))


@pytest.fixture
def kernels(interpreter):
    @triton.jit
    def kernel(x, bf16, fp16, byte, value, N: tl.constexpr):
        at = tl.program_id(0) * N + tl.arange(0, N)
        v = tl.load(x + at)
        tl.store(bf16 + at, rounding.storable(v, tl.bfloat16, True))
        tl.store(fp16 + at, rounding.rounded(tl.minimum(tl.maximum(v, -65504.0), 65504.0), tl.float16, True))
        small = tl.minimum(tl.maximum(v, -448.0), 448.0)
        tl.store(byte + at, rounding.e4m3_byte(small, True))
        tl.store(value + at, rounding.e4m3_value(tl.abs(small)))

    return kernel


def test_ptx_for_nvidia_only_and_not_for_the_interpreter(monkeypatch):
    targets = [cuda_target(75), cuda_target(80), cuda_target(90), hip_target("gfx942"), target_for("cpu")]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert [rounding.has_ptx(t) for t in targets] == [True, True, True, False, False]
    assert [rounding.has_pairs(t) for t in targets] == [False, True, True, False, False]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not any(rounding.has_ptx(t) or rounding.has_pairs(t) for t in targets)


def test_emulated_rounding_equals_torch(kernels):
    x = numbers()
    bf16, fp16 = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x)
    byte, value = torch.empty_like(x, dtype=torch.uint8), torch.empty_like(x)
    kernels[(len(x) // 1024,)](x, bf16, fp16, byte, value, N=1024)
    assert torch.equal(bf16, x.bfloat16())
    assert torch.equal(fp16, x.clamp(-65504, 65504).half().float())
    e4m3 = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(byte.view(torch.float8_e4m3fn).float(), e4m3.float())
    assert torch.equal(value, e4m3.float().abs())


def nearest(x: Fraction) -> Fraction:
    """To fp32, for numbers far from its limits: by way of 53 bits unless those are a tie of 24."""
    down = np.float32(float(x))
    near = [np.nextafter(down, np.float32(-np.inf)), down, np.nextafter(down, np.float32(np.inf))]
    return min((Fraction(float(n)) for n in near), key=lambda n: abs(n - x))


def run_ptx(text: str, *operands: Fraction) -> Fraction:
    """What the instructions of `divided` make of $1, $2 and $3, each rounded once."""
    registers = {f"${i + 1}": value for i, value in enumerate(operands)}
    steps = {"mul.rn": lambda a, b: nearest(a * b), "neg": lambda a: -a, "fma.rn": lambda a, b, c: nearest(a * b + c)}
    for name, arguments in re.findall(r"([\w.]+)\.f32 ([^;]+);", text.replace(".reg .f32", "")):
        target, *sources = (a.strip() for a in arguments.split(","))
        registers[target] = steps[name](*(registers[s] for s in sources))
    return registers["$0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ulps", [-1, 0, 1])
def test_a_division_by_product_and_correction_is_to_nearest(dtype, ulps):
    """16-bit numbers, with an inverse that is an ulp off: that is what rcp.approx promises."""
    g = torch.Generator().manual_seed(0)
    a, b = ((torch.rand(400, generator=g) + 1) * 2.0 ** torch.randint(-6, 6, (400,), generator=g) for _ in range(2))
    for x, y in zip(a.to(dtype).tolist(), b.to(dtype).tolist(), strict=True):
        inverse = np.float32(1 / y)
        if ulps:
            inverse = np.nextafter(inverse, np.float32(np.inf * ulps))
        found = run_ptx(rounding._DIVIDED.value, Fraction(x), Fraction(y), Fraction(float(inverse)))
        assert found == nearest(Fraction(x) / Fraction(y)), (x, y)
