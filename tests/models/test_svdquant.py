"""The quantiser of SVDQuant layers: each means lowers the error that it is there for, on rows that it has not seen, and nothing is lost."""

import math
from dataclasses import replace

import pytest
import torch
from tonfa.kernels.layout import LogicalLinear, dense_bias, dense_weight, dense_weight4, pack, plan, views
from tonfa.kernels.smooth_quantize_torch import smooth_quantize_torch
from tonfa.kernels.w4_matmul_torch import dequantized_input, w4_matmul_torch
from tonfa.models.formats import nunchaku as nk
from tonfa.models.formats.quantize import group_scales, low_rank, nearest_codes, quantize_linear
from tonfa.models.formats.writer import pack_layer
from tonfa.models.svdquant import CLIPS, InputStatistics, Recipe, choose_smoothing, svd_quantize
from tonfa.models.svdquant_gptq import gptq_values
from tonfa.models.svdquant_inputs import Metric, quantized_input

PRECISIONS = ("int4", "nvfp4")
N, K = 256, 384


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def statistics(x: torch.Tensor, rows: int = 256) -> InputStatistics:
    return InputStatistics(x.abs().amax(0), x.square().mean(0), x[:rows].bfloat16(), len(x))


def correlated(rows: int, gen: torch.Generator, k: int = K) -> torch.Tensor:
    """Inputs as a network's: a falling spectrum, and channels of different size."""
    turn = torch.linalg.qr(torch.randn(k, k, generator=gen)).Q
    sizes = torch.exp(0.7 * torch.randn(k, generator=gen))
    return (torch.randn(rows, k, generator=gen) * torch.linspace(1, -2, k).exp()) @ turn.T * sizes


def heavy(gen: torch.Generator, n: int = N, k: int = K) -> torch.Tensor:
    """A weight with heavy tails and a part of low rank."""
    tails = torch.randn(n, k, generator=gen) * torch.randn(n, k, generator=gen).square()
    return (tails + torch.randn(n, 8, generator=gen) @ torch.randn(8, k, generator=gen)) / k**0.5


def noise(layer: LogicalLinear, weight: torch.Tensor, x: torch.Tensor) -> float:
    """|error| over |output| of a layer without its bias, its activations quantised, written out: y = a @ W4.T + x @ down.T @ up.T."""
    x = x.bfloat16()
    a = quantized_input(x, layer.smooth, layer.precision, layer.act_unsigned)
    y = a @ dense_weight4(layer).T + x.float() @ layer.down.float().T @ layer.up.float().T
    wanted = x.float() @ weight.T
    return float((y - wanted).norm() / wanted.norm())


def quantized(weight, recipe, x=None, rows=256, act_unsigned=False, bias=None):
    known = None if x is None else statistics(x, rows)
    smooth = choose_smoothing([weight], known, recipe, act_unsigned)
    return svd_quantize(weight, bias, recipe, smooth, known, act_unsigned)


def same(a: LogicalLinear, b: LogicalLinear, fields=("codes", "scales", "smooth", "down", "up", "channel_scale", "bias")) -> None:
    for name in fields:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)), name


# -- what is measured --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("precision", "unsigned"), [("int4", False), ("int4", True), ("nvfp4", False)])
def test_activations_and_errors_are_those_of_the_kernels(precision, unsigned, dtype):
    gen = seeded(1)
    w, x = heavy(gen), torch.randn(128, K, generator=gen)
    x = (torch.nn.functional.gelu(x) if unsigned else x).to(dtype)
    x[3, :64] = 0
    smooth = torch.exp(torch.randn(K, generator=gen)).to(dtype)
    known = InputStatistics(x.abs().amax(0).float(), x.float().square().mean(0), x, len(x))
    layer, error = svd_quantize(w, None, Recipe(precision, 16, dtype=dtype), smooth, known, unsigned)
    spec = plan(N, K, [(layer, 0, 0)], "int8")
    part = views(spec, pack(spec, [layer]))[0]
    q = smooth_quantize_torch(x, part, "exact")
    got = quantized_input(x, smooth, precision, unsigned)
    kernels = dequantized_input(q, "int8") - (0.171875 / smooth.float() if unsigned else 0)
    assert torch.equal(got, kernels)
    y = w4_matmul_torch(q, part, layer.bias if unsigned else None, torch.empty(len(x), N))
    wanted = x.float() @ w.T
    snr = 20 * math.log10(float(wanted.norm() / (y - wanted).norm()))
    assert abs(snr - error.output_snr_db) < 0.02  # the 16-bit bias of shifted layers counts only above
    assert abs(20 * math.log10(float(w.norm() / (w - dense_weight(layer)).norm())) - error.weight_snr_db) < 1e-4
    naive, _ = svd_quantize(w, None, Recipe.naive(precision, dtype), None, None, unsigned)
    assert not naive.up.any() and (naive.smooth == 1).all()
    a = quantized_input(x, naive.smooth, precision, unsigned) @ dense_weight4(naive).T
    assert abs(20 * math.log10(float(wanted.norm() / (a - wanted).norm())) - error.naive_output_snr_db) < 1e-3


