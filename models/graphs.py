"""CUDA graphs of blocks: what a block launches, recorded once and replayed with one call.

A block is some thirty launches. A fast GPU runs them in less time than Python needs to issue them, so a whole step would wait for the CPU.
A recorded block reads and writes fixed addresses. Its results lie in a Slot, where the next block reads them: copies between blocks were
1.5 % of a step at 1024 x 1024 on an H200. A slot is written again only when no tensor outside looks at it any more, so that none ever
changes behind its holder's back; a block that finds no such slot runs unrecorded.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

FORMS = 2  # sizes of inputs for which a block is kept: with CFG two prompts of different length take turns
WAYS = 4  # recordings that a block has for each of them, to read one slot and write another
SLOTS = 4  # for results of one size
# Priorities of a recording's streams, the smallest first: the text stream, which is small and waited for, most of the work, and what fills
# the gaps that leaves.
PRIORITIES = {"text": -2, "main": -1, "gaps": 0, "gaps of text": 0}
ROOM = 2 << 30  # free bytes below which nothing is recorded: a recorded block's memory cannot be used by anything else
INSIDE = 16  # times as much as its streams a block may need: a single block of FLUX has seven for its first linear alone


_use_count = getattr(torch._C, "_storage_Use_Count", None)  # torch's own CUDA graph trees count by it


def holders(t: Tensor) -> int:
    """How many tensors look at t's memory, and a constant."""
    return _use_count(t.untyped_storage()._cdata)


class Slot:
    """Memory for the results of a block; the next one may read them there.

    Every tensor of a result counts as a holder, views too. Whoever lets go of one while another stream still reads it is not seen.
    """

    def __init__(self, like: Sequence[Tensor]):
        with torch.inference_mode(False):
            self.tensors = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]
        self._unheld = [holders(t) for t in self.tensors]

    def holds(self, i: int, t: Tensor) -> bool:
        """Whether t is the result i that lies here."""
        return t.data_ptr() == self.tensors[i].data_ptr() and t.is_contiguous()

    def free(self, i: int) -> bool:
        """Whether nobody outside has a tensor of result i."""
        return holders(self.tensors[i]) == self._unheld[i]

    def all_free(self) -> bool:
        return all(self.free(i) for i in range(len(self.tensors)))

    def results(self) -> tuple[Tensor, ...]:
        """The results as tensors that count as holders."""
        return tuple(t.detach() for t in self.tensors)


