"""What recorded blocks run beside their main work: the order in which streams part and meet again. On a GPU, benchmarks/blocks_gpu.py and

families.py compare the bits; here a side stream is one that writes down when it is entered and joined.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tonfa.models import qwen_image, z_image
from tonfa.models.linear import PackedLinear

from .formats import packed_files
from .test_families import HIDDEN, IMAGE, TEXT, noise, opened, options, table
from .test_flux import FILES, block_inputs, load, mode


class Streams:
    """Stands in for Graphs: each name a side stream."""

    def __init__(self, events: list):
        self.events, self.inside = events, []

    def side(self, device, name):
        return Named(self, name)


class Named:
    def __init__(self, streams: Streams, name: str):
        self.streams, self.name = streams, name

    def __bool__(self):
        return True

    def __enter__(self):
        self.streams.events.append(("part", self.name))
        self.streams.inside.append(self.name)

    def __exit__(self, *error):
        self.streams.inside.pop()

    def join(self):
        self.streams.events.append(("meet", self.name, self.streams.inside[-1] if self.streams.inside else "main"))


def watched(block, monkeypatch) -> list:
    """The block's events from now on: ("part", name), ("meet", name, where), ("attend",), ("unpack", linear, tokens, where),

    ("run", linear, how many weights it was given, where).
    """
    events, names = [], {module: name for name, module in block.named_modules()}
    streams, attend = Streams(events), block.runtime.attend

    def attending(*args):
        events.append(("attend",))
        return attend(*args)

    runtime = dataclasses.replace(block.runtime, graphs=streams, attend=attending)
    for module in block.modules():
        if hasattr(module, "runtime"):
            module.runtime = runtime
    where = lambda: streams.inside[-1] if streams.inside else "main"  # noqa: E731
    unpack, run = PackedLinear.unpack, PackedLinear.run

    def unpacking(self, rows, compute, dtype):
        events.append(("unpack", names[self], rows, where()))
        return unpack(self, rows, compute, dtype)

    def running(self, x, compute, **more):
        events.append(("run", names[self], len(more.get("weights") or ()), where()))
        return run(self, x, compute, **more)

    monkeypatch.setattr(PackedLinear, "unpack", unpacking)
    monkeypatch.setattr(PackedLinear, "run", running)
    return events


def check(events: list) -> None:
    """Every side stream meets another behind its last work; what is unpacked on it is used behind that, and on that stream."""
    for i, event in enumerate(events):
        if event[0] == "part":
            assert any(e[:2] == ("meet", event[1]) for e in events[i:]), f"{event[1]} is never joined"
        if event[0] == "unpack":
            _, name, _, stream = event
            met = next(j for j, e in enumerate(events) if j > i and e[:2] == ("meet", stream))
            runs = [(j, e) for j, e in enumerate(events) if e[:2] == ("run", name)]
            assert len(runs) == 1 and runs[0][0] > met and runs[0][1][2] > 0, f"{name} runs before its weights are there, or without"
            assert runs[0][1][3] == events[met][2], f"{name} runs on a stream that did not wait for its weights"
    unpacked = {e[1] for e in events if e[0] == "unpack"}
    for event in events:
        assert event[0] != "run" or event[1] in unpacked or event[2] == 0


def joint(events: list, text: tuple[str, ...]) -> None:
    check(events)
    at = events.index(("attend",))
    assert events.index(("meet", "text", "main")) < at, "attention reads what the text stream writes"
    assert events[-1] == ("meet", "text", "main")
    assert {e[3] for e in events if e[0] == "run" and e[1].startswith(text)} == {"text"}
    assert {e[3] for e in events if e[0] == "run" and not e[1].startswith(text)} == {"main"}
    assert len([e for e in events if e[0] == "unpack"]) == 7


@pytest.fixture
def qwen(tmp_path):
    return qwen_image.build_blocks(opened(tmp_path, packed_files.qwen()))[0]


def test_flux_double_block(monkeypatch):
    model = load(FILES[0])
    block, a = model.double_blocks[0], block_inputs(model, 2, torch.float32)
    with torch.inference_mode():
        want = block(**a, transformer_options=mode("fast"))
        events = watched(block, monkeypatch)
        got = block(**a, transformer_options=mode("fast"))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    joint(events, ("txt_",))
    assert ("unpack", "img_attn.qkv", 2 * a["img"].shape[1], "gaps") in events
    assert ("unpack", "txt_mlp.2", 2 * a["txt"].shape[1], "gaps of text") in events


def test_qwens_block(qwen, monkeypatch):
    img, txt, temb, pe = noise(1, IMAGE, HIDDEN), noise(1, TEXT, HIDDEN, seed=1), noise(1, HIDDEN, seed=2), table([16, 56, 56])
    want = qwen(img, txt, None, temb, pe, transformer_options=options("fast"))
    events = watched(qwen, monkeypatch)
    got = qwen(img, txt, None, temb, pe, transformer_options=options("fast"))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    joint(events, ("txt_", "attn.add_qkv", "attn.to_add_out"))


def test_text_in_turn_where_it_is_asked_for(qwen, monkeypatch):
    monkeypatch.setattr(qwen_image.QwenImageBlock, "text_beside", False)
    events = watched(qwen, monkeypatch)
    qwen(noise(1, IMAGE, HIDDEN), noise(1, TEXT, HIDDEN), None, noise(1, HIDDEN), table([16, 56, 56]), transformer_options=options("fast"))
    check(events)
    assert ("part", "text") not in events and {e[3] for e in events if e[0] == "run"} == {"main"}


def test_flux_single_block(monkeypatch):
    model = load(FILES[0])
    block, a = model.single_blocks[0], block_inputs(model, 1, torch.float32)
    x = torch.cat((a["txt"], a["img"]), 1)
    with torch.inference_mode():
        want = block(x, vec=a["vec"], pe=a["pe"], transformer_options=mode("fast"))
        events = watched(block, monkeypatch)
        got = block(x, vec=a["vec"], pe=a["pe"], transformer_options=mode("fast"))
    assert torch.equal(got, want)
    check(events)
    assert [e[1:] for e in events if e[0] == "unpack"] == [(n, x.shape[1], "gaps") for n in ("linear1", "linear2")]


def test_z_images_block(tmp_path, monkeypatch):
    block = z_image.build_blocks(opened(tmp_path, packed_files.zimage(refiners=1)))["layers"][0]
    x, pe, times = noise(1, TEXT + IMAGE, HIDDEN), table([32, 48, 48]).transpose(1, 2), noise(1, 256, seed=3)
    want = block(x, None, pe, times, transformer_options=options("fast"))
    events = watched(block, monkeypatch)
    got = block(x, None, pe, times, transformer_options=options("fast"))
    assert torch.equal(got, want)
    check(events)
    assert len([e for e in events if e[0] == "unpack"]) == 4


def test_the_check_finds_a_stream_that_is_not_waited_for():
    with pytest.raises(AssertionError, match="never joined"):
        check([("part", "gaps"), ("unpack", "a", 1, "gaps"), ("run", "a", 1, "main")])
    with pytest.raises(AssertionError, match="before its weights are there"):
        check([("part", "gaps"), ("unpack", "a", 1, "gaps"), ("run", "a", 1, "main"), ("meet", "gaps", "main")])
    with pytest.raises(AssertionError, match="on a stream that did not wait"):
        check([("part", "gaps"), ("unpack", "a", 1, "gaps"), ("meet", "gaps", "main"), ("run", "a", 1, "text")])
