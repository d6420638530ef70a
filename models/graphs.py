"""CUDA graphs of blocks: what a block launches, recorded once and replayed with one call.

A block is some thirty launches. A fast GPU runs them in less time than Python needs to issue them, so a whole step would wait for the CPU.
A recorded block reads and writes fixed addresses: its inputs are copied into buffers that all blocks share, its results copied out of them
(2 % of a step at 1024 x 1024 on an H200), so that no tensor outside ever changes behind its holder's back.
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
ROOM = 2 << 30  # free bytes below which nothing is recorded: a recorded block's memory cannot be used by anything else


@dataclass(eq=False)
class Recorded:
    """A block's graph, and what has to be the same for it to be right: see Graphs.run."""

    key: tuple
    graph: torch.cuda.CUDAGraph


class Side:
    """`with side:` work runs on its stream beside what comes next, until `join`. All of it holds on to its inputs until then."""

    def __init__(self, stream: torch.cuda.Stream | None):
        self._stream, self._entered = stream, None

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
        self.release()

    def __reduce__(self) -> tuple:
        return Graphs, ()  # a copied model records its own

    def release(self) -> None:
        """Forgets every recorded block and gives its memory back."""
        # Weak, for the blocks hold this: a model that nobody uses must go at once, not when Python next looks for cycles.
        self._seen: MutableMapping[nn.Module, list[tuple]] = weakref.WeakKeyDictionary()
        self._recorded: MutableMapping[nn.Module, dict[tuple, Recorded]] = weakref.WeakKeyDictionary()
        self._arena: dict[str, Tensor] = {}
        self._copied: dict[int, tuple] = {}  # input's place -> what was last copied there
        self._layout: tuple = ()  # of the inputs that were copied
        self._pool = self._stream = self._side = None

    def trim(self, device: torch.device) -> None:
        """Gives the memory back if others may need it. Between samplings."""
        if self._recorded and not room(device):
            self.release()

    def side(self, device: torch.device) -> Side:
        """For work that is to run beside what follows it, while a block is being recorded; in its place at any other time."""
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            return Side(None)
        if self._side is None:
            self._side = torch.cuda.Stream(device, priority=-1)  # or it would wait for the larger work's last programs
        return Side(self._side)

    def run(self, block: nn.Module, key: tuple, inputs: Sequence[Tensor], results: int, work: Callable[..., tuple]) -> tuple[Tensor, ...]:
        """work(*inputs, out): its results are of the shapes and types of the first `results` inputs, which it leaves alone; it may write

        them to the tensors in the list `out`, where those are not None.

        key: everything else that work depends on (addresses of weights, modes). The first run with a key is an ordinary one, so that
        kernels are compiled and plans are made; the second is recorded.
        """
        state, key = key, (key, *((t.shape, t.dtype, t.device) for t in inputs))
        recorded = self._recorded.get(block, {}).get(key)
        if recorded is None:
            seen = self._seen.get(block, [])
            if self.off or key not in seen or not room(inputs[0].device):
                self._seen[block] = [*seen, key][-FORMS:]
                return work(*inputs, [None] * results)
            recorded = self._record(block, key, inputs, results, work)
            if recorded is None:
                return work(*inputs, [None] * results)
            others = [(k, kept) for k, kept in self._recorded.get(block, {}).items() if k[0] == state]
            self._recorded[block] = dict([*others, (key, recorded)][-FORMS:])
        self._copy_in(inputs, results)
        recorded.graph.replay()
        return tuple(buffer.clone() for buffer in self._carve("results", inputs[:results]))

    def _record(self, block: nn.Module, key: tuple, inputs: Sequence[Tensor], results: int, work: Callable[..., tuple]) -> Recorded | None:
        """Records the block; None, and never again, where something in it cannot be recorded."""
        buffers, out = self._carve("inputs", inputs), self._carve("results", inputs[:results])
        graph, device = torch.cuda.CUDAGraph(), inputs[0].device
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    for made, wanted in zip(work(*buffers, out), out, strict=True):
                        if made.data_ptr() != wanted.data_ptr():
                            wanted.copy_(made)
                finally:
                    graph.capture_end()
                    release_workspaces()
        except Exception as error:
            self.off = True
            self.release()
            log.info("Blocks are not recorded as CUDA graphs here (%s: %s).", type(error).__name__, str(error).splitlines()[0])
            return None
        torch.cuda.current_stream(device).wait_stream(self._stream)
        return Recorded(key, graph)

    def _copy_in(self, inputs: Sequence[Tensor], results: int) -> None:
        """Inputs into their buffers; the ones that all blocks of a step share (modulation vector, positions) once a step."""
        buffers, layout = self._carve("inputs", inputs), tuple((t.shape, t.dtype) for t in inputs)
        if layout != self._layout:  # other inputs lay where these go
            self._copied.clear()
            self._layout = layout
        for i, (buffer, t) in enumerate(zip(buffers, inputs, strict=True)):
            mark = None
            if i >= results:
                mark = (weakref.ref(t), buffer.data_ptr(), 0 if t.is_inference() else t._version)
                last = self._copied.get(i)
                if last is not None and last[0]() is t and last[1:] == mark[1:]:
                    continue
            buffer.copy_(t)
            self._copied[i] = mark

    def _carve(self, name: str, like: Sequence[Tensor]) -> list[Tensor]:
        """Tensors shaped like these, one behind the other at a fixed address."""
        sizes = [-(-t.numel() * t.element_size() // 256) * 256 for t in like]
        arena = self._arena.get(name)
        if arena is None or arena.numel() < sum(sizes) or arena.device != like[0].device:
            if arena is not None:  # what was recorded looks at the old one; a pool dies with its last graph
                self._recorded.clear()
                self._pool = self._stream = self._side = None
            with torch.inference_mode(False):
                arena = self._arena[name] = torch.empty(sum(sizes), dtype=torch.uint8, device=like[0].device)
        views, at = [], 0
        for t, size in zip(like, sizes, strict=True):
            views.append(arena[at : at + t.numel() * t.element_size()].view(t.dtype).view(t.shape))
            at += size
        return views


def release_workspaces() -> None:
    """Gives back cuBLAS's workspaces: torch keeps one for ever for every stream, here 32 MiB of a pool that could never be released."""
    release = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if release is not None:
        release()


def room(device: torch.device) -> bool:
    """Whether there is memory to spare for recorded blocks. What torch keeps for itself does not count: a recording cannot use it."""
    return torch.cuda.mem_get_info(device)[0] > ROOM


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
    )
