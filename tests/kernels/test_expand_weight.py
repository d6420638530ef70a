"""expand_weight: the oracle against the layer's own codes and scales, the kernel (interpreter) against the oracle, bit for bit."""

from __future__ import annotations

import pytest
import torch
from tonfa.kernels.expand_weight_torch import expand_weight_torch
from tonfa.kernels.layout import code_values

from .make_layers import packed_view, random_layer

E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize("n, k", [(128, 128), (200, 192), (256, 1280)])
def test_int4_codes(interpreter, n, k):
    from tonfa.kernels.expand_weight_triton import expand_weight_triton

    layer = random_layer("int4", n, k)
    view = packed_view(layer, "e4m3")
    want = expand_weight_torch(view, E4M3)
    assert torch.equal(want[:n, :k].float() * 512, code_values(layer.codes, "int4")), "-8 too"
    assert torch.equal(expand_weight_triton(view, E4M3).float(), want.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n, k", [(128, 128), (200, 192)])
def test_nvfp4_values_are_exact(interpreter, n, k, dtype):
    from tonfa.kernels.expand_weight_triton import expand_weight_triton

    layer = random_layer("nvfp4", n, k)
    view = packed_view(layer)
    want = code_values(layer.codes, "nvfp4") * layer.scales.float().repeat_interleave(16, 1)
    oracle = expand_weight_torch(view, dtype)
    assert torch.equal(oracle[:n, :k].float(), want)
    assert torch.equal(expand_weight_triton(view, dtype), oracle)
