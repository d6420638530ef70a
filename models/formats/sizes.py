"""Sizes of a model from the tensors of its file, and the metadata's word on them. For Qwen-Image and Z-Image; flux_config has FLUX.1's.

Tensors are the truth for every size. Metadata that says otherwise is a warning; only blocks that it counts and the file lacks are an error.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .tensorfile import CheckpointError, Entry


@dataclass(frozen=True)
class Sizes:
    """The tensors of a file, asked for sizes. `where` is the path for messages, `title` the family ("Qwen-Image")."""

    tensors: Mapping[str, Entry]
    where: str
    title: str

    def shape(self, key: str, ndim: int) -> tuple[int, ...]:
        """The shape of a tensor that must be there. CheckpointError when it is not, or has other than ndim dimensions, or an empty one."""
        entry = self.tensors.get(key)
        if entry is None:
            raise CheckpointError(f"{self.where}: tensor {key} is missing, so this is no complete {self.title} file. Download it again.")
        if len(entry.shape) != ndim or 0 in entry.shape:
            raise CheckpointError(
                f"{entry.file.path}: {entry.key} has shape {list(entry.shape)}, expected {ndim} dimensions, none of them empty."
            )
        return entry.shape

    def inputs(self, prefix: str) -> int:
        """Input features of a W4A4 or plain layer."""
        if f"{prefix}.weight" in self.tensors:
            return self.shape(f"{prefix}.weight", 2)[1]
        return 2 * self.shape(f"{prefix}.qweight", 2)[1]

    def blocks(self, stack: str, told: object) -> int:
        """How many blocks a stack has. CheckpointError when there is none or one is missing: in the middle, or, by the count that the
        metadata tells (anything but a whole number tells nothing), at the end."""
        pattern = re.compile(re.escape(stack) + r"\.(0|[1-9]\d{0,5})\.", re.ASCII)
        found = {int(m[1]) for key in self.tensors if (m := pattern.match(key))}
        if not found:
            raise CheckpointError(f"{self.where}: holds no block {stack}.0, so this is no complete {self.title} file. Download it again.")
        count = max(found) + 1
        missing = next((i for i in range(count) if i not in found), None)
        if missing is not None:
            raise CheckpointError(
                f"{self.where}: block {stack}.{missing} is missing ({len(found)} of {count} are there). Download the file again."
            )
        if type(told) is int and told > count:
            raise CheckpointError(f"{self.where}: holds {count} blocks {stack}.*, its metadata says {told}: block {stack}.{count} is "
                                  "missing. Download the file again.")  # fmt: skip
        return count

    def multiples(self, *rules: tuple[str, int, int]) -> None:
        """CheckpointError unless each (what, value, multiple) holds."""
        for what, value, multiple in rules:
            if value % multiple:
                raise CheckpointError(
                    f"{self.where}: the {what} is {value} by the tensor shapes, expected a multiple of {multiple} for {self.title}."
                )


def contradictions(config: Mapping[str, object], facts: Mapping[str, object], warnings: list[str]) -> None:
    """A warning for every entry of the metadata's config that the tensors contradict."""
    for key, value in facts.items():
        if key in config and config[key] != value:
            warnings.append(f"metadata config.{key} is {config[key]!r:.80}, the tensors say {value!r}; the tensors are believed")


def axes_of(told: object, default: list[int], head_dim: int, warnings: list[str]) -> list[int]:
    """The rotary split of a head into (time, row, column): the metadata's when it is one, else `default`."""
    if told is None:
        return default
    good = isinstance(told, list) and len(told) == 3 and all(type(a) is int and a > 0 and a % 2 == 0 for a in told)
    if not good or sum(told) != head_dim:
        warnings.append(f"metadata gives the rotary split {told!r:.80}, which is none of a head of {head_dim}; {default} is used")
        return default
    if told != default:
        warnings.append(f"metadata gives the rotary split {told}, usual is {default}; the metadata is believed")
    return told


def number_of(config: Mapping[str, object], key: str, default: float, warnings: list[str]) -> float:
    """A positive number of the metadata that no tensor shows; `default` when it is absent or unusable."""
    value = config.get(key, default)
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        warnings.append(f"metadata config.{key} {value!r:.80} is not a usable number; {default:g} is used")
        return default
    if value != default:
        warnings.append(f"metadata config.{key} is {value:g}, usual is {default:g}; the metadata is believed")
    return value
