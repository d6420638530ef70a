"""smooth_quantize: the oracle against its formulas in fp64, the kernel (interpreter) against the oracle, code for code."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tonfa.kernels.layout import SHIFT
from tonfa.kernels.norm_modulate import Norm, norm_modulate
from tonfa.kernels.smooth_quantize import smooth_quantize
from tonfa.kernels.smooth_quantize_torch import e2m1_round, smooth_quantize_torch
from tonfa.kernels.targets import target_for
from tonfa.kernels.tiles import quantize_tile
from tonfa.kernels.w4_matmul_torch import dequantized_input

from .make_layers import packed_view, random_layer

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def smoothed(x, layer, shift=0.0):
    """v in the compute type, straight from the definition."""
    return ((x.float() + shift) / layer.smooth.float()).to(x.dtype).double()


def values(q, form):
    """Code values of a QuantizedInput as fp64."""
    codes = q.codes.double()
    if q.kind == "int4" and form == "e4m3":
        codes = torch.where(codes >= 128, 128 - codes, codes)
    return q.codes.view(torch.float8_e4m3fn).double() if q.kind == "e4m3" else codes


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("form", ["int8", "e4m3"])
@pytest.mark.parametrize("unsigned", [False, True])
def test_oracle_exact_int4(unsigned, form, dtype):
    torch.manual_seed(0)
    layer = random_layer("int4", 128, 256, act_unsigned=unsigned)
    x = torch.nn.functional.gelu(torch.randn(9, 256)).to(dtype) if unsigned else torch.randn(9, 256).to(dtype)
    q = smooth_quantize_torch(x, packed_view(layer, form), "exact")
    v = smoothed(x, layer, SHIFT if unsigned else 0.0).view(9, 4, 64)
    largest = 15 if unsigned else 7
    scale = v.abs().amax(2) / largest
    torch.testing.assert_close(q.scales.t().double(), scale, rtol=1e-7, atol=0)
    codes = values(q, form).view(9, 4, 64)
    assert codes.min() >= (0 if unsigned else -7) and codes.max() == largest
    assert (codes * scale[:, :, None] - v).abs().amax() <= 0.5 * scale.max() * (1 + 1e-6)
    want = torch.round(v / scale[:, :, None])
    assert (codes == want).double().mean() > 0.999  # fp32 division may tip an exact half
    torch.testing.assert_close(q.lowrank.double(), x.double() @ layer.down.double().t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["int8", "e4m3"])
def test_oracle_fast_int4(form):
    torch.manual_seed(0)
    layer = random_layer("int4", 128, 256, act_unsigned=True)  # and no shift in fast
    x = torch.randn(9, 256).to(BF16)
    q = smooth_quantize_torch(x, packed_view(layer, form), "fast")
    v = smoothed(x, layer)
    if form == "int8":
        groups = v.view(9, 4, 64)
        scale = groups.abs().amax(2) / 127
        torch.testing.assert_close(q.scales.t().double(), scale, rtol=1e-7, atol=0)
        assert (values(q, form).view(9, 4, 64) * scale[:, :, None] - groups).abs().max() <= 0.501 * scale.max()
    else:
        scale = v.abs().amax(1) / 448
        torch.testing.assert_close(q.scales.double(), scale, rtol=1e-7, atol=0)
        assert relative(values(q, form) * scale[:, None], v) < 0.03
        assert values(q, form).abs().max() == 448


def test_oracle_nvfp4():
    torch.manual_seed(0)
    layer = random_layer("nvfp4", 128, 256)
    x = torch.randn(9, 256).to(BF16)
    view = packed_view(layer)
    v = smoothed(x, layer)
    assert torch.equal(smooth_quantize_torch(x, view, "fast").codes.double(), v)
    q = smooth_quantize_torch(x, view, "exact")
    groups = v.view(9, 16, 16)
    scale = (groups.abs().amax(2) / 6).clamp(max=448)
    stored = scale.float().to(torch.float8_e4m3fn).double()
    codes = q.codes.double().view(9, 16, 16) / stored[:, :, None]
    assert torch.isin(codes.abs().float(), E2M1).all(), "codes must be e2m1 numbers times the stored scale, exactly"
    nearest = (groups / scale[:, :, None]).abs()[..., None] - E2M1.double()
    assert ((groups / scale[:, :, None] - codes).abs() <= nearest.abs().amin(-1) + 1e-6).all()


def test_e2m1_ties_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    assert e2m1_round(ties).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert e2m1_round(-ties).tolist() == [0, -1, -1, -2, -2, -4, -4, -6]


@pytest.mark.parametrize("precision, mode", [("int4", "exact"), ("int4", "fast"), ("nvfp4", "fast")])
@pytest.mark.parametrize("form", ["int8", "e4m3"])
def test_fp16_division_beyond_its_range_clips_nothing(interpreter, precision, mode, form):
    """x / smooth up to 1.5e6 from fp16 inputs: the codes must stand for what the same input in fp32 gives, kernel and oracle alike."""
    layer = dataclasses.replace(random_layer(precision, 128, 128), smooth=torch.full((128,), 0.001, dtype=FP16))
    view = packed_view(layer, form)
    x = (torch.randn(3, 128) * 500).to(FP16)
    want = dequantized_input(smooth_quantize_torch(x.float(), view, mode), form)
    assert want.abs().max() > 65504
    for got in (smooth_quantize_torch(x, view, mode), smooth_quantize(x, view, mode)):
        assert (dequantized_input(got, form) - want).norm() / want.norm() < 5e-3


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_fp16_low_rank_pairs_keep_their_bits(interpreter, dtype):
    layer = random_layer("int4", 128, 128)
    g = torch.Generator().manual_seed(9)
    layer = dataclasses.replace(layer, down=torch.randn(32, 128, generator=g).to(FP16), up=torch.randn(128, 32, generator=g).to(FP16))
    x = torch.randn(5, 128, generator=g).to(dtype)
    got = smooth_quantize(x, packed_view(layer), "exact").lowrank
    want = x.double() @ layer.down.double().t()
    assert (got - want).norm() / want.norm() < 5e-5, "a pair rounded to bf16 is off by 2e-3"


@pytest.mark.parametrize("dtype, pair, lowrank", [(BF16, BF16, BF16), (FP16, BF16, FP32), (BF16, FP16, FP32), (FP32, BF16, FP32)])
def test_low_rank_is_bf16_only_where_everything_is(interpreter, dtype, pair, lowrank):
    """The e4m3 product then multiplies both as they are; everything else keeps the sum in fp32."""
    torch.manual_seed(11)
    layer = random_layer("int4", 128, 256, scale_dtype=pair)
    x = torch.randn(9, 256).to(dtype)
    want = x.double() @ layer.down.double().t()
    for form, mode, wide, expected in (
        ("e4m3", "fast", False, lowrank), ("e4m3", "fast", True, lowrank), ("e4m3", "exact", False, FP32), ("e4m3", "exact", True, FP32),
        ("int8", "fast", False, FP32),
    ):  # fmt: skip
        view = packed_view(layer, form)
        for q in (smooth_quantize(x, view, mode, wide=wide), smooth_quantize_torch(x, view, mode, wide=wide)):
            assert q.lowrank.dtype == expected
            assert relative(q.lowrank, want) < (3e-3 if expected == BF16 else 5e-5)
        assert smooth_quantize(x[:0], view, mode, wide=wide).lowrank.dtype == expected
    assert smooth_quantize(x, packed_view(random_layer("nvfp4", 128, 256, scale_dtype=pair)), "fast").lowrank.dtype == FP32


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("k, pieces", [(128, 1), (1536, 6), (2112, 8)])
def test_low_rank_product_in_pieces(interpreter, k, pieces, mode):
    """K in one piece, in equal ones, and in eight of which seven have any of K's 34 steps; with and without a norm."""
    torch.manual_seed(12)
    view = packed_view(random_layer("int4", 128, k, 48))
    assert quantize_tile(target_for("cpu"), BF16, 5, view.spec.k_padded, mode == "exact").pieces == pieces
    x = torch.randn(5, k).to(BF16)
    q = compare(x, view, mode)
    assert torch.equal(q.lowrank, smooth_quantize(x, view, mode).lowrank)
    compare(x, view, mode, Norm(torch.randn(2, k).to(BF16), torch.randn(2, k).to(BF16), 3))


