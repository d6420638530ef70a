"""compare: the distances are those of the dense weights, whichever way round the files are given; other pairs are refused."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tonfa.models.compare import compare
from tonfa.models.dequantize import dense_state_dict
from tonfa.models.formats.checkpoint import open_checkpoint
from tonfa.models.formats.tensorfile import CheckpointError
from tonfa.models.formats.writer import write_flux

from .dense_files import CONFIG, dense_state, in_diffusers_names, write_dense

QKV, FC2, NORM = "transformer_blocks.0.qkv_proj", "single_transformer_blocks.1.mlp_fc2", "transformer_blocks.0.norm1.linear"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("compare")
    state = dense_state(torch.float32)
    found = {"dense": write_dense(folder, state), "int4": folder / "int4.safetensors", "nvfp4": folder / "nvfp4.safetensors"}
    write_flux(found["int4"], state, CONFIG, rank=16)
    write_flux(found["nvfp4"], state, CONFIG, rank=48, precision="nvfp4")
    return found


def decibels(got: torch.Tensor, want: torch.Tensor) -> float:
    return 10 * math.log10(float(want.double().square().sum() / (got.double() - want.double()).square().sum()))


def test_against_the_dense_model(files):
    steps = []
    found = compare(files["int4"], files["dense"], progress=lambda *at: steps.append(at))
    snr = {x.name: x.snr_db for x in found.layers}
    state, dense = dense_state(torch.float32), dict(dense_state_dict(open_checkpoint(files["int4"]), torch.float32))
    assert len(snr) == 20 and steps == [(i, 20) for i in range(21)]
    name = "double_blocks.0.img_attn.qkv.weight"
    assert snr[QKV] == pytest.approx(decibels(dense[name], state[name]), abs=1e-4)
    name = "single_blocks.1.linear2.weight"
    assert snr[FC2] == pytest.approx(decibels(dense[name][:, 256:], state[name][:, 256:]), abs=1e-4)
    assert {x.name: x.ranks for x in found.layers}[QKV] == (16, None) and {x.name: x.ranks for x in found.layers}[NORM] == (None, None)
    assert [x.snr_db for x in found.worst(20)] == sorted(snr.values())
    assert len(found.plain) == 0  # in bf16 they are the same
    turned = compare(files["dense"], files["int4"])
    assert turned.layers == found.layers and turned.path == found.path


def test_two_four_bit_files(files):
    found = compare(files["int4"], files["nvfp4"])
    snr = {x.name: x.snr_db for x in found.layers}
    assert snr[NORM] is None and 10 < snr[QKV] < 30  # modulation is alike in both
    assert {x.name: x.ranks for x in found.layers}[QKV] == (16, 48)
    text = "\n".join(found.lines())
    assert "double qkv_proj_context" in text and "single mlp_fc2" in text and "rank 16 and 48" in text and "all equal in bf16" in text
    same = compare(files["int4"], files["int4"])
    assert all(x.snr_db is None for x in same.layers) and same.mean() is None and same.worst() == []
    assert "inf" in "\n".join(same.lines()) and same.as_json()["mean_snr_db"] is None


def test_other_plain_tensors_are_counted(files, tmp_path):
    tensors = load_file(files["int4"])
    tensors["proj_out.bias"] = tensors["proj_out.bias"] + 1
    from safetensors import safe_open

    with safe_open(files["int4"], "pt") as f:
        save_file(tensors, tmp_path / "changed.safetensors", f.metadata())
    found = compare(tmp_path / "changed.safetensors", files["int4"])
    assert found.plain == ["final_layer.linear.bias"] and "1 differ, the first is final_layer.linear.bias" in found.lines()[-1]


def test_a_diffusers_folder_as_reference(files, tmp_path):
    save_file(in_diffusers_names(dense_state(torch.float32)), tmp_path / "diffusion_pytorch_model.safetensors")
    assert compare(files["int4"], tmp_path).layers == compare(files["int4"], files["dense"]).layers


def test_pairs_that_cannot_be_compared(files, tmp_path):
    with pytest.raises(CheckpointError, match="are both dense"):
        compare(files["dense"], files["dense"])
    other = write_dense(tmp_path, dense_state(single=1))
    with pytest.raises(CheckpointError, match="are not the same model"):
        compare(files["int4"], other)
    with pytest.raises(CheckpointError, match="does not exist"):
        compare(files["int4"], tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not a SVDQuant FLUX.1 checkpoint"):
        compare(tmp_path / "a.safetensors", files["int4"])
