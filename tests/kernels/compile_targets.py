"""Compiles every kernel for every kind of GPU, without one, and looks at what came out.

Run by test_compile.py in a process of its own, because Triton's interpreter and its compiler cannot share one. Prints one JSON line per
compiled kernel: target, kernel, whether it compiled, which matrix instructions it should hold and whether it does, spilled bytes, shared
memory against the target's limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from tonfa.kernels import attention_fp16_triton as attention
from tonfa.kernels import expand_weight_triton as expand
from tonfa.kernels import norm_gate_triton as norm_gate
from tonfa.kernels import norm_modulate_triton as norm_modulate
from tonfa.kernels import qk_norm_rope_triton as rope
from tonfa.kernels import rounding
from tonfa.kernels import row_statistics_triton as statistics
from tonfa.kernels import smooth_quantize_triton as quantize
from tonfa.kernels import w4_matmul_triton as matmul
from tonfa.kernels import w4_matmul_wide as wide
from tonfa.kernels import w4a16_linear_triton as linear
from tonfa.kernels.block_scale import BLOCK
from tonfa.kernels.smooth_quantize_torch import plain_dtype
from tonfa.kernels.targets import Target, cuda_target, hip_target
from tonfa.kernels.tiles import QUANTIZE_PIECES, Tile, matmul_tile, quantize_tile, wide_bands
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUDA = (75, 80, 86, 89, 90, 100, 120)
HIP = ("gfx942", "gfx1100", "gfx1201")
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int8: "*i8"}


@dataclass
class Variant:
    """One kernel as a launcher would ask for it: argument types by name ("constexpr" values in constants), and what must be inside."""

    name: str
    fn: object
    types: dict[str, str]
    constants: dict[str, object]
    warps: int
    stages: int
    instructions: tuple[str, ...]
    registers: int | None = None


def gpu_target(target: Target) -> GPUTarget:
    if target.name.startswith("sm_"):
        return GPUTarget("cuda", int(target.name[3:]), 32)
    return GPUTarget("hip", target.name, 64 if target.name.startswith("gfx9") else 32)


def compile_variant(variant: Variant, target: Target):
    names = variant.fn.arg_names
    signature = {n: "constexpr" if n in variant.constants else variant.types[n] for n in names}
    constants = {(names.index(n),): v for n, v in variant.constants.items()}
    # As in a launch at FLUX sizes: pointers and sizes are multiples of 16, except what the kernel does not specialise on.
    unknown = {n for n, t in signature.items() if t in ("constexpr", "fp32")} | set(variant.fn.do_not_specialize)
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in unknown}
    source = ASTSource(variant.fn, signature, constants, attrs)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    if variant.registers:
        options["maxnreg"] = variant.registers
    return triton.compile(source, target=gpu_target(target), options=options)


def instruction(target: Target, operands: str) -> str:
    """What a dot of these operands becomes, as a pattern over ptx or amdgcn (KERNELS.md's table, checked on Triton 3.6)."""
    name, ptx = target.name, {"int8": "s8", "fp16": "f16"}.get(operands, operands)
    if name.startswith("gfx9"):
        return {"int8": r"v_mfma_i32_\S+i8", "bf16": r"v_mfma_f32_\S+bf16", "fp16": r"v_mfma_f32_\S+f16"}[operands]
    if name.startswith("gfx"):
        return {"int8": r"v_wmma_i32_16x16x16_iu8", "bf16": r"v_wmma_f32_16x16x16_bf16", "fp16": r"v_wmma_f32_16x16x16_f16"}[operands]
    if name == "sm_90":
        return rf"wgmma\S+\.{ptx}\.{ptx}"
    if name == "sm_100":
        return r"tcgen05\.mma\S+kind::" + {"e4m3": "f8f6f4", "tf32": "tf32"}.get(operands, "f16")
    return rf"mma\.sync\S+\.{ptx}\.{ptx}"


def quantize_variant(
    name,
    target,
    dtype,
    kind,
    largest,
    byte_codes,
    *,
    norm,
    rms=False,
    rows=4608,
    k=3072,
    ranks=32,
    unsigned=False,
    batches=1,
    pair="bf16",
    lowrank="*fp32",
    extra=0,
) -> Variant:
    """lowrank: type of the result, which one piece writes itself. extra: ranks of further columns."""
    tile = quantize_tile(target, dtype, rows, k, kind in ("int", "half"))
    block, extra_block, _ = quantize.rank_blocks(ranks, extra, tile)
    wide = {"plain": plain_dtype(dtype), "nvfp4": plain_dtype(dtype), "half": torch.float16}
    codes = wide.get(kind, torch.uint8 if byte_codes else torch.int8)
    types = dict.fromkeys(quantize._quantize.arg_names, "i32") | dict.fromkeys(("x", "shift", "scale"), POINTERS[dtype])
    types |= dict.fromkeys(("smooth", "row_amax", "scales", "moments"), "*fp32") | {"codes": POINTERS[codes], "down": f"*{pair}"}
    types |= dict.fromkeys(("shift", "scale"), "*fp32") if rms else {}
    types["extra"] = types["down"]
    types["products"] = lowrank if tile.pieces == 1 else "*fp32"
    if target.copy_engine:
        types["x"] = f"tensordesc<{POINTERS[dtype][1:]}[{tile.bm}, {tile.bk}]>"
        types["down"] = f"tensordesc<{pair}[{tile.bk}, {block}]>" if ranks else types["x"]
        types["extra"] = f"tensordesc<{pair}[{tile.bk}, {extra_block}]>" if extra else types["x"]
    constants = {
        "x_col": 1, "KIND": kind, "LARGEST": largest, "BYTES": byte_codes, "UNSIGNED": unsigned, "NORM": norm, "RMS": rms,
        "ONE_BATCH": batches == 1, "RB": block, "XB": extra_block, "BM": tile.bm, "BK": tile.bk, "STAGES": tile.stages,
        "COPY_ENGINE": target.copy_engine, "PTX": rounding.has_pairs(target), "EMULATE": False,
    }  # fmt: skip
    narrow = tile.bm < 64 and target.name.startswith("sm_")  # too few rows for the newer instructions
    wanted = r"mma\.sync\S+\.bf16" if narrow else instruction(target, "bf16")
    registers = quantize.most_registers(target, dtype, block, extra_block)
    return Variant(f"smooth_quantize {name}", quantize._quantize, types, constants, tile.warps, 3, (wanted,) if ranks else (), registers)


def statistics_variant(name, target, dtype, *, norm, amax, rms=False, k=3072, unsigned=False) -> Variant:
    kernel = statistics._row_statistics
    width, rest, warps = statistics.row_tile(k)
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("x", "shift", "scale"), POINTERS[dtype])
    types |= {"smooth": "*fp32", "moments": "*fp32", "amax": "*fp32", "eps": "fp32"} | ({"scale": "*fp32"} if rms else {})
    constants = {
        "x_col": 1, "NORM": norm, "RMS": rms, "AMAX": amax, "UNSIGNED": unsigned, "ONE_BATCH": True, "BM": 1, "BK": width, "REST": rest,
        "PTX": rounding.has_pairs(target), "EMULATE": False,
    }  # fmt: skip
    return Variant(f"row_statistics {name}", kernel, types, constants, warps, 3, ())


