"""Blocks that wait in pinned host memory and pass through two buffers on the GPU: the next is copied while this one computes.

A step copies every streamed block once, so it takes at least their bytes over the bus's bandwidth, and what hides behind that is free.
Nothing announces a block: the first weight that is asked for does (a block that is skipped copies nothing). A block always passes through
the same buffer, so that its tensors have one address each: views of them are made once, and the block can be recorded as a CUDA graph.
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


@dataclass(eq=False)
class Buffer:
    """Room for one block on the device. `block`: the one whose copy was started last; the events order copies and computing."""

    memory: Tensor
    block: int | None = None
    ready: torch.cuda.Event | None = None
    free: torch.cuda.Event | None = None


class Streamer:
    """Streams these blocks to `device`, in their order and from the last to the first again. Its leaves ask it for their tensors.

    network: what runs the blocks, if they are not all of it. When it is called the first two are fetched, behind whatever it does first.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, network: nn.Module | None = None):
        self.device, self.blocks = device, list(blocks)
        self._on_gpu = device.type == "cuda"
        self._slabs = [gather(block, self._on_gpu) for block in blocks]
        self._index = {leaf: i for i, block in enumerate(blocks) for leaf in leaves_of(block)}
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        size = max((slab.host.nbytes for slab in self._slabs), default=0)
        self._buffers = [Buffer(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(min(2, len(blocks)))]
        self._windows = [windows(slab, self._buffer(i).memory) for i, slab in enumerate(self._slabs)]
        self._current: int | None = None
        for leaf in self._index:
            leaf.set_streamer(self)
        self._hook = None if network is None else network.register_forward_pre_hook(self._begin)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(buffer.memory.nbytes for buffer in self._buffers)

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
        self._buffers, self._windows, self._current = [], [], None

    def tensors(self, leaf: Leaf) -> dict[str, Tensor]:
        """A leaf's parameters on the device by name, until a leaf of another block is asked for."""
        block = self._index[leaf]
        if block != self._current:
            self._enter(block)
        return self._windows[block].get(leaf, {})

    def _buffer(self, block: int) -> Buffer:
        return self._buffers[block % len(self._buffers)]

    def _enter(self, block: int) -> None:
        """Makes a block current, and fetches the next."""
        self._leave()
        self._current = block
        self._fetch(block)
        if self._on_gpu:
            torch.cuda.current_stream(self.device).wait_event(self._buffer(block).ready)
        following = (block + 1) % len(self._slabs)
        if self._buffer(following) is not self._buffer(block):  # an odd number's last and first share one
            self._fetch(following)

    def _leave(self) -> None:
        """The current block is done with when what was asked of the device so far is."""
        if self._current is not None and self._on_gpu:
            self._buffer(self._current).free = torch.cuda.current_stream(self.device).record_event()
        self._current = None

    def _begin(self, *_: object) -> None:
        """Before a step: nothing computes with a buffer now."""
        if not torch.compiler.is_compiling():
            self._leave()
            for block in range(len(self._buffers)):
                self._fetch(block)

    def _fetch(self, block: int) -> None:
        """Starts copying a block into its buffer, unless it is there."""
        buffer = self._buffer(block)
        if buffer.block != block:
            buffer.block = block
            self._copy(block, buffer)

    def _copy(self, block: int, buffer: Buffer) -> None:
        host = self._slabs[block].host
        target = buffer.memory[: host.nbytes]
        if not self._on_gpu:
            target.copy_(host)
            return
        with torch.cuda.stream(self._stream):
            if buffer.free is not None:
                self._stream.wait_event(buffer.free)
            target.copy_(host, non_blocking=True)
            buffer.ready = self._stream.record_event()