@pytest.mark.parametrize("rank", [0, 48])
@pytest.mark.parametrize("form, mode", [("e4m3", "fast"), ("int8", "fast"), ("e4m3", "exact")])
def test_kernel_through_tensor_descriptors(interpreter, monkeypatch, form, mode, rank):
    """The copy engine's form has the pointers' bits; rows that no descriptor can stand for take the pointers."""
    import tonfa.kernels.smooth_quantize_triton as module

    torch.manual_seed(13)
    monkeypatch.setattr(module, "DESCRIPTOR_COLUMNS", 256)
    k = 320
    view = packed_view(random_layer("int4", 128, k, rank), form)
    whole = torch.randn(5, k + 8).to(BF16)
    norm = Norm(torch.randn(1, k).to(BF16), torch.randn(1, k).to(BF16), 5)
    made, from_tensor = [], module.TensorDescriptor.from_tensor
    monkeypatch.setattr(module.TensorDescriptor, "from_tensor", lambda t, block: made.append(t) or from_tensor(t, block))
    for x, fits in ((whole[:, :k], True), (whole[:, 3 : k + 3], False), (torch.randn(5, k + 2).to(BF16)[:, :k], False)):
        for given in (None, norm):
            made.clear()
            pointers = smooth_quantize(x, view, mode, given, wide=True)
            assert not made
            with monkeypatch.context() as patch:
                patch.setattr(module, "target_for", lambda device: dataclasses.replace(target_for(device), copy_engine=True))
                found = smooth_quantize(x, view, mode, given, wide=True)
            assert len(made) == (0 if not fits else 2 if rank else 1)
            for a, b in ((found.codes, pointers.codes), (found.scales, pointers.scales), (found.lowrank, pointers.lowrank)):
                assert (a is None and b is None) or torch.equal(a, b)


