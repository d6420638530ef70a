"""The operators that compiled code is made of: torch.compile sees one opaque call where eager code launches kernels itself.

Importing this module registers them, so it is imported only while torch.compile traces (an operator call costs tens of microseconds that
eager code need not pay). Each function here has the arguments of its eager twin.

ComfyUI imports the pack under a name made from its path; a second import under `tonfa` is another pack with other tables. So every import
registers under a namespace of its own: `tonfa` for the first, `tonfa_2` and so on for later ones.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..kernels import layout, t5_layout, targets
from ..kernels.norm_gate import norm_gate as norm_gate_now
from ..kernels.norm_modulate import Norm
from ..kernels.norm_modulate import norm_modulate as norm_modulate_now
from ..kernels.qk_norm_rope import qk_norm_rope_ as qk_norm_rope_now_
from ..kernels.t5_linear import t5_linear as t5_linear_now
from . import attention
from .linear import Ending, packed_linear, spec_of
from .lora import Side


def _free_namespace() -> str:
    names = itertools.chain(("tonfa",), (f"tonfa_{i}" for i in itertools.count(2)))
    return next(name for name in names if not hasattr(getattr(torch.ops, name), "linear"))


NAMESPACE = _free_namespace()
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # the operators live as long as this does
OPS = getattr(torch.ops, NAMESPACE)


def _register(schema: str, run: object, fake: object) -> None:
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


# -- a packed linear with its neighbours ---------------------------------------------------------------------------------------------

_LINEAR = (
    "Tensor[] xs, Tensor blob, Tensor? bias, int handle, str compute, Tensor? shift, Tensor? scale, SymInt rows_per_batch, float eps, "
    "bool rms, int? gelu_from, Tensor? gate, Tensor? residual, bool swiglu, Tensor[] columns, int[] segments"
)


def linear(
    x: Tensor | list[Tensor],
    blob: Tensor,
    bias: Tensor | None,
    handle: int,
    compute: str,
    norm: Norm | None,
    ending: Ending | None,
    out: Tensor | None,
    side: Side | None = None,
) -> Tensor:
    """PackedLinear with a side of columns only. handle: the layout's number (linear.spec_handle)."""
    norm, ending = norm or Norm(None, None, 1), ending or Ending()
    xs = [x] if isinstance(x, Tensor) else list(x)
    arguments = (xs, blob, bias, handle, compute, norm.shift, norm.scale, norm.rows_per_batch, norm.eps, norm.rms)
    arguments += (ending.gelu_from, ending.gate, ending.residual, ending.swiglu, *_flat(side, xs[0].device))
    if out is None:
        return OPS.linear(*arguments)
    OPS.linear_into(*arguments, out)
    return out


def _flat(side: Side | None, device: torch.device) -> tuple[list[Tensor], list[int]]:
    """A side's columns as an operator takes them: (down, up) of every part that has some; for every part how many segments, and where."""
    found = () if side is None else side.to(device).columns
    tensors = [t for c in found if c is not None for t in (c.down, c.up)]
    return tensors, [number for c in found for number in ((0,) if c is None else (len(c.segments), *c.segments))]


def _columns(tensors: list[Tensor], segments: list[int]) -> list[layout.Columns | None]:
    """What _flat was given."""
    pairs, numbers, found = iter(tensors), iter(segments), []
    for count in numbers:
        starts = tuple(next(numbers) for _ in range(count))
        found.append(layout.Columns(next(pairs), next(pairs), starts) if starts else None)
    return found


def _linear(
    xs, blob, bias, handle, compute, shift, scale, rows_per_batch, eps, rms, gelu_from, gate, residual, swiglu, columns, segments, out=None
) -> Tensor:
    spec = spec_of(handle)
    norm = None if scale is None else Norm(shift, scale, rows_per_batch, eps, rms)
    x, parts = xs[0] if len(xs) == 1 else list(xs), layout.views(spec, blob)
    for part, extra in zip(parts, _columns(columns, segments), strict=False):
        part.extra = extra
    return packed_linear(spec, parts, x, bias, compute, norm, Ending(gelu_from, gate, residual, swiglu=swiglu), out)


