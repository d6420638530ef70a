"""Hold the tensors of a SVDQuant file against what its model must have: presence, types, shapes, one precision."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from . import nunchaku as nk
from .flux_names import FLOATS, HALVES, HostLinear, LayerSpec, layer_tensors
from .layout import Layout
from .tensorfile import CheckpointError, Entry

MAX_RANK = 1024


def precision_of(layout: Layout, tensors: Mapping[str, Entry], told: str | None, where: str) -> str:
    """INT4 or NVFP4, by the majority of the W4A4 scale types. CheckpointError when the metadata says the other."""
    scales = [tensors.get(f"{p}.wscales") for p, s in layout.layers.items() if not s.chunks and f"{p}.qweight" in tensors]
    fp8 = sum(e is not None and e.dtype == "F8_E4M3" for e in scales)
    if not scales:
        return told or "int4"
    found = "nvfp4" if 2 * fp8 > len(scales) else "int4"
    if told and told != found:
        raise CheckpointError(f"{where}: its metadata says {told.upper()}, its scales are those of {found.upper()}: the file is damaged or "
                              "was put together from two files. Download it again.")  # fmt: skip
    return found


@dataclass
class Checker:
    """Every expected tensor against presence, dtype and shape; the rest is listed in one warning."""

    where: str
    layout: Layout
    tensors: Mapping[str, Entry]
    warnings: list[str]
    expected: set[str] = field(default_factory=set)

    def everything(self, precision: str) -> list[int]:
        """Returns the rank of every W4A4 layer."""
        layers = dict(self.layout.layers)
        for host in self.layout.linears:
            if host.kind == "plain":
                self._plain(host, layers)
        ranks = [r for prefix, spec in layers.items() if (r := self.layer(prefix, spec, precision))]
        for _, key, shape in self.layout.plains:
            self.tensor(key, FLOATS, shape)
        self._top_scales(layers, precision)
        self._mixed_halves()
        self._unknown()
        return ranks

    def _plain(self, host: HostLinear, layers: dict[str, LayerSpec]) -> None:
        """A linear left in 16 bit; its layers leave `layers`."""
        columns = {prefix: layers.pop(prefix).k for prefix, _, _ in host.parts}
        for source in self.layout.plain_sources(host, self.tensors):
            self.tensor(f"{source.name}.weight", FLOATS, (source.rows, columns.get(source.name, host.in_features)))
            if self.layout.biases:
                self.tensor(f"{source.name}.bias", FLOATS, (source.rows,))

    def layer(self, prefix: str, spec: LayerSpec, precision: str) -> int:
        rank = 0
        if not spec.chunks:
            down = self.tensors.get(f"{prefix}.lora_down")
            rank = down.shape[-1] if down and down.shape else 16
            if rank % nk.RANK_TILE or not 0 < rank <= MAX_RANK:
                raise self._wrong(down, f"[{spec.k}, rank] with a rank that is a multiple of 16 up to {MAX_RANK}")
        halves: dict[str, Entry] = {}
        for suffix, (dtypes, shape, required) in layer_tensors(spec, precision, rank).items():
            if suffix == "bias" and not self.layout.biases:
                continue
            entry = self.tensor(f"{prefix}.{suffix}", dtypes, shape, required)
            if entry and entry.dtype in HALVES and suffix != "wtscale":
                halves.setdefault(entry.dtype, entry)
        if len(halves) == 2:
            a, b = halves.values()
            raise CheckpointError(f"{b.file.path}: {a.key} is {a.dtype} but {b.key} is {b.dtype}, expected one 16-bit type in a layer: "
                                  "the file is damaged.")  # fmt: skip
        if precision == "int4":
            for top in ("wtscale", "wcscales"):
                if entry := self.tensors.get(f"{prefix}.{top}"):
                    raise CheckpointError(f"{entry.file.path}: {entry.key} is there, but INT4 layers have no such scale, only NVFP4 ones.")
        return rank

    def tensor(self, key: str, dtypes: tuple[str, ...], shape: tuple[int, ...], required: bool = True) -> Entry | None:
        self.expected.add(key)
        entry = self.tensors.get(key)
        want = f"{' or '.join(dtypes)} {list(shape)}"
        if entry is None:
            if not required:
                return None
            name = self.layout.disk_name(key)
            raise CheckpointError(f"{self.where}: tensor {name} is missing, expected {want}. The file is incomplete; download it again.")
        scalar = key.endswith(".wtscale") and entry.shape == ()  # one element is one element
        if entry.dtype not in dtypes or (entry.shape != shape and not scalar):
            raise self._wrong(entry, want)
        return entry

    def _wrong(self, entry: Entry, want: str) -> CheckpointError:
        return CheckpointError(f"{entry.file.path}: {entry.key} is {entry.dtype} {list(entry.shape)}, expected {want}.")

    def _top_scales(self, layers: dict[str, LayerSpec], precision: str) -> None:
        if precision != "nvfp4":
            return
        bare = [p for p, s in layers.items() if not s.chunks and not {f"{p}.wtscale", f"{p}.wcscales"} & self.tensors.keys()]
        if bare:
            self.warnings.append(f"{listed(bare)} have neither wtscale nor wcscales; both are taken as 1")

    def _mixed_halves(self) -> None:
        kinds = {d: [e.key for k, e in self.tensors.items() if e.dtype == d and k in self.expected] for d in HALVES}
        few, many = sorted(kinds, key=lambda d: len(kinds[d]))
        if kinds[few]:
            self.warnings.append(
                f"{listed(kinds[few])} are {few}, all other 16-bit tensors {many}; if pictures look wrong the file is damaged"
            )

    def _unknown(self) -> None:
        unknown = [e.key for k, e in self.tensors.items() if k not in self.expected]
        if unknown:
            self.warnings.append(f"not used, because no {self.layout.title} layer has them: {listed(unknown)}")


def listed(names: list[str]) -> str:
    """The first ten names, and how many there are."""
    return ", ".join(names[:10]) + (f", ... ({len(names)} tensors)" if len(names) > 10 else "")
