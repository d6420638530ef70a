"""What the 4-bit products can reach on each target, on paper: data-sheet rates against the scaling work in the kernels' loops.

    python benchmarks/targets.py > benchmarks/TARGETS.md

No GPU is needed and none is asked. For a target and a kernel form, the matrix units need step / rate clocks for one accumulator element,
the vector units the sum of operations / rate; the share of the matrix peak lies between "nothing overlaps" and "all overlaps".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tonfa.kernels import layout
from tonfa.kernels.block_scale import BLOCK
from tonfa.kernels.layout import LogicalLinear
from tonfa.kernels.targets import Target, cuda_target, hip_target


@dataclass(frozen=True)
class Chip:
    """Rates are results (multiply-adds, conversions) per clock and multiprocessor, dense, products accumulated in fp32 or int32.

    fp32       what one instruction a lane gives; `paired` where the data sheet counts two (dual issue, packed)
    integer    32-bit adds of units of their own, 0 where they take the fp32 units' time
    registers  KB per multiprocessor
    tbps       TB/s of memory
    doubtful   names of the fields that are less sure than the rest
    """

    name: str
    target: Target
    units: int
    ghz: float
    int8: int
    e4m3: int | None
    half: int
    fp32: int
    convert: int
    registers: int
    tbps: float
    paired: bool = False
    integer: int = 0
    doubtful: tuple[str, ...] = ()

    def peak(self, operand: str) -> float:
        """TFLOP/s (or TOP/s) of a kind of operand."""
        return 2e-3 * getattr(self, operand) * self.units * self.ghz

    def shown(self, name: str) -> str:
        value = getattr(self, name)
        return ("-" if value is None else f"{value:g}") + ("?" if name in self.doubtful else "")


CHIPS = (
    Chip("A100 80 GB SXM", cuda_target(80), 108, 1.41, 2048, None, 1024, 64, 16, 256, 2.04, integer=64),
    Chip("RTX 3090", cuda_target(86), 82, 1.695, 1024, None, 256, 128, 16, 256, 0.936),
    Chip("RTX 4090", cuda_target(89), 128, 2.52, 1024, 512, 256, 128, 16, 256, 1.008),
    Chip("H100 SXM", cuda_target(90), 132, 1.83, 4096, 4096, 2048, 128, 16, 256, 3.35, doubtful=("convert",)),
    Chip("B200", cuda_target(100), 148, 1.85, 8192, 8192, 4096, 128, 16, 256, 8.0, doubtful=("ghz", "units", "int8", "convert")),
    Chip("RTX 5090", cuda_target(120), 170, 2.407, 1024, 512, 256, 128, 16, 256, 1.792, doubtful=("convert",)),
    Chip("MI300X", hip_target("gfx942"), 304, 2.1, 2048, 2048, 1024, 64, 64, 512, 5.3, True, doubtful=("convert",)),
    Chip("RX 7900 XTX", hip_target("gfx1100"), 96, 2.5, 256, None, 256, 64, 64, 384, 0.96, True, doubtful=("convert",)),
    Chip("RX 9070 XT", hip_target("gfx1201"), 64, 2.97, 1024, 1024, 512, 64, 64, 384, 0.64, True, doubtful=("convert", "registers")),
)

SOURCES = """\
Sources: NVIDIA's architecture white papers (GA100, GA102, AD102, GH100, GB202: dense tensor rates, SMs, boost clocks, bandwidth) and
the throughput and capability tables of the CUDA C++ programming guide (fp32, conversions, shared memory per block); AMD's CDNA 3 white
paper and MI300X data sheet, GPUOpen's article on RDNA 4 matrix cores (operations per clock and CU of RDNA 3 and 4), ROCm's table of GPU
specifications. Rates per clock are peaks divided by units and clock. The documents themselves were not at hand when this was written;
the tensor rates of the RTX 4090 and 5090, the table for RDNA 3 and 4, and the 16 conversions a clock of the RTX 4090 were checked
against public pages that quote them. A question mark is a number less sure than that: B200's clock is derived from 2.25 PFLOP/s of bf16
and 148 SMs; conversions of sm_90 and up and of AMD are assumed; RDNA 4's register file is taken to be RDNA 3's."""


@dataclass(frozen=True)
class Form:
    """The loop of a product: matrix operands, K between two scalings (0: none), and the operations of one scaling of one accumulator."""

    name: str
    operand: str
    step: int = 0
    fp32: int = 0
    integer: int = 0
    convert: int = 0

    def clocks(self, chip: Chip) -> tuple[float, float, float]:
        """Clocks of the fp32, integer and conversion units for an element."""
        beside = 0 if chip.integer else self.integer
        return (self.fp32 + beside) / chip.fp32, self.integer / chip.integer if chip.integer else 0.0, self.convert / chip.convert

    def scaling(self, chip: Chip) -> float:
        """Clocks of scaling per clock of matrix work, one kind of unit after the other."""
        return sum(self.clocks(chip)) / (self.step / getattr(chip, self.operand)) if self.step else 0.0

    def longest(self, chip: Chip) -> float:
        """The same where the kinds of units overlap each other, as on NVIDIA; AMD's vector units do everything."""
        if not self.step or chip.target.name.startswith("gfx"):
            return self.scaling(chip)
        return max(self.clocks(chip)) / (self.step / getattr(chip, self.operand))


