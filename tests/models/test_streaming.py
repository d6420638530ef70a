"""Streamed blocks on the CPU: that the right numbers are in the buffers when they are asked for, and which copies are made when."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tonfa.models import streaming
from tonfa.models.linear import Leaf, PlainLinear, parameter
from tonfa.models.runtime import Runtime
from tonfa.models.streaming import Streamer, gather
from torch import nn

from .test_flux import FILES, load

CPU = torch.device("cpu")


def block(n: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    biased = PlainLinear(torch.randn(n, 8).bfloat16(), torch.randn(n), Runtime())
    return nn.Sequential(biased, nn.GELU(), PlainLinear(torch.randn(8, n), None, Runtime()))


@pytest.fixture
def blocks() -> list[nn.Module]:
    return [block(4 + 3 * i, i) for i in range(5)]


@pytest.fixture
def fetched(monkeypatch) -> list[int]:
    """Blocks in the order in which they are copied."""
    order, original = [], Streamer._copy
    monkeypatch.setattr(Streamer, "_copy", lambda self, i, before: (order.append(i), original(self, i, before))[1])
    return order


@pytest.fixture
def two(monkeypatch) -> None:
    """A ring of two of the largest blocks: five of one size take turns in two places."""
    monkeypatch.setattr(streaming, "AHEAD", 2)


@pytest.fixture
def equal() -> list[nn.Module]:
    return [block(8, i) for i in range(5)]


def tensors(of: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in of.parameters()]


def ask(streamer: Streamer, of: nn.Module) -> list[torch.Tensor]:
    return [t for leaf in streaming.leaves_of(of) for t in streamer.tensors(leaf).values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_gathering_keeps_every_number_and_holds_nothing_twice(blocks):
    before = tensors(blocks[2])
    slab = gather(blocks[2], pin=False)
    assert same(tensors(blocks[2]), before) and slab.is_whole()
    inside = range(slab.host.data_ptr(), slab.host.data_ptr() + slab.host.nbytes)
    assert all(p.data_ptr() in inside for p in blocks[2].parameters())
    leaf = streaming.leaves_of(blocks[2])[0]
    leaf.put("weight", parameter(leaf.weight.clone()))
    assert not slab.is_whole()


@pytest.mark.parametrize("ahead", [1, 2, 3, 4])
def test_three_steps_in_order(blocks, fetched, ahead, monkeypatch):
    monkeypatch.setattr(streaming, "AHEAD", ahead)
    want = [tensors(b) for b in blocks]
    streamer = Streamer(blocks, CPU)
    for step in range(3):
        for i, b in enumerate(blocks):
            assert same(ask(streamer, b), want[i])
            assert fetched.count(i) == step + 1 or ahead > 2  # larger rings keep a block, or have fetched it for the next step
    assert all(fetched.count(i) <= 4 for i in range(5)) and fetched[:5] == list(range(5))


def test_two_places_for_blocks_of_one_size(equal, fetched, two):
    streamer = Streamer(equal, CPU)
    for b in equal[:4]:
        ask(streamer, b)
    assert fetched == [0, 1, 2, 3, 4]  # always the one that is asked for and the next
    ask(streamer, equal[4])
    assert fetched == [0, 1, 2, 3, 4]  # the first lies where the last does
    ask(streamer, equal[0])
    assert fetched == [0, 1, 2, 3, 4, 0, 1]


def test_small_blocks_are_fetched_further_ahead(fetched, two):
    blocks = [block(n, i) for i, n in enumerate((64, 64, 8, 8, 8, 8))]
    streamer = Streamer(blocks, CPU)
    ask(streamer, blocks[1])
    assert fetched == [1, 2, 3, 4, 5]  # all of them where the first lay
    ask(streamer, blocks[5])
    assert fetched == [1, 2, 3, 4, 5]  # the first lies where this one does
    ask(streamer, blocks[0])
    assert fetched == [1, 2, 3, 4, 5, 0]  # and the second is still there


def test_a_step_begins_with_fetches(equal, fetched, two):
    blocks = [block(8, 9), *equal[:4]]
    want = [tensors(b) for b in blocks[1:]]
    network = nn.Sequential(*blocks)
    network.forward = lambda: [same(ask(streamer, b), w) for b, w in zip(blocks[1:], want, strict=True)]
    streamer = Streamer(blocks[1:], CPU, network)
    for _ in range(3):
        assert all(network())
    assert fetched == [*[*range(4)] * 3, 0]
    network.forward = lambda: fetched.append("step")
    network()
    assert fetched[12:] == [0, 1, "step"]  # before anything else of the step
    streamer.stop()
    network()
    assert fetched[15:] == ["step"]


def test_a_block_has_one_place(blocks, two):
    streamer = Streamer(blocks, CPU)
    places = [[t.data_ptr() for t in ask(streamer, b)] for b in blocks]
    for i in (3, 0, 4, 2, 1, 4):
        assert [t.data_ptr() for t in ask(streamer, blocks[i])] == places[i]


def test_views_of_a_streamed_weight_are_made_once_and_end_with_the_streaming():
    model = load(FILES[0])
    blocks = [*model.double_blocks, *model.single_blocks]
    leaf = blocks[0].img_attn.qkv
    own = leaf.views(leaf.weight)
    streamer = Streamer(blocks, CPU)
    blob = streamer.tensors(leaf)["weight"]
    views = leaf.views(blob)
    assert views is leaf.views(blob) and views is not own and views[0].codes.data_ptr() != own[0].codes.data_ptr()
    assert leaf.views(leaf.weight) is not leaf.views(leaf.weight)  # what is not streamed from there has no place
    streamer.stop()
    assert leaf._views is None and leaf.views(leaf.weight) is leaf.views(leaf.weight)


def test_a_block_that_is_asked_for_stays_while_the_next_is_fetched(equal, two):
    streamer = Streamer(equal, CPU)
    first, second = (streaming.leaves_of(equal[0])[i] for i in (0, 1))
    weight = streamer.tensors(first)["weight"]
    kept = weight.clone()
    streamer.tensors(second)
    assert torch.equal(weight, kept)
    streamer.tensors(streaming.leaves_of(equal[1])[0])
    streamer.tensors(streaming.leaves_of(equal[2])[0])
    assert not torch.equal(weight, kept)  # its place was used again: this is what is streamed, not the leaf's own


def test_skipped_blocks(equal, fetched, two):
    want = [tensors(b) for b in equal]
    streamer = Streamer(equal, CPU)
    for i in (0, 1, 0, 4, 0, 2, 3, 1):
        assert same(ask(streamer, equal[i]), want[i])
    assert fetched == [0, 1, 2, 0, 4, 0, 2, 3, 4, 1, 2]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    ahead=st.integers(1, 5),
    asked=st.lists(st.integers(0, 7), max_size=24),
)
@settings(deadline=None, max_examples=60)
def test_any_order_of_any_sizes(sizes, ahead, asked):
    blocks = [block(n, i) for i, n in enumerate(sizes)]
    want = [tensors(b) for b in blocks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "AHEAD", ahead)
        streamer = Streamer(blocks, CPU)
    for i in asked:
        assert same(ask(streamer, blocks[i % len(blocks)]), want[i % len(blocks)])


@pytest.mark.parametrize("count", [1, 2])
def test_few_blocks(blocks, fetched, count):
    want = [tensors(b) for b in blocks[:count]]
    streamer = Streamer(blocks[:count], CPU)
    assert streamer.nbytes == sum(gather(b, pin=False).host.nbytes for b in blocks[:count])
    streamer = Streamer(blocks[:count], CPU)
    for _ in range(3):
        for i in range(count):
            assert same(ask(streamer, blocks[i]), want[i])
    assert fetched == list(range(count))  # they stay


def test_a_ring_and_nothing_when_stopped(blocks, two):
    streamer = Streamer(blocks, CPU)
    assert streamer.nbytes == 2 * max(slab.host.nbytes for slab in streamer._slabs)
    leaves = [leaf for b in blocks for leaf in streaming.leaves_of(b)]
    assert all(leaf.streamer is streamer and leaf.home == CPU for leaf in leaves)
    streamer.stop()
    assert streamer.nbytes == 0 and all(leaf.streamer is None for leaf in leaves)


def test_no_blocks():
    streamer = Streamer([], CPU)
    assert streamer.nbytes == 0 and streamer.is_whole()
    streamer.stop()


def test_a_leaf_without_tensors(blocks):
    blocks[1].append(Leaf(Runtime()))
    blocks[1][-1].weight = blocks[1][-1].bias = None
    streamer = Streamer(blocks, CPU)
    assert streamer.tensors(blocks[1][-1]) == {}
