"""What 4 bits do to pictures: the trained miniature in 16 bit and quantised in three ways, the same captions and seeds.

    python benchmarks/quality.py [--json FILE] [--captions 64] [--facts 2000] [--precision int4] [--rank 32] [--cpu]

PSNR and SSIM against the pictures of the 16-bit model, for rounding to nearest ("naive"), "data-free" and "calibrated" SVDQuant, computed
exactly and fast. Calibration sees other captions and seeds than those that are measured. Limits: calibrated above data-free above naive,
each with p < 0.01 by a paired sign-flip permutation test over the pictures; calibrated at least 25 dB exact and 29 dB fast. The classifier
reads shape, colour and position of the first object back from --facts pictures: 4 bits may lose at most one point of each.
Needs the files in miniature/. --cpu runs in earnest on the CPU, with as many pictures as asked for. Exits 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import Report, heading, need_gpu
from tonfa.models.calibrate import Collector
from tonfa.models.dense_flux import dense_flux, open_dense
from tonfa.models.flux import Flux
from tonfa.models.formats.checkpoint import open_checkpoint
from tonfa.models.miniature import FOLDER, Miniature, load_miniature
from tonfa.models.quantize_flux import Options, quantize_flux
from tonfa.models.similarity import psnr, ssim
from torch import Tensor

sys.path.append(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "miniature"))
from classifier import load_classifier, right  # noqa: E402
from scenes import Facts, caption_text, caption_words, draw_facts  # noqa: E402

MODES, COMPUTES = ("naive", "data-free", "calibrated"), ("exact", "fast")
LEAST = {"exact": 25.0, "fast": 29.0}  # dB of calibrated
LOST = 0.01  # of the classifier's answers
FLIPS = 100_000
MEASURED, CALIBRATING, COUNTED = 1, 2, 3  # seeds of captions; pictures' seeds are a million times as large


@dataclass(frozen=True)
class Task:
    """Captions of random scenes, what is in the scenes, and the first picture's seed."""

    captions: list[str]
    facts: Facts
    seed: int

    @staticmethod
    def of(n: int, seed: int) -> Task:
        generator = torch.Generator().manual_seed(seed)
        facts = draw_facts(n, generator)
        return Task([caption_text(words) for words in caption_words(facts, generator)], facts, seed * 1_000_000)

    def pictures(self, miniature: Miniature, model: Flux, compute: str = "auto") -> Tensor:
        return miniature.sample(model, self.captions, self.seed, compute=compute).cpu()


# -- measures ---------------------------------------------------------------------------------------------------------------------


