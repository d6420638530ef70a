"""Trains the miniature FLUX: autoencoder, flow, classifier, one after the other, on scenes drawn on the spot (scenes.py).

    python miniature/train.py --out FOLDER [--minutes 9] [--seconds 130 270 30] [--resume] [--state FOLDER] [--cpu]

Needs torch, Pillow, safetensors, this package (importable as `tonfa`) and no data. Writes to FOLDER, every minute what there is:
flux.safetensors, autoencoder.safetensors, captions.safetensors, classifier.safetensors, samples.png and log.json. --seconds: the time of
each stage; a call ends after --minutes, and one with --resume goes on from the states in --state (default: FOLDER/state, about 0.2 GB).
--cpu: the same in a tiny form, to try it out.

On paper, for one H200: a scene costs 46 GFLOP in the autoencoder's training, 7.6 to encode, 3.1 in the flow's training. At a third of the
16-bit peak the flow does about 40 steps of 1024 a second at the very most; with hidden size 256 memory traffic (about 60 GB a step) brings
that to 20 or 30, so about 7000 steps in 270 s. Latents are kept in a pool (1 GB) of which a part is drawn anew every few steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from classifier import Classifier, right
from classifier import loss as classifier_loss
from network import CONFIG, LATENT, Captions, DoubleBlock, Network, SingleBlock, sample
from safetensors.torch import save_file
from scenes import SIZE, VOCABULARY, Scenes, caption_text, scenes
from stage import Run, Stage, write_whole
from tonfa.models.taesd import Autoencoder
from torch import Tensor, nn
from torch.nn import functional as F

ENDING = 20  # seconds kept for the last save and count
FREEZE = 0.55  # the part of its time after which the autoencoder's encoder is left alone
CHECK_SEED = 77_000_000  # of scenes that no stage trains on (up to chance)


@dataclass(frozen=True)
class Sizes:
    """Scenes a step, the pool of latents, how much of it is drawn anew how often, batches to normalise by, and what the end counts."""

    autoencoder: int = 64
    flow: int = 1024
    classifier: int = 256
    pool: int = 131072
    fresh: int = 512
    fresh_every: int = 8
    checked: int = 2000
    chunk: int = 250
    shown: int = 64
    measured: int = 16
    steps: int = 20


TINY = Sizes(autoencoder=2, flow=8, classifier=8, pool=16, fresh=4, fresh_every=4, checked=8, chunk=4, shown=4, measured=2, steps=2)


def amp(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def batch_of(n: int, generator: torch.Generator) -> Scenes:
    made = scenes(n, generator)
    return Scenes(made.pictures.contiguous(memory_format=torch.channels_last), made.words, made.facts)


# -- autoencoder ------------------------------------------------------------------------------------------------------------------


def train_autoencoder(run: Run, sizes: Sizes, seconds: float) -> Stage:
    """L1 and squared error of the picture. Latents are pulled to mean 0 and deviation 1; the decoder gets used to a little noise in them.

    After a part of the time the rest of the way goes into the encoder's last convolution, the encoder is left alone, the decoder goes on.
    """
    stage = Stage(run, "autoencoder", Autoencoder().to(memory_format=torch.channels_last), 7e-4, seconds)
    model = stage.model
    if stage.notes.get("normalised"):
        model.taesd_encoder.requires_grad_(False)
    while stage.going():
        if stage.fraction >= FREEZE and not stage.notes.get("normalised"):
            normalise(stage, sizes)
        pictures = batch_of(sizes.autoencoder, stage.generator).pictures
        with amp(run.device):
            latents = model.encode(pictures).float()
            noise = 0.03 if stage.notes.get("normalised") else 0.08
            made = model.decode(latents + noise * torch.randn_like(latents)).float()
        loss = F.l1_loss(made, pictures) + 5 * F.mse_loss(made, pictures)
        if not stage.notes.get("normalised"):
            mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
            loss = loss + 0.05 * (mean.square() + (deviation - 1).square()).mean()
        stage.update(loss)
        if stage.minute():
            stage.save()
    if stage.done() and not stage.notes.get("normalised"):
        normalise(stage, sizes)
    stage.save()
    check_autoencoder(run, stage.average, sizes)
    return stage


@torch.no_grad()
def normalise(stage: Stage, sizes: Sizes) -> None:
    """Folds the latents' mean and deviation into the encoder's last convolution, and freezes the encoder."""
    model = stage.model
    model.load_state_dict(stage.average.state_dict())
    generator = stage.run.generator(CHECK_SEED + 1)
    latents = torch.cat([model.encode(batch_of(sizes.autoencoder, generator).pictures) for _ in range(sizes.measured)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3)).clamp(min=1e-4)
    last = model.taesd_encoder[-1]
    last.weight /= deviation[:, None, None, None]
    last.bias.copy_((last.bias - mean) / deviation)
    model.taesd_encoder.requires_grad_(False)
    stage.average.load_state_dict(model.state_dict())
    stage.notes["normalised"] = True
    stage.pause()


@torch.no_grad()
def check_autoencoder(run: Run, model: Autoencoder, sizes: Sizes) -> None:
    pictures = batch_of(min(sizes.chunk, 64), run.generator(CHECK_SEED)).pictures
    with amp(run.device):
        latents = model.encode(pictures).float()
        made = model.decode(latents).float().clamp(0, 1)
    psnr = -10 * torch.log10((made - pictures).square().mean((1, 2, 3)))
    deviation = latents.std((0, 2, 3))
    run.note(autoencoder_psnr=float(psnr.mean()), worst=float(psnr.min()), latent_mean=float(latents.mean()),
             latent_deviation_low=float(deviation.min()), latent_deviation_high=float(deviation.max()))  # fmt: skip


# -- flow -------------------------------------------------------------------------------------------------------------------------


class Pool:
    """Latents (bf16) and captions of many scenes on the device; `refresh` draws the oldest of them anew."""

    def __init__(self, run: Run, sizes: Sizes, autoencoder: Autoencoder, generator: torch.Generator):
        self.run, self.fresh, self.autoencoder, self.generator = run, sizes.fresh, autoencoder, generator
        self.latents = torch.empty(sizes.pool, CONFIG["in_channels"], LATENT, LATENT, dtype=torch.bfloat16, device=run.device)
        self.words = torch.empty(sizes.pool, 16, dtype=torch.int64, device=run.device)
        self.oldest = 0
        for _ in range(sizes.pool // sizes.fresh):
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        made = batch_of(self.fresh, self.generator)
        here = slice(self.oldest, self.oldest + self.fresh)
        with amp(self.run.device):
            self.latents[here] = self.autoencoder.encode(made.pictures).to(torch.bfloat16)
        self.words[here] = made.words
        self.oldest = (self.oldest + self.fresh) % self.latents.shape[0]

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """(latents fp32 [n, 16, 16, 16], words [n, 16])."""
        which = torch.randint(self.latents.shape[0], (n,), generator=self.generator, device=self.run.device)
        return self.latents[which].float(), self.words[which]


def flow_loss(model: nn.ModuleDict, latents: Tensor, words: Tensor, generator: torch.Generator) -> Tensor:
    """Rectified flow (arXiv 2209.03003): the mean squared error of the velocity noise - latent at logit-normal times (arXiv 2403.03206)."""
    t = torch.randn(latents.shape[0], generator=generator, device=latents.device).sigmoid()
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    x = torch.lerp(latents, noise, t[:, None, None, None])
    with amp(latents.device):
        velocity = model["flux"](x, t, *model["captions"](words))
    return F.mse_loss(velocity.float(), noise - latents)


def train_flow(run: Run, sizes: Sizes, seconds: float, autoencoder: Autoencoder) -> Stage:
    stage = Stage(run, "flow", nn.ModuleDict({"flux": Network(), "captions": Captions()}), 1e-3, seconds)
    if stage.done():
        return stage
    started = time.perf_counter()
    pool = Pool(run, sizes, autoencoder, stage.generator)
    compile_blocks(stage.model, *pool.draw(sizes.flow), stage.generator)
    run.note(pool_and_compilation=round(time.perf_counter() - started, 1))
    while stage.going():
        if stage.step % sizes.fresh_every == 0:
            pool.refresh()
        stage.update(flow_loss(stage.model, *pool.draw(sizes.flow), stage.generator))
        if stage.minute():
            save_flow(run, sizes, stage, autoencoder)
    save_flow(run, sizes, stage, autoencoder)
    return stage


def compile_blocks(model: nn.ModuleDict, latents: Tensor, words: Tensor, generator: torch.Generator) -> None:
    """Compiles the blocks on a GPU where that works; says so where not, and leaves them as they are."""
    if latents.device.type != "cuda":
        return
    blocks = [m for m in model.modules() if isinstance(m, DoubleBlock | SingleBlock)]
    try:
        for block in blocks:
            block.compile(dynamic=False)
        flow_loss(model, latents, words, generator).backward()
        torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler raises, training goes on without it
        print(f"torch.compile does not work here ({type(error).__name__}: {str(error).splitlines()[:1]}): going on without it", flush=True)
        for block in blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
    model.zero_grad(set_to_none=True)


def save_flow(run: Run, sizes: Sizes, stage: Stage, autoencoder: Autoencoder) -> None:
    """The files to ship, a picture of samples, the loss on scenes kept apart, and the state."""
    average = stage.average
    generator = run.generator(CHECK_SEED + 2)
    with torch.no_grad():
        kept = batch_of(sizes.shown, generator)
        with amp(run.device):
            latents = autoencoder.encode(kept.pictures).float()
        loss = float(sum(flow_loss(average, latents, kept.words, generator) for _ in range(8)) / 8)
    run.note(flow_loss_on_others=loss, seconds=round(stage.spent, 1), steps=stage.step)
    flux = {k: v.to(torch.bfloat16).contiguous() for k, v in average["flux"].state_dict().items()}
    write_tensors(run.out / "flux.safetensors", flux, {"config": json.dumps(CONFIG)})
    captions = {k: v.contiguous() for k, v in average["captions"].state_dict().items()}
    write_tensors(run.out / "captions.safetensors", captions, {"vocabulary": json.dumps(VOCABULARY)})
    draw_samples(run.out / "samples.png", pictures_of(run, sizes, average, autoencoder, kept.words, 1), kept.words)
    stage.save()


@torch.no_grad()
def pictures_of(run: Run, sizes: Sizes, flow: nn.ModuleDict, autoencoder: Autoencoder, words: Tensor, seed: int) -> Tensor:
    """Sampled pictures fp32 [n, 3, 128, 128]."""
    generator, made = run.generator(seed), []
    for part in words.split(sizes.chunk):
        with amp(run.device):
            context, pooled = flow["captions"](part)
            latents = sample(flow["flux"], context, pooled, generator, sizes.steps)
            made.append(autoencoder.decode(latents).float().clamp(0, 1))
    return torch.cat(made)


# -- classifier -------------------------------------------------------------------------------------------------------------------


def train_classifier(run: Run, sizes: Sizes, seconds: float, autoencoder: Autoencoder) -> Stage:
    """On scenes as drawn and, every other step, as the autoencoder gives them back."""
    stage = Stage(run, "classifier", Classifier(), 2e-3, seconds)
    while stage.going():
        made = batch_of(sizes.classifier, stage.generator)
        pictures = made.pictures
        with amp(run.device):
            if stage.step % 2:
                with torch.no_grad():
                    latents = autoencoder.encode(pictures)
                    pictures = autoencoder.decode(latents + 0.1 * torch.randn_like(latents)).float().clamp(0, 1)
            outputs = stage.model(pictures)
        stage.update(classifier_loss(outputs, made.facts))
        if stage.minute():
            stage.save()
    stage.save()
    write_tensors(run.out / "classifier.safetensors", stage.average.state_dict())
    return stage


@torch.no_grad()
def count_right(run: Run, sizes: Sizes, classifier: Classifier, flow: nn.ModuleDict, autoencoder: Autoencoder) -> None:
    """How many scenes the classifier reads as they are, and how many sampled pictures show what the caption says."""
    generator = run.generator(CHECK_SEED + 3)
    found: dict[str, list[Tensor]] = {}
    for start in range(0, sizes.checked, sizes.chunk):
        made = batch_of(min(sizes.chunk, sizes.checked - start), generator)
        for name, ok in right(classifier, made.pictures, made.facts).items():
            found.setdefault(f"scenes_{name}", []).append(ok)
        sampled = pictures_of(run, sizes, flow, autoencoder, made.words, 1000 + start)
        for name, ok in right(classifier, sampled, made.facts).items():
            found.setdefault(f"sampled_{name}", []).append(ok)
    run.note(**{name: float(torch.cat(oks).float().mean()) for name, oks in found.items()}, of=sizes.checked)


# -- files ------------------------------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    held = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_whole(path, lambda part: save_file(held, part, metadata={"format": "pt", **(metadata or {})}))


def write_autoencoder(path: Path, model: Autoencoder) -> None:
    """fp16, but for the host's two numbers."""
    state = model.state_dict()
    write_tensors(path, {k: v if k.startswith("vae_") else v.half() for k, v in state.items()})


