"""warm_up: what it runs, and that it never stands in the way of loading."""

from __future__ import annotations

import logging

import pytest
import torch
from tonfa.models import warmup
from tonfa.models.formats.checkpoint import open_checkpoint, open_packed
from torch.nn.modules.module import register_module_forward_hook

from .formats import packed_files
from .test_flux import DATA

CPU = torch.device("cpu")


FILES = {
    "flux": ("double", "single"),
    "qwen-image": ("joint",),
    "z-image": ("main",),
}
NAMES = {"double": "DoubleBlock", "single": "SingleBlock", "joint": "QwenImageBlock", "main": "ZImageBlock"}


@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family, kinds in FILES.items() for kind in kinds])
def test_one_block_of_a_kind_is_run(family, kind, tmp_path, monkeypatch):
    if family == "flux":
        path = DATA / "mini_flux_int4.safetensors"
    else:
        tensors, metadata, _ = {"qwen-image": packed_files.qwen, "z-image": packed_files.zimage}[family]()
        path = packed_files.save(tmp_path / "file.safetensors", tensors, metadata)
    monkeypatch.setattr(warmup, "TOKENS", 16)
    ran = []
    hook = register_module_forward_hook(lambda module, args, out: ran.append(type(module).__name__))
    try:
        warmup._run_block(open_packed(path), kind, CPU, torch.float32, "weight_only")
    finally:
        hook.remove()
    assert [name for name in ran if name in NAMES.values()] == [NAMES[kind]]


def test_every_kind_is_named():
    assert {family: tuple(kinds) for family, kinds in warmup.KINDS.items()} == FILES


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
