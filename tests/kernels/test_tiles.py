"""kernels/tiles.py: how rows of a product are shared out over tiles."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from tonfa.kernels.targets import cuda_target, hip_target
from tonfa.kernels.tiles import ALL_TILES, quantize_tile, wide_bands, wide_tile

H200 = replace(cuda_target(90), multiprocessors=132)


@pytest.mark.parametrize("kind", ["half", "plain"])
def test_flux_products_with_a_poor_last_round_end_in_smaller_tiles(kind):
    """3072 outputs of 4608 rows: 432 tiles of 128 x 256 are three full rounds and 36 tiles."""
    (first, second) = wide_bands(H200, kind, 4608, 3072, 3072)
    assert first == (0, 4096, wide_tile(H200, kind)) and second[:2] == (4096, 4608)
    assert second[2].bm * second[2].bn == first[2].bm * first[2].bn // 2


def test_one_band_where_the_last_round_is_full_enough():
    assert len(wide_bands(H200, "half", 4608, 9216, 3072)) == 1  # 108 tiles of 132 left
    assert len(wide_bands(H200, "half", 4096 + 256 * 4, 3072, 3072)) == 1  # 84
    assert len(wide_bands(H200, "half", 33 * 256, 1024, 3072)) == 1  # two rounds and none left
    assert len(wide_bands(H200, "row", 4608, 3072, 3072)) == 1


@pytest.mark.parametrize("rows", [4608, 4352, 4096, 2048])
@pytest.mark.parametrize(("n", "k"), [(3072, 12288), (3072, 15360), (3840, 10240)])
def test_many_inputs_make_large_tiles_of_e4m3_products(n, k, rows):
    bands = wide_bands(H200, "row", rows, n, k)
    assert (bands[0][2].bn, bands[0][2].bm) == (128, 256) and bands[1:] in ([], [(bands[0][1], rows, wide_tile(H200, "row"))])
    for target in (cuda_target(100), cuda_target(120), cuda_target(89)):
        assert wide_bands(target, "row", rows, n, k) == [(0, rows, wide_tile(target, "row"))]
    assert wide_bands(H200, "row", rows, n, 8192) == [(0, rows, wide_tile(H200, "row"))]


def test_few_tokens_stay_with_small_tiles():
    """256 tokens of a text: 24 tiles of 256 x 128 would leave most of the machine idle."""
    assert wide_bands(H200, "row", 256, 3072, 12288) == [(0, 256, wide_tile(H200, "row"))]


def test_compiling_ahead_takes_both_tiles():
    token = ALL_TILES.set(True)
    try:
        assert [band[:2] for band in wide_bands(H200, "half", 512, 3072, 3072)] == [(0, 256), (256, 512)]
        assert (
            len({band[2] for band in wide_bands(H200, "half", 512, 3072, 3072)}) == 2 and len(wide_bands(H200, "row", 512, 3072, 3072)) == 1
        )
        assert len({band[2] for band in wide_bands(H200, "row", 512, 3072, 12288)}) == 2
    finally:
        ALL_TILES.reset(token)
    assert len(wide_bands(H200, "half", 512, 3072, 3072)) == 1


@pytest.mark.parametrize("kind", ["row", "half", "plain"])
@pytest.mark.parametrize("target", [H200, replace(H200, multiprocessors=7), replace(cuda_target(100), multiprocessors=148)])
def test_bands_cover_every_row_once(kind, target):
    for n, k in product((128, 1024, 3072, 3840, 9216, 11520, 12288, 20480, 21504), (3072, 12288)):
        for rows in [*range(1, 700, 37), *range(700, 20000, 997), 4352, 4608, 16384]:
            bands = wide_bands(target, kind, rows, n, k)
            assert bands[0][0] == 0 and bands[-1][1] == rows and 1 <= len(bands) <= 2
            assert all(start < stop for start, stop, _ in bands)
            for (_, stop, tile), (start, _, _) in zip(bands, bands[1:], strict=False):
                assert stop == start and start % tile.bm == 0, "the first band ends with a whole tile: its last one must not cross over"


SM_89, SM_120 = replace(cuda_target(89), multiprocessors=132), replace(cuda_target(120), multiprocessors=170)


@pytest.mark.parametrize("target", [cuda_target(90), cuda_target(80), SM_89, SM_120])
def test_no_bands_for_other_targets_or_an_unknown_size(target):
    for kind in ("half", "plain"):
        assert wide_bands(target, kind, 4608, 3072, 3072) == [(0, 4608, wide_tile(target, kind))]


@pytest.mark.parametrize("target", [H200, cuda_target(86), cuda_target(100), hip_target("gfx942"), hip_target("gfx1100")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pieces_of_the_low_rank_product_are_never_more_than_k_has_steps(target, dtype):
    for k in (128, 256, 384, 3072, 3840, 10240, 12288, 15360):
        for rows in (1, 33, 256, 4608, 65536):
            tile = quantize_tile(target, dtype, rows, k, grouped=True)
            assert tile.bk % 64 == 0 and k % tile.bk == 0 and 1 <= tile.pieces <= k // tile.bk