def add_variant(target, lowrank) -> Variant:
    types = {"products": "*fp32", "out": lowrank, "total": "i32", "pieces": "i32"}
    constants = {"MOST": QUANTIZE_PIECES, "BLOCK": 512, "EMULATE": False}
    return Variant(f"smooth_quantize add pieces {lowrank}", quantize._add_pieces, types, constants, 4, 3, ())


SWITCHES = ("HAS_CHANNEL", "HAS_SHIFT", "ACCUMULATE", "GELU", "GATE", "PAIRED", "SWIGLU")
SWIGLU = {"PAIRED": True, "SWIGLU": True}


def matmul_variant(name, target, dtype, kind, code_form, rows, *, rank=32, extra=0, **flags) -> Variant:
    kernel_kind, e4m3, fold = matmul.variant_of(kind, code_form)
    tile = matmul_tile(target, kernel_kind, rows)
    codes = plain_dtype(dtype) if kind == "plain" else torch.uint8 if code_form == "e4m3" else torch.int8
    types = dict.fromkeys(matmul._w4_matmul.arg_names, "i32") | {"x": POINTERS[codes]}
    types |= dict.fromkeys(("x_scales", "lowrank", "extra", "channel_scale", "shift_bias"), "*fp32")
    types |= {"codes": "*u8", "scales": "*u8" if kind == "plain" else "*bf16", "up": "*bf16", "extra_up": POINTERS[dtype]}
    types |= dict.fromkeys(("bias", "out", "residual", "gate"), POINTERS[dtype])
    constants = {
        "out_col": 1, "residual_col": 1, "KIND": kernel_kind, "E4M3": e4m3, "FOLD": fold, "RANK": rank, "RB": matmul.rank_step(rank, 32),
        "XB": matmul.rank_step(extra, 32), "HAS_BIAS": True, "BN": tile.bn, "BM": tile.bm, "GROUP_M": matmul.GROUP_M,
        "PTX": target.name.startswith("sm_"), "EMULATE": False, **{n: bool(flags.get(n)) for n in (*SWITCHES, "MAGIC")},
    }  # fmt: skip
    wanted = instruction(target, "e4m3" if e4m3 else "int8" if kernel_kind == "group" else "bf16")
    return Variant(f"w4_matmul {name}", matmul._w4_matmul, types, constants, tile.warps, tile.stages, (wanted,))


