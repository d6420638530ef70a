"""Recorded blocks: when a block is recorded and replayed, and that nothing outside sees the shared buffers. Recording itself needs a GPU

(benchmarks/blocks_gpu.py compares its bits there): here a recorded block is one whose work runs again on the buffers.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from tonfa.models import graphs as module
from tonfa.models.blocks import addresses, recorded
from tonfa.models.graphs import Graphs, Recorded
from tonfa.models.lora import make_side

from .test_flux import FILES, load


class Replayed:
    """Stands in for a CUDA graph."""

    def __init__(self, work, inputs, out):
        self.work, self.inputs, self.out, self.replays = work, inputs, out, 0

    def replay(self):
        self.replays += 1
        for made, wanted in zip(self.work(*self.inputs, self.out), self.out, strict=True):
            wanted.copy_(made)


@pytest.fixture
def graphs(monkeypatch):
    def record(self, block, key, inputs, results, work):
        graph = Replayed(work, self._carve("inputs", inputs), self._carve("results", inputs[:results]))
        return Recorded(key, graph)

    monkeypatch.setattr(Graphs, "_record", record)
    monkeypatch.setattr(module, "room", lambda device: True)
    return Graphs()


class Work:
    def __init__(self):
        self.calls = 0

    def __call__(self, x, y, out):
        self.calls += 1
        return (x * 2 + y,)


def test_first_ordinary_second_recorded_then_replayed(graphs):
    block, work = torch.nn.Identity(), Work()
    xs, y = [torch.randn(3, 4) for _ in range(4)], torch.randn(4)
    got = [graphs.run(block, ("fast",), [x, y], 1, work)[0] for x in xs]
    for x, result in zip(xs, got, strict=True):  # compared when all are made: a result must not change with the buffers
        assert torch.equal(result, x * 2 + y)
    (kept,) = graphs._recorded[block].values()
    assert kept.graph.replays == 3


def test_two_forms_that_take_turns_are_both_recorded(graphs):
    """With CFG the texts of a model's two calls a step may differ in length."""
    block, work, y = torch.nn.Identity(), Work(), torch.randn(4)
    long, short = torch.randn(7, 4), torch.randn(3, 4)
    for x in [long, short] * 4:
        assert torch.equal(graphs.run(block, (), [x, y], 1, work)[0], x * 2 + y)
    assert [kept.graph.replays for kept in graphs._recorded[block].values()] == [3, 3]
    for _ in range(2):
        graphs.run(block, ("other weights",), [long, y], 1, work)
    (kept,) = graphs._recorded[block].values()
    assert kept.key[0] == ("other weights",)  # what was recorded with the old ones is of no use any more
    for x in (short, short, torch.randn(5, 4)):
        graphs.run(block, ("other weights",), [x, y], 1, work), graphs.run(block, ("other weights",), [x, y], 1, work)
    assert len(graphs._recorded[block]) == 2


def test_what_all_blocks_share_is_copied_when_it_changes(graphs):
    block, work, y = torch.nn.Identity(), Work(), torch.randn(4)
    x = torch.randn(3, 4)
    for _ in range(3):
        graphs.run(block, (), [x, y], 1, work)
    y.add_(1)
    assert torch.equal(graphs.run(block, (), [x, y], 1, work)[0], x * 2 + y)
    other = y.clone() + 1
    assert torch.equal(graphs.run(block, (), [x, other], 1, work)[0], x * 2 + other)


def test_another_key_or_shape_is_an_ordinary_run_first(graphs):
    block, work = torch.nn.Identity(), Work()
    small, large, y = torch.randn(3, 4), torch.randn(30, 4), torch.randn(4)
    for key, x in ((1, small), (1, small), (2, small), (1, small), (2, large), (2, large), (1, small), (1, small)):
        assert torch.equal(graphs.run(block, (key,), [x, y], 1, work)[0], x * 2 + y)
    assert graphs._arena["inputs"].numel() >= large.nbytes


def test_off_and_short_of_memory_stay_ordinary(graphs, monkeypatch):
    block, work, x, y = torch.nn.Identity(), Work(), torch.randn(3, 4), torch.randn(4)
    monkeypatch.setattr(module, "room", lambda device: False)
    for _ in range(3):
        graphs.run(block, (), [x, y], 1, work)
    monkeypatch.setattr(module, "room", lambda device: True)
    graphs.off = True
    for _ in range(3):
        graphs.run(block, (), [x, y], 1, work)
    assert not graphs._recorded and work.calls == 6


def test_release_forgets_everything_and_copies_start_empty(graphs):
    block, work, x, y = torch.nn.Identity(), Work(), torch.randn(3, 4), torch.randn(4)
    for _ in range(2):
        graphs.run(block, (), [x, y], 1, work)
    assert not copy.deepcopy(graphs)._recorded
    graphs.release()
    assert not graphs._recorded and not graphs._arena


def test_a_recording_knows_its_side_and_a_weight_elsewhere_or_a_wrapped_forward_is_not_recorded():
    block = load(FILES[0]).double_blocks[0]
    cpu = torch.device("cpu")
    found = addresses(block, cpu)
    assert found is not None and len(found) > 10 and found == addresses(block, cpu)
    linear = block.img_attn.qkv
    linear.set_side(make_side(linear.spec, [], torch.zeros(linear.out_features, linear.in_features), cpu, torch.float32))
    with_side = addresses(block, cpu)
    assert with_side != found and set(found) < set(with_side)
    linear.set_side(None)
    assert addresses(block, cpu) == found
    linear.forward = linear.forward
    assert addresses(block, cpu) is None
    del linear.forward
    block.runtime = dataclasses.replace(block.runtime, held=lambda leaf, device: None if leaf is linear else leaf._parameters)
    assert addresses(block, cpu) is None


def test_nothing_is_recorded_on_the_cpu():
    block = load(FILES[0]).single_blocks[0]
    block.runtime = dataclasses.replace(block.runtime, graphs=Graphs())
    x = torch.randn(1, 2, 4)
    for _ in range(3):
        assert recorded(block, "fast", [x], 1, lambda x, out: (x + 1,))[0].equal(x + 1)
    assert not block.runtime.graphs._recorded


def test_a_model_nobody_uses_goes_at_once(graphs):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.graphs = graphs

    block, work, x, y = Block(), Work(), torch.randn(3, 4), torch.randn(4)
    for _ in range(3):
        graphs.run(block, (), [x, y], 1, work)
    gone = weakref.ref(block)
    gc.disable()
    try:
        del block
        assert gone() is None
    finally:
        gc.enable()


def test_inputs_of_another_layout_do_not_pass_for_the_last_ones(graphs):
    wide, narrow, work = torch.nn.Identity(), torch.nn.Identity(), Work()
    x, y, small, other = torch.randn(2, 4), torch.randn(4), torch.randn(30, 4), torch.randn(4)
    for _ in range(3):
        graphs.run(narrow, (), [small, other], 1, work)
    for _ in range(3):
        graphs.run(wide, (), [x, y], 1, work)
    graphs.run(narrow, (), [small, other], 1, work)
    assert torch.equal(graphs.run(wide, (), [x, y], 1, work)[0], x * 2 + y)
