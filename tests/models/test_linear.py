"""PackedLinear: every way of calling it against the dense linear it stands for, and against its own parts."""

import contextlib
import copy
import dataclasses

import pytest
import torch
from tonfa.kernels import layout
from tonfa.kernels.norm_modulate import Norm
from tonfa.models import linear as linear_module
from tonfa.models.linear import Ending, PackedLinear, PlainLinear, apply_ending, spec_of
from tonfa.models.lora import Term, make_side
from tonfa.models.runtime import Runtime
from torch.nn import functional as F

TOLERANCE = {"weight_only": 1e-5, "exact": 0.25, "fast": 0.05}  # random codes on Gaussian input; what 4 and 8 bits may cost


def layer(n, k, rank=16, seed=0, unsigned=False, smooth=None, precision="int4"):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
    group = 64 if precision == "int4" else 16
    scales = torch.rand(n, k // group, generator=g) * 0.02 + 0.01
    scales = scales.to(torch.bfloat16) if precision == "int4" else (scales * 100).to(torch.float8_e4m3fn)
    if smooth is None:
        smooth = (torch.rand(k, generator=g) + 0.5).to(torch.bfloat16)
    low = {"down": (torch.randn(rank, k, generator=g) * 0.05).bfloat16(), "up": (torch.randn(n, rank, generator=g) * 0.2).bfloat16()}
    channel = torch.rand(n, generator=g) * 0.02 + 0.005 if precision == "nvfp4" else None
    bias = torch.randn(n, generator=g).bfloat16()
    return layout.LogicalLinear(precision, codes, scales, smooth=smooth, bias=bias, act_unsigned=unsigned, channel_scale=channel, **low)


def module(parts, out_features, in_features, bias, code_form="int8", paired=False):
    spec = layout.plan(out_features, in_features, parts, code_form, paired)
    return PackedLinear(spec, layout.pack(spec, [p for p, _, _ in parts]), bias, Runtime())


def single(n=256, k=128, code_form="int8", paired=False, **kw):
    part = layer(n, k, **kw)
    return module([(part, 0, 0)], n, k, part.bias, code_form, paired), layout.dense_weight(part), layout.dense_bias(part)


def relative(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


def gelu_like(*shape):
    return F.gelu(torch.randn(*shape, generator=torch.Generator().manual_seed(3)), approximate="tanh")


@pytest.mark.parametrize("mode", TOLERANCE)
@pytest.mark.parametrize("code_form", ["int8", "e4m3"])
@pytest.mark.parametrize("kw", [{}, {"unsigned": True}, {"precision": "nvfp4"}, {"n": 200, "k": 192}])
def test_is_the_dense_linear(mode, code_form, kw):
    m, weight, bias = single(code_form=code_form, **kw)
    x = gelu_like(2, 9, m.in_features) if kw.get("unsigned") else torch.randn(2, 9, m.in_features)
    assert relative(m(x, mode), F.linear(x, weight, bias)) < TOLERANCE[mode]


@pytest.mark.parametrize("mode", TOLERANCE)
@pytest.mark.parametrize("equal_smooth", [True, False])
def test_linear1_of_two_layers(mode, equal_smooth):
    a = layer(384, 128, seed=1)
    b = layer(512, 128, rank=32, seed=2, smooth=a.smooth if equal_smooth else None)
    parts = [(layout.stack_rows(a, b), 0, 0)] if equal_smooth else [(a, 0, 0), (b, 384, 0)]
    m = module(parts, 896, 128, torch.cat((a.bias, b.bias)))
    x = torch.randn(1, 7, 128)
    want = torch.cat([F.linear(x, layout.dense_weight(p), p.bias.float()) for p in (a, b)], -1)
    assert relative(m(x, mode), want) < TOLERANCE[mode]
    ended = m.run(x, mode, ending=Ending(gelu_from=384))
    assert relative(ended[..., :384], want[..., :384]) < TOLERANCE[mode]
    assert relative(ended[..., 384:], F.gelu(m(x, mode)[..., 384:], approximate="tanh")) < 1e-5


@pytest.mark.parametrize("mode", TOLERANCE)
def test_linear2_of_a_signed_and_an_unsigned_part(mode):
    a, b = layer(128, 128, seed=1), layer(128, 512, seed=2, unsigned=True)
    m = module([(a, 0, 0), (b, 0, 128)], 128, 640, b.bias)
    attn, h = torch.randn(2, 5, 128), gelu_like(2, 5, 512)
    want = F.linear(attn, layout.dense_weight(a)) + F.linear(h, layout.dense_weight(b), layout.dense_bias(b))
    assert relative(m(torch.cat((attn, h), -1), mode), want) < TOLERANCE[mode]
    assert relative(m.run([attn, h], mode), want) < TOLERANCE[mode]


@pytest.mark.parametrize("mode", TOLERANCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_neighbours_fused_equal_the_same_steps_apart(mode, dtype):
    m, _, _ = single(n=256, k=128)
    g = torch.Generator().manual_seed(5)
    x, residual = torch.randn(2, 6, 128, generator=g).to(dtype), torch.randn(2, 6, 256, generator=g).to(dtype)
    shift, scale, gate = (torch.randn(2, n, generator=g).to(dtype) for n in (128, 128, 256))
    normed = (F.layer_norm(x.float(), (128,), eps=1e-6) * (1 + scale[:, None].float()) + shift[:, None].float()).to(dtype)
    want = torch.addcmul(residual, m(normed, mode), gate[:, None])
    got = m.run(x, mode, norm=Norm(shift, scale, 6), ending=Ending(gate=gate, residual=residual))
    assert got.dtype == dtype
    assert relative(got, want) < (1e-5 if dtype == torch.float32 else 3e-3) * (3 if mode == "exact" else 1)


@pytest.mark.parametrize("mode", TOLERANCE)
def test_writes_where_it_is_told(mode):
    m, _, _ = single(n=128, k=128)
    for batch in (1, 2):
        x = torch.randn(batch, 5, 128)
        whole = torch.full((batch, 9, 200), 7.0)
        m.run(x, mode, out=whole[:, 2:7, :128])
        assert relative(whole[:, 2:7, :128], m.run(x, mode)) < 1e-6
        assert (whole[:, :2] == 7).all() and (whole[:, 7:] == 7).all() and (whole[..., 128:] == 7).all()


@pytest.mark.parametrize("mode", TOLERANCE)
def test_side_branches_are_added_before_the_ending(mode):
    m, _, _ = single(n=128, k=128)
    x = torch.randn(1, 5, 128)
    down, up, delta = torch.randn(4, 128) * 0.2, torch.randn(128, 4) * 0.2, torch.randn(128, 128) * 0.02
    want = F.gelu(m(x, mode) + F.linear(F.linear(x, down), up) + F.linear(x, delta), approximate="tanh")
    m.set_side(make_side(m.spec, [Term(up, down)], delta, x.device, x.dtype))
    assert sum(t.nbytes for t in m.side_tensors()) == (16 * 128 * 2 + 128 * 128) * 4
    assert relative(m.run(x, mode, ending=Ending(gelu_from=0)), want) < 1e-5
    m.set_side(None)
    assert not m.side_tensors()


def test_a_forward_that_the_host_wrapped_is_called():
    """Bypass LoRA puts its own `forward` on the module: whatever the block asks for, it takes part in."""
    m, _, _ = single(n=128, k=128)
    x, own = torch.randn(1, 5, 128), m.forward
    want = F.gelu(m(x, "fast") * 2, approximate="tanh")
    m.forward = lambda x, *args, **kwargs: own(x, *args, **kwargs) * 2
    out = torch.zeros(1, 5, 128)
    assert m.run(x, "fast", ending=Ending(gelu_from=0), out=out) is out and relative(out, want) < 1e-6
    del m.forward
    assert relative(m.run(x, "fast"), own(x, "fast")) == 0


@pytest.mark.parametrize("mode", TOLERANCE)
def test_float16_compute_takes_a_bias_that_float16_cannot_hold(mode):
    """bias 1e5 with a product of about -5e4: the sum fits float16, the bias alone does not."""
    part = layer(128, 128)
    bias = part.bias.clone()
    bias[3] = 1e5
    m = module([(part, 0, 0)], 128, 128, bias)
    x = -5e4 * layout.dense_weight(part)[3] / layout.dense_weight(part)[3].square().sum()
    x = x[None].half()
    want = F.linear(x.float(), layout.dense_weight(part), bias.float())
    assert abs(want[0, 3]) < 65504
    assert relative(m(x, mode)[:, 3], want[:, 3]) < 0.2


def test_float16_compute_takes_weights_that_float16_cannot_hold():
    part = layer(128, 128)
    part = dataclasses.replace(part, scales=part.scales * 1e6)
    m = module([(part, 0, 0)], 128, 128, None)
    x = torch.randn(4, 128).mul(1e-4).half()
    assert layout.dense_weight(part).abs().max() > 65504
    assert relative(m(x, "weight_only"), F.linear(x.float(), layout.dense_weight(part))) < 1e-3
    plain = PlainLinear(torch.full((8, 4), 1e5, dtype=torch.bfloat16), torch.full((8,), -1e5, dtype=torch.bfloat16), Runtime())
    assert torch.allclose(plain(torch.full((1, 4), 0.26).half()).float(), torch.full((1, 8), 4000.0), rtol=0.1)


def test_unsigned_layer_without_a_bias():
    part = dataclasses.replace(layer(128, 128, unsigned=True), bias=None)
    m = module([(part, 0, 0)], 128, 128, None)
    x = gelu_like(6, 128)
    want = F.linear(x, layout.dense_weight(part), layout.dense_bias(part))
    assert relative(m(x, "weight_only"), want) < 1e-5 and relative(m(x, "fast"), want) < 0.05


def test_what_the_host_asks_of_a_leaf():
    m, weight, bias = single(unsigned=True)
    assert m.comfy_cast_weights is False and m.weight_function == [] and m.bias_function == []
    assert m.weight.dtype == torch.uint8 and m.weight.ndim == 1 and sorted(m.state_dict()) == ["bias", "weight"]
    assert torch.equal(m.convert_weight(m.weight.float()), weight), "the host casts bytes to float before it converts"
    dense, dense_bias = m.dense()
    assert torch.equal(dense, weight) and torch.allclose(dense_bias, bias)
    with pytest.raises(RuntimeError, match="cannot be overwritten"):
        m.set_weight(weight)


@pytest.mark.parametrize("mode", TOLERANCE)
@pytest.mark.parametrize("code_form", ["int8", "e4m3"])
@pytest.mark.parametrize("kw", [{}, {"precision": "nvfp4"}, {"n": 208, "k": 192}])
def test_a_linear_stored_in_pairs_is_the_dense_linear_and_ends_in_swiglu(mode, code_form, kw):
    m, weight, bias = single(code_form=code_form, paired=True, **kw)
    x = torch.randn(2, 9, m.in_features)
    y = m(x, mode)
    assert relative(y, F.linear(x, weight, bias)) < TOLERANCE[mode]
    assert torch.equal(m.dense()[0], weight) and torch.equal(m.convert_weight(m.weight.float()), weight)
    h, half = m.run(x, mode, ending=Ending(swiglu=True)), m.out_features // 2
    assert h.shape == (2, 9, half) and relative(h, y[..., :half] * F.silu(y[..., half:])) < 1e-6
    for dtype in (torch.bfloat16, torch.float16):
        ended = m.run(x.to(dtype), mode, ending=Ending(swiglu=True))
        assert torch.equal(ended, apply_ending(m.run(x.to(dtype), mode), Ending(swiglu=True)))
    for batch in (1, 2):
        whole = torch.full((batch, 12, half + 5), 7.0)
        m.run(x[:batch], mode, ending=Ending(swiglu=True), out=whole[:, 2:11, :half])
        assert relative(whole[:, 2:11, :half], h[:batch]) < 1e-6
        assert (whole[:, :2] == 7).all() and (whole[:, 11:] == 7).all() and (whole[..., half:] == 7).all()


@pytest.mark.parametrize("mode", TOLERANCE)
@pytest.mark.parametrize("dense_delta", [False, True])
def test_side_branches_of_a_linear_stored_in_pairs(mode, dense_delta):
    """LoRA on the gates alone, on all of it, and a dense delta: before the ending, in the order of the outputs."""
    m, _, _ = single(paired=True)
    x = torch.randn(1, 5, 128)
    gates, whole = (torch.randn(4, 128) * 0.2, torch.randn(128, 4) * 0.2), (torch.randn(8, 128) * 0.2, torch.randn(256, 8) * 0.2)
    delta = torch.randn(256, 128) * 0.02 if dense_delta else torch.zeros(256, 128)
    want = m(x, mode) + F.linear(F.linear(x, whole[0]), whole[1]) + F.linear(x, delta)
    want[..., 128:] += F.linear(F.linear(x, gates[0]), gates[1])
    terms = [Term(gates[1], gates[0], row=128), Term(whole[1], whole[0])]
    m.set_side(make_side(m.spec, terms, delta if dense_delta else None, x.device, x.dtype))
    assert relative(m(x, mode), want) < 1e-5
    assert relative(m.run(x, mode, ending=Ending(swiglu=True)), want[..., :128] * F.silu(want[..., 128:])) < 1e-5


def test_a_wrapped_forward_of_a_linear_stored_in_pairs():
    m, _, _ = single(paired=True)
    x, own = torch.randn(1, 5, 128), m.forward
    want = apply_ending(m(x, "fast") + torch.arange(256) / 100, Ending(swiglu=True))
    m.forward = lambda x, *args, **kwargs: own(x, *args, **kwargs) + torch.arange(256) / 100
    assert relative(m.run(x, "fast", ending=Ending(swiglu=True)), want) < 1e-6


def test_plain_linear_ends_in_swiglu():
    m = PlainLinear(torch.randn(64, 32), torch.randn(64), Runtime())
    y = m(torch.ones(2, 5, 32))
    assert torch.equal(m.run(torch.ones(2, 5, 32), "exact", ending=Ending(swiglu=True)), y[..., :32] * F.silu(y[..., 32:]))


def test_float16_results_of_swiglu_saturate():
    """An infinity in the linear's own result, as its largest number; a gate far below 0 leaves nothing."""
    y = torch.tensor([[[torch.inf, 300.0, -torch.inf, 5.0, 1000.0, 20.0, 3.0, -torch.inf]]]).half()
    assert apply_ending(y, Ending(swiglu=True)).flatten().tolist() == [65504.0, 6000.0, -65504.0, 0.0]


def test_plain_linear_has_the_same_calling_form():
    m = PlainLinear(torch.randn(64, 32), torch.randn(64), Runtime())
    x, shift, scale = torch.randn(2, 5, 32), torch.randn(2, 32), torch.randn(2, 32)
    normed = F.layer_norm(x, (32,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    got = m.run(x, "exact", norm=Norm(shift, scale, 5), ending=Ending(gelu_from=16))
    want = F.linear(normed, m.weight, m.bias)
    want = torch.cat((want[..., :16], F.gelu(want[..., 16:], approximate="tanh")), -1)
    assert relative(got, want) < 1e-5
    assert relative(m.run([x[..., :10], x[..., 10:]], "fast"), F.linear(x, m.weight, m.bias)) < 1e-6


def other_weight(m, seed=7):
    """Another blob of the module's own layout."""
    return layout.pack(m.spec, [layer(m.out_features, m.in_features, seed=seed)])


def test_views_are_made_once_for_a_weight_that_stays():
    m, _, _ = single()
    x = torch.randn(3, 128)
    m(x, "fast")
    kept = m._views
    m(x, "fast")
    assert m._views is kept and kept[1][0].codes.untyped_storage().data_ptr() == m.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("how", ["data", "parameter", "in place", "move"])
def test_a_weight_that_changes_is_seen(how):
    m, _, _ = single()
    x = torch.randn(3, 128)
    m(x, "fast")
    other = other_weight(m)
    want = module([(layer(256, 128, seed=7), 0, 0)], 256, 128, m.bias)(x, "fast")
    if how == "data":
        m.weight.data = other
    elif how == "parameter":
        m.weight = torch.nn.Parameter(other, requires_grad=False)
    elif how == "in place":
        m.weight.copy_(other)
    else:
        m._apply(lambda t: other.clone() if t.dtype == torch.uint8 else t.clone())
    assert torch.equal(m(x, "fast"), want)


def test_nothing_holds_on_to_a_weight_that_was_moved():
    m, _, _ = single()
    m(torch.randn(3, 128), "fast")
    assert m._views is not None
    m.to("meta")
    assert m._views is None


def test_a_copy_has_its_own_views():
    m, _, _ = single()
    x = torch.randn(3, 128)
    want = m(x, "fast")
    twin = copy.deepcopy(m)
    assert twin._views is None
    m.weight.zero_()
    assert torch.equal(twin(x, "fast"), want)


def test_streamed_weights_share_a_buffer_without_mixing():
    """A host that brings every weight through one buffer: what lies in it now counts."""
    a, b = single(seed=1)[0], single(seed=2)[0]
    x = torch.randn(3, 128)
    want = [m(x, "fast") for m in (a, b)]
    buffer = torch.empty_like(a.weight.data)

    @contextlib.contextmanager
    def acquire(m, device):
        buffer.copy_(m.weight)
        yield buffer, m.bias

    for m in (a, b):
        m.runtime = dataclasses.replace(m.runtime, acquire=acquire)
    assert all(torch.equal(m(x, "fast"), w) for m, w in [(a, want[0]), (b, want[1]), (a, want[0])])


def test_equal_layouts_have_one_handle():
    a, b, c = single(seed=1)[0], single(seed=2)[0], single(n=128)[0]
    assert a.handle == b.handle != c.handle
    assert spec_of(a.handle) == a.spec and spec_of(c.handle) == c.spec


def modulation(n=384, k=128):
    g = torch.Generator().manual_seed(0)
    codes, scales = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8), (torch.rand(n, k // 64, generator=g) * 0.02).bfloat16()
    part = layout.LogicalLinear("w4a16", codes, scales, zeros=-7 * scales, bias=torch.randn(n, generator=g))
    return module([(part, 0, 0)], n, k, part.bias)


@pytest.mark.parametrize("how", ["packed", "columns", "delta", "wrapped", "plain"])
def test_some_outputs_of_a_modulation(how):
    m, x = modulation(), torch.randn(2, 1, 128)
    if how in ("columns", "delta"):
        term = Term(torch.randn(384, 4), torch.randn(4, 128), 0)
        delta = torch.randn(384, 128) if how == "delta" else None
        m.set_side(make_side(m.spec, [term], delta, torch.device("cpu"), torch.float32))
    if how == "plain":
        m = PlainLinear(torch.randn(384, 128), torch.randn(384), Runtime())
    if how == "wrapped":
        stock = m.forward
        m.forward = lambda x: stock(x) * 2
    rows = range(128, 384)
    torch.testing.assert_close(m.outputs(x, rows), m.forward(x)[..., 128:], rtol=1e-5, atol=1e-5)
    assert m.outputs(x, rows).shape == (2, 1, 256)


def test_what_is_unpacked_before_its_turn(monkeypatch):
    """Every part, in the form for these tokens, and handed on to the product of that part; nothing where the kernels do not take it all."""
    asked, used = [], []
    monkeypatch.setattr("tonfa.models.linear.unpack_for", lambda part, mode, rows, dtype: asked.append((part, mode, rows, dtype)) or part)
    product = linear_module.w4_matmul

    def multiply(q, part, bias, y, finish, weight):
        used.append((part, weight))
        return product(q, part, bias, y, finish)

    monkeypatch.setattr(linear_module, "w4_matmul", multiply)
    a, b = layer(128, 128), layer(128, 256, seed=1, unsigned=True)
    m = module([(a, 0, 0), (b, 0, 128)], 128, 384, a.bias)
    weights = m.unpack(9, "fast", torch.bfloat16)
    assert [call[1:] for call in asked] == [("fast", 9, torch.bfloat16)] * 2 and len(weights) == 2
    m.run(torch.randn(1, 9, 384), "fast", weights=weights)
    assert len(used) == 2 and all(part is weight for part, weight in used)
    assert m.unpack(9, "weight_only", torch.bfloat16) is None and modulation().unpack(9, "fast", torch.bfloat16) is None
    m.runtime = dataclasses.replace(m.runtime, held=lambda leaf, device: None)
    assert m.unpack(9, "fast", torch.bfloat16) is None
    m.runtime = Runtime()
    m.set_side(make_side(m.spec, [], torch.zeros(128, 384), torch.device("cpu"), torch.float32))
    assert m.unpack(9, "fast", torch.bfloat16) is None
    m.set_side(None)
    assert m.unpack(9, "fast", torch.bfloat16) is not None
    m.forward = m.forward
    assert m.unpack(9, "fast", torch.bfloat16) is None
    assert PlainLinear(torch.randn(128, 128), None, Runtime()).unpack(9, "fast", torch.bfloat16) is None