def wide_variants(name, target, dtype, kind, *, pair="bf16", rank=32, extra=0, peak=0, k=3072, **flags) -> list[Variant]:
    """The product of kind "row", "half" or "plain" with 3072 outputs, in the tiles of every band."""
    tf32 = not (kind == "row" and dtype == torch.bfloat16 and pair == "bf16")
    step, extra_step = wide.ranks_a_step(rank, tf32), wide.ranks_a_step(extra, tf32)
    fetch, extra_fetch = wide.fetches(kind, tf32, bool(flags.get("GATE")), rank, extra)
    element, operands = {"row": ("fp8e4nv", "e4m3"), "half": ("fp16", "fp16"), "plain": ("bf16", "bf16")}[kind]
    kernel = wide._w4_matmul_wide
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("bias", "out", "residual", "gate"), POINTERS[dtype])
    types |= dict.fromkeys(("table", "x_scales", "channel_scale", "shift_bias", "next_smooth"), "*fp32")
    types |= {"gain": "fp32", "peak": "*i32"}
    wanted = (instruction(target, operands), instruction(target, "tf32" if tf32 else "bf16"))

    def band(tile: Tile) -> Variant:
        sources = {"w_from": (element, tile.bn, tile.bk), "x_from": (element, tile.bm, tile.bk)}
        sources |= {"up": (pair, tile.bn, step), "lowrank": ("fp32" if tf32 else "bf16", tile.bm, step)}
        sources |= {"extra_up": (pair, tile.bn, extra_step), "extra": ("fp32" if tf32 else "bf16", tile.bm, extra_step)}
        plain = (("up", "lowrank") if fetch != "steps" else ()) + (("extra_up", "extra") if extra_fetch != "steps" or not extra else ())
        for argument, (stored, rows, cols) in sources.items():
            pointer = argument in plain or not target.copy_engine
            sources[argument] = f"*{stored}" if pointer else f"tensordesc<{stored}[{rows}, {cols}]>"
        constants = {
            "out_col": 1, "residual_col": 1, "KIND": kind, "RANK": rank, "RB": step, "FETCH": fetch, "TF32": tf32,
            "XB": extra_step, "EXTRA_FETCH": extra_fetch, "JOINED": wide.joins(target, fetch, extra_fetch, step, extra_step),
            "HAS_BIAS": True, "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "GROUP_M": wide.GROUP_M[kind], "PIECES": tile.pieces,
            "PEAK": peak, "BLOCK": BLOCK, "PTX": rounding.has_pairs(target), "COPY_ENGINE": target.copy_engine, "EMULATE": False,
            **{n: bool(flags.get(n)) for n in SWITCHES},
        }  # fmt: skip
        label = f"w4_matmul_wide {name}, {tile.bm} rows"
        registers = wide.most_registers(target, kind, extra, tile)
        return Variant(label, kernel, types | sources, constants, tile.warps, tile.stages, wanted, registers)

    return [band(tile) for _, _, tile in wide_bands(replace(target, multiprocessors=132), kind, 4608, 3072, k)]


