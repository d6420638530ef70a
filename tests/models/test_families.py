"""Qwen-Image's and Z-Image's blocks without a host: both paths of a block, and what decides between them; the kernels' warm-up."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from tonfa.models import qwen_image, z_image
from tonfa.models.dequantize import dense_linear, dense_state_dict, dequantize
from tonfa.models.flux import rope_table
from tonfa.models.formats.checkpoint import open_packed
from tonfa.models.linear import PackedLinear, PlainLinear

from .formats import packed_files

TEXT, IMAGE, HIDDEN = 5, 12, packed_files.HIDDEN
COMPUTES = [("weight_only", 1e-5), ("fast", 3e-3), ("exact", 1e-2)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rel(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def table(axes: list[int], batch: int = 1) -> torch.Tensor:
    ids = torch.arange((TEXT + IMAGE) * 3).view(1, TEXT + IMAGE, 3).float() % 7
    return rope_table(ids, axes, 10000.0).expand(batch, -1, -1, -1, -1, -1)


def opened(folder, made: tuple):
    """The checkpoint of packed_files' tensors, its scales made small: random ones are of any size."""
    tensors, metadata, _ = made
    for name, tensor in tensors.items():
        if name.endswith((".wscales", ".wzeros")) and tensor.dtype == torch.bfloat16:
            tensors[name] = tensor * 0.01
        if name.endswith((".proj_down", ".proj_up")):
            tensors[name] = (tensor - 1) * 0.05
    return open_packed(packed_files.save(folder / "file.safetensors", tensors, metadata))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return qwen_image.build_blocks(opened(tmp_path_factory.mktemp("qwen"), packed_files.qwen()))


@pytest.fixture(scope="module")
def z_file(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("z"), packed_files.zimage(refiners=1))


@pytest.fixture(scope="module")
def z_blocks(z_file):
    return z_image.build_blocks(z_file)


def options(compute: str) -> dict:
    return {"tonfa": {"compute": compute}}


# -- Qwen-Image ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compute", "most"), COMPUTES)
def test_both_paths_of_qwens_block_agree(qwen, compute, most):
    img, txt, temb = noise(2, IMAGE, HIDDEN), noise(2, TEXT, HIDDEN, seed=1), noise(2, HIDDEN, seed=2)
    pe = table([16, 56, 56])
    fused = qwen[0](img, txt, None, temb, pe, transformer_options=options(compute))
    plain = qwen[0](img, txt, torch.zeros(2, TEXT), temb, pe, transformer_options=options(compute))
    assert all(rel(a, b) < most for a, b in zip(fused, plain, strict=True))
    assert fused[0].shape == txt.shape and fused[1].shape == img.shape  # text first, as the host's


def test_either_arrangement_of_qwens_table(qwen):
    img, txt, temb, pe = noise(1, IMAGE, HIDDEN), noise(1, TEXT, HIDDEN), noise(1, HIDDEN), table([16, 56, 56])
    one, two = (qwen[0](img, txt, None, temb, p, transformer_options=options("weight_only")) for p in (pe, pe.transpose(1, 2)))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_two_times_alike_are_one(qwen):
    """With the time of the references equal to the picture's, index_timestep_zero changes nothing."""
    img, txt, temb, pe = noise(2, IMAGE, HIDDEN), noise(2, TEXT, HIDDEN), noise(2, HIDDEN), table([16, 56, 56])
    one = qwen[0](img, txt, None, temb, pe, transformer_options=options("weight_only"))
    two = qwen[0](img, txt, None, torch.cat((temb, temb)), pe, timestep_zero_index=7, transformer_options=options("weight_only"))
    other = qwen[0](img, txt, None, torch.cat((temb, 0 * temb)), pe, timestep_zero_index=7, transformer_options=options("weight_only"))
    assert all(rel(a, b) < 1e-5 for a, b in zip(two, one, strict=True))
    assert rel(other[1][:, 7:], one[1][:, 7:]) > 1e-2


def test_a_mask_hides_text_from_qwens_image(qwen):
    img, temb, pe = noise(1, IMAGE, HIDDEN), noise(1, HIDDEN), table([16, 56, 56])
    mask = torch.zeros(1, 1, TEXT)
    mask[..., 3:] = -1e9
    texts = noise(1, TEXT, HIDDEN), noise(1, TEXT, HIDDEN)
    texts[1][:, 3:] = 5.0
    one, two = (qwen[0](img, txt, mask, temb, pe, transformer_options=options("weight_only"))[1] for txt in texts)
    assert rel(one, two) < 1e-5


# -- Z-Image ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", ["layers", "noise_refiner", "context_refiner"])
@pytest.mark.parametrize(("compute", "most"), COMPUTES)
def test_both_paths_of_z_images_block_agree(z_blocks, stack, compute, most):
    block, x, pe = z_blocks[stack][0], noise(2, TEXT + IMAGE, HIDDEN), table([32, 48, 48]).transpose(1, 2)
    times = None if stack == "context_refiner" else noise(2, 256, seed=3)
    fused = block(x, None, pe, times, transformer_options=options(compute))
    plain = block(x, torch.zeros(1, 1, 1, TEXT + IMAGE), pe, times, transformer_options=options(compute))
    assert rel(fused, plain) < most


