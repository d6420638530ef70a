"""What quantising a model cost it, layer by layer: as JSON, as a picture and as lines for a terminal.

Signal to noise in dB: 10 log10(|y|^2 / |y - y4|^2). Of the weight: against the dense one. Of the output: of the linear on sampled inputs,
with activations quantised as the kernels do; "naive" is the same layer rounded to nearest, without smoothing and without low-rank branch.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1280, 560, 64, 170, 48, 46
GREY, FRAME = "#b4b4b4", "#606060"
KINDS = {"qkv_proj": "#1f5fbf", "out_proj": "#d9731a", "mlp_fc1": "#2a9447", "mlp_fc2": "#c0272d"}


@dataclass(frozen=True)
class LayerReport:
    """One layer of the file, by its v1 name; n outputs, k inputs. rank: None for modulation layers. Decibels: None where not measured."""

    name: str
    n: int
    k: int
    rank: int | None
    weight_snr_db: float | None
    output_snr_db: float | None = None
    naive_output_snr_db: float | None = None
    seconds: float = 0.0


@dataclass
class Report:
    """Of one file. bytes: its size. seconds: of the call that finished it, calibration not included."""

    path: str
    source: str
    mode: str
    precision: str
    bytes: int = 0
    seconds: float = 0.0
    layers: list[LayerReport] = field(default_factory=list)

    @property
    def measured(self) -> str:
        """Which decibels tell layers apart: "output" where every W4A4 layer has them, else "weight"."""
        return "output" if self.layers and all(x.output_snr_db is not None for x in self.w4a4()) else "weight"

    def w4a4(self) -> list[LayerReport]:
        return [x for x in self.layers if x.rank is not None]

    def snr(self, layer: LayerReport) -> float:
        """The layer's decibels as `measured`; infinite where there is no noise."""
        value = layer.output_snr_db if self.measured == "output" else layer.weight_snr_db
        return math.inf if value is None else value

    def worst(self, count: int = 5) -> list[LayerReport]:
        """The W4A4 layers with the most noise, worst first."""
        return sorted(self.w4a4(), key=self.snr)[:count]

    def as_json(self) -> dict:
        """Plain JSON values; what is not finite becomes null."""
        facts = asdict(self) | {"measured": self.measured, "worst": [x.name for x in self.worst()]}
        facts["layers"] = [{key: _finite(value) for key, value in layer.items()} for layer in facts["layers"]]
        return facts

    def lines(self) -> list[str]:
        """For a terminal: size, mean and worst layers."""
        found = [self.snr(x) for x in self.w4a4() if math.isfinite(self.snr(x))]
        mean = f", {self.measured} signal to noise {sum(found) / len(found):.1f} dB on average" if found else ""
        lines = [f"{self.precision}, {self.mode}: {size(self.bytes)}, {len(self.layers)} layers in {self.seconds:.0f} s{mean}"]
        naive = {x.name: x.naive_output_snr_db for x in self.layers}
        for x in self.worst():
            beside = "" if naive[x.name] is None or self.measured == "weight" else f" (rounded to nearest {naive[x.name]:.1f})"
            lines.append(f"  worst: {x.name:<46} {self.snr(x):6.1f} dB{beside}, rank {x.rank}")
        return lines

    def save(self, path: Path) -> list[Path]:
        """Writes path.report.json and, where Pillow can be imported, path.report.png; the files that were written.

        path: the checkpoint. OSError when they cannot be written.
        """
        written = [path.with_name(f"{path.stem}.report.json")]
        written[0].write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        picture = path.with_name(f"{path.stem}.report.png")
        try:
            draw(self, picture)
            written.append(picture)
        except ImportError as e:
            log.info("no %s: it takes Pillow (%s)", picture.name, e)
        return written


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- the picture --------------------------------------------------------------------------------------------------------------------


