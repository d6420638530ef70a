"""The inline PTX that unpacks four nibbles at once, carried out on Python integers: the interpreter cannot run it, and no GPU is needed.

Every byte must become what the Triton form of the same function makes of it.
"""

from __future__ import annotations

import re

import pytest
import torch

REASON = "Triton is not installed: pip install triton==3.6.0"
matmul = pytest.importorskip("tonfa.kernels.w4_matmul_triton", reason=REASON)
linear = pytest.importorskip("tonfa.kernels.w4a16_linear_triton", reason=REASON)

OPS = {
    "shr": lambda a, b: a >> b,
    "shl": lambda a, b: (a << b) & 0xFFFFFFFF,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "add": lambda a, b: (a + b) & 0xFFFFFFFF,
    "not": lambda a: ~a & 0xFFFFFFFF,
    "prmt": lambda a, b, selector: sum(((b << 32 | a) >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i for i in range(4)),
}


def run_ptx(text: str, word: int, source: str = "$1") -> dict[str, int]:
    """What the code leaves in its registers, with `word` in `source`."""
    registers = {source: word}
    for name, arguments in re.findall(r"(\w+)\.[bu]32 ([^;]+);", text.replace(".reg .b32", "")):
        target, *sources = (a.strip() for a in arguments.split(","))
        registers[target] = OPS[name](*(registers[s] if s in registers else int(s, 0) for s in sources))
    return registers


def unpacked(asm, packed: list[int]) -> torch.Tensor:
    text = getattr(asm, "value", asm)
    words = [run_ptx(text, int.from_bytes(bytes(packed[i : i + 4]), "little"))["$0"] for i in range(0, len(packed), 4)]
    return torch.tensor([b for word in words for b in word.to_bytes(4, "little")], dtype=torch.uint8)


@pytest.mark.parametrize("half", [0, 1])
def test_every_byte(half):
    generator = torch.Generator().manual_seed(0)
    packed = torch.cat([torch.arange(256), torch.randint(0, 256, (1024,), generator=generator)]).tolist()
    nibbles = torch.tensor([(b >> (4 * half)) & 15 for b in packed])
    e4m3 = unpacked((matmul._E4M3_LOW, matmul._E4M3_HIGH)[half], packed).view(torch.float8_e4m3fn).float() * 2**9
    magnitude = torch.where(nibbles == 8, 8, nibbles & 7)
    assert torch.equal(e4m3, torch.where(nibbles >= 8, -magnitude, magnitude).float())
    int8 = unpacked((matmul._INT8_LOW, matmul._INT8_HIGH)[half], packed).view(torch.int8)
    assert torch.equal(int8.int(), 16 * torch.where(nibbles >= 8, nibbles - 16, nibbles).int())


@pytest.mark.parametrize("half", [0, 1])
def test_sixteen_and_every_code(half):
    """w4a16_linear's: four floats of four bytes."""
    text = (linear._LOW, linear._HIGH)[half].value
    for packed in range(0, 256, 4):
        word = int.from_bytes(bytes([packed, packed ^ 255, packed + 1, packed + 3]), "little")
        left = run_ptx(text, word, "$4")
        bits = torch.tensor([left[f"${i}"] for i in range(4)], dtype=torch.int32)
        nibbles = [word >> 8 * i + 4 * half & 15 for i in range(4)]
        assert bits.view(torch.float32).tolist() == [16.0 + n for n in nibbles]
