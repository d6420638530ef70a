"""The host's patches as data: what they fit, whether two lists mean the same; and applying one with the host's own code."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import types
from collections.abc import Iterator

import comfy.lora
import comfy.weight_adapter
import torch
from torch import Tensor

# The host's patch: (strength, adapter or tuple or list, strength of the model's own weight, (dim, start, length) or None, function or None)
Patch = tuple
FAILURES = (ValueError, RuntimeError, TypeError, IndexError, KeyError, AttributeError, AssertionError)  # what a wrong tensor can set off
MOST_NAMED = 6


class PatchError(ValueError):
    """A patch that does not fit its layer."""


def active(patches: list[Patch]) -> list[Patch]:
    """Without those that change nothing: strength 0 beside the model's own weight in full. ("set" ignores its strength.)"""
    return [p for p in patches if p[0] != 0 or p[2] != 1.0 or is_kind(p[1], "set")]


def is_kind(value: object, kind: str) -> bool:
    """Whether a patch's value is the host's tuple (kind, tensors)."""
    return isinstance(value, tuple) and len(value) == 2 and value[0] == kind


def window(patch: Patch, rows: int, columns: int) -> tuple[int, int, int, int]:
    """(rows, columns, first row, first column) of the part of a weight that a patch is for. Raises PatchError when it leaves the weight."""
    dim, start, length = patch[3] or (0, 0, rows)
    if dim not in (0, 1) or start + length > (rows, columns)[dim]:
        raise PatchError(f"{'columns' if dim else 'rows'} {start} to {start + length} of a layer of {rows} x {columns}")
    return (length, columns, start, 0) if dim == 0 else (rows, length, 0, start)


def completed(value: object) -> object:
    """The value as the host can compute it: where a BOFT file has no constraint (alpha) the host fails, though it takes 0 for an OFT's."""
    if isinstance(value, list):  # another model's weight and the patches on it
        return [value[0], *((patch[0], completed(patch[1]), *patch[2:]) for patch in value[1:])]
    if isinstance(value, comfy.weight_adapter.BOFTAdapter) and value.weights[2] is None:
        return type(value)(value.loaded_keys, (*value.weights[:2], 0, *value.weights[3:]))
    return value


# -- comparing ------------------------------------------------------------------------------------------------------------------


class Same:
    """Stands for an object where things are compared: equal only to itself, since tensors have no truth value."""

    __slots__ = ("it",)

    def __init__(self, it: object):
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.it is self.it

    def __hash__(self) -> int:
        return id(self.it)


def fingerprint(value: object) -> object:
    """Equal for patches that mean the same: the same tensors, strengths, slices and functions, whatever objects hold them.

    A loader that runs again makes new adapters over the tensors of the file that it has in memory.
    """
    if isinstance(value, tuple | list):
        return tuple(fingerprint(v) for v in value)
    if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        return type(value), fingerprint(tuple(value.weights))
    if isinstance(value, dict):
        return tuple((key, fingerprint(v)) for key, v in value.items())
    if isinstance(value, functools.partial):
        return "partial", fingerprint((value.func, value.args, value.keywords))
    if inspect.ismethod(value):
        return fingerprint(value.__func__), Same(value.__self__)
    if isinstance(value, types.FunctionType) and value.__closure__ is None:
        return value.__code__  # the host writes some of its functions anew each time
    return value if value is None or isinstance(value, int | float | str) else Same(value)


# -- applying --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def caught(key: str, listen: bool = False) -> Iterator[list[str]]:
    """Collects, in sentences, what goes wrong inside with a key, and goes on behind it.

    listen: also what the host says of the key in the log, and keeps it from there: it logs many failures where it could raise.
    """
    said: list[str] = []

    def hears(record: logging.LogRecord) -> bool:
        about = record.levelno >= logging.WARNING and key in str(record.msg)
        if about:
            said.append(str(record.msg))
        return not about

    root = logging.getLogger()
    if listen:
        root.addFilter(hears)
    try:
        yield said
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        said.append(first if key in first else f"{key}: {first}")
    finally:
        root.removeFilter(hears)


def patched(weight: Tensor, patch: Patch, key: str, original: Tensor | None = None) -> tuple[Tensor, list[str]]:
    """What the host makes of an fp32 weight, which it may write to. Raises PatchError when it cannot.

    original: the model's own weight, which "model_as_lora" is a difference to. The sentences returned are about patches within the patch,
    when it merges another model: what is left of that is merged all the same.
    """
    originals = None if original is None else {key: [(original, lambda weight, **_: weight)]}
    shape = weight.shape
    made = None
    with caught(key, listen=True) as said:
        made = comfy.lora.calculate_weight([patch], weight, key, intermediate_dtype=torch.float32, original_weights=originals)
    if made is None or (said and not isinstance(patch[1], list)):
        raise PatchError(said[0])
    if made.shape != shape:
        raise PatchError(f"{key} is {sizes(shape)}, the patch makes it {sizes(made.shape)}")
    return made, said


def sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def named(refused: list[str]) -> str:
    """A few of the sentences, and how many more there are."""
    more = f"; and {len(refused) - MOST_NAMED} more" if len(refused) > MOST_NAMED else ""
    return "; ".join(refused[:MOST_NAMED]) + more