def draw(report: Report, path: Path) -> None:
    """A dot for every W4A4 layer: its block to the right, its decibels upwards, grey what rounding to nearest gives.

    ImportError without Pillow (10.1 or newer, for text of a chosen size).
    """
    import PIL
    from PIL import Image, ImageDraw

    if tuple(int(number) for number in PIL.__version__.split(".")[:2]) < (10, 1):
        raise ImportError(f"Pillow {PIL.__version__} is older than 10.1")
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(sheet)
    layers = [x for x in report.w4a4() if math.isfinite(report.snr(x))]
    blocks = list(dict.fromkeys(_place(x)[0] for x in layers))
    values = [report.snr(x) for x in layers]
    values += [x.naive_output_snr_db for x in layers if report.measured == "output" and x.naive_output_snr_db is not None]
    values = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = 5 * math.floor(min(values) / 5), 5 * math.floor(max(values) / 5) + 5
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def y_of(decibels: float) -> float:
        return TOP + tall * (high - decibels) / (high - low)

    title = f"{Path(report.path).name}: {report.precision}, {report.mode}, {size(report.bytes)}"
    pen.text((LEFT, 14), f"{title}. Signal to noise of every layer's {report.measured}, dB", fill="black", font_size=16)
    for decibels in range(low, high + 1, 5):
        pen.line((LEFT, y_of(decibels), LEFT + wide, y_of(decibels)), fill="#e4e4e4")
        pen.text((LEFT - 8, y_of(decibels)), str(decibels), fill=FRAME, font_size=13, anchor="rm")
    _axis(pen, blocks, wide)
    column = wide / max(len(blocks), 1)
    for x in layers:
        block, kind, text = _place(x)
        at = LEFT + column * (blocks.index(block) + (list(KINDS).index(kind) + (0.7 if text else 0.3)) / len(KINDS))
        if report.measured == "output" and x.naive_output_snr_db is not None and math.isfinite(x.naive_output_snr_db):
            _mark(pen, at, y_of(x.naive_output_snr_db), GREY, text)
        _mark(pen, at, y_of(report.snr(x)), KINDS[kind], text)
    _legend(pen, report.measured == "output", any(_place(x)[2] for x in layers))
    sheet.save(path, format="PNG")


def _place(x: LayerReport) -> tuple[str, str, bool]:
    """("transformer_blocks.3", "out_proj", whether it is of the text stream) of a v1 name."""
    block, _, layer = x.name.rpartition(".")
    return block, layer.replace("_context", ""), "_context" in layer


def _axis(pen, blocks: list[str], wide: int) -> None:
    bottom, column = HEIGHT - BOTTOM, wide / max(len(blocks), 1)
    pen.rectangle((LEFT, TOP, LEFT + wide, bottom), outline=FRAME)
    every = math.ceil(26 / column)
    for i, block in enumerate(blocks):
        stack, _, number = block.rpartition(".")
        if i and not blocks[i - 1].startswith(f"{stack}."):
            pen.line((LEFT + column * i, TOP, LEFT + column * i, bottom), fill=FRAME)
        if int(number) % every == 0:
            pen.text((LEFT + column * (i + 0.5), bottom + 6), number, fill=FRAME, font_size=13, anchor="ma")
    for stack, words in (("transformer_blocks.", "double blocks"), ("single_transformer_blocks.", "single blocks")):
        found = [i for i, block in enumerate(blocks) if block.startswith(stack)]
        if found:
            pen.text((LEFT + column * (sum(found) / len(found) + 0.5), bottom + 24), words, fill=FRAME, font_size=13, anchor="ma")


def _mark(pen, x: float, y: float, colour: str, text: bool) -> None:
    box = (x - 3, y - 3, x + 3, y + 3)
    (pen.rectangle if text else pen.ellipse)(box, fill=colour)


def _legend(pen, naive: bool, text: bool) -> None:
    x, y = WIDTH - RIGHT + 20, TOP + 10
    rows = [(name, colour, False) for name, colour in KINDS.items()]
    rows += [("text stream", FRAME, True)] if text else []
    rows += [("rounded to nearest", GREY, False)] if naive else []
    for name, colour, square in rows:
        _mark(pen, x, y, colour, square)
        pen.text((x + 10, y), name, fill="black", font_size=13, anchor="lm")
        y += 22
