"""Attention: exact whatever the back end, which is chosen once a shape and given up where it fails."""

import logging

import pytest
import torch
from tonfa.kernels.targets import cuda_target, hip_target
from tonfa.models import attention
from tonfa.models.runtime import Runtime, apply_rope, own_tensors
from torch.nn import functional as F


def heads(batch=2, length=7, dim=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, 3, dim, generator=g).to(dtype).transpose(1, 2) for _ in range(3)]


def formula(q, k, v, mask=None):
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.double()
    return (scores.softmax(-1) @ v.double()).transpose(1, 2).flatten(2)


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def masks():
    g = torch.Generator().manual_seed(1)
    looks = torch.rand(2, 1, 7, 7, generator=g) > 0.4
    looks[..., 0] = True
    bias = torch.randn(2, 7, 7, generator=g)
    return {"none": None, "boolean": looks, "[L, L]": bias[0], "[B, L, L]": bias, "[B, 1, L, L]": bias[:, None]}


@pytest.fixture
def fresh(monkeypatch):
    """No shape has been asked about."""
    monkeypatch.setattr(attention, "_takes", {})
    attention._tell.cache_clear()


@pytest.fixture
def cudnn(fresh, monkeypatch):
    """A GPU that prefers cuDNN, as far as a CPU can play one: what was asked, and what was called."""
    asked, called = [], []
    monkeypatch.setattr(attention, "cudnn_takes", lambda q, k, v, mask: asked.append(q.shape) or True)

    def operator(q, k, v, mask):
        called.append(q.shape)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attention.added(mask, q.dtype))

    monkeypatch.setattr(attention, "cudnn_operator", operator)
    return asked, called


@pytest.mark.parametrize("name", masks())
def test_attend_is_the_formula(fresh, name):
    q, k, v = heads()
    mask = masks()[name]
    wide = mask if mask is None or mask.ndim == 4 else mask.expand(2, 7, 7)[:, None]
    assert relative(attention.attend(q, k, v, 3, mask), formula(q, k, v, wide)) < 1e-6


@pytest.mark.parametrize("name", masks())
def test_cudnn_is_asked_once_a_shape_and_given_every_mask(cudnn, caplog, name):
    asked, called = cudnn
    q, k, v = heads()
    mask = masks()[name]
    wide = mask if mask is None or mask.ndim == 4 else mask.expand(2, 7, 7)[:, None]
    with caplog.at_level(logging.INFO, attention.log.name):
        for seed in range(3):
            q, k, v = heads(seed=seed)
            assert relative(attention.attend(q, k, v, 3, mask), formula(q, k, v, wide)) < 1e-6
        attention.attend(*heads(length=7, batch=2, seed=9), 3, mask)
    assert len(asked) == 1 and len(called) == 4
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and said[0].endswith("cuDNN.") and ("masked" in said[0]) == (mask is not None)


def test_a_shape_that_cudnn_fails_on_takes_the_default_from_then_on(fresh, monkeypatch, caplog):
    """The real operator, which raises for CPU tensors."""
    tried = []
    operator = attention.cudnn_operator
    monkeypatch.setattr(attention, "cudnn_takes", lambda *a: True)
    monkeypatch.setattr(attention, "cudnn_operator", lambda *a: tried.append(a[0].shape) or operator(*a))
    q, k, v = heads()
    for _ in range(2):
        assert relative(attention.attend(q, k, v, 3), formula(q, k, v)) < 1e-6
    assert len(tried) == 1 and len([r for r in caplog.records if "cuDNN attention fails" in r.getMessage()]) == 1
    attention.attend(*heads(length=5), 3)
    assert len(tried) == 2, "another shape has its own chance"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("CUDA error: an illegal memory access")])
def test_what_says_nothing_about_cudnn_is_raised(cudnn, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(attention, "cudnn_operator", full)
    with pytest.raises(RuntimeError, match=str(error)):
        attention.attend(*heads(), 3)
    assert list(attention._takes.values()) == [True]


def test_training_takes_the_differentiable_one(cudnn):
    q, k, v = heads()
    attention.attend(q.requires_grad_(), k, v, 3).sum().backward()
    assert q.grad is not None and cudnn[1] == []


def test_the_preference_is_by_capability(monkeypatch):
    def preferred(target):
        monkeypatch.setattr(attention, "target_for", lambda device: target)
        return attention.prefers_cudnn(torch.device("cuda", 0))

    assert [preferred(cuda_target(c)) for c in (75, 86, 89, 90, 100, 120)] == [False, False, False, True, True, True]
    assert not preferred(hip_target("gfx942")) and not preferred(hip_target("gfx1201"))
    monkeypatch.undo()
    assert not attention.cudnn_takes(*heads(), None), "a CPU"


def test_what_torch_would_refuse_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(attention, "prefers_cudnn", lambda device: True)
    q, k, v = heads(dtype=torch.bfloat16)
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda parameters, debug: True)
    assert attention.cudnn_takes(q, k, v, None) and attention.cudnn_takes(q, k, v, torch.ones(1, 1, 7, 7, dtype=torch.bool))
    assert not attention.cudnn_takes(q, k, v, torch.zeros(1, 1, 7, 7)), "a mask of another type"
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda parameters, debug: False)
    assert not attention.cudnn_takes(q, k, v, None)


