"""The doctor's self-test: every operation on one device, against its torch oracle and against the dense product in double precision.

Where no Triton kernel runs the operation is its oracle, so only the second comparison is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import t5_layout
from ..kernels.attention_fp16 import attention_fp16
from ..kernels.attention_fp16_torch import attention_fp16_torch
from ..kernels.layout import LogicalLinear, PartView, dense_bias, dense_weight, pack, plan, views
from ..kernels.norm_modulate import Norm, norm_modulate
from ..kernels.qk_norm_rope import qk_norm_rope_
from ..kernels.qk_norm_rope_torch import qk_norm_rope_torch
from ..kernels.smooth_quantize import smooth_quantize
from ..kernels.smooth_quantize_torch import smooth_quantize_torch
from ..kernels.t5_linear import t5_linear
from ..kernels.t5_linear_torch import t5_linear_torch, t5_weight
from ..kernels.targets import code_form, triton_reason
from ..kernels.w4_matmul import quantize_for, w4_matmul
from ..kernels.w4_matmul_torch import w4_matmul_torch
from ..kernels.w4a16_linear import w4a16_linear
from ..kernels.w4a16_linear_torch import w4a16_linear_torch

MEND = "Report this line with the output of doctor --json; until then choose compute weight_only, or set TONFA_COMPUTE=weight_only."
ORACLE = 3e-3  # relative error allowed between a kernel and its oracle
# Relative error allowed against the dense product: about twice what rounding the activations of a Gaussian input costs.
DENSE = {"exact": 0.2, "fast": 0.06, "w4a16": 0.01}
N, K, RANK, ROWS = 256, 384, 32, 96
MANY_ROWS = 272  # GPUs multiply this many through other kernels


@dataclass(frozen=True)
class Deviation:
    """A relative error that was found, and the one that is allowed."""

    what: str
    error: float
    limit: float


def relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|; infinite when anything found is not a number."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm()) if bool(found.isfinite().all()) else float("inf")


def random_linear(precision: str, unsigned: bool = False) -> LogicalLinear:
    """A linear [N, K] of random codes over their whole range, with every optional part present; always the same one."""
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (N, K), generator=g, dtype=torch.uint8)
    scales = torch.rand(N, K // (16 if precision == "nvfp4" else 64), generator=g) * 0.02 + 0.005
    bias = torch.randn(N, generator=g).bfloat16()
    if precision == "w4a16":
        scales = scales.bfloat16()
        return LogicalLinear(precision, codes, scales, zeros=(-7.5 * scales.float()).bfloat16(), bias=bias)
    return LogicalLinear(
        precision,
        codes,
        (scales * 32).to(torch.float8_e4m3fn) if precision == "nvfp4" else scales.bfloat16(),
        smooth=(torch.rand(K, generator=g) + 0.5).bfloat16(),
        down=(torch.randn(RANK, K, generator=g) / K**0.5).bfloat16(),
        up=(torch.randn(N, RANK, generator=g) * 0.05).bfloat16(),
        channel_scale=torch.rand(N, generator=g) * 0.02 + 0.02 if precision == "nvfp4" else None,
        bias=bias,
        act_unsigned=unsigned,
    )


def packed(layer: LogicalLinear, device: torch.device) -> PartView:
    spec = plan(layer.n, layer.k, [(layer, 0, 0)], code_form(device))
    return views(spec, pack(spec, [layer]).to(device))[0]


def random_input(device: torch.device, rows: int = ROWS, unsigned: bool = False) -> Tensor:
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(2))
    return (F.gelu(x, approximate="tanh") if unsigned else x).bfloat16().to(device)


def check_w4a4(device: torch.device, precision: str, mode: str, unsigned: bool, rows: int = ROWS) -> list[Deviation]:
    """quantize_for and w4_matmul, as one linear."""
    layer, x = random_linear(precision, unsigned), random_input(device, rows, unsigned)
    part, bias = packed(layer, device), layer.bias.to(device)
    name = f"{precision}{' after GELU' if unsigned else ''} {mode}, {rows} tokens"
    out = torch.full((rows, N), float("nan"), dtype=x.dtype, device=device)
    q = quantize_for(x, part, mode)
    found = w4_matmul(q, part, bias, out)
    dense = x.double().cpu() @ dense_weight(layer).double().t() + dense_bias(layer).double()
    deviations = [Deviation(f"{name} against dense", relative(found.cpu(), dense), DENSE[mode])]
    if triton_reason(device) is None:
        oracle = w4_matmul_torch(smooth_quantize_torch(x, part, mode, wide=q.kind == "half"), part, bias, torch.empty_like(out))
        deviations.append(Deviation(f"{name} against oracle", relative(found, oracle), ORACLE))
    return deviations


def sizes(device: torch.device) -> tuple[int, ...]:
    """Numbers of tokens that take different kernels."""
    return (ROWS, MANY_ROWS) if device.type == "cuda" else (ROWS,)


def check_int4(device: torch.device) -> list[Deviation]:
    cases = [(mode, unsigned, rows) for unsigned in (False, True) for mode in ("exact", "fast") for rows in sizes(device)]
    return [d for mode, unsigned, rows in cases for d in check_w4a4(device, "int4", mode, unsigned, rows)]


def check_nvfp4(device: torch.device) -> list[Deviation]:
    return [d for mode in ("exact", "fast") for rows in sizes(device) for d in check_w4a4(device, "nvfp4", mode, False, rows)]


def check_modulation(device: torch.device) -> list[Deviation]:
    """w4a16_linear, for one row: what a batch of one gives."""
    layer, x = random_linear("w4a16"), random_input(device, rows=1)
    part, bias = packed(layer, device), layer.bias.to(device)
    found = w4a16_linear(x, part, bias)
    dense = x.double().cpu() @ dense_weight(layer).double().t() + dense_bias(layer).double()
    deviations = [Deviation("against dense", relative(found.cpu(), dense), DENSE["w4a16"])]
    if triton_reason(device, needs_dot=False) is None:
        deviations.append(Deviation("against oracle", relative(found, w4a16_linear_torch(x, part, bias)), ORACLE))
    return deviations


def check_norm(device: torch.device) -> list[Deviation]:
    """norm_modulate against layer_norm in double precision, and as smooth_quantize's first step."""
    x, g = random_input(device), torch.Generator().manual_seed(3)
    shift, scale = (torch.randn(1, K, generator=g).bfloat16() for _ in range(2))
    norm = Norm(shift.to(device), scale.to(device), rows_per_batch=ROWS)
    dense = F.layer_norm(x.double().cpu(), (K,), eps=norm.eps) * (1 + scale.double()) + shift.double()
    deviations = [Deviation("against dense", relative(norm_modulate(x, norm).cpu(), dense), 0.01)]
    if triton_reason(device) is None:
        part = packed(random_linear("int4"), device)
        bias, out = None, torch.empty(ROWS, N, dtype=x.dtype, device=device)
        found = w4_matmul(smooth_quantize(x, part, "fast", norm), part, bias, out)
        oracle = w4_matmul_torch(smooth_quantize_torch(x, part, "fast", norm), part, bias, torch.empty_like(out))
        deviations.append(Deviation("fused, against oracle", relative(found, oracle), ORACLE))
    return deviations