def expand_variant(form: str, target: Target, scales: str, k: int) -> Variant:
    stored = {"e4m3": "*u8", "half": "*fp16", "plain": "*bf16"}[form]
    types = {"codes": "*u8", "scales": scales, "block_scale": scales, "NP": "i32", "KP": "i32", "out": stored, "table": "*fp32"}
    constants = {
        "FORM": form, "PTX": target.name.startswith("sm_"), "GROUPS": triton.next_power_of_2(k // 64) if form == "half" else 1,
        "BLOCK": BLOCK, "BN": expand.ROWS, "S": expand.program_slices(form, k), "EMULATE": False,
    }  # fmt: skip
    return Variant(f"expand_weight {form}, K {k}", expand._expand_weight, types, constants, 4, 3, ())


def linear_variant(target, dtype, extra=0) -> Variant:
    types = dict.fromkeys(linear._w4a16_linear.arg_names, "i32") | {"x": POINTERS[dtype], "out": POINTERS[dtype]}
    types |= {"codes": "*u8", "scales": "*bf16", "zeros": "*bf16", "bias": "*fp32", "h": "*fp32", "up": POINTERS[dtype]}
    constants = {"x_col": 1, "XB": matmul.rank_step(extra, 32), "HAS_BIAS": True, "BN": linear.BN, "RUN": linear.RUN}
    constants |= {"S": linear.SLICES, "PTX": rounding.has_pairs(target), "EMULATE": False}
    return Variant("w4a16_linear" + (f", lora {extra}" if extra else ""), linear._w4a16_linear, types, constants, linear.WARPS, 1, ())


def down_variant(dtype) -> Variant:
    """The low-rank product beside w4a16_linear."""
    types = dict.fromkeys(linear._down.arg_names, "i32") | {"x": POINTERS[dtype], "down": POINTERS[dtype], "h": "*fp32"}
    return Variant("w4a16_linear down", linear._down, types, {"x_col": 1, "BK": linear.DOWN_K, "RB": 16}, linear.DOWN_WARPS, 3, ())


def norm_variants(target: Target, dtype) -> list[Variant]:
    return [
        norm_variant("norm_modulate", target, dtype),
        norm_variant("norm_modulate, rms", target, dtype, rms=True),
        statistics_variant("norm", target, dtype, norm=True, amax=False),
        statistics_variant("rms norm, K 3840", target, dtype, norm=True, amax=False, rms=True, k=3840),
    ]


def norm_variant(name, target: Target, dtype, *, rms=False) -> Variant:
    kernel = norm_modulate._norm_modulate
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("x", "shift", "scale", "out"), POINTERS[dtype]) | {"moments": "*fp32"}
    types |= {"scale": "*fp32"} if rms else {}
    constants = {"x_col": 1, "RMS": rms, "ONE_BATCH": True, "BM": norm_modulate._BM, "BK": norm_modulate._BK, "EMULATE": False}
    return Variant(name, kernel, types, constants | {"PTX": rounding.has_pairs(target)}, 4, 3, ())


