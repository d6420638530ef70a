"""The packed tensors of SVDQuant (Nunchaku) files, to plain row-major tensors and back, bit for bit.

Every function here is a pure re-ordering (view, permute, view): nothing is computed with the values, so all of them run on any
device and for any stored type. `n` are output features, `k` input features, `r` ranks of the low-rank branch. Packed sizes are padded
to multiples of 128 (ranks to 16); `n`, `k`, `r` in the calls are the unpadded ones and the unpackers crop.

The declared 2-D shape of a packed tensor is nominal, only its element count means something, so unpackers flatten first. ValueError says
which count was found and which was expected.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128  # output and input channels of one packed tile
RANK_TILE = 16
GROUP = {"int4": 64, "nvfp4": 16}  # input channels that share one weight scale


def ceil_to(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _flat(t: Tensor, count: int, what: str) -> Tensor:
    if t.numel() != count:
        raise ValueError(f"packed {what} has {t.numel()} elements, expected {count}")
    return t.reshape(-1)


def _pad2(t: Tensor, rows: int, cols: int, value: float) -> Tensor:
    """[a, b] -> [rows, cols], new elements = value (float8 goes through its bytes, so there only value 0 or 1 is possible)."""
    a, b = t.shape
    if (a, b) == (rows, cols):
        return t
    if t.dtype == torch.float8_e4m3fn:
        byte = int(torch.tensor(value).to(t.dtype).view(torch.uint8))
        return _pad2(t.view(torch.uint8), rows, cols, byte).view(t.dtype)
    return F.pad(t, (0, cols - b, 0, rows - a), value=value)


# ---- 4-bit codes (INT4 two's complement nibbles and NVFP4 e2m1 codes alike) ----------------------------------------------------------


def unpack_qweight(packed: Tensor, n: int, k: int) -> Tensor:
    """W4A4 `qweight` -> codes uint8 [n, k], values 0..15.

    A 32-bit word holds the eight nibbles k%8 of one row. Words are ordered [n/128][k/64] then, in the 128x64 tile,
    [16-row strip][n%8][(k/8)%4][(n/8)%2][(k/32)%2].
    """
    np_, kp = ceil_to(n, TILE), ceil_to(k, TILE)
    words = _flat(packed.contiguous().view(torch.uint8), np_ * kp // 2, "qweight").view(torch.int32)
    words = words.view(np_ // 128, kp // 64, 8, 8, 4, 2, 2).permute(0, 2, 5, 3, 1, 6, 4)
    nibbles = words.contiguous().view(torch.uint8).view(np_, kp // 2)
    codes = torch.empty((np_, kp // 2, 2), dtype=torch.uint8, device=packed.device)
    torch.bitwise_and(nibbles, 15, out=codes[..., 0])
    torch.bitwise_right_shift(nibbles, 4, out=codes[..., 1])
    codes = codes.view(np_, kp)
    return codes if (np_, kp) == (n, k) else codes[:n, :k].contiguous()


def pack_qweight(codes: Tensor) -> Tensor:
    """codes uint8 [n, k] (0..15) -> `qweight` int8 [N, K/2], padded with zero codes to multiples of 128."""
    n, k = codes.shape
    np_, kp = ceil_to(n, TILE), ceil_to(k, TILE)
    c = _pad2(codes, np_, kp, 0).view(np_, kp // 2, 2)
    words = (c[..., 0] | (c[..., 1] << 4)).contiguous().view(torch.int32)
    words = words.view(np_ // 128, 8, 2, 8, kp // 64, 2, 4).permute(0, 4, 1, 3, 6, 2, 5)
    return words.contiguous().view(torch.int8).view(np_, kp // 2)


# ---- channel vectors and INT4 scales ------------------------------------------------------------------------------------------------


def unpack_vector(packed: Tensor, n: int) -> Tensor:
    """`bias`, `smooth`, `smooth_orig`, `wcscales` -> [n]. In every 128: stored [i][j][h][e], channel 16i + 8h + 2j + e."""
    np_ = ceil_to(n, TILE)
    return _flat(packed, np_, "vector").view(np_ // 16, 4, 2, 2).transpose(1, 2).reshape(np_)[:n].contiguous()


def pack_vector(v: Tensor, pad: float = 1.0) -> Tensor:
    """[n] -> packed [N]; padded channels are ones as the published converter writes them."""
    np_ = ceil_to(v.numel(), TILE)
    return _pad2(v.reshape(1, -1), 1, np_, pad).view(np_ // 16, 2, 4, 2).transpose(1, 2).reshape(np_)


def unpack_int4_scales(packed: Tensor, n: int, k: int) -> Tensor:
    """INT4 `wscales` -> [n, k/64]: for each 128 rows all groups follow each other, each a packed 128-vector."""
    np_, groups = ceil_to(n, TILE), ceil_to(k, TILE) // 64
    s = _flat(packed, np_ * groups, "wscales").view(np_ // 128, groups, 8, 4, 2, 2).permute(0, 2, 4, 3, 5, 1)
    return s.reshape(np_, groups)[:n, : ceil_to(k, 64) // 64].contiguous()


def pack_int4_scales(scales: Tensor, k: int) -> Tensor:
    """[n, k/64] -> `wscales` [K/64, N], padded with ones."""
    n, groups = scales.shape
    if groups * 64 != ceil_to(k, 64):
        raise ValueError(f"{groups} scale groups for {k} input features, expected {ceil_to(k, 64) // 64}")
    np_, gp = ceil_to(n, TILE), ceil_to(k, TILE) // 64
    s = _pad2(scales, np_, gp, 1.0).view(np_ // 128, 8, 2, 4, 2, gp).permute(0, 5, 1, 3, 2, 4)
    return s.reshape(gp, np_)


def _need_whole_tiles(k: int) -> None:
    if k % TILE:  # the published converter writes too few scale groups for such a layer; nothing can load those files
        raise ValueError(f"NVFP4 needs input features in multiples of {TILE}, got {k}")


def unpack_nvfp4_scales(packed: Tensor, n: int, k: int) -> Tensor:
    """NVFP4 `wscales` (float8_e4m3fn) -> [n, k/16]. Stored [n/128][k/64][n%8][(n/8)%4][(n/32)%4][(k/16)%4]."""
    _need_whole_tiles(k)
    np_ = ceil_to(n, TILE)
    s = _flat(packed.contiguous().view(torch.uint8), np_ * k // 16, "wscales").view(np_ // 128, k // 64, 8, 4, 4, 4)
    return s.permute(0, 4, 3, 2, 1, 5).reshape(np_, k // 16)[:n].contiguous().view(packed.dtype)


def pack_nvfp4_scales(scales: Tensor, k: int) -> Tensor:
    """[n, k/16] float8_e4m3fn -> `wscales` [K/16, N], padded rows are ones."""
    _need_whole_tiles(k)
    n, groups = scales.shape
    if groups * 16 != k:
        raise ValueError(f"{groups} scale groups for {k} input features, expected {k // 16}")
    np_ = ceil_to(n, TILE)
    s = _pad2(scales, np_, groups, 1.0).contiguous().view(torch.uint8).view(np_ // 128, 4, 4, 8, k // 64, 4)
    return s.permute(0, 4, 3, 2, 1, 5).reshape(groups, np_).view(scales.dtype)


# ---- low-rank pair ------------------------------------------------------------------------------------------------------------------


def unpack_up(packed: Tensor, n: int, r: int) -> Tensor:
    """`lora_up` / `proj_up` -> [n, r]. 16x16 tiles [n/16][r/16], in a tile [n%8][(r%8)/2][(n/8)%2][(r/8)%2][r%2]."""
    np_, rp = ceil_to(n, TILE), ceil_to(r, RANK_TILE)
    t = _flat(packed, np_ * rp, "low-rank up factor").view(np_ // 16, rp // 16, 8, 4, 2, 2, 2)
    return t.permute(0, 4, 2, 1, 5, 3, 6).reshape(np_, rp)[:n, :r].contiguous()


def pack_up(up: Tensor) -> Tensor:
    """[n, r] -> `lora_up` [N, R], zero padded."""
    np_, rp = ceil_to(up.shape[0], TILE), ceil_to(up.shape[1], RANK_TILE)
    t = _pad2(up, np_, rp, 0).reshape(np_ // 16, 2, 8, rp // 16, 2, 4, 2)
    return t.permute(0, 3, 2, 5, 1, 4, 6).reshape(np_, rp)


def unpack_down(packed: Tensor, k: int, r: int) -> Tensor:
    """`lora_down` / `proj_down` (declared [K, R]) -> [r, k]. Tiles [k/16][r/16], in a tile [r%8][(k%8)/2][(r/8)%2][(k/8)%2][k%2]."""
    kp, rp = ceil_to(k, TILE), ceil_to(r, RANK_TILE)
    t = _flat(packed, kp * rp, "low-rank down factor").view(kp // 16, rp // 16, 8, 4, 2, 2, 2)
    return t.permute(1, 4, 2, 0, 5, 3, 6).reshape(rp, kp)[:r, :k].contiguous()


def pack_down(down: Tensor) -> Tensor:
    """[r, k] -> `lora_down`, declared [K, R], zero padded."""
    rp, kp = ceil_to(down.shape[0], RANK_TILE), ceil_to(down.shape[1], TILE)
    t = _pad2(down, rp, kp, 0).reshape(rp // 16, 2, 8, kp // 16, 2, 4, 2)
    return t.permute(3, 0, 2, 5, 1, 4, 6).reshape(kp, rp)


# ---- W4A16 (modulation layers; the T5 encoder uses the same codes with groups of 128) ---------------------------------------------------


def w4a16_scale_rows(k: int, group: int = 64) -> int:
    """Rows that `wscales`/`wzeros` are stored with: the number of groups, rounded up to a multiple of 8 (group 128), 16 (64) or 32 (32)."""
    return ceil_to(ceil_to(k, group) // group, {32: 32, 64: 16}.get(group, 8))


def unpack_w4a16_qweight(packed: Tensor, n: int, k: int) -> Tensor:
    """W4A16 `qweight` (int32 [n/4, k/2] or int16 [n/4, k]) -> codes uint8 [n, k] in STORED row order, values 0..15.

    16-bit words ordered [n/4][k/64][n%4][(k/32)%2][k%8]; nibble j of a word is k%32 in 8j..8j+7. n % 4 == 0 and k % 64 == 0.
    """
    if n % 4 or k % 64:
        raise ValueError(f"W4A16 needs n in multiples of 4 and k in multiples of 64, got {n} x {k}")
    words = _flat(packed.contiguous().view(torch.int16), n * k // 4, "W4A16 qweight").view(n // 4, k // 64, 4, 2, 8)
    b = words.transpose(1, 2).contiguous().view(torch.uint8).view(n, k // 32, 8, 2)
    codes = torch.empty((n, k // 32, 4, 8), dtype=torch.uint8, device=packed.device)
    for j in range(4):
        codes[:, :, j] = (b[..., j // 2] >> (4 * (j % 2))) & 15
    return codes.view(n, k)


def pack_w4a16_qweight(codes: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """codes uint8 [n, k] in stored row order -> int32 [n/4, k/2] (or int16 [n/4, k])."""
    n, k = codes.shape
    if n % 4 or k % 64:
        raise ValueError(f"W4A16 needs n in multiples of 4 and k in multiples of 64, got {n} x {k}")
    c = codes.reshape(n, k // 32, 4, 8)
    b = torch.stack([c[:, :, 0] | (c[:, :, 1] << 4), c[:, :, 2] | (c[:, :, 3] << 4)], dim=-1)
    words = b.contiguous().view(torch.int16).view(n // 4, 4, k // 64, 2, 8).transpose(1, 2)
    return words.contiguous().view(n // 4, k).view(dtype)


def unpack_w4a16_scales(packed: Tensor, n: int, k: int, group: int = 64) -> Tensor:
    """`wscales` / `wzeros` (plain [rows, n]) -> [n, k/group] in stored row order."""
    rows = w4a16_scale_rows(k, group)
    return _flat(packed, rows * n, "W4A16 scales").view(rows, n)[: ceil_to(k, group) // group].t().contiguous()


def pack_w4a16_scales(scales: Tensor, k: int, group: int = 64) -> Tensor:
    """[n, k/group] -> plain [rows, n], zeros beyond k/group."""
    return _pad2(scales.t(), w4a16_scale_rows(k, group), scales.shape[0], 0).contiguous()


def deinterleave_rows(t: Tensor, chunks: int) -> Tensor:
    """Modulation rows from stored order (channel c, chunk s at c*S + s) to native order (s*D + c), along dim 0."""
    return t.view(-1, chunks, *t.shape[1:]).transpose(0, 1).reshape(t.shape)


def interleave_rows(t: Tensor, chunks: int) -> Tensor:
    """Inverse of deinterleave_rows."""
    return t.view(chunks, -1, *t.shape[1:]).transpose(0, 1).reshape(t.shape)
