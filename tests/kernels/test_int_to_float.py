"""The two ways from int32 to float32 are the same bits, and the loader's switch chooses between them."""

from __future__ import annotations

import pytest
import torch
from tonfa.kernels.int_to_float import MAGIC, MAGIC_BITS, by_magic, set_mode
from tonfa.kernels.smooth_quantize import smooth_quantize
from tonfa.kernels.w4_matmul_torch import Finish

from .make_layers import packed_view, random_layer

LARGEST = 64 * 127 * 7 * 16  # of a group of 64: activations in 8 bit, weights times 16


@pytest.fixture(autouse=True)
def default():
    yield
    set_mode("enabled")


def test_the_magic_number_converts_every_sum_of_a_group_exactly():
    assert LARGEST < 2**22
    every = torch.cat((torch.arange(-LARGEST, LARGEST + 1, 7), torch.tensor([-LARGEST, -1, 0, 1, LARGEST, 2**22 - 1, 1 - 2**22]))).int()
    assert torch.equal((every + MAGIC_BITS).view(torch.float32) - MAGIC, every.float())
    beyond = torch.tensor([2**23], dtype=torch.int32)
    assert not torch.equal((beyond + MAGIC_BITS).view(torch.float32) - MAGIC, beyond.float())


def test_modes():
    assert not by_magic()
    set_mode("always")
    assert by_magic()
    with pytest.raises(ValueError, match="i2f_mode is 'never', expected one of enabled, always"):
        set_mode("never")
    assert by_magic()
    set_mode("enabled")
    assert not by_magic()


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_kernel_gives_the_same_bits_either_way(interpreter, mode, monkeypatch):
    from tonfa.kernels import w4_matmul_triton as module

    part = packed_view(random_layer("int4", 128, 256, 16), "int8")
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    q, asked, results = smooth_quantize(x, part, mode), [], []
    monkeypatch.setattr(module, "by_magic", lambda: asked.append(by_magic()) or by_magic())
    for chosen in ("enabled", "always"):
        set_mode(chosen)
        results.append(module.w4_matmul_triton(q, part, None, torch.empty(5, 128, dtype=torch.bfloat16), Finish()))
    assert asked == [False, True] and torch.equal(*results) and results[0].abs().max() > 0