def test_misfits_are_refused():
    view = packed_view(random_layer("int4", 128, 256))
    with pytest.raises(ValueError, match=r"\[M, 256\]"):
        smooth_quantize(torch.zeros(2, 128), view, "exact")
    with pytest.raises(ValueError, match="mode"):
        smooth_quantize(torch.zeros(2, 256), view, "quick")
    with pytest.raises(ValueError, match="norm.shift"):
        smooth_quantize(torch.zeros(4, 256), view, "fast", Norm(torch.zeros(1, 256), torch.zeros(2, 256), 2))
    with pytest.raises(ValueError, match="norm.scale has"):
        smooth_quantize(torch.zeros(4, 256), view, "fast", Norm(None, torch.zeros(1, 256), 2, rms=True))
    for shift, rms in ((None, False), (torch.zeros(1, 256), True)):
        with pytest.raises(ValueError, match="RMSNorm takes none"):
            smooth_quantize(torch.zeros(2, 256), view, "fast", Norm(shift, torch.zeros(1, 256), 2, rms=rms))
    x, norm = torch.zeros(2, 256), Norm(torch.zeros(1, 256), torch.zeros(1, 256), 2)
    with pytest.raises(ValueError, match="one of the two"):
        smooth_quantize(x, view, "fast", norm, torch.zeros(2))
    with pytest.raises(ValueError, match="row_amax is"):
        smooth_quantize(x, view, "fast", row_amax=torch.zeros(3))
    with pytest.raises(ValueError, match="w4a16"):
        smooth_quantize(torch.zeros(2, 256), packed_view(random_layer("w4a16", 128, 256)), "exact")