@dataclass(eq=False)
class Recorded:
    """A block's graph, from where it reads and where it writes."""

    graph: torch.cuda.CUDAGraph
    source: Slot
    target: Slot

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether these inputs lie where the graph reads or can be copied there, and nothing is lost that it overwrites."""
        return self.target.all_free() and all(self.source.holds(i, t) or self.source.free(i) for i, t in enumerate(inputs))

    def copies(self, inputs: Sequence[Tensor]) -> int:
        return sum(not self.source.holds(i, t) for i, t in enumerate(inputs))


class Side:
    """`with side:` work runs on its stream beside what comes next, until `join`. All of it holds on to its inputs until then."""

    def __init__(self, stream: torch.cuda.Stream | None):
        self._stream, self._entered = stream, None

    def __bool__(self) -> bool:
        """Whether it is a stream of its own."""
        return self._stream is not None

    def __enter__(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            self._entered = torch.cuda.stream(self._stream)
            self._entered.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._entered is not None:
            self._entered.__exit__(*error)
            self._entered = None

    def join(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class Graphs:
    """The recorded blocks of one model. They share one memory pool and one set of buffers, because they run one after another."""

    def __init__(self) -> None:
        self.off = False
        self._most: float = float("inf")  # bytes of streams: with more, memory ran out while a block was recorded
        self.release()

    def __reduce__(self) -> tuple:
        return Graphs, ()  # a copied model records its own

    def release(self) -> None:
        """Forgets every recorded block and gives its memory back."""
        # Weak, for the blocks hold this: a model that nobody uses must go at once, not when Python next looks for cycles.
        self._seen: MutableMapping[nn.Module, list[tuple]] = weakref.WeakKeyDictionary()
        self._recorded: MutableMapping[nn.Module, dict[tuple, list[Recorded]]] = weakref.WeakKeyDictionary()
        self._slots: dict[tuple, list[weakref.ref[Slot]]] = {}  # by their tensors' shapes; the recordings hold them
        self._shared: Tensor | None = None  # what all blocks of a step are given lies here
        self._copied: dict[int, tuple] = {}  # input's place there -> what was last copied
        self._layout: tuple = ()  # of the inputs that were copied
        self._pool = self._stream = None
        self._sides: dict[str, torch.cuda.Stream] = {}

    def trim(self, device: torch.device) -> None:
        """Gives the memory back if others may need it. Between samplings."""
        if self._recorded and not room(device):
            self.release()

    def side(self, device: torch.device, name: str) -> Side:
        """For work that is to run beside what follows it, while a block is being recorded; in its place at any other time.

        name: of PRIORITIES.
        """
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            return Side(None)
        if name not in self._sides:
            self._sides[name] = torch.cuda.Stream(device, priority=PRIORITIES[name])
        return Side(self._sides[name])

    def run(self, block: nn.Module, key: tuple, inputs: Sequence[Tensor], results: int, work: Callable[..., tuple]) -> tuple[Tensor, ...]:
        """work(*inputs, out): its results are of the shapes and types of the first `results` inputs, which it leaves alone; it may write

        them to the tensors in the list `out`, where those are not None.

        key: everything else that work depends on (addresses of weights, modes). The first run with a key is an ordinary one, so that
        kernels are compiled and plans are made; the second is recorded, and later ones whose inputs lie elsewhere.
        """
        state, key = key, (key, *((t.shape, t.dtype, t.device) for t in inputs))
        streams = inputs[:results]
        fitting = [found for found in self._recorded.get(block, {}).get(key, ()) if found.fits(streams)]
        if fitting:
            recorded = min(fitting, key=lambda found: found.copies(streams))
        else:
            seen = self._seen.get(block, [])
            if self.off or key not in seen or nbytes(streams) > self._most or not room(inputs[0].device, nbytes(streams)):
                self._seen[block] = [*seen, key][-FORMS:]
                return work(*inputs, [None] * results)
            enough = len(self._recorded.get(block, {}).get(key, ())) == WAYS
            recorded = None if enough else self._record(block, inputs, results, work)
            if recorded is None:
                return work(*inputs, [None] * results)
            # Of other weights only while they may take turns with these, as with a LoRA on one of two conditionings.
            forms = {k: kept for k, kept in self._recorded.get(block, {}).items() if k[0] == state or k in seen}
            forms[key] = [*forms.pop(key, ()), recorded]
            self._recorded[block] = dict(list(forms.items())[-FORMS:])
        for i, t in enumerate(streams):
            if not recorded.source.holds(i, t):
                recorded.source.tensors[i].copy_(t)
        self._copy_shared(inputs[results:])
        recorded.graph.replay()
        return recorded.target.results()

    def _record(self, block: nn.Module, inputs: Sequence[Tensor], results: int, work: Callable[..., tuple]) -> Recorded | None:
        """Records the block; None where all slots are taken, and None and never again where something in it cannot be recorded."""
        try:
            pair = self._pair(inputs[:results])
            return None if pair is None else Recorded(self._capture(*pair, inputs[results:], work), *pair)
        except Exception as error:
            self.release()
            if isinstance(error, torch.OutOfMemoryError):
                self._most = nbytes(inputs[:results]) - 1
            else:
                self.off = True
            log.info("Blocks are not recorded as CUDA graphs here (%s: %s).", type(error).__name__, str(error).splitlines()[0])
            return None

    def _capture(self, source: Slot, target: Slot, shared: Sequence[Tensor], work: Callable[..., tuple]) -> torch.cuda.CUDAGraph:
        """The graph of work on what lies in source, its results in target."""
        graph, device = torch.cuda.CUDAGraph(), source.tensors[0].device
        buffers, out = [*source.tensors, *self._carve(shared)], list(target.tensors)
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device, priority=PRIORITIES["main"])
        self._stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    for made, wanted in zip(work(*buffers, out), out, strict=True):
                        if made.data_ptr() != wanted.data_ptr():
                            wanted.copy_(made)
                finally:
                    self._join_all()
                    graph.capture_end()
        finally:
            release_workspaces()
        torch.cuda.current_stream(device).wait_stream(self._stream)
        return graph

    def _join_all(self) -> None:
        """Joins side streams that an error left apart: torch's allocator never recovers from a recording that cannot be ended."""
        for stream in self._sides.values():
            with torch.cuda.stream(stream):
                apart = torch.cuda.is_current_stream_capturing()
            if apart:
                self._stream.wait_stream(stream)

    def _pair(self, streams: Sequence[Tensor]) -> tuple[Slot, Slot] | None:
        """Where a block is to read (where its inputs lie, if they lie in one place) and where to write."""
        layout = tuple((t.shape, t.dtype, t.device) for t in streams)
        slots = [slot for ref in self._slots.get(layout, ()) if (slot := ref()) is not None]
        there = [slot for slot in slots if all(slot.holds(i, t) for i, t in enumerate(streams))]
        free = [slot for slot in slots if slot.all_free()]
        while len(there[:1] + free) < 2 and len(slots) < SLOTS:
            free.append(Slot(streams))
            slots.append(free[-1])
        self._slots = {k: refs for k, refs in self._slots.items() if any(ref() is not None for ref in refs)}
        self._slots[layout] = [weakref.ref(slot) for slot in slots]
        pair = (there[:1] + free)[:2]
        return tuple(pair) if len(pair) == 2 else None

    def _copy_shared(self, inputs: Sequence[Tensor]) -> None:
        """What all blocks of a step share (modulation vector, positions) goes to its buffers once a step."""
        buffers, layout = self._carve(inputs), tuple((t.shape, t.dtype) for t in inputs)
        if layout != self._layout:  # other inputs lay where these go
            self._copied.clear()
            self._layout = layout
        for i, (buffer, t) in enumerate(zip(buffers, inputs, strict=True)):
            mark = (weakref.ref(t), buffer.data_ptr(), 0 if t.is_inference() else t._version)
            last = self._copied.get(i)
            if last is None or last[0]() is not t or last[1:] != mark[1:]:
                buffer.copy_(t)
                self._copied[i] = mark

    def _carve(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Tensors shaped like these, one behind the other at a fixed address."""
        if not like:
            return []
        sizes = [-(-t.numel() * t.element_size() // 256) * 256 for t in like]
        if self._shared is None or self._shared.numel() < sum(sizes) or self._shared.device != like[0].device:
            if self._shared is not None:  # what was recorded looks at the old one; a pool dies with its last graph
                self._recorded.clear()
                self._pool = self._stream = None
                self._sides = {}
            with torch.inference_mode(False):
                self._shared = torch.empty(sum(sizes), dtype=torch.uint8, device=like[0].device)
        views, at = [], 0
        for t, size in zip(like, sizes, strict=True):
            views.append(self._shared[at : at + t.numel() * t.element_size()].view(t.dtype).view(t.shape))
            at += size
        return views


def release_workspaces() -> None:
    """Gives back cuBLAS's workspaces: torch keeps one for ever for every stream, here 32 MiB of a pool that could never be released."""
    release = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if release is not None:
        release()


def nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def room(device: torch.device, streams: int = 0) -> bool:
    """Whether there is memory to spare for recorded blocks. What torch keeps for itself does not count: a recording cannot use it.

    streams: bytes of a block's streams, of which it needs some multiple.
    """
    return torch.cuda.mem_get_info(device)[0] > ROOM + INSIDE * streams


def may_record(device: torch.device) -> bool:
    """Whether a call now may be recorded or replayed at all: nothing is traced, differentiated or being recorded already.

    torch's own allocator only: with CUDA's (cudaMallocAsync, ComfyUI's default on many GPUs) a graph keeps memory that nothing gives back.
    """
    return (
        device.type == "cuda"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
        and torch.cuda.get_allocator_backend() == "native"
        and _use_count is not None
    )