def dotless_variants(dtype, target: Target) -> list[Variant]:
    """Kernels without matrix instructions, which every GPU runs."""
    linears = [linear_variant(target, dtype), linear_variant(target, dtype, 48), down_variant(dtype)]
    ropes = [rope_variant("qk_norm_rope", dtype, torch.float32), rope_variant("qk_norm_rope, 16 bit table and scales", dtype, dtype)]
    return [*linears, *ropes, *(gate_variant(form, k) for form, k in ((dtype, 3840), (torch.float32, 3840), (torch.float32, 10240)))]


def rope_variant(name, dtype, table) -> Variant:
    kernel = rope.qk_norm_rope_kernel
    types = dict.fromkeys(kernel.arg_names, "i32") | {"eps": "fp32", "qkv": POINTERS[dtype]}
    types |= dict.fromkeys(("query_scale", "key_scale", "pe"), POINTERS[table])
    return Variant(name, kernel, types, {"HEADS": 24, "BLOCK_H": 32, "D": 128, "ROPE": True, "EMULATE": False}, 4, 3, ())


def gate_variant(dtype, k) -> Variant:
    block, warps = norm_gate.row_block(k)
    types = dict.fromkeys(norm_gate._norm_gate.arg_names, "i32") | dict.fromkeys(("x", "y", "out"), POINTERS[dtype])
    types |= {"gate": "*fp32", "eps": "fp32"}
    return Variant(f"norm_gate {dtype}, K {k}", norm_gate._norm_gate, types, {"BLOCK": block, "EMULATE": False}, warps, 3, ())


