"""The two ways from int32 to float32 are the same bits, and the loader's switch chooses between them."""

from __future__ import annotations

import pytest
import torch
from tonfa.kernels import int_to_float
from tonfa.kernels.int_to_float import MAGIC, MAGIC_BITS, by_magic, set_mode
from tonfa.kernels.targets import cuda_target, hip_target

LARGEST = 64 * 127 * 7 * 16  # of a group of 64: activations in 8 bit, weights times 16


@pytest.fixture(autouse=True)
def default(monkeypatch):
    monkeypatch.setattr(int_to_float, "interpreting", lambda: False)
    yield
    set_mode("enabled")


def test_the_magic_number_converts_every_sum_of_a_group_exactly():
    assert LARGEST < 2**22
    every = torch.cat((torch.arange(-LARGEST, LARGEST + 1, 7), torch.tensor([-LARGEST, -1, 0, 1, LARGEST, 2**22 - 1, 1 - 2**22])))
    every = every.int()
    assert torch.equal((every + MAGIC_BITS).view(torch.float32) - MAGIC, every.float())
    beyond = torch.tensor([2**23], dtype=torch.int32)
    assert not torch.equal((beyond + MAGIC_BITS).view(torch.float32) - MAGIC, beyond.float())


def test_modes():
    targets = [cuda_target(75), cuda_target(86), hip_target("gfx1100"), hip_target("gfx942")]
    assert [by_magic(t) for t in targets] == [True, True, False, False]
    set_mode("always")
    assert all(by_magic(t) for t in targets)
    set_mode("enabled")
    assert not by_magic(targets[2])
    with pytest.raises(ValueError, match="i2f_mode is 'never', expected one of enabled, always"):
        set_mode("never")