def p_greater(a: Tensor, b: Tensor, flips: int = FLIPS) -> float:
    """One-sided p that a [n] is greater than b [n] by chance: their differences' signs are flipped at random."""
    difference = (a - b).double()
    generator = torch.Generator().manual_seed(0)
    at_least = 0
    for _ in range(flips // 1000):
        signs = torch.randint(0, 2, (1000, difference.shape[0]), generator=generator).double() * 2 - 1
        at_least += int((signs @ difference >= difference.sum()).sum())
    return (1 + at_least) / (1 + flips // 1000 * 1000)


# -- the models -------------------------------------------------------------------------------------------------------------------


def quantised(miniature: Miniature, reference: Flux, folder: Path, options: argparse.Namespace, report: Report) -> dict[str, Flux]:
    """Mode -> the 4-bit model; a row of the report each."""
    task, models = Task.of(options.calibration, CALIBRATING), {}
    with Collector(reference) as seen:
        task.pictures(miniature, reference)
    with closing(open_dense(miniature.flux)) as source:
        for mode in MODES:
            path, began = folder / f"{mode}.safetensors", time.perf_counter()
            chosen = Options(mode=mode, precision=options.precision, rank=options.rank)
            quantize_flux(source, path, chosen, seen.statistics, miniature.device)
            row = {"what": "model", "mode": mode, "bytes": path.stat().st_size, "seconds": time.perf_counter() - began}
            with closing(open_checkpoint(path)) as checkpoint:
                models[mode] = Flux(checkpoint, reference.dtype, miniature.device).eval()
            report.rows.append(row)
            print(f"{mode:12} {row['bytes'] / 2**20:6.2f} MiB, quantised in {row['seconds']:.1f} s", flush=True)
    return models


def compare(miniature: Miniature, reference: Flux, models: dict[str, Flux], n: int, report: Report) -> None:
    """PSNR and SSIM of every mode, and whether the better recipe is better."""
    task = Task.of(n, MEASURED)
    wanted = task.pictures(miniature, reference)
    for compute in COMPUTES:
        found = {}
        for mode, model in models.items():
            made = task.pictures(miniature, model, compute)
            found[mode], similar = psnr(made, wanted), ssim(made, wanted)
            row = {"what": "pictures", "mode": mode, "compute": compute, "psnr": float(found[mode].mean()), "ssim": float(similar.mean())}
            worst = float(found[mode].min())
            report.rows.append(row | {"worst_psnr": worst, "psnrs": [round(float(x), 3) for x in found[mode]]})
            print(f"{mode:12} {compute:6} PSNR {row['psnr']:6.2f} dB (worst {worst:5.2f}), SSIM {row['ssim']:.4f}", flush=True)
        for worse, better in zip(MODES, MODES[1:], strict=False):
            gain = float((found[better] - found[worse]).mean())
            report.check(
                f"{compute}: p that {better} is above {worse} ({gain:+.2f} dB) by chance", p_greater(found[better], found[worse]), 0.01
            )
        report.check(f"{compute}: PSNR of calibrated", float(found["calibrated"].mean()), LEAST[compute], "dB", at_least=True)


def count_facts(miniature: Miniature, reference: Flux, models: dict[str, Flux], folder: Path, n: int, report: Report) -> None:
    """How many pictures show what their caption says, in 16 bit and in 4 bit."""
    task, classifier = Task.of(n, COUNTED), load_classifier(folder / "classifier.safetensors")

    def shares(pictures: Tensor) -> dict[str, float]:
        return {name: float(ok.float().mean()) for name, ok in right(classifier, pictures, task.facts).items()}

    before = shares(task.pictures(miniature, reference))
    report.rows.append({"what": "facts", "mode": "16 bit", "compute": "dense"} | before)
    print("right in 16 bit".ljust(28), _percent(before), flush=True)
    for mode, compute in ((m, c) for m in MODES for c in COMPUTES):
        found = shares(task.pictures(miniature, models[mode], compute))
        report.rows.append({"what": "facts", "mode": mode, "compute": compute} | found)
        print(f"right, {mode:12} {compute:6}".ljust(28), _percent(found), flush=True)
        if mode == "calibrated":
            for name, share in found.items():
                report.check(f"{compute}: share of pictures with the right {name} that 4 bits lose", before[name] - share, LOST)


def _percent(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the trained files are (default: miniature/ of the pack)")
    parser.add_argument("--captions", type=int, default=64, help="pictures that are compared (default 64)")
    parser.add_argument("--facts", type=int, default=2000, help="pictures that the classifier reads, 0 for none (default 2000)")
    parser.add_argument("--calibration", type=int, default=64, help="captions to calibrate with (default 64)")
    parser.add_argument("--precision", choices=("int4", "nvfp4"), default="int4")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(args)
    device = need_gpu(options.cpu)
    report = Report(heading(), options.json)
    miniature = load_miniature(options.folder, device)
    reference = dense_flux(miniature.flux, torch.bfloat16 if device == "cuda" else torch.float32, device)
    with tempfile.TemporaryDirectory(prefix="tonfa-quality-") as folder:
        models = quantised(miniature, reference, Path(folder), options, report)
    compare(miniature, reference, models, options.captions, report)
    if options.facts:
        count_facts(miniature, reference, models, options.folder, options.facts, report)
    return report.close()


if __name__ == "__main__":
    raise SystemExit(main())