def test_naive_is_plain_rounding():
    w = heavy(seeded(2))
    for precision in PRECISIONS:
        layer, error = svd_quantize(w, None, Recipe.naive(precision))
        scales, top = group_scales(w, precision, torch.bfloat16)
        assert torch.equal(layer.codes, nearest_codes(w, scales, top, precision)) and torch.equal(layer.scales.float(), scales.float())
        assert error.output_snr_db is None and error.naive_output_snr_db is None


# -- every means helps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_outlying_channels_are_smoothed(precision):
    gen = seeded(3)
    w = torch.randn(N, K, generator=gen) / K**0.5
    x = torch.randn(1024, K, generator=gen)
    x[:, torch.randperm(K, generator=gen)[:16]] *= 50
    layer, error = quantized(w, Recipe(precision), x[:512])
    naive, _ = svd_quantize(w, None, Recipe.naive(precision))
    assert noise(layer, w, x[512:]) < noise(naive, w, x[512:]) / 3
    assert error.output_snr_db > error.naive_output_snr_db + 9.5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_branch_and_refinements_beat_the_plain_recipe(precision):
    gen = seeded(4)
    w, x = heavy(gen), correlated(1024, gen)
    plain = noise(quantize_linear(w, None, 32, precision), w, x[512:])
    no_branch, once, often = (
        noise(quantized(w, recipe, x[:512])[0], w, x[512:])
        for recipe in (Recipe(precision, branch=False), Recipe(precision, refinements=0), Recipe(precision, refinements=3))
    )
    assert often < 0.95 * once < 0.9 * no_branch and often < 0.75 * plain


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["normal", "heavy", "columns"])
def test_without_a_sample_it_still_beats_the_plain_recipe(precision, kind):
    gen = seeded(5)
    w = torch.randn(N, K, generator=gen) if kind == "normal" else heavy(gen)
    if kind == "columns":
        w = w * torch.exp(1.5 * torch.randn(K, generator=gen))
    x = torch.randn(512, K, generator=gen)
    layer, error = quantized(w, Recipe(precision))
    plain = quantize_linear(w, None, 32, precision)
    assert (dense_weight(layer) - w).norm() < 0.95 * (dense_weight(plain) - w).norm()
    assert noise(layer, w, x) < noise(plain, w, x)
    assert error.output_snr_db is None
    if kind == "columns":
        assert noise(layer, w, x) < 0.95 * noise(svd_quantize(w, None, Recipe(precision))[0], w, x)  # that is the smoothing


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_refinement_is_never_worse(precision, sampled):
    gen = seeded(6)
    for w in (heavy(gen), torch.randn(N, K, generator=gen)):
        x = correlated(256, gen)[::4].repeat_interleave(4, 0)  # rows to fit by and to score by are the same ones
        known = statistics(x) if sampled else None
        found = [svd_quantize(w, None, Recipe(precision, refinements=i), None, known)[1] for i in range(4)]
        snr = [e.output_snr_db if sampled else e.weight_snr_db for e in found]
        assert all(b >= a - 1e-3 for a, b in zip(snr, snr[1:], strict=False)) and snr[3] > snr[0] + 0.2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gptq_is_better_on_rows_that_it_has_not_seen(precision):
    gen = seeded(7)
    w, x = heavy(gen), correlated(1024, gen)
    recipe = Recipe(precision, migrations=())
    (plain, before), (fed, after) = (quantized(w, r, x[:512], 512) for r in (recipe, replace(recipe, gptq=True)))
    assert after.output_snr_db > before.output_snr_db + 0.3
    assert noise(fed, w, x[512:]) < 0.97 * noise(plain, w, x[512:])
    few = [quantized(w, r, torch.randn(64, K, generator=gen), 64)[1].output_snr_db for r in (recipe, replace(recipe, gptq=True))]
    assert few[1] > few[0] - 0.05  # nothing to be learnt from few rows without a pattern, nothing lost


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gptq_minimises_what_it_says(precision):
    """|(w - q) @ U| with the second moments U @ U.T: far less than nearest rounding; with moments of no correlation, just that."""
    gen = seeded(8)
    w, x = torch.randn(128, K, generator=gen), correlated(512, gen)
    scales, top = group_scales(w, precision, torch.bfloat16)
    steps = scales.float() if top is None else scales.float() * top
    wide = steps.repeat_interleave(K // steps.shape[1], 1)

    def nearest(moments):
        return gptq_values(w, steps, moments, precision) * wide

    independent = nearest(torch.diag(torch.rand(K, generator=gen) + 0.1))
    moments = x.T @ x / len(x)
    layer = LogicalLinear(precision, nearest_codes(w, scales, top, precision), scales, channel_scale=top and top.repeat(128))
    assert torch.equal(independent, dense_weight4(layer))
    cost = [float(((w - q) @ moments * (w - q)).sum()) for q in (independent, nearest(moments))]
    assert cost[1] < 0.6 * cost[0]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_clips_find_smaller_errors_group_by_group(precision):
    w = heavy(seeded(9))
    importance = torch.rand(K, generator=seeded(10))
    group = K // group_scales(w, precision, torch.bfloat16)[0].shape[1]

    def cost(clips):
        scales, top = group_scales(w, precision, torch.bfloat16, clips, importance)
        layer = LogicalLinear(
            precision, nearest_codes(w, scales, top, precision), scales, channel_scale=None if top is None else top.repeat(N)
        )
        return ((dense_weight4(layer) - w).square() * importance).unflatten(1, (-1, group)).sum(2)

    offered = CLIPS[precision]
    best, alone = cost(offered), cost((1.0,))
    assert best.sum() < 0.9 * alone.sum()
    if precision == "int4":  # NVFP4's top scale depends on what is offered
        each = torch.stack([cost((clip,)) for clip in offered]).amin(0)
        assert torch.allclose(best, each, rtol=1e-4)


def test_low_rank_is_the_best_in_its_metric():
    gen = seeded(11)
    for n, k, rank in ((192, 256, 48), (640, 512, 16), (512, 640, 32)):  # the first is exact
        w = torch.randn(n, k, generator=gen) * torch.exp(torch.randn(k, generator=gen))
        rows, columns = torch.randn(20, k, generator=gen) * 3, torch.rand(k, generator=gen) + 0.05
        up, down = low_rank(w, rank, rows, columns)
        factor = torch.cat([rows, torch.diag(columns)])
        best = torch.linalg.svdvals(w @ factor.T)[rank:].norm()
        found = ((w - up @ down) @ factor.T).norm()
        assert best * 0.9999 < found < best * (1.0001 if n == 192 else 1.01)
        plain_up, plain_down = low_rank(w, rank)
        assert found < ((w - plain_up @ plain_down) @ factor.T).norm()
        assert torch.allclose(up.T @ up, torch.eye(rank), atol=1e-4)


def test_few_rows_are_shrunk_towards_independence():
    gen = seeded(12)
    x = correlated(4000, gen) + 2
    truth = x.T @ x / len(x)
    for rows in (16, 64, 1000):
        sample = x[:rows]
        shrunk = Metric.of(sample, x.square().mean(0)).matrix()
        raw = sample.T @ sample / rows
        assert (shrunk - truth).norm() < (raw - truth).norm()
        assert torch.linalg.eigvalsh(shrunk.double())[0] > 0


# -- files -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_layers_come_back_from_the_format(precision, dtype):
    gen = seeded(13)
    w, bias = heavy(gen), torch.randn(N, generator=gen)
    unsigned = precision == "int4"
    layer, _ = quantized(w, Recipe(precision, 48, dtype=dtype), torch.nn.functional.gelu(correlated(256, gen)), 256, unsigned, bias)
    packed = pack_layer(layer)
    scales = nk.unpack_int4_scales if precision == "int4" else nk.unpack_nvfp4_scales
    back = LogicalLinear(
        precision,
        nk.unpack_qweight(packed["qweight"], N, K),
        scales(packed["wscales"], N, K),
        smooth=nk.unpack_vector(packed["smooth"], K),
        down=nk.unpack_down(packed["lora_down"], K, 48),
        up=nk.unpack_up(packed["lora_up"], N, 48),
        channel_scale=packed["wtscale"].float().repeat(N) if precision == "nvfp4" else None,
        bias=nk.unpack_vector(packed["bias"], N),
        act_unsigned=unsigned,
    )
    same(layer, back)
    assert layer.up.dtype == layer.smooth.dtype == layer.bias.dtype == dtype and layer.rank == 48
    assert (dense_weight(layer) - w).norm() < 0.25 * w.norm()


def test_the_shift_is_taken_back():
    """Outputs of shifted activations: the file's bias is the true one less SHIFT times the row sums of what the codes stand for."""
    gen = seeded(14)
    w, bias = heavy(gen) + 0.05, torch.randn(N, generator=gen)
    x = torch.nn.functional.gelu(2 * torch.randn(256, K, generator=gen), approximate="tanh")
    layer, _ = quantized(w, Recipe("int4"), x, act_unsigned=True, bias=bias)
    rows = (dense_weight4(layer) / layer.smooth.float()).double().sum(1)
    assert torch.equal(layer.bias, (bias.double() - 0.171875 * rows).float().bfloat16()) or torch.allclose(
        layer.bias.double(), bias.double() - 0.171875 * rows, rtol=2**-8, atol=1e-6
    )
    assert (layer.bias.float() - bias).abs().max() > 0.05 and (dense_bias(layer) - bias).abs().max() < 0.02
    exact = (x + 0.171875) @ (dense_weight4(layer) / layer.smooth.float()).T + x @ (layer.up.float() @ layer.down.float()).T
    assert (exact + layer.bias.float() - (x @ dense_weight(layer).T + bias)).abs().max() < 0.03


def test_one_smooth_for_linears_of_one_input():
    gen = seeded(15)
    a, b = heavy(gen), torch.randn(128, K, generator=gen) * 0.05
    x = correlated(256, gen)
    smooth = choose_smoothing([a, b], statistics(x), Recipe())
    assert smooth.shape == (K,) and smooth.dtype == torch.bfloat16 and (smooth > 0).all() and len(smooth.unique()) > 10
    for w in (a, b):
        with_it, without = (svd_quantize(w, None, Recipe(), s, statistics(x))[1].output_snr_db for s in (smooth, None))
        assert with_it > without + 1
    assert torch.equal(svd_quantize(a, None, Recipe(), smooth)[0].smooth, smooth)
    assert choose_smoothing([a], statistics(x), Recipe(migrations=())) is None
    even = torch.randn(N, K, generator=gen), torch.randn(512, K, generator=gen)
    assert len(choose_smoothing([even[0]], statistics(even[1]), Recipe()).unique()) <= 2  # nothing to gain: none


def test_fp4_inputs_are_brought_into_the_range_of_their_scales():
    """e4m3 scales without a scale above them lose small activations; smoothing carries that scale."""
    gen = seeded(16)
    w, x = torch.randn(N, K, generator=gen), torch.randn(512, K, generator=gen) * 2e-3
    smooth = choose_smoothing([w], statistics(x), Recipe("nvfp4"))
    layer, error = svd_quantize(w, None, Recipe("nvfp4"), smooth, statistics(x))
    assert error.output_snr_db > error.naive_output_snr_db + 6
    assert 100 < (x / smooth.float()).abs().max() < 700


@pytest.mark.parametrize("precision", PRECISIONS)
def test_statistics_without_rows(precision):
    gen = seeded(17)
    w, x = torch.randn(N, K, generator=gen), torch.randn(512, K, generator=gen)
    x[:, ::30] *= 30
    layer, error = quantized(w, Recipe(precision), x, rows=0)
    assert error.output_snr_db is None
    assert noise(layer, w, x) < 0.5 * noise(svd_quantize(w, None, Recipe(precision))[0], w, x)
    with pytest.raises(ValueError, match="calibrate first"):
        quantized(w, Recipe(precision, gptq=True), x, rows=0)


def test_statistics_of_columns():
    x = torch.randn(64, K, generator=seeded(18))
    part = statistics(x, 32).columns(128, 256)
    want = statistics(x[:, 128:256], 32)
    assert all(torch.equal(getattr(part, f), getattr(want, f)) for f in ("amax", "square", "sample")) and part.count == 64


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_comes_out_the_same_twice(precision):
    gen = seeded(19)
    w, x = heavy(gen, 512, 512), correlated(256, gen, 512)
    recipe = Recipe(precision, gptq=True)
    (a, first), (b, again) = (quantized(w, recipe, x) for _ in range(2))
    same(a, b)
    assert first == again


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros(precision, known):
    gen = seeded(20)
    x = correlated(128, gen)
    x[:, :70] = 0
    recipe = Recipe(precision, gptq=known)
    layer, error = quantized(torch.zeros(128, K), recipe, x if known else None)
    assert torch.equal(dense_weight(layer), torch.zeros(128, K)) and error.weight_snr_db == math.inf
    w = heavy(gen)
    w[:, 100:180] = 0
    w[7] = 0
    layer, error = quantized(w, recipe, x if known else None)
    assert torch.isfinite(dense_weight(layer)).all() and error.weight_snr_db > 10 and torch.isfinite(layer.smooth).all()
    assert dense_weight(layer)[7].abs().max() < 0.05 * w.abs().max()
    silent = InputStatistics(torch.zeros(K), torch.zeros(K), torch.zeros(80, K), 80)
    smooth = choose_smoothing([w], silent, recipe)
    layer, error = svd_quantize(w, None, recipe, smooth, silent)
    assert (smooth > 0).all() and (dense_weight(layer) - w).norm() < 0.3 * w.norm() and not math.isnan(error.output_snr_db)


def test_the_smallest_linear_and_wide_ranks():
    gen = seeded(21)
    w = torch.randn(128, 128, generator=gen)
    for precision in PRECISIONS:
        layer, error = quantized(w, Recipe(precision, 128), torch.randn(100, 128, generator=gen))
        assert layer.rank == 128 and error.weight_snr_db > 40  # the branch holds all of it, in bf16
        layer, _ = quantized(w, Recipe(precision, 144))
        assert layer.rank == 144 and not layer.up[:, 128:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_other_types(dtype):
    gen = seeded(22)
    w = heavy(gen).to(dtype)
    layer, _ = quantized(w, Recipe("int4"), correlated(128, gen), bias=torch.zeros(N, dtype=torch.float16))
    assert (dense_weight(layer) - w.float()).norm() < 0.25 * w.float().norm()


def test_what_does_not_fit_is_told():
    w, known = torch.randn(128, 256), statistics(torch.randn(80, 256))
    for weight in (torch.zeros(128, 192), torch.zeros(100, 128), torch.zeros(128), torch.zeros(0, 128)):
        with pytest.raises(ValueError, match="multiples of 128"):
            svd_quantize(weight, None, Recipe())
    for call in (
        lambda: svd_quantize(w, torch.zeros(64), Recipe()),
        lambda: svd_quantize(w, None, Recipe(), torch.ones(128)),
        lambda: svd_quantize(w, None, Recipe(), None, known.columns(0, 128)),
        lambda: choose_smoothing([w], known.columns(0, 128), Recipe()),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
    bad = w.clone()
    bad[5, 6] = math.nan
    for call in (lambda: svd_quantize(bad, None, Recipe()), lambda: choose_smoothing([bad], known, Recipe())):
        with pytest.raises(ValueError, match="weight has numbers that are infinite"):
            call()
    with pytest.raises(ValueError, match="sample has numbers"):
        svd_quantize(w, None, Recipe(), None, replace(known, sample=known.sample / 0))
    with pytest.raises(ValueError, match="above zero"):
        svd_quantize(w, None, Recipe(), torch.zeros(256))
    with pytest.raises(ValueError, match="same K"):
        choose_smoothing([w, torch.zeros(128, 128)], None, Recipe())
    with pytest.raises(ValueError, match="INT4 property"):
        svd_quantize(w, None, Recipe("nvfp4"), act_unsigned=True)
    with pytest.raises(ValueError, match="write the file in bfloat16"):
        svd_quantize(w, torch.full((128,), 1e6), Recipe(dtype=torch.float16))
    for wrong in ({"precision": "fp8"}, {"rank": 20}, {"rank": 0}, {"migrations": (1.5,)}, {"refinements": -1}, {"dtype": torch.float32}):
        with pytest.raises(ValueError, match="expected"):
            Recipe(**wrong)