def e4m3_variants(target: Target) -> list[Variant]:
    """INT4 where codes are e4m3: fast for all rows, exact for many (16 bit) and for few."""
    bf16, fp16 = torch.bfloat16, torch.float16
    endings = {"GATE": True, "ACCUMULATE": True}
    return [
        quantize_variant("exact, norm", target, bf16, "int", 7, True, norm=True, ranks=128),
        quantize_variant("exact unsigned", target, fp16, "int", 15, True, norm=False, unsigned=True),
        quantize_variant("exact wide, norm", target, bf16, "half", 7, True, norm=True, ranks=128),
        quantize_variant("exact unsigned wide, K 12288", target, bf16, "half", 15, True, norm=False, k=12288, unsigned=True),
        quantize_variant("fast, norm", target, bf16, "e4m3", 0, True, norm=True, ranks=128),
        quantize_variant("fast, norm, fp16", target, fp16, "e4m3", 0, True, norm=True, pair="fp16"),
        quantize_variant("fast, many rows, to bf16", target, bf16, "e4m3", 0, True, norm=False, rows=65536, k=12288, lowrank="*bf16"),
        statistics_variant("norm, maximum", target, bf16, norm=True, amax=True),
        statistics_variant("rms norm, maximum, K 3840", target, bf16, norm=True, amax=True, rms=True, k=3840),
        statistics_variant("rms norm, maximum, fp16, K 3840", target, fp16, norm=True, amax=True, rms=True, k=3840),
        quantize_variant("fast, rms norm, K 3840", target, bf16, "e4m3", 0, True, norm=True, rms=True, rows=4128, k=3840, ranks=128),
        quantize_variant("exact wide, rms norm, K 3840", target, bf16, "half", 7, True, norm=True, rms=True, k=3840, ranks=128),
        quantize_variant("fast, rms norm, fp16", target, fp16, "e4m3", 0, True, norm=True, rms=True, k=3840, pair="fp16"),
        statistics_variant("maximum, K 12288", target, bf16, norm=False, amax=True, k=12288),
        statistics_variant("maximum, shifted, fp16", target, fp16, norm=False, amax=True, k=12288, unsigned=True),
        add_variant(target, "*bf16"),
        matmul_variant("exact, 200 rows", target, bf16, "int4", "e4m3", 200),
        matmul_variant("exact, 1 row, gelu", target, bf16, "int4", "e4m3", 1, GELU=True),
        *wide_variants("fast, gelu, peak", target, bf16, "row", peak=1, GELU=True),
        *wide_variants("fast, shift, gate", target, bf16, "row", HAS_SHIFT=True, **endings),
        *wide_variants("fast, lora 32", target, bf16, "row", extra=32),
        *wide_variants("fast, gelu, peak, lora 64", target, bf16, "row", peak=1, GELU=True, extra=64),
        *wide_variants("fast, shift, gate, lora 32", target, bf16, "row", HAS_SHIFT=True, extra=32, **endings),
        *wide_variants("fast, rank 128, gelu, peak, lora 128", target, bf16, "row", peak=1, GELU=True, rank=128, extra=128),
        quantize_variant("fast, norm, lora 32", target, bf16, "e4m3", 0, True, norm=True, extra=32),
        quantize_variant("fast, norm, lora 128", target, bf16, "e4m3", 0, True, norm=True, extra=128),
        quantize_variant("fast, K 12288, lora 128", target, bf16, "e4m3", 0, True, norm=False, k=12288, extra=128),
        *wide_variants("exact, gate, lora 32", target, bf16, "half", extra=32, **endings),
        quantize_variant("fast, norm, lora 4 x 32", target, bf16, "e4m3", 0, True, norm=True, ranks=64, extra=128),
        quantize_variant("exact wide, norm, rank 128, lora 64", target, bf16, "half", 7, True, norm=True, ranks=128, extra=64),
        quantize_variant("fast, K 12288, fp16, lora 32", target, fp16, "e4m3", 0, True, norm=False, k=12288, pair="fp16", extra=32),
        matmul_variant("exact, 200 rows, lora 16", target, bf16, "int4", "e4m3", 200, extra=16),
        *wide_variants("fast, fp16", target, fp16, "row", pair="fp16", HAS_SHIFT=True, **endings),
        *wide_variants("exact, gelu, peak", target, bf16, "half", peak=2, GELU=True),
        *wide_variants("exact, fp16, gate", target, fp16, "half", pair="fp16", **endings),
        *wide_variants("fast, swiglu, peak", target, bf16, "row", peak=1, **SWIGLU),
        *wide_variants("fast, swiglu, peak, lora 32", target, bf16, "row", peak=1, extra=32, **SWIGLU),
        *wide_variants("fast, pairs in order, gate", target, fp16, "row", pair="fp16", PAIRED=True, GATE=True),
        *wide_variants("exact, swiglu, peak", target, bf16, "half", peak=1, **SWIGLU),
        matmul_variant("exact, 200 rows, swiglu", target, fp16, "int4", "e4m3", 200, **SWIGLU),
        matmul_variant("exact, 1 row, swiglu", target, bf16, "int4", "e4m3", 1, **SWIGLU),
        expand_variant("e4m3", target, "*bf16", 3072),
        expand_variant("half", target, "*bf16", 3072),
        expand_variant("half", target, "*fp16", 12288),
    ]


def long_variants(target: Target) -> list[Variant]:
    """Hopper's large tile for many inputs; of the last rows', which wide_variants gives too, there are others enough."""
    bf16, endings = torch.bfloat16, {"HAS_SHIFT": True, "GATE": True, "ACCUMULATE": True}
    made = [
        wide_variants("fast, shift, gate, K 12288", target, bf16, "row", k=12288, **endings),
        wide_variants("fast, shift, gate, lora 32, K 12288", target, bf16, "row", extra=32, k=12288, **endings),
        wide_variants("fast, gelu, peak, lora 64, K 12288", target, bf16, "row", peak=1, GELU=True, extra=64, k=12288),
        wide_variants("fast, fp16, shift, gate, K 12288", target, torch.float16, "row", pair="fp16", k=12288, **endings),
    ]
    return [bands[0] for bands in made]