# Kept in step with kernels/w4_matmul_triton.py (int8) and kernels/w4_matmul_wide.py (the others).
ROW = Form(f"e4m3, accumulator times a ratio every {BLOCK}", "e4m3", BLOCK, fp32=1)
HALF = Form("fp16 operands, scales inside", "half")
INT8 = Form("int8, converted and scaled every 64", "int8", 64, fp32=2, convert=1)
INT8_BY_ADDING = Form("int8, converted by adding 3 * 2^22 and scaled every 64", "int8", 64, fp32=3, integer=1)
PLAIN = Form("bf16 operands, scales inside", "half")


def forms(chip: Chip) -> list[tuple[str, Form]]:
    """(mode, form) for many tokens."""
    if chip.target.e4m3_dot:
        return [("INT4 fast", ROW), ("INT4 exact", HALF), ("NVFP4", PLAIN)]
    return [("INT4 fast, exact", INT8 if chip.target.name.startswith("gfx") else INT8_BY_ADDING), ("NVFP4", PLAIN)]


def blank_layer(precision: str, n: int, k: int, rank: int) -> LogicalLinear:
    """A layer of these sizes whose numbers do not matter."""
    codes = torch.zeros(n, k, dtype=torch.uint8)
    if precision == "w4a16":
        scales = torch.ones(n, k // 64, dtype=torch.bfloat16)
        return LogicalLinear(precision, codes, scales, zeros=scales)
    group, dtype = (16, torch.float8_e4m3fn) if precision == "nvfp4" else (64, torch.bfloat16)
    down, up = torch.zeros(rank, k, dtype=torch.bfloat16), torch.zeros(n, rank, dtype=torch.bfloat16)
    return LogicalLinear(precision, codes, torch.ones(n, k // group).to(dtype), smooth=torch.ones(k), down=down, up=up)


def packed_bytes(precision: str, n: int, k: int, rank: int = 32) -> int:
    layer = blank_layer(precision, n, k, rank)
    return layout.plan(n, k, [(layer, 0, 0)], "int8").nbytes


def data_sheet() -> list[str]:
    lines = [
        "| target | chip | units | GHz | int8 | e4m3 | fp16, bf16 | fp32 | int to float | shared KB a block | registers KB | TB/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in CHIPS:
        rates = " | ".join(c.shown(name) for name in ("units", "ghz", "int8", "e4m3", "half"))
        fp32 = c.shown("fp32") + (" (x2 paired)" if c.paired else "")
        shared = f"{c.target.shared / 1024:g}"
        lines.append(
            f"| {c.target.name} | {c.name} | {rates} | {fp32} | {c.shown('convert')} | {shared} | {c.shown('registers')} | {c.tbps:g} |"
        )
    return lines


def roofline() -> list[str]:
    lines = [
        "| target | mode | loop | matrix peak TFLOP/s | of bf16 peak | scaling / matrix time | share of peak | TFLOP/s | x bf16 peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in CHIPS:
        for mode, form in forms(c):
            peak, bf16 = c.peak(form.operand), c.peak("half")
            low, high = 1 / (1 + form.scaling(c)), min(1.0, 1 / max(form.longest(c), 1e-9))
            share = f"{low:.0%}" if high == low else f"{low:.0%} to {high:.0%}"
            reach = f"{low * peak:.0f}" if high == low else f"{low * peak:.0f} to {high * peak:.0f}"
            times = f"{low * peak / bf16:.2f}" if high == low else f"{low * peak / bf16:.2f} to {high * peak / bf16:.2f}"
            doubt = "?" if form.operand in c.doubtful or (form.convert and "convert" in c.doubtful) else ""
            work = f"{mode} | {form.name} | {peak:.0f} | {peak / bf16:.1f} | {form.scaling(c):.0%}{doubt}"
            lines.append(f"| {c.target.name} | {work} | {share}{doubt} | {reach}{doubt} | {times}{doubt} |")
    return lines


def one_token() -> list[str]:
    sizes = {
        "INT4 9216 x 3072 rank 32": packed_bytes("int4", 9216, 3072),
        "NVFP4 9216 x 3072 rank 32": packed_bytes("nvfp4", 9216, 3072),
        "w4a16 18432 x 3072 (a double block's modulation)": packed_bytes("w4a16", 18432, 3072),
        "bf16 9216 x 3072": 2 * 9216 * 3072,
    }
    heads = " | ".join(f"{name}, {size / 1e6:.1f} MB" for name, size in sizes.items())
    lines = [f"| target | {heads} |", "|---|" + "---|" * len(sizes)]
    for c in CHIPS:
        lines.append(f"| {c.target.name} | " + " | ".join(f"{size / c.tbps * 1e-6:.1f}" for size in sizes.values()) + " |")
    return lines


NOTES = """\
- **int4 units.** sm_80, sm_86 and sm_89 have int4 matrix units of twice the int8 rate; Triton cannot emit their instruction, so exact
  runs on int8 units on sm_80 and sm_86 and on 16-bit ones on sm_89. gfx1100 and gfx1201 have iu4 instructions of twice the int8 rate,
  which Triton does not emit either. sm_90, sm_100 and sm_120 have no int4 units (int4 MMA is emulated and very slow).
- **sm_80 and sm_86: the conversion would decide.** Integers become floats at 16 a clock: on sm_80 that is twice the time of the matrix
  work, on sm_86 as long as it. A sum of 64 products stays below 2^22 (at most 128 * 127 * 64 = 1.04 million), so adding the integer
  0x4B400000, reading the bits as a float and subtracting 12582912.0 gives the same float exactly, at the rates of integer and fp32 adds.
- **sm_89 and sm_120: e4m3 with fp32 accumulation has half of its rate with fp16 accumulation**, and half of int8's. The int8 form there
  would need the conversions above (scaling 125 % of the matrix time, or 50 % by adding).
- **sm_100.** Accumulators of e4m3 and 16-bit products lie in tensor memory. A multiplication inside the loop has to fetch and store
  them, which is not counted here. int8 products become mma.sync, whose rate on this chip is not published; no form here uses them.
- **sm_100 and sm_120 have native NVFP4 products** (`dot_scaled`) of four to eight times the bf16 rate; our NVFP4 runs in bf16 there.
- **gfx1100**: matrix instructions run on the vector units, so count "nothing overlaps". On AMD fp32 figures assume one instruction a
  lane and clock; dual issue (RDNA) or packed fp32 (CDNA 3) would halve the fp32 part.
- **Not counted**: unpacking nibbles in the int8 form (once per tile of tokens), unpacking the weight before the product in the others
  (half a byte read and one or two written a code), low rank, ending, addresses."""


def main() -> None:
    print("# Targets on paper\n\nWritten by `python benchmarks/targets.py`; nothing here is measured.\n")
    print("## Data sheets\n\nResults per clock and multiprocessor (compute unit), dense, accumulated in fp32 or int32.\n")
    print("\n".join(data_sheet()), "\n\n" + SOURCES + "\n", sep="")
    print("\n## Many tokens: scaling against matrix work\n")
    print("Share of peak: nothing overlaps, to all overlaps. Clocks under load are lower than boost; the shares are not touched by that.\n")
    print("\n".join(roofline()), "\n\n" + NOTES + "\n", sep="")
    print("\n## One token: memory floor in us\n\nWeights read once at data-sheet bandwidth. On an H200 a copy reaches 87 % of it.\n")
    print("\n".join(one_token()))


if __name__ == "__main__":
    main()
