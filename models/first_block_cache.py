"""First-block cache: where a step's first block changes little, the rest of the network is not run but its last change used again.

The rule is ParaAttention's first_block_cache (github.com/chengzeyi/ParaAttention), which WaveSpeed's is made after. Let r be what the first
block adds to the image tokens, and r' the r of the step whose rest was last computed. If mean|r - r'| / mean|r'| is under a threshold, what
the rest added then is added again. Here that is asked of every image of a batch, and all must pass.

The loop over the blocks is the host's. So each block goes `through` the call that it is part of. The first of a stage decides; if the rest
is reused, the blocks between hand on what they are given, and the last returns the first one's result plus the cached change. What the host
adds between two blocks of a stage (ControlNet) is in that change already: what the last block is given is not used.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .linear import LARGEST_FP16

KEY = "tonfa_first_block_cache"  # of transformer_options: the Call that a forward belongs to
Tensors = tuple[Tensor, ...]  # a block's streams: (img [B, Li, D], txt [B, Lt, D]) of a double block, (x [B, Lt + Li, D],) of a single one


@dataclass(frozen=True)
class CacheConfig:
    """What the user chose. threshold 0: off. threshold_single above 0: the single blocks decide for themselves, by their own first one.

    start, end: the part of sampling (0..1) in which reuse is allowed. most: reuses in a row, 0 for any number.
    """

    threshold: float = 0.0
    threshold_single: float = 0.0
    start: float = 0.0
    end: float = 1.0
    most: int = 0


@dataclass(frozen=True)
class Stage:
    """Blocks first..last, by position (double blocks come first), of which the first decides for the others."""

    name: str
    first: int
    last: int
    threshold: float


def stages(config: CacheConfig, doubles: int, singles: int) -> list[Stage]:
    """The stages of a network of so many blocks; one that would save nothing is left out."""
    split = config.threshold_single > 0 and singles > 1
    end = doubles if split else doubles + singles
    found = [Stage("double blocks" if split else "", 0, end - 1, config.threshold)] if doubles else []
    if split:
        found.append(Stage("single blocks", doubles, doubles + singles - 1, config.threshold_single))
    return [stage for stage in found if stage.last > stage.first]


@dataclass
class Kept:
    """What a stage added when it was last computed: its first block to the image, `first` [B, Li, D]; the rest to all, `rest` [B, L, D].

    size: mean|first| [B] in fp32. like: what has to be the same for it to be of use. reused: how often since, in a row.
    """

    first: Tensor
    size: Tensor
    rest: Tensor
    like: tuple
    reused: int = 0


@dataclass(frozen=True)
class Place:
    """The how-manyth call (`index`, from 0) of one conditioning at one sigma. sigmas: the host's tensor that sigma was read from."""

    sigmas: Tensor
    sigma: float
    index: int


@dataclass
class Tally:
    """Of one stage in one run. A step counts as reused when all its calls reused."""

    steps: int = 0
    reused_steps: int = 0
    calls: int = 0
    reused_calls: int = 0
    _sigma: float | None = None
    _whole: bool = False

    def note(self, sigma: float, reused: bool) -> None:
        before = self._whole and sigma == self._sigma
        if sigma != self._sigma:
            self.steps, self._sigma, self._whole = self.steps + 1, sigma, reused
            self.reused_steps += reused
        elif before and not reused:
            self.reused_steps, self._whole = self.reused_steps - 1, False
        self.calls += 1
        self.reused_calls += reused

    def __str__(self) -> str:
        calls = "" if self.calls == self.steps else f" ({self.reused_calls} of {self.calls} model calls)"
        return f"{self.reused_steps} of {self.steps} steps reused{calls}"


@dataclass
class Run:
    """One sampling run of one model: all that is kept from step to step, by stage, conditioning and place.

    doubles, singles: how many blocks there are. low, high: reuse is allowed where low < sigma <= high.
    room(device, size): whether that many bytes more may be kept there.
    """

    config: CacheConfig
    doubles: int
    singles: int
    low: float = -math.inf
    high: float = math.inf
    room: Callable[[torch.device, int], bool] = lambda device, size: True
    kept: dict[tuple, Kept] = field(default_factory=dict)
    places: dict[Hashable, Place] = field(default_factory=dict)
    closed: bool = False
    off: int = 0  # model calls made without the cache
    cramped: bool = False  # whether something was not kept for lack of room

    def __post_init__(self) -> None:
        self.stages = stages(self.config, self.doubles, self.singles)
        self.tallies = {stage: Tally() for stage in self.stages}

    def stage(self, position: int) -> Stage | None:
        """The stage of the block at this position."""
        return next((stage for stage in self.stages if stage.first <= position <= stage.last), None)

    def close(self) -> None:
        """Lets go of everything; a late call runs without the cache."""
        self.closed = True
        self.kept.clear()
        self.places.clear()

    def summary(self) -> str:
        """The run in one line, for the log."""
        said = [f"{stage.name} {tally}".strip() for stage, tally in self.tallies.items()]
        if self.off:
            said.append(f"off for {self.off} model call(s), in which other nodes replace blocks or something is trained")
        if self.cramped:
            said.append("not kept for all conditionings, because memory is short")
        return "; ".join(said) or "nothing to reuse in so few blocks"