def int8_variants(target: Target) -> list[Variant]:
    """INT4 where codes are int8."""
    bf16, fp16 = torch.bfloat16, torch.float16
    return [
        quantize_variant("exact, norm", target, bf16, "int", 7, False, norm=True, ranks=128),
        quantize_variant("exact unsigned", target, fp16, "int", 15, False, norm=False, unsigned=True),
        quantize_variant("fast, norm", target, bf16, "int", 127, False, norm=True, ranks=128),
        quantize_variant("fast, norm, fp16", target, fp16, "int", 127, False, norm=True),
        quantize_variant("exact, rms norm, K 3840", target, bf16, "int", 7, False, norm=True, rms=True, k=3840, ranks=128),
        quantize_variant("fast, rms norm, K 3840", target, bf16, "int", 127, False, norm=True, rms=True, k=3840, ranks=128),
        quantize_variant("fast, rms norm, fp16", target, fp16, "int", 127, False, norm=True, rms=True, k=3840),
        matmul_variant("exact", target, bf16, "int4", "int8", 4608),
        matmul_variant("exact, magic", target, bf16, "int4", "int8", 4608, MAGIC=True),
        matmul_variant("exact, 1 row, gelu", target, bf16, "int4", "int8", 1, GELU=True),
        matmul_variant("fast, lora 32", target, bf16, "int8", "int8", 4608, extra=32),
        quantize_variant("fast, norm, lora 4 x 32", target, bf16, "int", 127, False, norm=True, ranks=64, extra=128),
        matmul_variant("fast, two segments, gelu", target, bf16, "int8", "int8", 4608, GELU=True),
        matmul_variant("fast, gate", target, fp16, "int8", "int8", 4608, HAS_SHIFT=True, GATE=True, ACCUMULATE=True),
        matmul_variant("fast, swiglu, lora 32", target, bf16, "int8", "int8", 4608, extra=32, **SWIGLU),
        matmul_variant("exact, swiglu", target, fp16, "int4", "int8", 4608, **SWIGLU),
        matmul_variant("exact, 1 row, swiglu", target, bf16, "int4", "int8", 1, **SWIGLU),
        matmul_variant("exact, pairs in order", target, bf16, "int4", "int8", 4608, PAIRED=True),
    ]


def nvfp4_variants(target: Target) -> list[Variant]:
    bf16, fp16, nvidia = torch.bfloat16, torch.float16, target.name.startswith("sm_")
    endings = {"HAS_CHANNEL": True, "GATE": True, "ACCUMULATE": True}
    found = [
        quantize_variant("nvfp4 exact, norm", target, bf16, "nvfp4", 0, False, norm=True, ranks=128),
        quantize_variant("nvfp4 fast, norm", target, bf16, "plain", 0, False, norm=True),
        quantize_variant("nvfp4 exact, rms norm, K 3840", target, bf16, "nvfp4", 0, False, norm=True, rms=True, k=3840, ranks=128),
        quantize_variant("nvfp4 fast, rms norm, K 3840", target, bf16, "plain", 0, False, norm=True, rms=True, k=3840, ranks=128),
        matmul_variant("nvfp4", target, bf16, "plain", "e2m1", 200 if nvidia else 4608, rank=128, **endings),
        matmul_variant("nvfp4 fp16", target, fp16, "plain", "e2m1", 200),
        matmul_variant("nvfp4, 1 row", target, bf16, "plain", "e2m1", 1, rank=128, HAS_CHANNEL=True),
        matmul_variant("nvfp4, swiglu", target, bf16, "plain", "e2m1", 200 if nvidia else 4608, rank=128, HAS_CHANNEL=True, **SWIGLU),
    ]
    if nvidia:
        found += wide_variants("nvfp4, gate", target, bf16, "plain", rank=128, **endings)
        found += wide_variants("nvfp4, gelu", target, fp16, "plain", rank=128, HAS_CHANNEL=True, GELU=True)
        found += wide_variants("nvfp4, swiglu", target, bf16, "plain", rank=128, HAS_CHANNEL=True, **SWIGLU)
        found.append(expand_variant("plain", target, "*u8", 3072))
    return found


