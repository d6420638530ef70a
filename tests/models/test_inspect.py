"""inspect: the facts of a good file, a sentence for every other."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tonfa.models.inspect import format_report, inspect

_spec = importlib.util.spec_from_file_location("flux_files", Path(__file__).parent / "formats" / "flux_files.py")
ff = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ff)


@pytest.mark.parametrize("name", ff.MINI)
def test_good_file(name):
    path = ff.DATA / f"{name}.safetensors"
    r = inspect(path)
    tensors, meta = ff.mini(name)
    precision = name.split("_")[2]
    assert r["usable"] and r["family"] == "flux" and r["precision"] == precision and r["names"] == "v1"
    assert r["tensors"] == len(tensors) and sum(r["bytes_by_kind"].values()) == r["bytes"]
    assert r["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    codes = sum(t.numel() for k, t in tensors.items() if k.endswith("qweight") and t.dtype == torch.int8)
    assert r["bytes_by_kind"]["codes"] == codes
    assert r["layers"] == {"double_blocks": 1, "single_blocks": 1, "linears": {"w4a16": 3, "w4a4": 10}}
    assert r["config"] == json.loads(meta["comfy_config"])["model_config"] and r["metadata"] == sorted(meta)
    assert json.loads(json.dumps(r)) == r
    text = format_report(r)
    for word in (precision, "rank", "1 double, 1 single", "codes", "hidden_size", "NunchakuFluxDiTLoader"):
        assert word in text


def test_v2_without_metadata(tmp_path):
    tensors, _ = ff.mini("mini_flux_nvfp4")
    r = inspect(ff.save(tmp_path / "m.safetensors", ff.as_v2(tensors)))
    assert r["usable"] and r["names"] == "v2" and r["metadata"] == [] and r["warnings"]
    assert "none (shapes decide)" in format_report(r) and "warning: " in format_report(r)


def test_files_that_cannot_be_used_get_their_sentence(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"")
    r = inspect(path)
    assert not r["usable"] and r["family"] == "unreadable" and "empty" in r["sentence"] and format_report(r) == r["sentence"]
    r = inspect(ff.DATA / "lora_mini_flux_int4.safetensors")
    assert not r["usable"] and r["family"] == "lora" and "NunchakuFluxLoraLoader" in r["sentence"] and r["tensors"] > 0
    tensors, meta = ff.mini()
    del tensors["transformer_blocks.0.mlp_fc1.smooth"]
    r = inspect(ff.save(path, tensors, meta))
    assert not r["usable"] and r["family"] == "flux" and "mlp_fc1.smooth is missing" in format_report(r)
    assert not inspect(tmp_path / "absent")["usable"]


def test_full_size_model_is_not_given_a_size(tmp_path):
    """Only models of another depth than FLUX.1's say how deep they are."""
    tensors, _ = ff.mini()
    sentence = inspect(ff.save(tmp_path / "m.safetensors", ff.deeper(tensors, 19, 38)))["sentence"]
    assert "blocks" not in sentence and "FLUX.1" in sentence
    assert "1+1 blocks of 128" in inspect(ff.DATA / "mini_flux_int4.safetensors")["sentence"]
