"""Blocks that wait in pinned host memory and pass through a ring on the GPU: the next are copied while this one computes.

A step copies every streamed block once, so it takes at least their bytes over the bus's bandwidth, and what hides behind that is free.
FLUX's double blocks take longer to copy than to compute and its single ones less, so the ring holds more than two: while single
blocks compute, the bus gets ahead.

Nothing announces a block: the first weight that is asked for does (a block that is skipped costs at most the copies that were ahead). A
block always goes to the same place, so that its tensors have one address each: views are made once, and CUDA graphs of it can be recorded.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .linear import Leaf, parameter

log = logging.getLogger(__name__)

ALIGN = 256
AHEAD = 4  # of the largest blocks fit in the ring


@dataclass(frozen=True)
class Place:
    """Where a parameter of a leaf lies in its block's slab."""

    leaf: Leaf
    name: str
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    nbytes: int

    def window(self, slab: Tensor) -> Tensor:
        return slab[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(eq=False)
class Slab:
    """A block's parameters in one piece of host memory, so that they are one copy; the leaves' own tensors are windows on it."""

    host: Tensor
    places: list[Place]

    def is_whole(self) -> bool:
        """Whether every leaf still has its window, as before a move to the GPU and back."""
        start = self.host.data_ptr()
        return all(getattr(p.leaf, p.name) is not None and getattr(p.leaf, p.name).data_ptr() == start + p.offset for p in self.places)


def windows(slab: Slab, memory: Tensor) -> dict[Leaf, dict[str, Tensor]]:
    """The leaves' parameters as they lie in `memory` after a copy of the slab."""
    found: dict[Leaf, dict[str, Tensor]] = {}
    for place in slab.places:
        found.setdefault(place.leaf, {})[place.name] = place.window(memory)
    return found


def leaves_of(block: nn.Module) -> list[Leaf]:
    return [module for module in block.modules() if isinstance(module, Leaf)]


def gather(block: nn.Module, pin: bool) -> Slab:
    """Moves a block's parameters into one piece of memory, pinned if that can be had."""
    places, size = [], 0
    for leaf in leaves_of(block):
        for name, tensor in leaf._parameters.items():
            if tensor is not None:
                places.append(Place(leaf, name, size, tensor.dtype, tensor.shape, tensor.nbytes))
                size += -(-tensor.nbytes // ALIGN) * ALIGN
    slab = Slab(torch.empty(size, dtype=torch.uint8), places)
    for place in places:
        window = place.window(slab.host)
        window.copy_(getattr(place.leaf, place.name))
        place.leaf.put(place.name, parameter(window))
    if pin:
        pin_memory(slab)
    return slab


def sizes(block: nn.Module) -> tuple[int, int]:
    """Bytes of a block's parameters, and of a slab of them."""
    found = [t.nbytes for leaf in leaves_of(block) for t in leaf._parameters.values() if t is not None]
    return sum(found), sum(-(-n // ALIGN) * ALIGN for n in found)


def pin_memory(slab: Slab) -> None:
    """Registers a slab with the driver, in place: torch's pinned allocator would take the next power of two."""
    driver, address = torch.cuda.cudart(), slab.host.data_ptr()
    if int(driver.cudaHostRegister(address, slab.host.nbytes, 0)) == 0:
        weakref.finalize(slab, driver.cudaHostUnregister, address)
    else:
        log.info("Host memory for offloaded blocks could not be pinned; copies from ordinary memory are slower.")


def room_for(sizes: Sequence[int]) -> tuple[list[int], int]:
    """(where each block goes, bytes in all): one behind the other in a ring that holds AHEAD of the largest, or all if they are fewer."""
    total, starts, at = min(sum(sizes), AHEAD * max(sizes, default=0)), [], 0
    for size in sizes:
        at = 0 if at + size > total else at
        starts.append(at)
        at += size
    return starts, total


class Streamer:
    """Streams these blocks to `device`, in their order and from the last to the first again. Its leaves ask it for their tensors.

    network: what runs the blocks, if they are not all of it. When it is called the first ones are fetched, beside whatever it does first.
    pin: whether the blocks wait in page-locked memory. From ordinary memory copies take longer, and the CPU waits for them.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, network: nn.Module | None = None, pin: bool = True):
        self.device, self.blocks, self.pin = device, list(blocks), pin
        self._on_gpu = device.type == "cuda"
        self._slabs = [gather(block, self._on_gpu and pin) for block in blocks]
        self._index = {leaf: i for i, block in enumerate(blocks) for leaf in leaves_of(block)}
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        sizes = [slab.host.nbytes for slab in self._slabs]
        starts, total = room_for(sizes)
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        self._memory = torch.empty(total, dtype=torch.uint8, device=device)
        self._targets = [self._memory[start:end] for start, end in zip(starts, ends, strict=True)]
        self._windows = [windows(slab, target) for slab, target in zip(self._slabs, self._targets, strict=True)]
        every = range(len(self._slabs))
        self._rivals = [{j for j in every if j != i and starts[j] < ends[i] and starts[i] < ends[j]} for i in every]
        self._here: set[int] = set()  # blocks whose copy was started, and whose place nothing else has been copied to since
        self._ready: dict[int, torch.cuda.Event] = {}
        self._left: dict[int, torch.cuda.Event] = {}
        self._current: int | None = None
        for leaf in self._index:
            leaf.set_streamer(self)
        self._hook = None if network is None else network.register_forward_pre_hook(self._begin)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return 0 if self._memory is None else self._memory.nbytes

    def is_whole(self) -> bool:
        """Whether what it copies are still the leaves' own tensors."""
        return all(slab.is_whole() for slab in self._slabs)

    def stop(self) -> None:
        """Gives the buffers back. The leaves keep their tensors where they are."""
        if self._on_gpu:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        for leaf in self._index:
            leaf.set_streamer(None)
        if self._hook is not None:
            self._hook.remove()
        self._memory, self._current = None, None
        self._targets, self._windows, self._here = [], [], set()

    def tensors(self, leaf: Leaf) -> dict[str, Tensor]:
        """A leaf's parameters on the device by name, until a leaf of another block is asked for."""
        block = self._index[leaf]
        if block != self._current:
            self._enter(block)
        return self._windows[block].get(leaf, {})

    def _enter(self, block: int) -> None:
        """Makes a block current, and fetches those behind it, as many as there are places for that nothing in between needs."""
        self._leave()
        self._current = block
        self._fetch(block)
        if self._on_gpu:
            torch.cuda.current_stream(self.device).wait_event(self._ready[block])
        self._fetch_behind({block}, block + 1)

    def _leave(self) -> None:
        """The current block is done with when what was asked of the device so far is."""
        if self._current is not None and self._on_gpu:
            self._left[self._current] = torch.cuda.current_stream(self.device).record_event()
        self._current = None

    def _begin(self, *_: object) -> None:
        """Before a step: no block is computed with."""
        if self._slabs and not torch.compiler.is_compiling():
            self._leave()
            self._fetch_behind(set(), 0)

    def _fetch_behind(self, needed: set[int], first: int) -> None:
        for i in range(first, first + len(self._slabs)):
            block = i % len(self._slabs)
            if block in needed or not needed.isdisjoint(self._rivals[block]):
                return
            needed.add(block)
            self._fetch(block)

    def _fetch(self, block: int) -> None:
        """Starts copying a block to its place, unless it is there."""
        if block in self._here:
            return
        gone = self._here & self._rivals[block]
        self._here = (self._here - gone) | {block}
        self._copy(block, [self._left[i] for i in gone if i in self._left])

    def _copy(self, block: int, before: list[torch.cuda.Event]) -> None:
        """Starts the copy; on a GPU it begins behind these events."""
        host, target = self._slabs[block].host, self._targets[block]
        if not self._on_gpu:
            target.copy_(host)
            return
        with torch.cuda.stream(self._stream):
            for event in before:
                self._stream.wait_event(event)
            target.copy_(host, non_blocking=True)
            self._ready[block] = self._stream.record_event()
