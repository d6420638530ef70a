"""SVDQuant (arXiv 2411.05007) of one linear: smoothing, a low-rank branch in 16 bits, and the rest in 4 bits, searched by output error.

    y = x @ W.T  ~  Q(x / t) @ W4.T + x @ down.T @ up.T         t = smooth

What a linear's inputs look like comes as InputStatistics. Without them its inputs count as independent and equally large.

Smoothing       t_j = span(x_j)^m / max|w_j|^(1 - m) for every migration strength m of the recipe and two spans, the largest |x_j| and the
                root of its mean square. Each is tried on some rows of the weight and of the sample; no smoothing is one of them.
Branch          first what rounding would cost most, then in turn what rounding the rest has left, as the outputs see it, and the rest
                anew (the refinements). Rounded factors are taken off, so that the 4 bits also take up their rounding.
4 bits          a search of clips, each group by itself, or GPTQ (svdquant_gptq.py).

Of the refinements the one is kept that does best on rows of the sample that none was fitted to. Errors are those of the kernels' exact
mode, in which activations are 4-bit too; the fast one rounds them less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.layout import SHIFT, LogicalLinear, dense_weight, dense_weight4
from .formats.nunchaku import GROUP, RANK_TILE, TILE
from .formats.quantize import codes_of, group_scales, low_rank, multipliers, nearest_codes
from .svdquant_gptq import gptq_values
from .svdquant_inputs import InputStatistics, LayerInputs, Metric, layer_inputs

__all__ = ["InputStatistics", "LayerError", "Recipe", "choose_smoothing", "svd_quantize"]

MIGRATIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CLIPS = {"int4": (1.0, 0.95, 0.91, 0.875, 0.84, 0.8, 0.75), "nvfp4": (1.0, 0.86, 0.93, 1.08, 1.2, 1.35, 1.5)}
SEARCH_WEIGHTS, SEARCH_ROWS = 2048, 256  # rows of weights and of the sample that smoothing is searched on
WORTH = 0.99  # noise of the best smoothing over that of none, above which there is none
FP4_INPUT = 6 * 448 / 4  # largest |x / t| that NVFP4 smoothing leaves: e4m3 scales with four times as much room above
_SMALLEST, _LARGEST = 2.0**-14, 2.0**14  # of smooth


@dataclass(frozen=True)
class Recipe:
    """How linears are quantised.

    precision    "int4" | "nvfp4"
    rank         of the branch, a multiple of 16
    migrations   strengths that smoothing is searched over; () = no smoothing
    refinements  how often the branch is fitted anew to what rounding has left
    gptq         round with feedback between columns (needs a sample)
    branch       False: a branch of zeros, for comparisons
    dtype        16-bit type of the file
    clipping     search the scale of every group
    """

    precision: str = "int4"
    rank: int = 32
    migrations: tuple[float, ...] = MIGRATIONS
    refinements: int = 2
    gptq: bool = False
    branch: bool = True
    dtype: torch.dtype = torch.bfloat16
    clipping: bool = True

    def __post_init__(self):
        if self.precision not in CLIPS:
            raise ValueError(f"precision is {self.precision!r}, expected int4 or nvfp4")
        if not 0 < self.rank <= 1024 or self.rank % RANK_TILE:
            raise ValueError(f"rank is {self.rank}, expected a multiple of {RANK_TILE} up to 1024")
        if not all(0 <= m <= 1 for m in self.migrations):
            raise ValueError(f"migrations are {self.migrations}, expected numbers from 0 to 1")
        if self.refinements < 0:
            raise ValueError(f"refinements is {self.refinements}, expected 0 or more")
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype is {self.dtype}, expected bfloat16 or float16")

    @staticmethod
    def naive(precision: str, dtype: torch.dtype = torch.bfloat16) -> Recipe:
        """Round to nearest: no smoothing, no branch, no search."""
        return Recipe(precision, RANK_TILE, (), 0, False, False, dtype, False)


@dataclass(frozen=True)
class LayerError:
    """Signal to noise in dB; infinite without noise. Weight: of what the layer stands for against the dense one. Output: of the linear's
    outputs without its bias on the sample, None without one; naive_output: the same of Recipe.naive."""

    weight_snr_db: float
    output_snr_db: float | None
    naive_output_snr_db: float | None


# -- smoothing ---------------------------------------------------------------------------------------------------------------------


def choose_smoothing(weights: Sequence[Tensor], statistics: InputStatistics | None, recipe: Recipe,
                     act_unsigned: bool = False) -> Tensor | None:  # fmt: skip
    """One smooth [K] of recipe.dtype for all linears that share an input, positive and finite; None when the recipe has no migrations.

    weights [N_i, K], any float type. Tried on at most 2048 of their rows together, with one branch for them, plain rounding and 256 rows of
    the sample; without a sample, on normal random rows. ValueError for shapes that do not fit and values that are not finite.
    """
    for weight in weights:
        _check(weight, None, None, statistics, recipe, act_unsigned)
    if len({weight.shape[1] for weight in weights}) != 1:
        raise ValueError(f"linears that share an input have the same K, found {[weight.shape[1] for weight in weights]}")
    if not recipe.migrations:
        return None
    largest = torch.stack([w.float().abs().amax(0) for w in weights]).amax(0)
    step = -(-sum(len(w) for w in weights) // SEARCH_WEIGHTS)
    weight = torch.cat([w[::step].float() for w in weights])
    known = _with_rows(statistics, weight, act_unsigned)
    candidates = [_limited(t, known, statistics is not None, recipe) for t in _smooth_candidates(known, largest, recipe, act_unsigned)]
    noise = torch.stack([_smoothing_noise(weight, t, known, recipe, act_unsigned) for t in candidates]).tolist()
    best = min(range(len(noise)), key=noise.__getitem__)
    return candidates[best if noise[best] < WORTH * noise[0] else 0]


def _with_rows(known: InputStatistics | None, like: Tensor, act_unsigned: bool) -> InputStatistics:
    """Statistics with rows to try on, on the weight's device: some of the sample, or normal random ones of the known mean squares."""
    if known is not None and len(known.sample):
        step = -(-len(known.sample) // SEARCH_ROWS)
        return replace(known, amax=known.amax.to(like), square=known.square.to(like), sample=known.sample[::step].to(like.device))
    square = torch.ones_like(like[0]) if known is None else known.square.to(like)
    gen = torch.Generator().manual_seed(0)
    rows = torch.randn(SEARCH_ROWS // 2, like.shape[1], generator=gen).to(like) * square.sqrt()
    rows = F.gelu(rows, approximate="tanh") if act_unsigned else rows
    return InputStatistics(torch.ones_like(square) if known is None else known.amax.to(like), square, rows.bfloat16(), 0)


def _smooth_candidates(known: InputStatistics, largest: Tensor, recipe: Recipe, act_unsigned: bool) -> list[Tensor]:
    """fp32 [K] each, ones first."""
    shift = SHIFT if act_unsigned else 0.0
    spans = [known.amax.float() + shift, known.square.sqrt() + shift]
    if torch.equal(spans[0], spans[1]):
        spans = spans[:1]
    spans = [span.clamp(min=1e-5 * float(span.max()) + 1e-30) for span in spans]
    largest = largest.clamp(min=1e-5 * float(largest.max()) + 1e-30)
    return [torch.ones_like(largest)] + [span**m / largest ** (1 - m) for m in recipe.migrations for span in spans]


def _limited(t: Tensor, known: InputStatistics, has_amax: bool, recipe: Recipe) -> Tensor:
    """t scaled as a whole, which INT4 does not feel, into the 16-bit type. NVFP4 does: its activations have e4m3 scales and no other."""
    if recipe.precision == "nvfp4" and has_amax:
        whole = (known.amax.float() / t).max() / FP4_INPUT
        whole = torch.where(whole > 0, whole, torch.ones_like(whole))
    else:
        whole = 1 / t.log().mean().exp()
    return (t * torch.exp2(whole.log2().ceil())).clamp(_SMALLEST, _LARGEST).to(recipe.dtype)


def _smoothing_noise(weight: Tensor, smooth: Tensor, known: InputStatistics, recipe: Recipe, act_unsigned: bool) -> Tensor:
    inputs = layer_inputs(known, smooth, recipe.precision, act_unsigned)
    w = weight * inputs.t
    rest = w
    if recipe.branch:
        up, down = low_rank(w, recipe.rank, columns=inputs.rounding_cost(GROUP[recipe.precision]).columns, steps=1)
        rest = w - up @ down
    scales, top = group_scales(rest, recipe.precision, recipe.dtype)
    four = _values(nearest_codes(rest, scales, top, recipe.precision), scales, top, recipe.precision)
    return (inputs.x @ rest.T - inputs.a @ four.T).square().sum()


# -- one linear --------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Split:
    """A linear as branch and 4 bits. up [N, R] and down [R, K] of the file's type, down for x itself; four fp32 [N, K]: codes times
    steps."""

    up: Tensor
    down: Tensor
    codes: Tensor
    scales: Tensor
    top: Tensor | None
    four: Tensor


def svd_quantize(weight: Tensor, bias: Tensor | None, recipe: Recipe, smooth: Tensor | None = None,
                 statistics: InputStatistics | None = None, act_unsigned: bool = False) -> tuple[LogicalLinear, LayerError]:  # fmt: skip
    """One W4A4 layer of a dense linear, and how good it is.

    weight [N, K] (multiples of 128) and bias [N], any float type, on the device where to compute; smooth [K] as `choose_smoothing` gives it
    (None = ones). act_unsigned: an INT4 layer fed by a GELU, whose stored bias takes back what shifting the activations by SHIFT adds.
    ValueError for sizes that FLUX files cannot hold, statistics that do not fit, and numbers that are not finite or leave recipe.dtype.
    """
    _check(weight, bias, smooth, statistics, recipe, act_unsigned)
    if recipe.gptq and (statistics is None or not len(statistics.sample)):
        raise ValueError("gptq needs sampled inputs: calibrate first, or leave gptq off")
    weight = weight.float()
    ones = torch.ones(weight.shape[1], device=weight.device, dtype=recipe.dtype)
    smooth = ones if smooth is None else smooth.to(weight.device, recipe.dtype)
    inputs = layer_inputs(statistics, smooth, recipe.precision, act_unsigned)
    split = _best_split(weight * inputs.t, inputs, recipe)
    layer = _layer(split, bias, smooth, recipe, act_unsigned)
    found = 10 * _log10(weight.square().sum(), (weight - dense_weight(layer)).square().sum())
    if not len(inputs.x):
        return layer, LayerError(found, None, None)
    naive_recipe = Recipe.naive(recipe.precision, recipe.dtype)
    naive_inputs = layer_inputs(statistics, ones, recipe.precision, act_unsigned)
    naive = _best_split(weight, naive_inputs, naive_recipe)
    outputs = [_output_snr(weight * i.t, s, i) for i, s in ((inputs, split), (naive_inputs, naive))]
    return layer, LayerError(found, *outputs)


def _check(weight: Tensor, bias: Tensor | None, smooth: Tensor | None, known: InputStatistics | None, recipe: Recipe,
           act_unsigned: bool) -> None:  # fmt: skip
    if weight.ndim != 2 or weight.shape[0] % TILE or weight.shape[1] % TILE or not weight.numel():
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [N, K], both multiples of {TILE}")
    n, k = weight.shape
    if act_unsigned and recipe.precision != "int4":
        raise ValueError(f"act_unsigned is an INT4 property, the recipe is {recipe.precision}")
    expected = {"bias": (bias, (n,)), "smooth": (smooth, (k,))}
    if known is not None:
        expected |= {"amax": (known.amax, (k,)), "square": (known.square, (k,)), "sample": (known.sample, (len(known.sample), k))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    for name, tensor in {"weight": weight, **{name: tensor for name, (tensor, _) in expected.items()}}.items():
        if tensor is not None and not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{name} has numbers that are infinite or not a number: it cannot be quantised")
    if smooth is not None and not (smooth.to(recipe.dtype) > 0).all():
        raise ValueError(f"smooth has numbers that are not above zero in {recipe.dtype}: it cannot divide by them")


def _best_split(w: Tensor, inputs: LayerInputs, recipe: Recipe) -> _Split:
    """Branch and 4 bits of w = weight * t, the best of those that the refinements come by."""
    outputs = inputs.x[inputs.score] @ w.T
    best, least = None, math.inf

    def keep(split: _Split) -> None:
        nonlocal best, least
        noise = float(_noise(w, outputs, split, inputs))
        if best is None or noise < least:
            best, least = split, noise

    pair = _branch(w, inputs.rounding_cost(GROUP[recipe.precision]), inputs, recipe)
    metric = inputs.moments()
    for left in range(recipe.refinements, -1, -1):
        split = _nearest(w, pair, inputs, recipe)
        keep(split)
        if left and recipe.branch:
            pair = _branch(w - split.four, metric, inputs, recipe)
            keep(replace(split, up=pair[0], down=pair[1]))
    if recipe.gptq:
        split = _fed_back(w, (best.up, best.down), inputs, recipe)
        keep(split)
        if recipe.refinements and recipe.branch:
            up, down = _branch(w - split.four, metric, inputs, recipe)
            keep(replace(split, up=up, down=down))
    return best


def _branch(w: Tensor, metric: Metric, inputs: LayerInputs, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(up, down) in the file's type for what w is, seen by the metric."""
    if not recipe.branch:
        return w.new_zeros(w.shape[0], recipe.rank, dtype=recipe.dtype), w.new_zeros(recipe.rank, w.shape[1], dtype=recipe.dtype)
    up, down = low_rank(w, recipe.rank, metric.rows, metric.columns)
    short = recipe.rank - up.shape[1]  # of a matrix with fewer rows or columns than that
    return F.pad(up, (0, short)).to(recipe.dtype), F.pad(down / inputs.t, (0, 0, 0, short)).to(recipe.dtype)


def _product(up: Tensor, down: Tensor, inputs: LayerInputs) -> Tensor:
    return up.float() @ (down.float() * inputs.t)


def _values(codes: Tensor, scales: Tensor, top: Tensor | None, precision: str) -> Tensor:
    steps = None if top is None else top.expand(len(codes))
    return dense_weight4(LogicalLinear(precision, codes, scales, channel_scale=steps))


def _nearest(w: Tensor, pair: tuple[Tensor, Tensor], inputs: LayerInputs, recipe: Recipe) -> _Split:
    rest = w - _product(*pair, inputs)
    clips = CLIPS[recipe.precision] if recipe.clipping else (1.0,)
    scales, top = group_scales(rest, recipe.precision, recipe.dtype, clips, inputs.square)
    codes = nearest_codes(rest, scales, top, recipe.precision)
    return _Split(*pair, codes, scales, top, _values(codes, scales, top, recipe.precision))


def _fed_back(w: Tensor, pair: tuple[Tensor, Tensor], inputs: LayerInputs, recipe: Recipe) -> _Split:
    """As _nearest, rounded by GPTQ at the same scales."""
    rest = w - _product(*pair, inputs)
    clips = CLIPS[recipe.precision] if recipe.clipping else (1.0,)
    scales, top = group_scales(rest, recipe.precision, recipe.dtype, clips, inputs.square)
    values = gptq_values(rest, multipliers(scales, top), inputs.quantized_moments().matrix(), recipe.precision)
    codes = codes_of(values, recipe.precision)
    return _Split(*pair, codes, scales, top, _values(codes, scales, top, recipe.precision))


def _noise(w: Tensor, outputs: Tensor, split: _Split, inputs: LayerInputs) -> Tensor:
    """Squared error of outputs [S, N] of the rows to score by; without rows, of independent inputs."""
    if not len(inputs.score):
        return ((w - split.four - _product(split.up, split.down, inputs)).square() * inputs.square).sum()
    return (outputs - _outputs(split, inputs, inputs.score)).square().sum()


def _outputs(split: _Split, inputs: LayerInputs, rows: Tensor) -> Tensor:
    branch = (inputs.x[rows] @ (split.down.float() * inputs.t).T) @ split.up.float().T
    return inputs.a[rows] @ split.four.T + branch


def _output_snr(w: Tensor, split: _Split, inputs: LayerInputs) -> float:
    every = torch.arange(len(inputs.x), device=w.device)
    outputs = inputs.x @ w.T
    return 10 * _log10(outputs.square().sum(), (outputs - _outputs(split, inputs, every)).square().sum())


def _log10(signal: Tensor, noise: Tensor) -> float:
    signal, noise = float(signal), float(noise)
    if noise == 0:
        return math.inf
    return math.log10(signal / noise) if signal else -math.inf


def _layer(split: _Split, bias: Tensor | None, smooth: Tensor, recipe: Recipe, act_unsigned: bool) -> LogicalLinear:
    n = len(split.codes)
    bias = torch.zeros(n, device=smooth.device) if bias is None else bias.to(smooth.device).float()
    if act_unsigned:
        bias = bias - SHIFT * (split.four / smooth.float()).sum(1)
    stored = {"scales": split.scales.float(), "down": split.down, "up": split.up, "bias": bias.to(recipe.dtype)}
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} of this linear leaves the range of {recipe.dtype}: write the file in bfloat16")
    steps = None if split.top is None else split.top.repeat(n)
    return LogicalLinear(
        recipe.precision, split.codes, split.scales, None, smooth, split.down, split.up, steps, stored["bias"], act_unsigned
    )
