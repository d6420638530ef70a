"""dequantize against a reference written from the format's index formulas (formats/flux_files.py), not from our unpackers."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tonfa.models import dequantize as dq
from tonfa.models.formats.checkpoint import CheckpointError, open_checkpoint

_spec = importlib.util.spec_from_file_location("flux_files", Path(__file__).parent / "formats" / "flux_files.py")
ff = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ff)


@pytest.mark.parametrize("name", ff.MINI)
def test_every_layer_equals_the_formula(name):
    tensors, _ = ff.mini(name)
    checkpoint = open_checkpoint(ff.DATA / f"{name}.safetensors")
    h = checkpoint.config["hidden_size"]
    want = ff.reference_flux(tensors, checkpoint.precision, h, 4 * h)
    got = dict(dq.dense_state_dict(checkpoint, torch.float32))
    assert got.keys() == want.keys()
    for key, w in want.items():
        g = got[key].double().numpy()
        assert g.shape == w.shape, key
        assert np.abs(g - w).max() <= 1e-5 * max(1.0, np.abs(w).max()), (key, np.abs(g - w).max())


@pytest.mark.parametrize("name", ff.MINI)
def test_close_to_the_true_weights(name):
    """Catches a reference and a reader that are wrong in the same way: the logical companion holds the weights before quantisation."""
    truth = load_file(ff.DATA / f"{name}.logical.safetensors")
    got = dict(dq.dense_state_dict(open_checkpoint(ff.DATA / f"{name}.safetensors"), torch.float32))
    s, d = "single_transformer_blocks.0.", "transformer_blocks.0."
    pairs = {
        "double_blocks.0.img_attn.qkv": truth[d + "qkv_proj.weight"],
        "double_blocks.0.txt_mlp.2": truth[d + "mlp_context_fc2.weight"],
        "double_blocks.0.txt_mod.lin": truth[d + "norm1_context.linear.weight"],
        "single_blocks.0.modulation.lin": truth[s + "norm.linear.weight"],
        "single_blocks.0.linear1": torch.cat([truth[s + "qkv_proj.weight"], truth[s + "mlp_fc1.weight"]]),
        "single_blocks.0.linear2": torch.cat([truth[s + "out_proj.weight"], truth[s + "mlp_fc2.weight"]], 1),
    }
    for native, w in pairs.items():
        error = (got[f"{native}.weight"] - w.float()).norm() / w.float().norm()
        assert error < 0.2, (native, error)
    mod = truth[d + "norm1.linear.bias"].float()
    assert (got["double_blocks.0.img_mod.lin.bias"] - mod).abs().max() < 0.02  # bf16 of bias + 1
    for native, layer in (("double_blocks.0.img_mlp.2", d + "mlp_fc2"), ("single_blocks.0.linear2", s + "mlp_fc2")):
        bias = truth[layer + ".bias"].float()
        # quantised row sums leave a third of the bias's size; with the compensation still in, it is one and a half times that size
        assert (got[f"{native}.bias"] - bias).abs().mean() < 0.5 * bias.abs().mean()


@pytest.mark.parametrize("name", ff.MINI)
def test_file_is_the_bf16_rounding(name, tmp_path):
    seen = []
    dq.dequantize(ff.DATA / f"{name}.safetensors", tmp_path / "out.safetensors", progress=lambda done, total: seen.append((done, total)))
    got = load_file(tmp_path / "out.safetensors")
    want = dict(dq.dense_state_dict(open_checkpoint(ff.DATA / f"{name}.safetensors"), torch.float32))
    assert got.keys() == want.keys()
    for key, t in got.items():
        assert t.dtype == torch.bfloat16
        assert torch.equal(t, want[key].to(torch.bfloat16)), key
    assert seen[-1][0] == seen[-1][1] == sum(t.numel() * 2 for t in got.values())
    assert all(a[0] <= b[0] for a, b in zip(seen, seen[1:], strict=False))
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]


def test_a_failure_leaves_nothing_behind_and_keeps_the_old_file(tmp_path):
    tensors, meta = ff.mini()
    tensors["single_transformer_blocks.0.mlp_fc2.lora_up"][3, 3] = float("nan")
    bad = ff.save(tmp_path / "bad.safetensors", tensors, meta)
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    with pytest.raises(CheckpointError, match=r"mlp_fc2\.lora_up"):
        dq.dequantize(bad, out)
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.safetensors", "out.safetensors"]


def test_refuses_to_overwrite_its_input(tmp_path):
    tensors, meta = ff.mini()
    path = ff.save(tmp_path / "in.safetensors", tensors, meta)
    with pytest.raises(CheckpointError, match="choose another name"):
        dq.dequantize(path, path)


MINI = ff.DATA / "mini_flux_int4.safetensors"


def refused_before_writing(source, target, words):
    """One sentence with `words`, and nothing written: a slot that is made would raise something else."""
    before = sorted(p for p in target.parent.rglob("*")) if target.parent.is_dir() else None
    with pytest.raises(CheckpointError, match=words) as raised:
        dq.dequantize(source, target, progress=lambda done, total: pytest.fail("it was writing"))
    said = str(raised.value)
    assert str(target) in said and ".part" not in said and "\n" not in said
    assert before == (sorted(p for p in target.parent.rglob("*")) if target.parent.is_dir() else None)


def test_refuses_a_folder(tmp_path):
    (tmp_path / "models").mkdir()
    refused_before_writing(MINI, tmp_path / "models", "is a folder; give the name")


def test_refuses_a_folder_that_is_not_there(tmp_path):
    refused_before_writing(MINI, tmp_path / "no" / "out.safetensors", "there is no folder .*no; make it first")
    (tmp_path / "file").touch()
    refused_before_writing(MINI, tmp_path / "file" / "out.safetensors", "there is no folder")


def test_refuses_a_full_disk(tmp_path, monkeypatch):
    need = sum(t.numel() * 2 for _, t in dq.dense_state_dict(open_checkpoint(MINI)))
    usage = SimpleNamespace(free=need - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    refused_before_writing(MINI, tmp_path / "out.safetensors", "needs .* GB, but its disk has .* GB free")
    usage.free = need
    dq.dequantize(MINI, tmp_path / "out.safetensors")


def test_a_write_that_fails_names_the_file_that_was_asked_for(tmp_path, monkeypatch):
    from tonfa.models.formats import tensorfile

    def full(slot):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorfile, "_bytes_of", full)
    with pytest.raises(CheckpointError, match="out.safetensors cannot be written: No space left on device"):
        dq.dequantize(MINI, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