def draw_samples(path: Path, pictures: Tensor, words: Tensor, columns: int = 8) -> None:
    """A sheet of pictures, each with its caption below."""
    import textwrap

    from PIL import Image, ImageDraw

    width, label = SIZE + 32, 46
    rows = -(-pictures.shape[0] // columns)
    sheet = Image.new("RGB", (columns * (width + 8) + 8, rows * (width + label) + 8), "white")
    text = ImageDraw.Draw(sheet)
    for i, (picture, ids) in enumerate(zip(pictures, words, strict=True)):
        left, top = 8 + i % columns * (width + 8), 8 + i // columns * (width + label)
        values = (picture.cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        sheet.paste(Image.fromarray(values).resize((width, width), Image.Resampling.BICUBIC), (left, top))
        for row, line in enumerate(textwrap.wrap(caption_text(ids), 27)[:4]):
            text.text((left, top + width + 1 + 10 * row), line, fill="black")
    write_whole(path, lambda part: sheet.save(part, format="PNG"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Trains the miniature FLUX.", epilog=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--state", type=Path, metavar="FOLDER", help="where states to go on from are kept (default: OUT/state)")
    parser.add_argument("--minutes", type=float, default=9.0, help="how long this call may take (default 9)")
    parser.add_argument("--seconds", type=float, nargs=3, default=(130, 270, 30), metavar=("AUTOENCODER", "FLOW", "CLASSIFIER"))
    parser.add_argument("--resume", action="store_true", help="go on from the saved states")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="a tiny form, without a GPU")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        print("training needs a GPU, and torch finds none (--cpu tries it out in a tiny form)", file=sys.stderr)
        return 2
    began = time.perf_counter()
    sizes = TINY if options.cpu else Sizes()
    state = options.state or options.out / "state"
    if not options.resume and any(state.glob("*.pt")):
        print(f"{state} holds a training that has begun: go on with --resume, or remove it", file=sys.stderr)
        return 2
    for folder in (options.out, state):
        folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if options.cpu else "cuda")
    run = Run(device, options.out, state, began + options.minutes * 60 - (0 if options.cpu else ENDING), options.seed)
    if options.resume and (run.out / "log.json").exists():
        run.log = json.loads((run.out / "log.json").read_text(encoding="utf-8"))
    torch.manual_seed(options.seed + len(run.log))
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    run.note(device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu", torch=torch.__version__)
    return 0 if train(run, sizes, options.seconds) else 3


def train(run: Run, sizes: Sizes, seconds: tuple[float, float, float]) -> bool:
    """All stages, as far as the time goes. Whether they are done."""
    first = train_autoencoder(run, sizes, seconds[0])
    autoencoder = first.average
    write_autoencoder(run.out / "autoencoder.safetensors", autoencoder)
    last = None
    if first.done():
        flow = train_flow(run, sizes, seconds[1], autoencoder)
        if flow.done():
            last = train_classifier(run, sizes, seconds[2], autoencoder)
    if last is None or not last.done():
        print("The time is up: the same command with --resume goes on.", flush=True)
        return False
    count_right(run, sizes, last.average, flow.average, autoencoder)
    return True


if __name__ == "__main__":
    raise SystemExit(main())