def attention_variant(name: str, target: Target, dtype, dim: int) -> Variant:
    tile = attention.attention_tile(target)
    types = dict.fromkeys(attention._attention_fp16.arg_names, "i32") | dict.fromkeys(("q", "k", "v", "out"), POINTERS[dtype])
    types |= dict.fromkeys(("unit_q", "unit_k", "unit_v"), "*fp32") | {"scale": "fp32"}
    constants = {"D": dim, "BM": tile.bm, "BN": tile.bk, "STAGES": tile.stages, "EMULATE": False}
    wanted = (instruction(target, "fp16"),)
    return Variant(f"attention_fp16 {name}", attention._attention_fp16, types, constants, tile.warps, tile.stages, wanted)


def variants(target: Target) -> list[Variant]:
    """What this target would be asked to run: every operand form, every ending, norm with large ranks, every type."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if not target.has_dot:
        return dotless_variants(fp16, target)
    return [
        quantize_variant("no low rank", target, bf16, "plain", 0, False, norm=True, ranks=0),
        quantize_variant("1 row", target, bf16, "plain", 0, False, norm=True, rows=1, ranks=64),
        quantize_variant("rank 2 x 128, two batches", target, fp16, "plain", 0, False, norm=True, ranks=256, batches=2, pair="fp16"),
        quantize_variant("rank 2 x 128, two batches, fp32", target, fp32, "plain", 0, False, norm=True, ranks=256, batches=2, pair="fp16"),
        attention_variant("bf16, heads of 128", target, bf16, 128),
        attention_variant("fp16, heads of 128", target, fp16, 128),
        attention_variant("fp32, heads of 64", target, fp32, 64),
        add_variant(target, "*fp32"),
        *(e4m3_variants(target) if target.e4m3_dot else int8_variants(target)),
        *(long_variants(target) if target.name == "sm_90" else ()),
        *nvfp4_variants(target),
        *norm_variants(target, bf16),
        *dotless_variants(bf16, target),
    ]


def spilled(compiled, target: Target) -> tuple[int, int]:
    """Bytes or registers spilled: stack and local memory of a cubin, .vgpr_spill_count of amdgcn. And a thread's registers on NVIDIA."""
    if target.name.startswith("gfx"):
        return sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])), 0
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
        found = int(usage["STACK"]) + int(usage["LOCAL"])
        if found:  # sm_120's copy engine has zeros stored that nobody reads: a spill is loaded again
            text = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
            found = found if "LDL" in text else 0
    return found, int(usage["REG"])


def check(variant: Variant, target: Target) -> dict:
    row = {"target": target.name, "kernel": variant.name, "error": None}
    start = time.time()
    try:
        compiled = compile_variant(variant, target)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
    text = compiled.asm["amdgcn" if target.name.startswith("gfx") else "ptx"]
    missing = [wanted for wanted in variant.instructions if not re.search(wanted, text)]
    if variant.fn is quantize._quantize and re.search(r"wgmma\.wait_group\S* [1-9]", text):
        missing.append("wait for every product before the next step (see _low_rank)")
    spills, registers = spilled(compiled, target)
    return row | {
        "instructions": variant.instructions, "missing": missing,
        "spilled": spills, "registers": registers, "shared": compiled.metadata.shared, "limit": target.shared,
        "seconds": round(time.time() - start, 2),
    }  # fmt: skip


def main(names: list[str]) -> None:
    targets = [cuda_target(c) for c in CUDA] + [hip_target(a) for a in HIP]
    for target in targets:
        if names and target.name not in names:
            continue
        for variant in variants(target):
            print(json.dumps(check(variant, target)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
