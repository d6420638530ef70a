"""Rounding and division inside Triton kernels, right on the hardware and in the interpreter.

The interpreter truncates fp32 -> bf16, converts fp32 -> e4m3 wrongly and computes bf16 arithmetic wrongly (Triton 3.6 to 3.9). So with
EMULATE (a constexpr, true under TRITON_INTERPRET) bf16 is rounded and e4m3 encoded with integers, and matrix operands are raised to fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .targets import Target, interpreting

# `divided`: Triton's minus is a subtraction, PTX negates for nothing.
_DIVIDED = tl.constexpr("""{
    .reg .f32 first, minus, rest;
    mul.rn.f32 first, $1, $3;
    neg.f32 minus, first;
    fma.rn.f32 rest, minus, $2, $1;
    fma.rn.f32 $0, rest, $3, first;
}""")


@triton.jit
def rne(x):
    """fp32 -> nearest integer, ties to even, as fp32; |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def inverse_of(b, PTX: tl.constexpr):
    """About 1 / b, for `divided`."""
    if PTX:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [b], dtype=tl.float32, is_pure=True, pack=1)
    else:
        first = 1.0 / b
        y = tl.fma(tl.fma(-b, first, 1.0), first, first)
    return y


@triton.jit
def divided(a, b, inverse, PTX: tl.constexpr, EMULATE: tl.constexpr):
    """a / b with inverse = inverse_of(b): a product and its correction in place of a division (Markstein, 1990).

    The error before the one rounding is below 2^-44: to nearest for operands of 16-bit types, whose quotients stay further from every tie.
    """
    if EMULATE:  # the interpreter's fma rounds twice
        y = tl.div_rn(a, tl.broadcast_to(b, a.shape))
    elif PTX:
        y = tl.inline_asm_elementwise(_DIVIDED, "=f,f,f,f", [a, b, inverse], dtype=tl.float32, is_pure=True, pack=1)
    else:
        first = a * inverse
        y = tl.fma(tl.fma(first, -b, a), inverse, first)
    return y


@triton.jit
def safe_scale(scale):
    """A scale to divide by: 1 for 0, and nothing whose reciprocal overflows."""
    return tl.where(scale > 0.0, tl.maximum(scale, 1e-30), 1.0)


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
def rounded_pairs(x, DTYPE: tl.constexpr, PTX: tl.constexpr, EMULATE: tl.constexpr):
    """`rounded`, two numbers an instruction: LLVM converts them one by one, on a unit with an eighth of the rate.

    Not pure, so that a dot's operand is converted to its layout behind the rounding; computed in that layout, each warp would do all of it.
    """
    if PTX and tl.bfloat16 == DTYPE:
        asm: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        y = tl.inline_asm_elementwise(asm, "=r,r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=2).to(tl.float32)
    elif PTX and tl.float16 == DTYPE:
        asm: tl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
        y = tl.inline_asm_elementwise(asm, "=r,r,r", [x], dtype=tl.float16, is_pure=False, pack=2).to(tl.float32)
    else:
        y = rounded(x, DTYPE, EMULATE)
    return y


@triton.jit
def in_registers(x, PTX: tl.constexpr):
    """bf16 x itself, as a dot's left operand that Triton cannot leave in shared memory."""
    if PTX:
        y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        y = x
    return y


@triton.jit
def settled(acc, PTX: tl.constexpr):
    """An accumulator itself, used: what was multiplied into it so far has to be finished here."""
    if PTX:
        y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = acc
    return y


@triton.jit
def held(x, PTX: tl.constexpr):
    """A tile fetched long before, used from here on. Triton would store it in shared memory, and wait for it, where it is fetched."""
    if PTX and x.dtype == tl.float32:
        y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=x.dtype, is_pure=False, pack=1)
    elif PTX:
        y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    else:
        y = x
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


def has_ptx(target: Target) -> bool:
    """Whether a kernel's inline PTX is understood: NVIDIA's compiler does, the interpreter does not, even with tensors on a GPU."""
    return target.name.startswith("sm_") and not interpreting()


def has_pairs(target: Target) -> bool:
    """PTX of `inverse_of`, `divided` and `rounded_pairs`: sm_80 and newer."""
    return target.has_dot and has_ptx(target)