@pytest.fixture
def unfused(monkeypatch):
    """As on a GPU with Triton for which torch has no fused attention; what our kernel was given."""
    given, run = [], attention.attention_fp16
    monkeypatch.setattr(attention, "_takes", {})
    monkeypatch.setattr(attention, "by_kernel", lambda device, dtype, dim: True)
    monkeypatch.setattr(attention, "attention_fp16", lambda *qkv: given.append(qkv[0].shape) or run(*qkv))
    return given


def test_our_kernel_attends_where_torch_has_no_fused_one(unfused):
    q, k, v = heads(dim=32)
    assert relative(attention.attend(q, k, v, 3), formula(q, k, v)) < 1e-3 and unfused == [q.shape]


@pytest.mark.parametrize("name", ["boolean", "[L, L]", "[B, L, L]", "[B, 1, L, L]"])
def test_a_mask_goes_to_torch(unfused, name):
    q, k, v = heads(dim=32)
    mask = masks()[name]
    assert relative(attention.attend(q, k, v, 3, mask), formula(q, k, v, attention.with_heads(mask))) < 1e-6 and unfused == []


def test_flash_attention2_is_never_ours(unfused):
    q, k, v = heads(dim=32)
    options = {"tonfa": {"attention": "flash-attention2"}}
    assert relative(attention.attend(q, k, v, 3, None, options), formula(q, k, v)) < 1e-6 and unfused == []


def test_when_our_kernel_is_taken(monkeypatch, caplog):
    device = torch.device("cuda", 0)
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(attention, "triton_reason", lambda device: None)
    monkeypatch.setattr(attention.torch, "empty", lambda *shape, dtype, device: torch.zeros(*shape, dtype=dtype))
    for fuses in (True, False):
        attention.by_kernel.cache_clear()
        monkeypatch.setattr(attention, "torch_fuses", lambda x, fuses=fuses: fuses)
        assert attention.by_kernel(device, torch.bfloat16, 128) != fuses
    assert attention.by_kernel(device, torch.bfloat16, 128) and caplog.text.count("ours, since torch has no fused one") == 1
    assert not attention.by_kernel(device, torch.bfloat16, 48) and not attention.by_kernel(torch.device("cpu"), torch.bfloat16, 128)
    monkeypatch.setattr(attention, "triton_reason", lambda device: "no compiler")
    attention.by_kernel.cache_clear()
    assert not attention.by_kernel(device, torch.bfloat16, 128)
    attention.by_kernel.cache_clear()


def test_remembered_shapes_are_bounded(cudnn, monkeypatch):
    monkeypatch.setattr(attention, "MOST_SHAPES", 4)
    for length in range(1, 12):
        attention.attend(*heads(length=length), 3)
    assert len(attention._takes) <= 4


def test_attention_turns_q_and_k_before_it_attends():
    q, k, v = heads()
    angle = torch.rand(1, 1, 7, 8, generator=torch.Generator().manual_seed(2)) * 6
    pe = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).unflatten(-1, (2, 2))

    def turned(x):
        z = torch.view_as_complex(x.double().unflatten(-1, (8, 2)).contiguous()) * torch.polar(torch.ones(()).double(), angle.double())
        return torch.view_as_real(z).flatten(-2)

    assert relative(apply_rope(q, pe), turned(q)) < 1e-6
    assert relative(Runtime().attention(q, k, v, 3, pe), formula(turned(q), turned(k), v)) < 1e-6


def test_own_tensors_are_the_modules_own():
    m = torch.nn.Linear(3, 2)
    with own_tensors(m, torch.device("cpu")) as (weight, bias):
        assert weight is m.weight and bias is m.bias
    with own_tensors(m, torch.device("meta")) as (weight, _):
        assert weight.device.type == "meta" and m.weight.device.type == "cpu"
