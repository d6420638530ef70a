"""warm_up: what it runs, and that it never stands in the way of loading."""

from __future__ import annotations

import logging

import pytest
import torch
from tonfa.models import warmup
from tonfa.models.formats.checkpoint import open_checkpoint

from .test_flux import DATA

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["double", "single"])
def test_one_block_of_a_kind_is_run(kind, monkeypatch):
    ran = []

    class Watched:
        def __init__(self, block):
            self.block = block

        def __call__(self, *args, **kwargs):
            out = self.block(*args, **kwargs)
            ran.append((type(self.block).__name__, torch.isfinite(out if isinstance(out, torch.Tensor) else out[0]).all()))
            return out

    build = warmup.build_blocks
    monkeypatch.setattr(warmup, "build_blocks", lambda *a, **k: [[Watched(b) for b in blocks] for blocks in build(*a, **k)])
    warmup._run_block(open_checkpoint(DATA / "mini_flux_int4.safetensors"), kind, CPU, torch.float32, "weight_only")
    assert ran == [(f"{kind.title()}Block", True)]


def test_nothing_is_run_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(warmup, "_run_block", lambda *a: pytest.fail("ran"))
    warmup.warm_up(open_checkpoint(DATA / "mini_flux_int4.safetensors"), CPU, torch.float32)()


def test_a_failure_is_logged_and_not_raised(monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("no kernel today")

    monkeypatch.setattr(warmup, "_run_block", fail)
    monkeypatch.setattr(warmup, "triton_reason", lambda device: None)
    monkeypatch.setattr(warmup, "resolve_compute", lambda compute, device: "fast")
    caplog.set_level(logging.DEBUG)
    warmup.warm_up(open_checkpoint(DATA / "mini_flux_int4.safetensors"), torch.device("cuda"), torch.float32)()
    assert "no kernel today" in caplog.text
