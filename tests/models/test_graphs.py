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
from tonfa.models.graphs import Graphs
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
    def capture(self, source, target, shared, work):
        return Replayed(work, [*source.tensors, *self._carve(shared)], target.tensors)

    monkeypatch.setattr(Graphs, "_capture", capture)
    monkeypatch.setattr(module, "room", lambda device, streams: True)
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
    kept = [way for ways in graphs._recorded[block].values() for way in ways]
    assert [way.graph.replays for way in kept] == [1, 1, 1]  # each into a slot of its own, for the results before were still held


def test_two_forms_that_take_turns_are_both_recorded(graphs):
    """With CFG the texts of a model's two calls a step may differ in length."""
    block, work, y = torch.nn.Identity(), Work(), torch.randn(4)
    long, short = torch.randn(7, 4), torch.randn(3, 4)
    for x in [long, short] * 4:
        assert torch.equal(graphs.run(block, (), [x, y], 1, work)[0], x * 2 + y)
    assert [[kept.graph.replays for kept in ways] for ways in graphs._recorded[block].values()] == [[3], [3]]
    for _ in range(2):
        graphs.run(block, ("other weights",), [long, y], 1, work)
    states = [(key[0], key[1][0]) for key in graphs._recorded[block]]
    assert states == [((), short.shape), (("other weights",), long.shape)]  # what was last seen with the old ones may come again
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
    steps = (
        (1, small),
        (1, small),
        (2, small),
        (1, small),
        (2, large),
        (2, large),
        (1, small),
        (1, small),
        *[(3, small)] * 2,
        *[(4, small)] * 2,
    )
    for key, x in steps:
        assert torch.equal(graphs.run(block, (key,), [x, y], 1, work)[0], x * 2 + y)
    layouts = {layout[0][0] for layout, refs in graphs._slots.items() if any(ref() is not None for ref in refs)}
    assert layouts == {small.shape}  # the large ones' memory went with their recordings


def test_off_and_short_of_memory_stay_ordinary(graphs, monkeypatch):
    block, work, x, y = torch.nn.Identity(), Work(), torch.randn(3, 4), torch.randn(4)
    monkeypatch.setattr(module, "room", lambda device, streams: False)
    for _ in range(3):
        graphs.run(block, (), [x, y], 1, work)
    monkeypatch.setattr(module, "room", lambda device, streams: True)
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
    assert not graphs._recorded and graphs._shared is None and not graphs._slots


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


# -- slots ---------------------------------------------------------------------------------------------------------------------------


class Counted:
    """A block's work on two streams and something shared."""

    def __init__(self, number: int):
        self.number = number

    def __call__(self, x, y, shared, out):
        return x * 0.5 + shared * self.number, y - x.mean() + shared


def step(graphs, blocks, x, y, shared, between=lambda i, x, y: (x, y)):
    for i, (block, work) in enumerate(blocks):
        x, y = between(i, *graphs.run(block, (), [x, y, shared], 2, work))
    return x, y


def wanted(blocks, x, y, shared):
    for _, work in blocks:
        x, y = work(x, y, shared, None)
    return x, y


def chain(n: int) -> list:
    return [(torch.nn.Identity(), Counted(i)) for i in range(n)]


def ways(graphs, blocks) -> list:
    return [way for block, _ in blocks for kept in graphs._recorded.get(block, {}).values() for way in kept]


def streams(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, 4, generator=g), torch.randn(1, 2, 4, generator=g)


def test_a_block_reads_where_the_one_before_wrote(graphs, monkeypatch):
    """Two slots serve a whole model; only what comes from outside is copied."""
    blocks, shared, copied = chain(5), torch.ones(4), []
    run = module.Recorded.copies
    for seed in range(6):
        monkeypatch.setattr(module.Recorded, "copies", lambda way, inputs: copied.append(run(way, inputs)) or run(way, inputs))
        got = step(graphs, blocks, *streams(seed), shared)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted(blocks, *streams(seed), shared), strict=True))
        del got
    kept = ways(graphs, blocks)
    assert len(kept) == 5 and len({id(way.source) for way in kept} | {id(way.target) for way in kept}) == 2
    assert copied[-5:] == [2, 0, 0, 0, 0]
    assert all(a.target is b.source for a, b in zip(kept, kept[1:], strict=False))


