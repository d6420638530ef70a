"""Packed tensors against the golden files, bit for bit and in both directions, and against the index formulas of the format."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tonfa.models.formats import nunchaku as nk

DATA = Path(__file__).resolve().parents[2] / "data"
INT4 = [
    "int4_linear_256x384_r32",
    "int4_fc2_shift_256x384_r32",
    "int4_minus8_256x256_r16",
    "int4_padded_200x192_r10",
    "int4_smoothfused_128x256_r16",
]
NVFP4 = ["nvfp4_linear_256x384_r32_wtscale", "nvfp4_qkv_384x256_r16_wcscales"]
MOD = ["awq_mod3_384x192", "awq_mod6_768x128"]


def golden(name):
    tensors = load_file(DATA / f"{name}.safetensors")
    with safe_open(DATA / f"{name}.safetensors", "pt") as f:
        meta = f.metadata()
    packed = {k[7:]: v for k, v in tensors.items() if k.startswith("packed.")}
    logical = {k[8:]: v for k, v in tensors.items() if k.startswith("logical.")}
    return packed, logical, tensors, meta


def same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape, (a.dtype, a.shape, b.dtype, b.shape)
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", INT4 + NVFP4)
def test_w4a4_golden_both_ways(name):
    packed, logical, _, _ = golden(name)
    n, k = logical["codes"].shape
    r = logical["lora_down"].shape[0]
    codes = (logical["codes"].view(torch.uint8) & 15) if name.startswith("int4") else logical["codes"]
    unpack_scales, pack_scales = (
        (nk.unpack_int4_scales, nk.pack_int4_scales) if name.startswith("int4") else (nk.unpack_nvfp4_scales, nk.pack_nvfp4_scales)
    )
    same_bits(nk.unpack_qweight(packed["qweight"], n, k), codes)
    same_bits(nk.pack_qweight(codes), packed["qweight"])
    same_bits(unpack_scales(packed["wscales"], n, k), logical["wscales"])
    same_bits(pack_scales(logical["wscales"], k), packed["wscales"])
    same_bits(nk.unpack_down(packed["lora_down"], k, r), logical["lora_down"])
    same_bits(nk.pack_down(logical["lora_down"]), packed["lora_down"])
    same_bits(nk.unpack_up(packed["lora_up"], n, r), logical["lora_up"])
    same_bits(nk.pack_up(logical["lora_up"]), packed["lora_up"])
    for vector, size in (("bias", n), ("smooth", k), ("smooth_orig", k), ("wcscales", n)):
        if vector in packed:
            same_bits(nk.unpack_vector(packed[vector], size), logical[vector])
            same_bits(nk.pack_vector(logical[vector]), packed[vector])


@pytest.mark.parametrize("name", INT4)
def test_int4_values_match_the_expected_weight(name):
    packed, logical, tensors, _ = golden(name)
    n, k = logical["codes"].shape
    codes = nk.unpack_qweight(packed["qweight"], n, k).to(torch.int32)
    signed = ((codes ^ 8) - 8).float()
    scales = nk.unpack_int4_scales(packed["wscales"], n, k).float()
    assert torch.equal(signed * scales.repeat_interleave(64, 1)[:, :k], tensors["expected.w_dequant"])


def test_minus8_golden_holds_every_code():
    packed, logical, _, _ = golden("int4_minus8_256x256_r16")
    assert nk.unpack_qweight(packed["qweight"], 256, 256).unique().tolist() == list(range(16))


@pytest.mark.parametrize("name", MOD)
def test_modulation_golden_both_ways(name):
    packed, logical, tensors, meta = golden(name)
    n, k = logical["codes"].shape
    chunks = int(meta["splits"])
    stored = nk.unpack_w4a16_qweight(packed["qweight"], n, k)
    codes = nk.deinterleave_rows(stored, chunks)
    same_bits(codes, logical["codes"])
    same_bits(nk.pack_w4a16_qweight(nk.interleave_rows(codes, chunks)), packed["qweight"])
    scales = nk.deinterleave_rows(nk.unpack_w4a16_scales(packed["wscales"], n, k), chunks)
    same_bits(scales, logical["scale"])
    same_bits(nk.pack_w4a16_scales(nk.interleave_rows(scales, chunks), k), packed["wscales"])
    zeros = nk.deinterleave_rows(nk.unpack_w4a16_scales(packed["wzeros"], n, k), chunks)
    same_bits(nk.pack_w4a16_scales(nk.interleave_rows(zeros, chunks), k), packed["wzeros"])
    dense = codes.float() * scales.float().repeat_interleave(64, 1) + zeros.float().repeat_interleave(64, 1)
    torch.testing.assert_close(dense, tensors["expected.w_dequant"], rtol=1e-6, atol=1e-6)


def test_t5_golden_both_ways():
    packed, logical, tensors, _ = golden("awq_t5_128x512")
    n, k = logical["codes"].shape
    codes = nk.unpack_w4a16_qweight(packed["qweight"], n, k)
    same_bits(codes, logical["codes"])
    same_bits(nk.pack_w4a16_qweight(codes, torch.int16), packed["qweight"])
    scales = nk.unpack_w4a16_scales(packed["scales"], n, k, 128)
    same_bits(scales, logical["scale"])
    same_bits(nk.pack_w4a16_scales(scales, k, 128), packed["scales"])


def test_formulas_of_the_format_at_random_places():
    """Index arithmetic written out as the format gives it, on sizes that no golden has (several tiles each way, rank 48)."""
    gen = torch.Generator().manual_seed(5)
    n, k, r = 384, 640, 48
    codes = torch.randint(0, 16, (n, k), generator=gen, dtype=torch.uint8)
    words = nk.pack_qweight(codes).view(torch.uint8).flatten().view(torch.int32)
    scales = torch.randn(n, k // 64, generator=gen)
    packed_scales = nk.pack_int4_scales(scales, k).flatten()
    bytes_ = torch.randint(0, 0x7F, (n, k // 16), generator=gen, dtype=torch.uint8)
    packed_bytes = nk.pack_nvfp4_scales(bytes_.view(torch.float8_e4m3fn), k).view(torch.uint8).flatten()
    up, down = torch.randn(n, r, generator=gen), torch.randn(r, k, generator=gen)
    flat_up, flat_down = nk.pack_up(up).flatten(), nk.pack_down(down).flatten()
    w4a16 = nk.pack_w4a16_qweight(codes).view(torch.int16).flatten()

    def vec(i):
        return 16 * (i // 16) + 4 * ((i % 8) // 2) + 2 * ((i // 8) % 2) + i % 2

    for _ in range(300):
        i, j, q = (int(torch.randint(0, s, (1,), generator=gen)) for s in (n, k, r))
        word = (((i // 128 * (k // 64) + j // 64) * 8 + (i // 16) % 8) * 32 + 4 * (i % 8) + (j // 8) % 4) * 4
        word += 2 * ((i // 8) % 2) + (j // 32) % 2
        assert (int(words[word]) >> (4 * (j % 8))) & 15 == codes[i, j]
        assert packed_scales[(i // 128 * (k // 64) + j // 64) * 128 + vec(i % 128)] == scales[i, j // 64]
        g = j // 16
        at = (((i // 128 * (k // 64) + g // 4) * 8 + i % 8) * 4 + (i // 8) % 4) * 16 + ((i // 32) % 4) * 4 + g % 4
        assert packed_bytes[at] == bytes_[i, g]
        at = ((i // 16 * (r // 16) + q // 16) * 32 + (i % 8) * 4 + (q % 8) // 2) * 8 + ((i // 8) % 2) * 4 + ((q // 8) % 2) * 2 + q % 2
        assert flat_up[at] == up[i, q]
        at = ((j // 16 * (r // 16) + q // 16) * 32 + (q % 8) * 4 + (j % 8) // 2) * 8 + ((q // 8) % 2) * 4 + ((j // 8) % 2) * 2 + j % 2
        assert flat_down[at] == down[q, j]
        at = (i // 4) * k + (j // 64) * 64 + (i % 4) * 16 + ((j // 32) % 2) * 8 + j % 8
        assert (int(w4a16[at]) >> (4 * ((j % 32) // 8))) & 15 == codes[i, j]


def test_wrong_sizes_are_told():
    with pytest.raises(ValueError, match="8192 elements, expected 16384"):
        nk.unpack_qweight(torch.zeros(128, 64, dtype=torch.int8), 128, 256)
    with pytest.raises(ValueError, match="multiples of 128"):
        nk.pack_nvfp4_scales(torch.ones(128, 12).to(torch.float8_e4m3fn), 192)
    with pytest.raises(ValueError, match="multiples of 64"):
        nk.pack_w4a16_qweight(torch.zeros(8, 96, dtype=torch.uint8))
