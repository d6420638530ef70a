"""One model in training: optimiser, running average of the weights, the time it has had, and all of it saved for a later call."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

WARM_UP, LOG_EVERY, LONGEST_MEMORY, LARGEST_NORM = 200, 20, 0.999, 1.0


@dataclass
class Run:
    """Where a training runs and until when. log: one entry for each minute and result, written to out/log.json."""

    device: torch.device
    out: Path
    state: Path
    ends: float  # by time.perf_counter
    seed: int = 0
    log: list[dict] = field(default_factory=list)

    def out_of_time(self) -> bool:
        return time.perf_counter() >= self.ends

    def note(self, **entry: object) -> None:
        """Prints an entry and adds it to the log."""
        self.log.append(entry)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()), flush=True)
        write_whole(self.out / "log.json", lambda path: path.write_text(json.dumps(self.log, indent=1), encoding="utf-8"))

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """write(a path beside), then the file under its name."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


class Stage:
    """One model's training, of `seconds` altogether, in as many calls as it takes.

    AdamW; the rate rises over the first steps and falls along a cosine of the time that is used up. `average` holds the weights to ship.
    """

    def __init__(self, run: Run, name: str, model: nn.Module, rate: float, seconds: float):
        self.run, self.name, self.model, self.rate, self.seconds = run, name, model.to(run.device), rate, seconds
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.99), weight_decay=0.01, fused=run.device.type == "cuda")
        self.step, self.spent, self.notes = 0, 0.0, {}
        self._last: float | None = None
        self._saved = time.perf_counter()
        if self.file.exists():
            self._load()
        self.generator = run.generator(run.seed + 1_000_003 * (self.step + 1) + sum(map(ord, name)))

    @property
    def file(self) -> Path:
        return self.run.state / f"{self.name}.pt"

    @property
    def fraction(self) -> float:
        """The part of the stage's time that is used up, 0 to 1."""
        return min(1.0, self.spent / self.seconds)

    def done(self) -> bool:
        return self.spent >= self.seconds

    def going(self) -> bool:
        return not self.done() and not self.run.out_of_time()

    def update(self, loss: Tensor) -> None:
        """One step down the gradient of `loss`. RuntimeError when the loss is no number (looked at every few steps)."""
        rate = self.rate * min(1.0, (self.step + 1) / WARM_UP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.fraction)))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
        self.optimiser.step()
        self._follow()
        self.step += 1
        if self.step % LOG_EVERY == 0 or self.run.device.type == "cpu":
            self.notes["loss"] = value = float(loss.detach())  # waits for the GPU, which keeps the clock honest
            if not math.isfinite(value):
                raise RuntimeError(f"{self.name}: the loss is {value} at step {self.step}; go on from the last saved state with --resume")
        now = time.perf_counter()
        self.spent += now - self._last if self._last is not None else 0.0  # not the first step, which compiles
        self._last = now

    @torch.no_grad()
    def _follow(self) -> None:
        weight = 1 - min(LONGEST_MEMORY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), weight)
        for kept, new in zip(self.average.buffers(), self.model.buffers(), strict=True):
            kept.copy_(new)

    def pause(self) -> None:
        """What follows until the next step does not count as the stage's time."""
        self._last = None

    def minute(self) -> bool:
        """Whether a minute has gone by since the last save."""
        return time.perf_counter() - self._saved >= 60

    def save(self) -> None:
        self._saved = time.perf_counter()
        held = {
            "model": self.model.state_dict(), "average": self.average.state_dict(), "optimiser": self.optimiser.state_dict(),
            "step": self.step, "spent": self.spent, "notes": self.notes,
        }  # fmt: skip
        write_whole(self.file, lambda path: torch.save(held, path))
        self.run.note(stage=self.name, step=self.step, seconds=round(self.spent, 1), of=self.seconds, loss=self.notes.get("loss"))
        self.pause()

    def _load(self) -> None:
        held = torch.load(self.file, map_location=self.run.device, weights_only=True)
        self.model.load_state_dict(held["model"])
        self.average.load_state_dict(held["average"])
        self.optimiser.load_state_dict(held["optimiser"])
        self.step, self.spent, self.notes = held["step"], held["spent"], held["notes"]