def test_what_is_changed_in_place_between_blocks_is_what_the_next_one_reads(graphs):
    """As the host adds a ControlNet's residual: to a part of the image stream, in place."""
    blocks, shared = chain(4), torch.ones(4)

    def add(i, x, y):
        if i == 1:
            x[:, :2] += 7
        return x, y

    for seed in range(4):
        x, y = step(graphs, blocks, *streams(seed), shared, add)
        a, b = wanted(blocks[:2], *streams(seed), shared)
        a[:, :2] += 7
        assert torch.equal(x, wanted(blocks[2:], a, b, shared)[0])
        del x, y
    assert len(ways(graphs, blocks)) == 4


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_kept_or_dropped_nothing_changes_and_all_is_right(graphs, seed):
    """Blocks in any order, inputs from anywhere, results or views of them kept for a while: against the same work unrecorded."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda n: int(torch.randint(n, (1,), generator=g))  # noqa: E731
    blocks, shared, kept = chain(3), torch.ones(4), []
    x, y = streams(seed)
    for turn in range(200):
        block, work = blocks[pick(3)]
        want = work(x, y, shared, None)
        x, y = graphs.run(block, (), [x, y, shared], 2, work)
        assert torch.equal(x, want[0]) and torch.equal(y, want[1]), turn
        what = pick(8)
        if what == 0:
            kept.append((x, x.clone()))
        elif what == 1:
            kept.append((y[:, 1:], y[:, 1:].clone()))
        elif what == 2:
            y = y + 1
        elif what == 3:
            x = x.clone()
        elif what == 4 and kept:
            kept.pop(pick(len(kept)))
        elif what == 5 and kept and kept[-1][0].shape == x.shape:
            x = kept.pop()[0]
        for held, copy_ in kept:
            assert torch.equal(held, copy_), turn
    assert ways(graphs, blocks) and all(len(list(refs)) <= module.SLOTS for refs in graphs._slots.values())


def test_who_keeps_everything_gets_ordinary_runs(graphs, monkeypatch):
    """And nothing is given back that only a recording takes."""
    monkeypatch.setattr(module, "release_workspaces", lambda: pytest.fail("nothing was recorded"))
    blocks, shared, kept = chain(6), torch.ones(4), []
    for seed in range(4):
        step(graphs, blocks, *streams(seed), shared, lambda i, x, y: kept.append((x, x.clone())) or (x, y))
    assert all(torch.equal(a, b) for a, b in kept)
    assert len(ways(graphs, blocks)) <= module.SLOTS


def test_two_states_of_the_weights_that_take_turns_are_recorded_once(graphs):
    """As with a LoRA on one of two conditionings."""
    block, work, x, y = torch.nn.Identity(), Work(), torch.randn(3, 4), torch.randn(4)
    for _ in range(5):
        for state in (("one",), ("two",)):
            assert torch.equal(graphs.run(block, state, [x, y], 1, work)[0], x * 2 + y)
    assert [[kept.graph.replays for kept in ways] for ways in graphs._recorded[block].values()] == [[4], [4]]


def test_memory_that_runs_out_while_a_block_is_recorded_is_no_reason_not_to_record_smaller_ones(monkeypatch):
    """The real _record up to where the device comes in."""
    graphs, block, work, y = Graphs(), torch.nn.Identity(), Work(), torch.randn(4)
    small, large = torch.randn(3, 4), torch.randn(300, 4)
    monkeypatch.setattr(module, "room", lambda device, streams: True)
    asked = []

    def none_left(self, streams):
        asked.append(streams[0].shape)
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(Graphs, "_pair", none_left)
    for x in (large, large, large, large, small, small):
        assert torch.equal(graphs.run(block, (), [x, y], 1, work)[0], x * 2 + y)
    assert asked == [large.shape, small.shape] and not graphs.off

    def broken(self, streams):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(Graphs, "_pair", broken)
    for _ in range(3):
        graphs.run(block, (), [torch.randn(2, 4), y], 1, work)
    assert graphs.off