def check_qk_norm_rope(device: torch.device) -> list[Deviation]:
    """qk_norm_rope_ with two heads of 128; against RMSNorm and rotation in double precision."""
    g, heads, dim = torch.Generator().manual_seed(4), 2, 128
    qkv = torch.randn(1, ROWS, 3 * heads * dim, generator=g).bfloat16()
    scales = [torch.rand(dim, generator=g) + 0.5 for _ in range(2)]
    angle = torch.rand(1, 1, ROWS, dim // 2, generator=g) * 6.3
    pe = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).unflatten(-1, (2, 2))
    dense = qkv.double().unflatten(-1, (3, heads, dim)).clone()
    for i, scale in enumerate(scales):
        normed = F.rms_norm(dense[:, :, i], (dim,), scale.double(), 1e-6).unflatten(-1, (dim // 2, 2))
        a, b = normed.unbind(-1)
        cos, sin = angle.double().cos().transpose(1, 2), angle.double().sin().transpose(1, 2)
        turned = torch.stack((cos * a - sin * b, sin * a + cos * b), -1)
        dense[:, :, i] = turned.flatten(-2)
    arguments = (scales[0].to(device), scales[1].to(device), pe.to(device), heads)
    found = qk_norm_rope_(qkv.to(device, copy=True), *arguments)
    deviations = [Deviation("against dense", relative(found.cpu(), dense.flatten(2)), 0.01)]
    if triton_reason(device) is None:
        deviations.append(Deviation("against oracle", relative(found, qk_norm_rope_torch(qkv.to(device, copy=True), *arguments)), ORACLE))
    return deviations


def check_t5(device: torch.device) -> list[Deviation]:
    """t5_linear for one token and for many, on fp32 activations as the host's encoder has them."""
    g, deviations = torch.Generator().manual_seed(5), []
    scales = torch.rand(N, K // t5_layout.GROUP, generator=g) * 0.02 + 0.005
    codes = torch.randint(0, 16, (N, K), generator=g, dtype=torch.uint8)
    blob = t5_layout.pack(t5_layout.T5Linear(codes, scales.half(), (-7.5 * scales).half()))
    view = t5_layout.views(t5_layout.read_spec(blob), blob.to(device))
    weight = t5_weight(view, 0, N).double().cpu()
    for rows in (1, ROWS):
        x = torch.randn(rows, K, generator=g)
        found = t5_linear(x.to(device), view)
        deviations.append(Deviation(f"{rows} rows, against dense", relative(found.cpu(), x.double() @ weight.t()), 1e-3))
        if triton_reason(device, needs_dot=False) is None:
            deviations.append(Deviation(f"{rows} rows, against oracle", relative(found, t5_linear_torch(x.to(device), view)), ORACLE))
    return deviations


def check_attention(device: torch.device) -> list[Deviation]:
    """attention_fp16 with two heads of 128 and values beyond fp16's range, against attention in double precision."""
    g = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, 2, ROWS, 128, generator=g).bfloat16() for _ in range(3))
    v[:, 0] *= 1e5
    scores = q.double() @ k.double().transpose(2, 3) / 128**0.5
    dense = (scores.softmax(3) @ v.double()).transpose(1, 2).flatten(2)
    on_device = [x.to(device) for x in (q, k, v)]
    found = attention_fp16(*on_device)
    deviations = [Deviation("against dense", relative(found.cpu(), dense), 0.01)]
    if triton_reason(device) is None:
        deviations.append(Deviation("against oracle", relative(found, attention_fp16_torch(*on_device)), ORACLE))
    return deviations


TESTS: dict[str, Callable[[torch.device], list[Deviation]]] = {
    "INT4 linear": check_int4,
    "NVFP4 linear": check_nvfp4,
    "modulation linear": check_modulation,
    "norm and modulation": check_norm,
    "q/k norm and RoPE": check_qk_norm_rope,
    "T5 linear": check_t5,
    "attention in fp16": check_attention,
}
