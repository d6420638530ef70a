"""Terms to columns: whatever the cut, the columns are the terms' sum, and planning knows their bytes beforehand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tonfa.kernels.layout import LogicalLinear, PackSpec, plan
from tonfa.models.lora import Term, make_side, plan_part, planned_nbytes, shape_of

CPU = torch.device("cpu")


def spec_of(parts: list[tuple[int, int, int, int]], n: int, k: int) -> PackSpec:
    """Parts (n, k, row, col)."""
    return plan(n, k, [(layer(pn, pk), row, col) for pn, pk, row, col in parts], "e4m3")


def layer(n: int, k: int) -> LogicalLinear:
    scales = torch.ones(n, k // 64, dtype=torch.bfloat16)
    return LogicalLinear("int4", torch.zeros(n, k, dtype=torch.uint8), scales, smooth=torch.ones(k, dtype=torch.bfloat16))


SPECS = {
    "one": spec_of([(512, 192, 0, 0)], 512, 192),
    "two by rows": spec_of([(384, 128, 0, 0), (200, 128, 384, 0)], 584, 128),
    "two by columns": spec_of([(128, 128, 0, 0), (128, 320, 0, 128)], 128, 448),
    "in pairs": plan(528, 192, [(layer(528, 192), 0, 0)], "e4m3", paired=True),
}


def term(r: int, n: int, k: int, row: int = 0, col: int = 0, scale: float = 1.0, seed: int = 0, dtype=torch.float32) -> Term:
    g = torch.Generator().manual_seed(seed)
    return Term(torch.randn(n, r, generator=g).to(dtype), torch.randn(r, k, generator=g).to(dtype), scale, row, col)


def dense(spec: PackSpec, terms: list[Term]) -> torch.Tensor:
    total = torch.zeros(spec.out_features, spec.in_features, dtype=torch.float64)
    for t in terms:
        r, n, k, row, col = shape_of(t)
        total[row : row + n, col : col + k] += t.scale * t.up.double() @ t.down.double()
    return total


@st.composite
def cases(draw: st.DrawFn) -> tuple[PackSpec, list[Term]]:
    spec = SPECS[draw(st.sampled_from(sorted(SPECS)))]
    terms = []
    for seed in range(draw(st.integers(1, 5))):
        row = draw(st.sampled_from([r for r in (0, 128, 256, 300) if r < spec.out_features]))
        n = draw(
            st.sampled_from([c for c in (100, 128, 256, spec.out_features) if c <= spec.out_features - row] or [spec.out_features - row])
        )
        col = draw(st.sampled_from([0, 64]))
        k = draw(st.sampled_from([64, spec.in_features - col]))
        terms.append(term(draw(st.sampled_from([1, 4, 16, 33])), n, k, row, col, draw(st.sampled_from([1.0, -0.3])), seed))
    return spec, terms


@settings(max_examples=60, deadline=None)
@given(cases())
def test_columns_are_the_sum_of_the_terms(case):
    spec, terms = case
    side = make_side(spec, terms, None, CPU, torch.float32)
    want = dense(spec, terms)
    torch.testing.assert_close(side.dense(spec).double(), want, rtol=1e-4, atol=1e-4)
    x, y = torch.randn(2, 3, spec.in_features), torch.randn(2, 3, spec.out_features)
    torch.testing.assert_close(side.add(spec, y, x).double(), y.double() + x.double() @ want.t(), rtol=1e-4, atol=1e-3)
    assert side.nbytes() == planned_nbytes(spec, [shape_of(t) for t in terms], 4)
    assert all(c is None or (len(c.segments) <= 4 and c.up.shape[1] % 16 == 0) for c in side.columns)


def test_separate_q_k_v_have_segments_of_their_own_and_fused_ones_do_not():
    part = SPECS["one"].parts[0]
    split = plan_part(part, [(8, 128, 192, 128 * i, 0) for i in range(4)])
    assert split.segments == (0, 128, 256, 384) and split.rank == 16
    assert plan_part(part, [(8, 512, 192, 0, 0)]).segments == (0,)
    assert plan_part(part, [(16, 128, 192, 128 * i, 0) for i in (0, 2)]).segments == (0, 128, 256, 384), "a missing k leaves a gap"
    many = plan_part(part, [(8, 64, 192, 64 * i, 0) for i in range(8)])
    assert many.segments == (0,) and many.rank == 64, "too many, and not where tiles begin: one for all rows"


def test_a_part_stored_in_pairs_has_one_segment_of_columns_in_its_order():
    spec = SPECS["in pairs"]
    values, gates = term(16, 264, 192, 0), term(16, 264, 192, 264, seed=1)
    assert plan_part(SPECS["one"].parts[0], [(16, 256, 192, row, 0) for row in (0, 256)]).segments == (0, 256)
    assert plan_part(spec.parts[0], [shape_of(values), shape_of(gates)]).segments == (0,)
    up = make_side(spec, [values, gates], None, CPU, torch.float32).columns[0].up
    for first, rows, ranks in ((0, values.up[:8], slice(16)), (8, gates.up[:8], slice(16, 32)), (16, values.up[8:16], slice(16))):
        assert torch.equal(up[first : first + 8, ranks], rows)
    assert not up[:8, 16:].any() and not up[8:16, :16].any() and not up[528:].any()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16])
def test_every_float_type_is_read(dtype):
    t = term(4, 512, 192, scale=0.5, dtype=dtype)
    side = make_side(SPECS["one"], [t], None, CPU, torch.float32)
    torch.testing.assert_close(side.dense(SPECS["one"]), 0.5 * t.up.float() @ t.down.float(), rtol=1e-5, atol=1e-5)


def test_delta_alone_beside_columns_and_nothing():
    spec, delta = SPECS["one"], torch.randn(512, 192)
    alone = make_side(spec, [], delta, CPU, torch.float32)
    assert torch.equal(alone.dense(spec), delta) and alone.nbytes() == delta.nbytes
    both = make_side(spec, [term(4, 512, 192)], delta, CPU, torch.float32)
    torch.testing.assert_close(both.dense(spec), delta + dense(spec, [term(4, 512, 192)]).float())
    assert make_side(spec, [], None, CPU, torch.float32) is None


@pytest.mark.parametrize(
    "bad", [term(4, 512, 191), term(4, 513, 192), term(4, 500, 192, row=20), Term(torch.ones(512, 3), torch.ones(4, 192))]
)
def test_terms_that_do_not_fit_are_named(bad):
    spec = SPECS["one"]
    if bad.down.shape[1] == 191:  # fits as a slice of the columns; as what it is it says where
        bad = Term(bad.up, bad.down, col=2)
    with pytest.raises(ValueError, match="the layer is 512 x 192, the LoRA"):
        make_side(spec, [bad], None, CPU, torch.float32)
