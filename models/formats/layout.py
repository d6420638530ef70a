"""What a complete SVDQuant file of one model holds: a table that a family's names module makes and the reader holds a file against.

Keys and prefixes in it are internal ones: the layer names as they are on disk (for FLUX.1 those of v1), always with the suffixes of v1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from .flux_names import V2_SUFFIXES, HostLinear, LayerSpec
from .tensorfile import CheckpointError, Entry

_V1_SUFFIX = {v2: v1 for v1, v2 in V2_SUFFIXES.items()}


@dataclass(frozen=True)
class Piece:
    """Some rows of a stacked linear: the name of the linear that they are when it stands alone, without ".weight"."""

    name: str
    first: int
    rows: int


@dataclass(frozen=True)
class Layout:
    """What a file of one model holds.

    title            the family as people call it, "FLUX.1"
    linears          the linears of the blocks, block by block
    layers           prefix -> LayerSpec of every layer that the format quantises
    plains           (native name, key, shape) of every tensor that it leaves alone
    disk_name        key -> the name that this file would give it, for messages
    natives          name of a linear that the host has in pieces -> those pieces, top to bottom; its own name is then none of the host's
    splits           prefix -> the layers that stand for it where somebody left it in 16 bit without stacking
    biases           whether the W4A4 layers have biases
    w4a4_modulation  whether modulation layers may be W4A4 too
    swapped          beginning of the native names whose two halves lie in the other order in the file; "" for none
    """

    title: str
    linears: list[HostLinear]
    layers: dict[str, LayerSpec]
    plains: list[tuple[str, str, tuple[int, ...]]]
    disk_name: Callable[[str], str]
    natives: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    splits: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    biases: bool = True
    w4a4_modulation: bool = False
    swapped: str = ""

    def pieces(self, host: HostLinear) -> tuple[Piece, ...]:
        """The host's own linears that `host` is made of, top to bottom: itself, or those that it stacks."""
        return self.natives.get(host.name, (Piece(host.name, 0, host.out_features),))

    def plain_sources(self, host: HostLinear, tensors: Mapping[str, Entry]) -> list[Piece]:
        """Where the rows of a linear that is not quantised lie in a file: the prefix of each layer, and the rows that it is."""
        out = []
        for prefix, row, _ in host.parts:
            if prefix in self.splits and f"{prefix}.weight" not in tensors:
                out += [replace(piece, first=row + piece.first) for piece in self.splits[prefix]]
            else:
                out.append(Piece(prefix, row, self.layers[prefix].n))
        return out

    def as_found(self, tensors: Mapping[str, Entry], where: str) -> "Layout":
        """This layout with the precision of every linear as the file has it: "plain" for those with `P.weight` instead of `P.qweight`,
        and modulation layers that are W4A4 so marked. CheckpointError when one half of a linear is quantised and the other is not."""
        layers = dict(self.layers)
        if self.w4a4_modulation:
            for prefix, spec in self.layers.items():
                entry = tensors.get(f"{prefix}.qweight")
                if spec.chunks and entry and entry.dtype == "I8":
                    layers[prefix] = replace(spec, chunks=0)
        linears = []
        for host in self.linears:
            plain = [p for p, _, _ in host.parts if f"{p}.qweight" not in tensors and self._has_weight(p, tensors)]
            if plain and len(plain) < len(host.parts):
                raise CheckpointError(
                    f"{where}: {plain[0]} is not quantised but the other half of {host.name} is; this pack needs both halves alike."
                )
            kind = "plain" if plain else "w4a16" if any(layers[p].chunks for p, _, _ in host.parts) else "w4a4"
            linears.append(replace(host, kind=kind))
        return replace(self, linears=linears, layers=layers)

    def _has_weight(self, prefix: str, tensors: Mapping[str, Entry]) -> bool:
        names = [prefix, *(piece.name for piece in self.splits.get(prefix, ()))]
        return any(f"{name}.weight" in tensors for name in names)


def v1_suffix(key: str) -> str:
    """A tensor name with its last part as v1 has it ("proj_down" -> "lora_down"); layer names stay."""
    prefix, dot, suffix = key.rpartition(".")
    return f"{prefix}{dot}{_V1_SUFFIX.get(suffix, suffix)}"


def v2_suffix(key: str) -> str:
    """The other way: "lora_down" -> "proj_down"."""
    prefix, dot, suffix = key.rpartition(".")
    return f"{prefix}{dot}{V2_SUFFIXES.get(suffix, suffix)}"
