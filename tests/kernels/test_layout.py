"""kernels/layout.py: what goes in comes out, in the byte order that the kernels rely on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tonfa.kernels import layout
from tonfa.kernels.layout import LogicalLinear, dense_bias, dense_weight, dense_weight4, pack, plan, stack_rows, unpack, views

from .make_layers import packed_view, random_layer

TENSORS = ("codes", "scales", "zeros", "smooth", "down", "up", "channel_scale")


def assert_same_layer(got: LogicalLinear, want: LogicalLinear):
    assert (got.precision, got.n, got.k, got.rank, got.segments) == (want.precision, want.n, want.k, want.rank, want.segments)
    assert got.act_unsigned == want.act_unsigned
    for name in TENSORS:
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert torch.equal(a.float(), b.float()), name
    assert got.scales.dtype == want.scales.dtype


CASES = {
    "int4": random_layer("int4", 256, 384, 32),
    "int4 unsigned": random_layer("int4", 128, 512, 16, act_unsigned=True),
    "int4 fp16": random_layer("int4", 128, 256, 48, scale_dtype=torch.float16),
    "int4 no low rank": random_layer("int4", 128, 128, 0),
    "int4 padded": random_layer("int4", 200, 192, 10),
    "int4 two segments": random_layer("int4", 384, 256, 32, segments=(0, 128)),
    "nvfp4": random_layer("nvfp4", 256, 256, 32),
    "nvfp4 channel": random_layer("nvfp4", 200, 192, 16, channel_scale=True),
    "nvfp4 two segments": random_layer("nvfp4", 256, 128, 10, segments=(0, 128), channel_scale=True),
    "w4a16": random_layer("w4a16", 384, 192),
    "w4a16 fp16": random_layer("w4a16", 200, 128, scale_dtype=torch.float16),
}


@pytest.mark.parametrize("code_form", ["int8", "e4m3"])
@pytest.mark.parametrize("name", CASES)
def test_round_trip(name, code_form):
    layer = CASES[name]
    spec = plan(layer.n, layer.k, [(layer, 0, 0)], code_form)
    blob = pack(spec, [layer])
    assert blob.dtype == torch.uint8 and blob.shape == (spec.nbytes,)
    assert_same_layer(unpack(spec, blob)[0], layer)
    assert layer.precision != "int4" or (layer.codes == 8).any(), "the case must hold -8 codes"


@pytest.mark.parametrize("code_form", ["int8", "e4m3"])
@pytest.mark.parametrize("name", ["int4", "int4 no low rank", "nvfp4 channel", "int4 fp16"])
def test_pairs_round_trip(name, code_form):
    """Every field that has rows holds them as 8 values, their 8 gates, and so on."""
    layer = {**CASES, "nvfp4 channel": random_layer("nvfp4", 208, 192, 16, channel_scale=True)}[name]
    spec = plan(layer.n, layer.k, [(layer, 0, 0)], code_form, paired=True)
    blob, flat = pack(spec, [layer]), packed_view(layer, code_form)
    view, half = views(spec, blob)[0], layer.n // 2
    assert_same_layer(unpack(spec, blob)[0], layer)
    order = [row for i in range(0, half, 8) for first in (i, half + i) for row in range(first, first + 8)]
    assert sorted(order) == list(range(layer.n)) and order[:17] == [*range(8), *range(half, half + 8), 8]
    for field in spec.offsets(0):
        stored, plain = (getattr(v, field).float() for v in (view, flat))
        if field in ("scales", "block_scale"):
            stored, plain = stored.t(), plain.t()
        rows = plain if field in ("smooth", "down") else torch.cat((plain[order], plain[layer.n :]))
        assert torch.equal(stored, rows), field
    assert torch.equal(layout.in_order(layout.in_pairs(layer.codes)), layer.codes)
    assert spec != plan(layer.n, layer.k, [(layer, 0, 0)], code_form) and spec.nbytes == flat_nbytes(layer, code_form)
    with pytest.raises(ValueError, match="another layer"):
        unpack(plan(layer.n, layer.k, [(layer, 0, 0)], code_form), blob)


def flat_nbytes(layer: LogicalLinear, code_form: str) -> int:
    return plan(layer.n, layer.k, [(layer, 0, 0)], code_form).nbytes


@pytest.mark.parametrize(
    "layers, out_features",
    [
        ([random_layer("int4", 128, 128), random_layer("int4", 128, 128)], 128),
        ([random_layer("int4", 128, 128)], 256),
        ([random_layer("int4", 200, 128)], 200),
        ([random_layer("int4", 256, 128, segments=(0, 128))], 256),
        ([random_layer("int4", 128, 128, act_unsigned=True)], 128),
        ([random_layer("w4a16", 128, 128)], 128),
    ],
    ids=["two parts", "half a linear", "rows", "segments", "unsigned", "w4a16"],
)
def test_what_cannot_be_paired_is_refused(layers, out_features):
    with pytest.raises(ValueError, match="one signed W4A4 part in one segment, its rows a multiple of 16"):
        plan(out_features, 256, [(layer, 0, 128 * i) for i, layer in enumerate(layers)], "e4m3", paired=True)


@pytest.mark.parametrize("code_form", ["int8", "e4m3"])
def test_bytes_are_where_the_kernels_look(code_form):
    layer = random_layer("int4", 200, 320, 20, segments=(0, 128))
    view = packed_view(layer, code_form)
    assert view.codes.shape == (256, 192) and view.scales.shape == (6, 256)
    assert view.down.shape == (384, 64) and view.up.shape == (256, 32)
    for n, k in [(0, 0), (3, 63), (199, 64), (17, 127), (18, 128), (77, 200), (198, 319)]:
        byte = int(view.codes[n, 64 * (k // 128) + k % 64])
        nibble = byte >> 4 if k % 128 >= 64 else byte & 15
        code = int(layer.codes[n, k])
        value = code - 16 if code >= 8 else code
        if code_form == "int8":
            assert nibble == code
        elif value == -8:
            assert nibble == 8
        else:
            assert nibble == (8 | -value if value < 0 else value)
        assert view.scales[k // 64, n] == layer.scales[n, k // 64]
        assert view.smooth[k] == layer.smooth[k].float()
        assert view.down[k, 32 + 7] == layer.down[20 + 7, k]
        assert view.up[n, 19] == layer.up[n, 19]
    assert not view.codes[200:].any() and not (view.codes[:, 128:] >> 4).any()
    assert not view.up[:, 20:].any() and not view.up[200:].any() and not view.down[320:].any()
    assert (view.scales[5] == 1).all() and (view.scales[:, 200:] == 1).all() and (view.smooth[320:] == 1).all()


def test_fields_are_aligned_and_zero_copy():
    layer = random_layer("int4", 200, 192, 10, act_unsigned=True)
    spec = plan(layer.n, layer.k, [(layer, 0, 0)], "e4m3")
    assert set(spec.offsets(0)) == {"codes", "scales", "smooth", "down", "up", "block_scale", "shift_bias"}
    assert all(f.offset % 256 == 0 for f in spec.offsets(0).values())
    blob = pack(spec, [layer])
    view = views(spec, blob)[0]
    view.up[0, 0] = 42
    assert unpack(spec, blob)[0].up[0, 0] == 42


def test_pack_into_out_leaves_no_old_byte():
    layer = random_layer("nvfp4", 200, 192, 10)
    spec = plan(layer.n, layer.k, [(layer, 0, 0)], "e4m3")
    out = torch.full((spec.nbytes,), 255, dtype=torch.uint8)
    assert pack(spec, [layer], out) is out
    assert torch.equal(out, pack(spec, [layer]))


def test_two_parts_side_by_side():
    a, b = random_layer("int4", 256, 128, 16, seed=1), random_layer("int4", 256, 384, 16, seed=2, act_unsigned=True)
    spec = plan(256, 512, [(a, 0, 0), (b, 0, 128)], "int8")
    assert [(p.row_offset, p.col_offset) for p in spec.parts] == [(0, 0), (0, 128)]
    got = unpack(spec, pack(spec, [a, b]))
    assert_same_layer(got[0], a)
    assert_same_layer(got[1], b)
    assert spec == plan(256, 512, [(a, 0, 0), (b, 0, 128)], "int8") and hash(spec) == hash(plan(256, 512, [(a, 0, 0), (b, 0, 128)], "int8"))


def test_stack_rows_equals_the_two_layers():
    a = random_layer("nvfp4", 256, 256, 16, seed=1, channel_scale=True)
    b = dataclasses.replace(random_layer("nvfp4", 128, 256, 32, seed=2), smooth=a.smooth)
    both = stack_rows(a, b)
    assert both.segments == (0, 256) and both.rank == 32
    assert torch.equal(dense_weight(both), torch.cat([dense_weight(a), dense_weight(b)]))
    assert torch.equal(both.bias, torch.cat([a.bias, b.bias]))
    three = stack_rows(both, dataclasses.replace(random_layer("nvfp4", 128, 256, 0, seed=3), smooth=a.smooth))
    assert three.segments == (0, 256, 384)
    assert torch.equal(dense_weight(three)[:384], dense_weight(both))


def test_stack_rows_refuses_what_cannot_share_an_input():
    a, b = random_layer("int4", 128, 256, seed=1), random_layer("int4", 128, 256, seed=2)
    with pytest.raises(ValueError, match="smooth"):
        stack_rows(a, b)
    with pytest.raises(ValueError, match="precision"):
        stack_rows(a, random_layer("nvfp4", 128, 256))
    with pytest.raises(ValueError, match="multiple of 128"):
        stack_rows(*(dataclasses.replace(random_layer("int4", 200, 256, seed=s), smooth=None) for s in (1, 2)))


@pytest.mark.parametrize("name", CASES)
def test_dense_weight_is_the_formula(name):
    layer = CASES[name]
    group = 16 if layer.precision == "nvfp4" else 64
    table = list(layout.E2M1) if layer.precision == "nvfp4" else [float(c) for c in range(16)]
    if layer.precision == "int4":
        table = [float(c - 16 if c > 7 else c) for c in range(16)]
    want = torch.tensor(table, dtype=torch.float64)[layer.codes.long()] * layer.scales.double().repeat_interleave(group, 1)
    if layer.zeros is not None:
        want += layer.zeros.double().repeat_interleave(group, 1)
    if layer.channel_scale is not None:
        want *= layer.channel_scale.double()[:, None]
    torch.testing.assert_close(dense_weight4(layer).double(), want, rtol=1e-6, atol=1e-9)
    if layer.smooth is not None:
        shift = layout.SHIFT * (want / layer.smooth.double()).sum(1)
        want /= layer.smooth.double()
        if layer.act_unsigned:
            torch.testing.assert_close(dense_bias(layer).double(), layer.bias.double() + shift, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(packed_view(layer).shift_bias[: layer.n].double(), shift, rtol=1e-5, atol=1e-5)
    for n in range(layer.n) if layer.rank else ():
        i = max(j for j, start in enumerate(layer.segments) if start <= n)
        want[n] += layer.up[n].double() @ layer.down[i * layer.rank : (i + 1) * layer.rank].double()
    torch.testing.assert_close(dense_weight(layer).double(), want, rtol=1e-5, atol=1e-6)


def test_errors_say_what_is_wrong():
    layer = random_layer("int4", 128, 256, 16)
    spec = plan(128, 256, [(layer, 0, 0)], "e4m3")
    blob = pack(spec, [layer])
    with pytest.raises(ValueError, match=f"expected uint8 \\[{spec.nbytes}\\]"):
        unpack(spec, blob[:-256])
    for at, match in [(0, "mark"), (8, "version"), (16, "another layer")]:
        broken = blob.clone()
        broken[at] += 1
        with pytest.raises(ValueError, match=match):
            unpack(spec, broken)
    other = plan(128, 256, [(layer, 0, 0)], "int8")
    with pytest.raises(ValueError, match="another kind of GPU"):
        unpack(other, blob)
    with pytest.raises(ValueError, match="planned"):
        pack(spec, [random_layer("int4", 128, 256, 32)])
    with pytest.raises(ValueError, match="does not fit"):
        plan(128, 256, [(layer, 64, 0)], "e4m3")
    with pytest.raises(ValueError, match="code form"):
        plan(128, 256, [(layer, 0, 0)], "fp6")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scales": torch.ones(128, 2, dtype=torch.bfloat16)}, r"scales has shape \[128, 2\], expected \[128, 4\]"),
        ({"scales": torch.ones(128, 4)}, "float32"),
        ({"codes": torch.zeros(128, 256, dtype=torch.int8)}, "uint8"),
        ({"down": None}, "half"),
        ({"smooth": torch.ones(255)}, "smooth has shape"),
        ({"segments": (0, 64)}, "segments"),
        ({"precision": "int3"}, "int3"),
    ],
)
def test_misshapen_layers_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(random_layer("int4", 128, 256, 16), **change)