@pytest.mark.parametrize("unsigned", [False, True])
def test_oracle_half(unsigned):
    """The same numbers as "int4" over a power of two of the row."""
    torch.manual_seed(0)
    view = packed_view(random_layer("int4", 128, 256, act_unsigned=unsigned))
    x = torch.randn(9, 256).to(BF16) * torch.logspace(-30, 30, 9)[:, None].to(BF16)
    x[4] = 0
    narrow, wide = smooth_quantize_torch(x, view, "exact"), smooth_quantize_torch(x, view, "exact", wide=True)
    assert wide.kind == "half" and wide.codes.dtype == FP16 and wide.scales.shape == (9,)
    codes = values(narrow, "e4m3").view(9, 4, 64) * narrow.scales.t().double()[:, :, None]
    amax = smoothed(x, view_layer(view, unsigned), SHIFT if unsigned else 0.0).abs().amax(1)
    u = torch.where(amax > 0, torch.exp2(torch.floor(torch.log2(amax)) - 8), 1.0)
    assert torch.equal(wide.scales.double(), u)
    assert torch.equal(wide.codes, (codes.float().view(9, 256) / u.float()[:, None]).to(FP16))
    assert wide.codes.abs().max() < 600


def view_layer(view, unsigned):
    return random_layer("int4", 128, view.spec.k, act_unsigned=unsigned)


@pytest.mark.parametrize("precision, form, mode", [("nvfp4", "e4m3", "exact"), ("int4", "int8", "exact"), ("int4", "e4m3", "fast")])
def test_wide_changes_nothing_else(interpreter, precision, form, mode):
    view = packed_view(random_layer(precision, 128, 256), form)
    x = torch.randn(3, 256).to(BF16)
    a, b = smooth_quantize(x, view, mode), smooth_quantize(x, view, mode, wide=True)
    assert a.kind == b.kind and torch.equal(a.codes, b.codes)


@pytest.mark.parametrize("options", [{"mode": "fast"}, {"mode": "exact", "wide": True}])
@pytest.mark.parametrize("k", [256, 448])
def test_known_row_maximum_is_taken(interpreter, options, k):
    """With the true maximum nothing changes; with eight times that, kernel and oracle both scale by it."""
    torch.manual_seed(7)
    view = packed_view(random_layer("int4", 128, k))
    x = torch.randn(5, k).to(BF16)
    amax = smoothed(x, random_layer("int4", 128, k)).abs().amax(1).float()
    found, given = smooth_quantize(x, view, **options), smooth_quantize(x, view, row_amax=amax, **options)
    assert torch.equal(found.codes, given.codes) and torch.equal(found.scales, given.scales)
    got, want = smooth_quantize(x, view, row_amax=8 * amax, **options), smooth_quantize_torch(x, view, row_amax=8 * amax, **options)
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)
    assert torch.equal(got.scales, 8 * found.scales)


@pytest.mark.parametrize(
    "form, mode, wide", [("e4m3", "fast", False), ("e4m3", "exact", False), ("int8", "fast", False), ("e4m3", "exact", True)]
)
@pytest.mark.parametrize("rms", [False, True])
def test_fused_norm_has_the_bits_of_the_plain_one(interpreter, rms, form, mode, wide):
    torch.manual_seed(8)
    view = packed_view(random_layer("int4", 128, 320), form)
    x, shift, scale = torch.randn(10, 320).to(BF16), torch.randn(2, 320).to(BF16), torch.randn(2, 320).to(BF16)
    norm = Norm(None if rms else shift, scale, 5, rms=rms)
    fused, plain = smooth_quantize(x, view, mode, norm, wide=wide), smooth_quantize(norm_modulate(x, norm), view, mode, wide=wide)
    for a, b in ((fused.codes, plain.codes), (fused.scales, plain.scales), (fused.lowrank, plain.lowrank)):
        assert torch.equal(a, b)


