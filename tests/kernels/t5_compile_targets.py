"""compile_targets.py for the kernels of t5_linear: run by test_t5_linear.py in a process of its own, one JSON line a kernel."""

from __future__ import annotations

import json
import sys

import torch
from compile_targets import POINTERS, Variant, check
from tonfa.kernels import t5_linear_triton as t5
from tonfa.kernels.rounding import has_pairs
from tonfa.kernels.targets import Target, cuda_target, hip_target
from tonfa.kernels.tiles import linear_tile

TARGETS = {"sm_80": cuda_target(80), "sm_89": cuda_target(89), "sm_90": cuda_target(90), "sm_120": cuda_target(120)}
TARGETS |= {"sm_75": cuda_target(75), "gfx942": hip_target("gfx942")}


def unpack_variant(target: Target, dtype: torch.dtype) -> Variant:
    halves = dtype == torch.float16
    types = dict.fromkeys(t5._operands.arg_names, "i32") | dict.fromkeys(("x", "half", "unit"), "*fp32" if halves else POINTERS[dtype])
    types |= {"half": "*fp16"} if halves else {}
    types |= {"codes": "*u8", "scales": "*fp16", "zeros": "*fp16", "weight": POINTERS[dtype]}
    constants = {"x_col": 1, "BK": 2048, "S": t5.SLICES, "PAIRS": has_pairs(target), "EMULATE": False}
    short = has_pairs(target) and dtype != torch.float32
    wanted = (r"st\.global\S*\.v4\.b32", r"cvt\.rn\.\S*x2\.f32") if short else ()
    return Variant(f"operands, {dtype}", t5._operands, types, constants, 4, 3, wanted)


def few_variant(target: Target, dtype: torch.dtype, rows: int) -> Variant:
    tile = linear_tile(target, rows)
    types = dict.fromkeys(t5._few_tokens.arg_names, "i32") | {"x": POINTERS[dtype], "out": POINTERS[dtype], "bias": POINTERS[dtype]}
    types |= {"codes": "*u8", "scales": "*fp16", "zeros": "*fp16"}
    constants = {
        "x_col": 1,
        "HAS_BIAS": False,
        "BN": tile.bn,
        "BM": tile.bm,
        "S": tile.bk // 128,
        "PAIRS": has_pairs(target),
        "EMULATE": False,
    }
    return Variant(f"few tokens, M={rows}", t5._few_tokens, types, constants, tile.warps, tile.stages, ())


def variants(target: Target) -> list[Variant]:
    unpacks = [unpack_variant(target, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    few = [few_variant(target, dtype, rows) for dtype, rows in ((torch.float32, 1), (torch.float16, 2), (torch.bfloat16, 8))]
    return [*unpacks, *few]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for variant in variants(TARGETS[name]):
            print(json.dumps(check(variant, TARGETS[name])), flush=True)
