"""Rounding inside Triton kernels, right on the hardware and in the interpreter.

The interpreter truncates fp32 -> bf16, converts fp32 -> e4m3 wrongly and computes bf16 arithmetic wrongly (Triton 3.6 to 3.9). So with
EMULATE (a constexpr, true under TRITON_INTERPRET) bf16 is rounded and e4m3 encoded with integers, and matrix operands are raised to fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rne(x):
    """fp32 -> nearest integer, ties to even, as fp32; |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def reciprocal(b):
    """1 / b to nearest; b nearer to 0 than 1e-30 counts as 1e-30, so that it stays finite."""
    held = tl.where(tl.abs(b) < 1e-30, 1e-30, b)
    return tl.div_rn(tl.full(held.shape, 1.0, tl.float32), held)


@triton.jit
def quotient(a, b, inverse, EMULATE: tl.constexpr):
    """a / b to nearest, with inverse = 1 / b to nearest: a product and its correction in place of a division (Markstein, 1990)."""
    if EMULATE:  # the interpreter's fma rounds twice
        y = tl.div_rn(a, tl.broadcast_to(b, a.shape))
    else:
        first = a * inverse
        y = tl.fma(tl.fma(-first, b, a), inverse, first)
    return y


@triton.jit
def _bf16_bits(x):
    bits = x.to(tl.uint32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def rounded(x, DTYPE: tl.constexpr, EMULATE: tl.constexpr):
    """fp32 -> fp32 that holds the nearest DTYPE number (bf16, fp16; fp32 unchanged)."""
    if EMULATE and tl.bfloat16 == DTYPE:
        y = (_bf16_bits(x) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(DTYPE).to(tl.float32)
    return y


@triton.jit
def rounded_finite(x, DTYPE: tl.constexpr, EMULATE: tl.constexpr):
    """As `rounded`, but fp16 saturates: an infinity would spoil the scale of its whole group."""
    if tl.float16 == DTYPE:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return rounded(x, DTYPE, EMULATE)


@triton.jit
def rounded_or_kept(x, DTYPE: tl.constexpr, EMULATE: tl.constexpr):
    """As `rounded`, but what fp16 cannot hold stays as it is: it becomes a code and a scale, which can."""
    y = rounded(x, DTYPE, EMULATE)
    if tl.float16 == DTYPE:
        y = tl.where(tl.abs(x) > 65504.0, x, y)
    return y


@triton.jit
def storable(x, DTYPE: tl.constexpr, EMULATE: tl.constexpr):
    """fp32 -> DTYPE tensor for a store, to nearest even."""
    if EMULATE and tl.bfloat16 == DTYPE:
        y = _bf16_bits(x).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def operand(x, DTYPE: tl.constexpr, EMULATE: tl.constexpr):
    """fp32 that already holds DTYPE numbers -> what tl.dot is given: DTYPE, in the interpreter fp32."""
    if EMULATE:
        y = x
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def e4m3_value(x):
    """0 <= x <= 448, fp32 -> nearest e4m3 number as fp32, ties to even, on every target."""
    bits = x.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) << 20
    subnormal = rne(x * 512.0) * 0.001953125
    return tl.where(x < 0.015625, subnormal, normal.to(tl.float32, bitcast=True))


@triton.jit
def e4m3_byte(x, EMULATE: tl.constexpr):
    """|x| <= 448, fp32 -> e4m3 byte (uint8), to nearest even."""
    if EMULATE:
        magnitude = tl.abs(x)
        bits = magnitude.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20).to(tl.int32) - 960  # 120 << 3: the exponent bias 127 becomes 7
        subnormal = rne(magnitude * 512.0).to(tl.int32)
        byte = tl.where(magnitude < 0.015625, subnormal, normal) + tl.where(x < 0, 128, 0)
        y = byte.to(tl.uint8)
    else:
        y = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return y


@triton.jit
def dot_split(a, b, acc, SPLIT_A: tl.constexpr, SPLIT_B: tl.constexpr, EMULATE: tl.constexpr):
    """acc + a @ b with bf16 matrix instructions for fp32 a and b. A split operand goes in as a bf16 number and its bf16 remainder,

    which keeps 16 bits of it without tf32; an operand that is not split must hold bf16 numbers already.
    """
    a_hi = rounded(a, tl.bfloat16, EMULATE)
    b_hi = rounded(b, tl.bfloat16, EMULATE)
    acc = tl.dot(operand(a_hi, tl.bfloat16, EMULATE), operand(b_hi, tl.bfloat16, EMULATE), acc, input_precision="ieee")
    if SPLIT_A:
        a_lo = rounded(a - a_hi, tl.bfloat16, EMULATE)
        acc = tl.dot(operand(a_lo, tl.bfloat16, EMULATE), operand(b_hi, tl.bfloat16, EMULATE), acc, input_precision="ieee")
    if SPLIT_B:
        b_lo = rounded(b - b_hi, tl.bfloat16, EMULATE)
        acc = tl.dot(operand(a_hi, tl.bfloat16, EMULATE), operand(b_lo, tl.bfloat16, EMULATE), acc, input_precision="ieee")
    return acc
