"""The report of a quantisation: what counts as worst, valid JSON, a picture with every layer in it, and none without Pillow."""

import json
import logging
import math
import sys

import pytest
from tonfa.models import quantize_report as qr
from tonfa.models.formats.flux_names import FluxDims, layer_specs
from tonfa.models.quantize_report import LayerReport, Report

FULL = FluxDims(3072, 128, 12288, 19, 38, 64, 64, 4096, 768, True)


def full_report(output: bool = True) -> Report:
    """As of FLUX.1-dev; the W4A4 layers' decibels are 20, 20.01, ..."""
    rows = []
    for i, (name, spec) in enumerate(layer_specs(FULL).items()):
        snr = 20 + i / 100
        if spec.chunks:
            rows.append(LayerReport(name, spec.n, spec.k, None, 25.0, seconds=0.1))
        else:
            rows.append(LayerReport(name, spec.n, spec.k, 32, snr + 1, snr if output else None, snr - 5 if output else None, 0.2))
    return Report("folder/svdq-int4.safetensors", "flux1-dev.safetensors", "calibrated", "int4", 6_800_000_000, 61.0, rows)


def test_worst_layers():
    report = full_report()
    assert report.measured == "output" and full_report(output=False).measured == "weight"
    worst = [x.name for x in report.worst(3)]
    assert worst == ["transformer_blocks.0.qkv_proj", "transformer_blocks.0.out_proj", "transformer_blocks.0.mlp_fc1"]
    lines = report.lines()
    assert "6.80 GB, 380 layers in 61 s" in lines[0] and "worst: transformer_blocks.0.qkv_proj " in lines[1]
    assert "20.0 dB (rounded to nearest 15.0), rank 32" in lines[1]
    assert "nearest" not in full_report(output=False).lines()[1]


def test_layers_without_noise():
    rows = [LayerReport("transformer_blocks.0.qkv_proj", 1, 1, 16, math.inf, math.inf, -math.inf)]
    report = Report("a.safetensors", "b", "calibrated", "int4", 5_000_000, 1.0, rows)
    facts = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert facts["layers"][0]["output_snr_db"] is None and facts["bytes"] == 5_000_000
    assert "5.00 MB" in report.lines()[0] and "average" not in report.lines()[0]


def test_saved_beside_the_checkpoint(tmp_path):
    written = full_report().save(tmp_path / "svdq-int4.safetensors")
    assert [p.name for p in written] == ["svdq-int4.report.json", "svdq-int4.report.png"]
    facts = json.loads(written[0].read_text())
    assert len(facts["layers"]) == 380 and facts["worst"][0] == "transformer_blocks.0.qkv_proj" and facts["mode"] == "calibrated"
    assert set(facts["layers"][1]) >= {"name", "n", "k", "rank", "weight_snr_db", "output_snr_db", "naive_output_snr_db", "seconds"}


@pytest.mark.parametrize("output", [True, False])
def test_the_picture_has_a_dot_for_every_layer(tmp_path, output):
    from PIL import Image

    full_report(output).save(tmp_path / "a.safetensors")
    with Image.open(tmp_path / "a.report.png") as sheet:
        assert sheet.size == (qr.WIDTH, qr.HEIGHT)
        inside = sheet.convert("RGB").crop((qr.LEFT + 1, qr.TOP + 1, qr.WIDTH - qr.RIGHT, qr.HEIGHT - qr.BOTTOM))
    counts = dict.fromkeys((*qr.KINDS.values(), qr.GREY), 0)
    counts |= {f"#{r:02x}{g:02x}{b:02x}": count for count, (r, g, b) in inside.getcolors(1 << 20)}
    for colour in qr.KINDS.values():  # 76 layers of a kind, 20 to 49 pixels a dot, some on top of each other
        assert counts[colour] > 76 * 10, (colour, counts)
    assert (counts[qr.GREY] > 304 * 10) == output


def test_no_pillow_no_picture(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with caplog.at_level(logging.INFO):
        written = full_report().save(tmp_path / "a.safetensors")
    assert [p.name for p in written] == ["a.report.json"] and "a.report.png: it takes Pillow" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["a.report.json"]


def test_an_old_pillow_is_none(tmp_path, monkeypatch):
    import PIL

    monkeypatch.setattr(PIL, "__version__", "9.5.0")
    assert len(full_report().save(tmp_path / "a.safetensors")) == 1
