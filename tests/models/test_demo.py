"""The demo's parts: what it draws differs from run to run as it should, and nothing keeps a file of its temporary folder open."""

import errno
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tonfa.models import demo
from tonfa.models.demo_picture import GAP, LABEL, MARGIN, PANEL, draw
from tonfa.models.dense_flux import open_dense
from tonfa.models.miniature import load_miniature
from tonfa.models.quantize_flux import Options, quantize_flux


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Whole networks take minutes in Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def mapped(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / demo.FILE
    quantize_flux(open_dense(load_miniature().flux), path, Options(mode="naive"))
    return path


def test_standalone_runs_and_closes_the_checkpoint(monkeypatch, checkpoint):
    monkeypatch.setattr(demo, "CAPTIONS", demo.CAPTIONS[:1])
    monkeypatch.setattr(demo, "STEPS", 2)
    opened, miniature = [], load_miniature()
    monkeypatch.setattr(demo, "open_checkpoint", lambda path, real=demo.open_checkpoint: opened.append(real(path)) or opened[-1])
    runs = {r.name: r for r in demo.standalone(miniature, checkpoint)}
    assert list(runs) == list(demo.RUNS) and len(opened) == 2
    assert sys.platform != "linux" or mapped(checkpoint.parent) == []  # `opened` keeps them alive: they were closed, not collected
    assert runs["16 bit"].nbytes > 2 * runs["fast"].nbytes and all(r.seconds > 0 for r in runs.values())
    assert not torch.equal(runs["exact"].pictures, runs["fast"].pictures)
    assert all((r.pictures - runs["16 bit"].pictures).abs().mean() < 0.1 for r in runs.values())


def test_the_captions_are_the_miniatures_and_calibration_sees_others():
    miniature = load_miniature()
    found = [tuple(miniature.captions.word_ids(caption)) for caption in (*demo.CAPTIONS, *demo.CALIBRATING)]
    assert len(set(found)) == 20 and len(demo.CAPTIONS) == 8


def test_a_run_that_was_read_is_no_view_of_its_file(tmp_path):
    run = demo.Run("fast", "bfloat16", 1, 0.5, torch.rand(2, 3, 4, 4))
    demo.write_run(tmp_path, run)
    read = demo.read_run(tmp_path, "fast")
    assert torch.equal(read.pictures, run.pictures) and (read.dtype, read.seconds) == ("bfloat16", 0.5)
    assert sys.platform != "linux" or mapped(tmp_path) == []


def test_a_folder_that_cannot_be_removed_does_not_end_the_demo(monkeypatch, tmp_path, capsys):
    def in_use(*_, **__):
        raise OSError(errno.EBUSY, "in use")

    pictures = torch.zeros(8, 3, 16, 16)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(demo, "quantise", lambda miniature, path: path.touch())
    monkeypatch.setattr(demo, "standalone", lambda *_: [demo.Run(name, "float32", 1, 0.5, pictures) for name in demo.RUNS])
    monkeypatch.setattr(os, "rmdir", in_use)
    demo.run(tmp_path / "out", use_comfyui=False)
    assert "Picture:" in capsys.readouterr().out
    assert list(tmp_path.glob("tonfa-demo-*")), "it was removed: this test means nothing"


def test_the_picture_shows_both_and_their_difference(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    dense, four = torch.zeros(3, 3, 16, 16), torch.zeros(3, 3, 16, 16)
    dense[:, 0] = 1
    four[:, 0], four[1, 1] = 1, 0.25
    draw(tmp_path / "a.png", ["one", "two", "three"], dense, four, "4 bit")
    with image.open(tmp_path / "a.png") as sheet:

        def middle(caption: int, column: int) -> tuple:
            left = MARGIN + caption % 2 * (3 * PANEL + 2 * GAP + 2 * MARGIN) + column * (PANEL + GAP)
            return sheet.getpixel((left + PANEL // 2, LABEL + caption // 2 * (LABEL + PANEL + MARGIN) + LABEL + PANEL // 2))

        assert middle(0, 0) == middle(2, 0) == middle(0, 1) == (255, 0, 0) and middle(1, 1) == (255, 64, 0)
        assert middle(0, 2) == middle(2, 2) == (128, 128, 128) and middle(1, 2) == (128, 255, 128)  # 4 x 0.25
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