def compare(x, view, mode, norm=None, wide=False):
    """Kernel against oracle on the same input. Codes may differ only where fp32 noise of the norm tipped a rounding."""
    got, want = smooth_quantize(x, view, mode, norm, wide=wide), smooth_quantize_torch(x, view, mode, norm, wide=wide)
    assert (got.kind, got.codes.dtype, got.codes.shape, got.dtype) == (want.kind, want.codes.dtype, want.codes.shape, want.dtype)
    if norm is None:
        assert torch.equal(values(got, view.spec.code_form), values(want, view.spec.code_form))
    elif got.codes.dtype == FP32:
        assert relative(got.codes, want.codes) < 1e-6
    else:
        assert (values(got, view.spec.code_form) == values(want, view.spec.code_form)).double().mean() > 0.999
    if want.scales is not None:
        assert got.scales.shape == want.scales.shape and relative(got.scales, want.scales) < (1e-6 if norm is None else 1e-4)
    if want.lowrank is not None:
        narrow = want.lowrank.dtype == BF16  # one ulp is 2^-8, where the order of a sum tipped a rounding
        assert (got.lowrank.shape, got.lowrank.dtype) == (want.lowrank.shape, want.lowrank.dtype)
        assert relative(got.lowrank, want.lowrank) < (2**-8 if narrow else 1e-5)
        assert not narrow or (got.lowrank != want.lowrank).sum() <= 1 + 0.02 * want.lowrank.numel()
    return got


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["int8", "int8 unsigned", "e4m3", "e4m3 unsigned", "nvfp4"])
def test_kernel_equals_oracle(interpreter, kind, mode, dtype):
    torch.manual_seed(1)
    form, unsigned = kind.split()[0], "unsigned" in kind
    layer = random_layer("nvfp4" if form == "nvfp4" else "int4", 128, 192, act_unsigned=unsigned, channel_scale=form == "nvfp4")
    view = packed_view(layer, "e4m3" if form == "nvfp4" else form)
    x = (torch.randn(17, 192) * 3).to(dtype)
    compare(x, view, mode)
    norm = Norm(torch.randn(2, 192).to(dtype), torch.randn(2, 192).to(dtype), rows_per_batch=9)
    compare(x, view, mode, norm)
    if mode == "exact" and form == "e4m3":
        compare(x, view, mode, wide=True)
        compare(x, view, mode, norm, wide=True)


@pytest.mark.parametrize("k", [128, 640, 1536, 2112])
@pytest.mark.parametrize("mode, wide", [("fast", False), ("exact", False), ("exact", True)])
def test_kernel_any_k(interpreter, mode, wide, k):
    """Rows held whole in one piece and in two, tiles that end inside K, K that is no multiple of a tile."""
    torch.manual_seed(6)
    view = packed_view(random_layer("int4", 128, k, 16, act_unsigned=True))
    compare(torch.randn(3, k).to(BF16), view, mode, wide=wide)
    compare(torch.randn(3, k).to(BF16), view, mode, Norm(torch.randn(1, k), torch.randn(1, k), 3), wide=wide)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["int8", "e4m3", "nvfp4"])