def test_two_times_of_z_image(z_blocks):
    block, x, times = z_blocks["layers"][0], noise(2, TEXT + IMAGE, HIDDEN), noise(2, 256)
    how = {"transformer_options": options("weight_only")}
    pe, slices = table([32, 48, 48]).transpose(1, 2), [(9, 14), (0, 3)]
    one = block(x, None, pe, times, **how)
    assert rel(block(x, None, pe, torch.cat((times, times)), timestep_zero_index=slices, **how), one) < 1e-5
    other = block(x, None, pe, torch.cat((times, 0 * times)), timestep_zero_index=slices, **how)
    assert rel(other[:, 9:14], one[:, 9:14]) > 1e-2


@pytest.mark.parametrize(
    ("slices", "dims"),
    [
        ([], [(0, 10, 0)]),
        ([(0, 10)], [(0, 10, 1)]),
        ([(7, 10), (0, 2)], [(0, 2, 1), (2, 7, 0), (7, 10, 1)]),
        ([(2, 5), (4, 6)], [(0, 2, 0), (2, 5, 1), (5, 6, 1), (6, 10, 0)]),
    ],
)
def test_slices_become_stretches_of_all_tokens(slices, dims):
    assert z_image.dims_of(slices, 10) == dims


def test_a_block_that_is_all_16_bit_is_left_to_the_host(tmp_path):
    blocks = z_image.build_blocks(opened(tmp_path, packed_files.zimage(skip_refiners=True)))
    assert set(blocks) == {"layers"} and sorted(blocks["layers"]) == [0, 1]


def test_a_linear_in_16_bit_in_a_packed_block(tmp_path):
    """Third parties leave some layers out: the stacked pair of a SwiGLU then is a plain linear with both halves."""
    tensors, metadata, _ = packed_files.zimage(depth=1, refiners=1)
    name = "layers.0.feed_forward.net.0.proj"
    for key in [key for key in tensors if key.startswith(name)]:
        del tensors[key]
    weight = noise(2 * packed_files.Z_MLP, HIDDEN).bfloat16()
    tensors[f"{name}.weight"] = weight
    block = z_image.build_blocks(opened(tmp_path, (tensors, metadata, None)))["layers"][0]
    proj = block.feed_forward.net[0].proj
    assert isinstance(proj, PlainLinear) and torch.equal(proj.weight, weight)
    assert [(p.name.rpartition(".")[2], p.first) for p in proj.pieces] == [("w3", 0), ("w1", packed_files.Z_MLP)]
    out = block(
        noise(1, 8, HIDDEN), None, table([32, 48, 48])[:, :, :8].transpose(1, 2), noise(1, 256), transformer_options=options("fast")
    )
    assert torch.isfinite(out).all()


def test_stacked_linears_know_their_pieces(qwen, z_blocks):
    names = [piece.name for piece in qwen[1].attn.add_qkv_proj.pieces]
    assert names == [f"transformer_blocks.1.attn.add_{q}_proj" for q in "qkv"]
    assert isinstance(qwen[1].attn.to_qkv, PackedLinear) and not hasattr(qwen[1].attn.to_add_out, "pieces")
    assert not hasattr(z_blocks["layers"][0].attention.qkv, "pieces")  # the host's own linear


def test_positions_are_those_of_the_cached_blocks(qwen, z_blocks):
    assert [block.position for block in qwen] == [0, 1]
    assert [z_blocks["layers"][i].position for i in range(2)] == [0, 1]
    assert z_blocks["noise_refiner"][0].position == z_blocks["context_refiner"][0].position == z_image.NOT_CACHED


@pytest.mark.parametrize("family", ["qwen", "zimage"])
def test_dequantize_writes_the_hosts_own_linears(family, tmp_path):
    checkpoint = opened(tmp_path, getattr(packed_files, family)(depth=1))
    dequantize(tmp_path / "file.safetensors", tmp_path / "dense.safetensors")
    written, want = load_file(tmp_path / "dense.safetensors"), dict(dense_state_dict(checkpoint))
    assert list(written) and all(torch.equal(written[name], tensor) for name, tensor in want.items()) and set(written) == set(want)
    names = ("to_q", "to_k", "to_v") if family == "qwen" else ("w1", "w3")
    assert all(any(key.endswith(f".{name}.weight") for key in written) for name in names)
    assert not any("to_qkv" in key or "net.0.proj" in key and family == "zimage" for key in written)
    stacked = "transformer_blocks.0.attn.to_qkv" if family == "qwen" else "layers.0.feed_forward.net.0.proj"
    host = next(h for h in checkpoint.host_linears() if h.name == stacked)
    whole = dense_linear(checkpoint, host)[0].bfloat16()
    for piece in checkpoint.pieces(host):
        assert torch.equal(written[f"{piece.name}.weight"], whole[piece.first : piece.first + piece.rows])


def test_names_of_rows_stand_in_for_modules(qwen, z_blocks):
    """Whoever looks a layer up by the host's key finds something; nothing is counted or saved twice."""
    attention, ff = qwen[0].attn, z_blocks["layers"][0].feed_forward
    for parent, names in ((attention, ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")), (ff, ("w1", "w3"))):
        assert all(getattr(parent, name).comfy_cast_weights is False for name in names)
        assert not any(name.split(".")[0] in names for name in (*parent.state_dict(), *dict(parent.named_modules())))


def test_less_of_a_checkpoint_can_be_built(z_file):
    dims = dataclasses.replace(z_file.dims, depth=1, refiners=0)
    blocks = z_image.build_blocks(dataclasses.replace(z_file, dims=dims))
    assert list(blocks) == ["layers"] and list(blocks["layers"]) == [0]