def _linear_fake(xs, blob, bias, handle, *rest) -> Tensor:
    swiglu = rest[-3]
    return xs[0].new_empty(*xs[0].shape[:-1], spec_of(handle).out_features // (2 if swiglu else 1))


def _linear_into(*arguments) -> None:
    _linear(*arguments)


_register(f"linear({_LINEAR}) -> Tensor", _linear, _linear_fake)
_register(f"linear_into({_LINEAR}, Tensor(a!) out) -> ()", _linear_into, lambda *arguments: None)


# -- a linear of the T5 encoder --------------------------------------------------------------------------------------------------------


def t5_linear(x: Tensor, blob: Tensor, spec: t5_layout.T5Spec) -> Tensor:
    """t5_linear on x [M, K] and a packed weight."""
    return OPS.t5_linear(x, blob, spec.n, spec.k, spec.scale_dtype)


def _t5_linear(x: Tensor, blob: Tensor, n: int, k: int, scale_dtype: torch.dtype) -> Tensor:
    return t5_linear_now(x, t5_layout.views(t5_layout.T5Spec(n, k, scale_dtype), blob))


_register(
    "t5_linear(Tensor x, Tensor blob, int n, int k, ScalarType scale_dtype) -> Tensor",
    _t5_linear,
    lambda x, blob, n, *rest: x.new_empty(x.shape[0], n),
)


# -- what stands between linears ------------------------------------------------------------------------------------------------------


def norm_modulate(x: Tensor, norm: Norm) -> Tensor:
    """norm_modulate on rows x [M, K]."""
    return OPS.norm_modulate(x, norm.shift, norm.scale, norm.rows_per_batch, norm.eps, norm.rms)


_register(
    "norm_modulate(Tensor x, Tensor? shift, Tensor scale, SymInt rows_per_batch, float eps, bool rms=False) -> Tensor",
    lambda x, *norm: norm_modulate_now(x, Norm(*norm)),
    lambda x, *rest: x.new_empty(x.shape),
)


def norm_gate(x: Tensor, y: Tensor, gate: Tensor, rows_per_batch: int, eps: float, out: Tensor | None = None) -> Tensor:
    """norm_gate on rows x, y [M, K]."""
    if out is None:
        return OPS.norm_gate(x, y, gate, rows_per_batch, eps)
    OPS.norm_gate_into(x, y, gate, rows_per_batch, eps, out)
    return out


def _norm_gate_into(*arguments) -> None:
    norm_gate_now(*arguments)


_NORM_GATE = "Tensor x, Tensor y, Tensor gate, SymInt rows_per_batch, float eps"
_register(f"norm_gate({_NORM_GATE}) -> Tensor", norm_gate_now, lambda x, *rest: x.new_empty(x.shape))
_register(f"norm_gate_into({_NORM_GATE}, Tensor(a!) out) -> ()", _norm_gate_into, lambda *arguments: None)


def qk_norm_rope_(qkv: Tensor, query_scale: Tensor, key_scale: Tensor, pe: Tensor | None, heads: int, eps: float) -> Tensor:
    """qk_norm_rope_: in place; returns qkv."""
    OPS.qk_norm_rope_(qkv, query_scale, key_scale, pe, heads, eps)
    return qkv


def _qk_norm_rope(*arguments) -> None:
    qk_norm_rope_now_(*arguments)


_register(
    "qk_norm_rope_(Tensor(a!) qkv, Tensor query_scale, Tensor key_scale, Tensor? pe, int heads, float eps) -> ()",
    _qk_norm_rope,
    lambda *arguments: None,
)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """attention.attend_now on q, k, v [B, H, L, D] -> [B, L, H * D]."""
    return OPS.attend(q, k, v, mask)


_register(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor",
    lambda q, k, v, mask: attention.attend_now(q, k, v, mask).contiguous(),
    lambda q, k, v, mask: q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3]),
)


# -- questions that are answered while tracing -----------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def resolve_compute(requested: str, device: torch.device) -> str:
    """targets.resolve_compute, asked once when the code is compiled."""
    return targets.resolve_compute(requested, device)


@torch.compiler.assume_constant_result
def prefers_cudnn(device: torch.device) -> bool:
    """attention.prefers_cudnn, asked once when the code is compiled."""
    return attention.prefers_cudnn(device)