@pytest.mark.parametrize("k", [768, 3840])
def test_kernel_at_z_images_sizes(interpreter, k, kind, mode):
    """3840 inputs are no power of two and end inside a block of 1024; RMSNorm, rank 128, a scale in fp32 or 16 bit."""
    torch.manual_seed(k)
    layer = random_layer("nvfp4" if kind == "nvfp4" else "int4", 128, k, 128, channel_scale=kind == "nvfp4")
    view = packed_view(layer, "e4m3" if kind == "nvfp4" else kind)
    x = (torch.randn(3, k) * 3).to(BF16)
    x[1] = 0
    for wide in (False, True) if (kind, mode) == ("e4m3", "exact") else (False,):
        norm = Norm(None, torch.randn(2, k).to(BF16 if wide else FP32), 2, 1e-5, rms=True)
        plain = compare(norm_modulate(x, norm), view, mode, wide=wide)
        fused = smooth_quantize(x, view, mode, norm, wide=wide)
        for a, b in ((fused.codes, plain.codes), (fused.scales, plain.scales), (fused.lowrank, plain.lowrank)):
            assert (a is None and b is None) or torch.equal(a, b)
        assert not fused.codes[1].any() and not fused.lowrank[1].any() and fused.codes[0].any()


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("form, mode, wide", [("int8", "exact", False), ("e4m3", "fast", False), ("e4m3", "exact", True)])
def test_kernel_with_an_rms_norm_in_other_types(interpreter, form, mode, wide, dtype):
    torch.manual_seed(1)
    x, scale = (torch.randn(17, 192) * 3).to(dtype), torch.randn(2, 192)
    compare(x, packed_view(random_layer("int4", 128, 192), form), mode, Norm(None, scale.to(dtype), 9, 1e-5, rms=True), wide=wide)
    compare(x, packed_view(random_layer("int4", 128, 192), form), mode, Norm(None, scale, 9, 1e-5, rms=True), wide=wide)


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("rank", [0, 10, 16, 48, 80])
def test_kernel_any_rows_and_rank(interpreter, rank, rows):
    torch.manual_seed(2)
    compare(torch.randn(rows, 256).to(BF16), packed_view(random_layer("int4", 128, 256, rank)), "fast")


@pytest.mark.parametrize("rank", [32, 128])
def test_kernel_two_segments(interpreter, rank):
    torch.manual_seed(3)
    view = packed_view(random_layer("int4", 384, 256, rank, segments=(0, 128)))
    q = compare(torch.randn(5, 256).to(BF16), view, "exact")
    assert q.lowrank.shape == (5, 2 * rank)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("form", ["int8", "e4m3", "nvfp4"])
def test_kernel_zero_groups(interpreter, form, mode):
    torch.manual_seed(4)
    x = torch.randn(4, 256).to(BF16)
    x[0] = 0
    x[1, 64:192] = 0
    layer = random_layer("nvfp4" if form == "nvfp4" else "int4", 128, 256)
    q = compare(x, packed_view(layer, "e4m3" if form == "nvfp4" else form), mode)
    assert not q.codes[0].any() and not q.codes[1, 64:192].any() and q.codes[1].any()


def test_kernel_strided_input_and_norm(interpreter):
    torch.manual_seed(5)
    view = packed_view(random_layer("int4", 128, 256))
    compare(torch.randn(9, 3, 256).to(BF16)[:, 1], view, "fast")
    compare(torch.randn(256, 9).to(BF16).t(), view, "exact")
    modulation = torch.randn(2, 6, 256).to(BF16)
    compare(torch.randn(32, 256).to(BF16), view, "fast", Norm(modulation[:, 3], modulation[:, 4], 16))
    x = torch.randn(6, 256).to(BF16) + 100  # a mean far from zero: the variance must not cancel
    norm = Norm(torch.zeros(1, 256), torch.zeros(1, 256), 6)
    got = smooth_quantize(x, packed_view(random_layer("nvfp4", 128, 256, 0)), "fast", norm)
    smooth = random_layer("nvfp4", 128, 256, 0).smooth.float()
    assert relative(got.codes.float(), norm_modulate(x, norm).float() / smooth) < 3e-3


def test_kernel_no_rows(interpreter):
    q = smooth_quantize(torch.zeros(0, 256, dtype=BF16), packed_view(random_layer("int4", 128, 256)), "fast")
    assert q.codes.shape == (0, 256)
