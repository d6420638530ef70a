"""Linears that the host has apart and a file has stacked (Qwen-Image's q, k and v; Z-Image's w3 and w1): the host's keys for them.

Whoever patches, merges or saves a model knows the host's keys. On the way in they become slices of the stacked linear's, which the host's
patches can be; on the way out the stacked ones are taken apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .patches import Patch


@dataclass(frozen=True)
class Window:
    """Rows first to first + rows of the weight or bias with the key `stacked`."""

    stacked: str
    first: int
    rows: int

    def of(self, whole: Tensor) -> Tensor:
        return whole[self.first : self.first + self.rows]

    def converted(self, convert: Callable[..., Tensor], whole: Tensor, **kwargs: object) -> Tensor:
        """The rows of what the host's convert function makes of the whole."""
        return self.of(convert(whole, **kwargs))

    def alone(self, patch: Patch) -> Patch | None:
        """A patch of the whole as one of the rows; None for one that is not for just these."""
        return (*patch[:3], None, *patch[4:]) if patch[3] == (0, self.first, self.rows) else None

    def placeholder(self, whole: Tensor) -> Tensor:
        """Stands for the rows where nobody reads them yet."""
        return torch.empty(0, dtype=whole.dtype)


def windows_of(model: nn.Module) -> dict[str, Window]:
    """The host's key -> its window, of every stacked linear of a base model."""
    found, network = {}, getattr(model, "diffusion_model", None)  # a text encoder has none
    for name, module in () if network is None else network.named_modules():
        for piece in getattr(module, "pieces", ()):
            for parameter in ("weight", "bias"):
                if getattr(module, parameter) is not None:
                    key = f"diffusion_model.{piece.name}.{parameter}"
                    found[key] = Window(f"diffusion_model.{name}.{parameter}", piece.first, piece.rows)
    return found


def take_apart(
    state: dict, windows: dict[str, Window], make: Callable[[str, Window, object], object], name: Callable[[str], str] = str
) -> dict:
    """`state` with the host's keys in place of stacked ones: make(key, window, what the stacked one has) -> value. It is changed.

    name: how the state calls a key.
    """
    for key, window in windows.items():
        if name(window.stacked) in state:
            state[name(key)] = make(key, window, state[name(window.stacked)])
    for window in windows.values():
        state.pop(name(window.stacked), None)
    return state


def sliced(patches: dict, windows: dict[str, Window]) -> tuple[dict, dict]:
    """(the host's patches with slices of stacked linears for keys of their rows, new key -> old one of those)."""
    made, old = {}, {}
    for key, value in patches.items():
        name, *rest = (key,) if isinstance(key, str) else key
        window = windows.get(name)
        if window is None:
            made[key] = value
            continue
        dim, start, length = rest[0] if rest and rest[0] is not None else (0, 0, window.rows)
        if dim != 0:  # columns of some rows: no patch of the host's can say that
            made[key] = value
            continue
        new = (window.stacked, (0, window.first + start, length), *rest[1:])
        made[new], old[new] = value, key
    return made, old