class Call:
    """One forward. whose: the conditioning; sigmas [B] of the call; like: whatever else must be as it was for a reuse to be right."""

    def __init__(self, run: Run, whose: Hashable, sigmas: Tensor, like: tuple = ()):
        self.run, self.whose, self.sigmas, self.like = run, whose, sigmas, like
        self.place: Place | None = None
        self.through = uncompiled() if "torch._dynamo" in sys.modules else through
        self.end()

    def end(self) -> None:
        """Lets go of what only this forward needs."""
        self.stage: Stage | None = None
        self.base = self.first = self.kept = None
        self.reusing = False

    def decide(self, stage: Stage, given: Tensors, made: Tensors) -> None:
        """After the stage's first block, which made `made` of `given`: is the rest to be reused?"""
        self.stage, self.base, self.first = stage, joined(made), made[0] - given[0]
        change, config = self._change_and_place(), self.run.config
        kept = self.kept = self._look_up(self.place.index)
        allowed = self.run.low < self.place.sigma <= self.run.high and kept is not None and (not config.most or kept.reused < config.most)
        self.reusing = allowed and change < stage.threshold
        if self.reusing:
            kept.reused += 1
            self.first = None
        self.run.tallies[stage].note(self.place.sigma, self.reusing)

    def keep(self, made: Tensors) -> None:
        """After the stage's last block, when it was computed."""
        rest, first, base = joined(made), self.first, self.base
        if rest.shape == base.shape:  # else something cut or added tokens on the way: not ours to repeat
            rest = in_range(rest.sub_(base))
            if self.kept is not None or self.run.room(rest.device, rest.nbytes + first.nbytes):
                key = stage_key(self.stage, self.whose, self.place.index)
                self.run.kept[key] = Kept(first, first.abs().mean((1, 2), dtype=torch.float32), rest, self._likeness())
            else:
                self.run.cramped = True
        self.end()

    def restored(self, given: Tensors) -> Tensors:
        """What the stage's last block returns when the stage is reused; its form is that of what the block is given."""
        whole = in_range(self.base.add_(self.kept.rest))
        self.end()
        if len(given) == 1:
            return (whole,)
        text = given[1].shape[1]
        return whole[:, text:], whole[:, :text]

    def _likeness(self) -> tuple:
        return self.first.shape, self.base.shape, self.first.dtype, self.first.device, self.like

    def _look_up(self, index: int) -> Kept | None:
        kept = self.run.kept.get(stage_key(self.stage, self.whose, index))
        return kept if kept is not None and kept.like == self._likeness() else None

    def _change(self, index: int) -> Tensor:
        """The largest relative change of an image's first residual, a scalar on the device; infinite without one to compare with."""
        kept = self._look_up(index)
        if kept is None:
            return self.first.new_full((), math.inf, dtype=torch.float32)
        return ((self.first - kept.first).abs_().mean((1, 2), dtype=torch.float32) / kept.size).amax()

    def _change_and_place(self) -> float:
        """The change, and on the way which call at its sigma this is: known where the host's tensor is the last call's own, else read.

        One wait for the device, but where a sigma comes back in another tensor: it is taken for a new one first.
        """
        last = self.run.places.get(self.whose)
        if self.place is None and last is not None and last.sigmas is self.sigmas:
            self._stand(last.sigma, last.index + 1)
        if self.place is None:
            sigma, change = torch.stack((self.sigmas.amax().to(self.first.device, torch.float32), self._change(0))).tolist()
            self._stand(sigma, last.index + 1 if last is not None and last.sigma == sigma else 0)
            if self.place.index == 0:
                return change
        return self._change(self.place.index).item()

    def _stand(self, sigma: float, index: int) -> None:
        self.place = self.run.places[self.whose] = Place(self.sigmas, sigma, index)


def stage_key(stage: Stage, whose: Hashable, index: int) -> tuple:
    return stage.first, whose, index


def joined(streams: Tensors) -> Tensor:
    """The streams in one tensor [B, Lt + Li, D], text first: a copy, for the host adds to its own in place."""
    return torch.cat(streams[::-1], 1)


def in_range(x: Tensor) -> Tensor:
    """float16 overflow brought back, in place: a difference of two numbers of that type need not be one."""
    return x.clamp_(-LARGEST_FP16, LARGEST_FP16) if x.dtype == torch.float16 else x


def through(call: Call, position: int, given: Tensors, compute: Callable[[], Tensors]) -> Tensors:
    """What the block at `position` returns for the streams `given`; compute() runs it."""
    stage = call.run.stage(position)
    if stage is None or (position != stage.first and call.stage is not stage):  # the latter where the first block was not asked
        return compute()
    if position == stage.first:
        made = compute()
        call.decide(stage, given, made)
        return made
    if call.reusing:
        return call.restored(given) if position == stage.last else given
    made = compute()
    if position == stage.last:
        call.keep(made)
    return made


@functools.cache
def uncompiled() -> Callable[..., Tensors]:
    """`through` as torch.compile leaves it alone; the blocks' own work is compiled still."""
    return torch.compiler.disable(through, recursive=False)


def cached(position: int, streams: Tensors, options: dict, compute: Callable[[], Tensors]) -> Tensors:
    """What the block at `position` makes of its streams: compute(), by way of the Call in its transformer_options if there is one."""
    call = options.get(KEY)
    return compute() if call is None else call.through(call, position, streams, compute)
