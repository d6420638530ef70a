"""Blocks that wait in pinned host memory and pass through two buffers on the GPU: the next is copied while this one computes.

A step copies every streamed block once, so it takes at least their bytes over the bus's bandwidth, and what hides behind that is free.
Nothing announces a block: the first weight that is asked for does (a block that is skipped copies nothing).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

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
    windows: dict[Leaf, dict[str, Tensor]] = field(default_factory=dict)


class Streamer:
    """Streams these blocks to `device`, in their order and from the last to the first again. Its leaves ask it for their tensors."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device):
        self.device, self.blocks = device, list(blocks)
        self._on_gpu = device.type == "cuda"
        self._slabs = [gather(block, self._on_gpu) for block in blocks]
        self._index = {leaf: i for i, block in enumerate(blocks) for leaf in leaves_of(block)}
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        size = max((slab.host.nbytes for slab in self._slabs), default=0)
        self._buffers = [Buffer(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(min(2, len(blocks)))]
        self._current: int | None = None
        for leaf in self._index:
            leaf.streamer = self

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
            leaf.streamer = None
        self._buffers, self._current = [], None

    def tensors(self, leaf: Leaf) -> dict[str, Tensor]:
        """A leaf's parameters on the device by name, until a leaf of another block is asked for."""
        block = self._index[leaf]
        if block != self._current:
            self._enter(block)
        return self._holding(block).windows.get(leaf, {})

    def _holding(self, block: int | None) -> Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.block == block), None) if block is not None else None

    def _enter(self, block: int) -> None:
        """Makes a block current: the one before is done with when what was asked of the device so far is, and the next is fetched."""
        left = self._holding(self._current)
        if left is not None and self._on_gpu:
            left.free = torch.cuda.current_stream(self.device).record_event()
        self._current = block
        here = self._holding(block) or self._fetch(block, left or self._buffers[0])
        if self._on_gpu:
            torch.cuda.current_stream(self.device).wait_event(here.ready)
        following = (block + 1) % len(self._slabs)
        other = next((buffer for buffer in self._buffers if buffer is not here), None)
        if other is not None and self._holding(following) is None:
            self._fetch(following, other)

    def _fetch(self, block: int, buffer: Buffer) -> Buffer:
        """Starts copying a block into a buffer."""
        slab = self._slabs[block]
        buffer.block, buffer.windows = block, {}
        for place in slab.places:
            buffer.windows.setdefault(place.leaf, {})[place.name] = place.window(buffer.memory)
        target = buffer.memory[: slab.host.nbytes]
        if not self._on_gpu:
            target.copy_(slab.host)
            return buffer
        with torch.cuda.stream(self._stream):
            if buffer.free is not None:
                self._stream.wait_event(buffer.free)
            target.copy_(slab.host, non_blocking=True)
            buffer.ready = self._stream.record_event()
        return buffer
