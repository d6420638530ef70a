"""The demo's housekeeping: nothing keeps a file of its temporary folder open (Windows could not remove the folder then)."""

import errno
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tonfa.models import demo
from tonfa.models.demo_weights import write_checkpoint


def mapped(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_checkpoint_is_closed(monkeypatch, tmp_path):
    write_checkpoint(tmp_path / demo.FILE)
    held = []

    def sample(model, *_):
        held.extend(mapped(tmp_path))
        return torch.zeros(1, 16, 2, 2)

    monkeypatch.setattr(demo, "sample", sample)
    opened = []
    monkeypatch.setattr(demo, "open_checkpoint", lambda path, real=demo.open_checkpoint: opened.append(real(path)) or opened[-1])
    demo.standalone(tmp_path / demo.FILE)
    assert len(opened) == len(demo.RUNS) and held == []  # `opened` keeps them alive: they were closed, not collected


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_run_that_was_read_is_no_view_of_its_file(tmp_path):
    run = demo.Run("fast", "bfloat16", 1, 0.5, torch.randn(1, 16, 4, 4))
    demo.write_run(tmp_path, run)
    read = demo.read_run(tmp_path, "fast")
    assert torch.equal(read.latent, run.latent) and (read.dtype, read.seconds) == ("bfloat16", 0.5)
    assert mapped(tmp_path) == []


def test_a_folder_that_cannot_be_removed_does_not_end_the_demo(monkeypatch, tmp_path, capsys):
    def in_use(*_, **__):
        raise OSError(errno.EBUSY, "in use")

    latent = torch.zeros(1, 16, 2, 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(demo, "write_checkpoint", lambda path, progress: path.touch())
    monkeypatch.setattr(demo, "standalone", lambda path: [demo.Run(name, "float32", 1, 0.5, latent) for name in demo.RUNS])
    monkeypatch.setattr(demo, "draw", lambda *_, **__: None)
    monkeypatch.setattr(os, "rmdir", in_use)
    demo.run(tmp_path / "out", use_comfyui=False)
    assert "Picture:" in capsys.readouterr().out
    assert list(tmp_path.glob("tonfa-demo-*")), "it was removed: this test means nothing"
