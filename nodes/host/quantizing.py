"""The quantising node inside the host: calibration by its own sampler, progress and cancel, and the file among its models."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.utils
import folder_paths
import torch
from tqdm import tqdm

from ...models.calibrate import LINEAR, Collector, StatisticsFile, save_statistics
from ...models.formats.flux_names import host_linears
from ...models.formats.output import check_place
from ...models.formats.writer import dims_of
from ...models.quantize_flux import Options, quantize_flux
from ...models.quantize_report import Report
from ...models.quantize_work import Work
from .dense_model import DenseModel, absorb, open_model

log = logging.getLogger(__name__)

ROWS = 512  # of each layer's inputs that are kept
FOLDER = "diffusion_models"
FEW = 8  # prompts, below which calibration fits what is special about them


@dataclass(frozen=True)
class Sampling:
    """How calibration samples: Euler, `simple` schedule, no CFG. width and height in pixels."""

    steps: int = 8
    width: int = 1024
    height: int = 1024
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1 or min(self.width, self.height) < 16:
            raise ValueError(f"steps is {self.steps}, the size {self.width} x {self.height}: expected a step, and 16 pixels, at least.")


def quantize_model(patcher: comfy.model_patcher.ModelPatcher, name: str, options: Options, conditioning: list | None,
                   sampling: Sampling) -> Report | None:  # fmt: skip
    """Writes models/diffusion_models/`name`, a 4-bit checkpoint of a MODEL. None where this very job has written it before.

    conditioning: the host's; each of its entries is sampled as a prompt of its own. Needed in mode "calibrated", not looked at otherwise.
    An interrupted call goes on where it was when it is made again, also in another session. ValueError for a MODEL or conditioning that
    cannot be, FileExistsError where the name is another file's, CheckpointError where the file cannot be written.
    """
    source = open_model(patcher)
    calibrated = options.mode == "calibrated"
    prompts = checked_prompts(conditioning, source.config) if calibrated else []
    path = target(name)
    check_place([], path)
    identity = {"model": source.fingerprint()}
    if calibrated:
        identity |= {"sampling": asdict(sampling) | {"rows": ROWS}, "prompts": prompts_digest(prompts)}
    words = f"{source.path} (job {job_digest(identity, options)})"
    if path.exists():
        if made_by(path, words):
            log.info("%s is there already, of the same model and settings: it is loaded.", path)
            return None
        raise FileExistsError(f"{path} is there already, of another model or other settings, and is not written over. Choose another "
                              "filename, or delete that file first.")  # fmt: skip
    source = replace(source, path=words)  # which is what the report will say
    device = patcher.load_device if patcher.load_device.type == "cuda" else torch.device("cpu")  # other back ends lack types
    with contextlib.ExitStack() as stack:
        statistics = None
        if calibrated:
            statistics = calibrated_statistics(source, path, identity, options, prompts, sampling)
            stack.callback(statistics.close)
        comfy.model_management.unload_all_models()  # the device is needed, and weights are read from where they wait
        comfy.model_management.soft_empty_cache()
        show = stack.enter_context(Progress("Quantising layers"))
        return quantize_flux(source, path, options, statistics, device, show, identity)


# -- the file ---------------------------------------------------------------------------------------------------------------------------


def target(name: str) -> Path:
    """Where a file of that name goes: the host's first diffusion_models folder that has this name, else its last."""
    folders = folder_paths.get_folder_paths(FOLDER)
    folder = next((f for f in folders if os.path.basename(os.path.normpath(f)) == FOLDER), folders[-1])
    os.makedirs(folder, exist_ok=True)
    return Path(folder) / name


def job_digest(identity: dict, options: Options) -> str:
    """Sixteen digits that tell one job from another."""
    text = json.dumps({"identity": identity, "options": options.as_json()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def made_by(path: Path, source: str) -> bool:
    """Whether a file's report says that it was made from `source`, in this size."""
    try:
        facts = json.loads(path.with_name(f"{path.stem}.report.json").read_text(encoding="utf-8"))
        return facts["source"] == source and facts["bytes"] == path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return False


# -- calibration ------------------------------------------------------------------------------------------------------------------------


def checked_prompts(conditioning: list | None, config: dict) -> list:
    """The entries of a CONDITIONING. ValueError where there are none, or they are not FLUX's."""
    if not conditioning:
        raise ValueError(
            "mode is calibrated, but nothing is connected to conditioning. Connect prompts (several through Conditioning (Combine), "
            "a dozen or more is good), or choose data-free."
        )
    for context, extra in conditioning:
        pooled = extra.get("pooled_output")
        found = [context.shape[-1], None if pooled is None else pooled.shape[-1]]
        if found != [config["context_in_dim"], config["vec_in_dim"]]:
            raise ValueError(
                f"The conditioning has {found[0]} channels, and {found[1] or 'no'} pooled ones; this model takes "
                f"{config['context_in_dim']} and {config['vec_in_dim']}. Encode the prompts with FLUX's text encoders (DualCLIPLoader, "
                "type flux)."
            )
    if sum(len(context) for context, _ in conditioning) < FEW:
        log.warning(
            "Calibrating with fewer than %d prompts: layers are fitted to what is special about them, and data-free is often better. "
            "Connect a dozen different ones.", FEW,
        )  # fmt: skip
    return conditioning


def prompts_digest(prompts: list) -> str:
    digest = hashlib.sha256()
    absorb(digest, prompts)
    return digest.hexdigest()


def calibrated_statistics(source: DenseModel, path: Path, identity: dict, options: Options, prompts: list,
                          sampling: Sampling) -> StatisticsFile:  # fmt: skip
    """What the linears see, from the work folder where it waits there, else from sampling."""
    work = Work(path, {"identity": identity, "options": options.as_json()})
    work.open()
    kept = work.path("calibration.kept")
    if not kept.exists():
        save_statistics(kept, sampled(source, prompts, sampling))
    return StatisticsFile(kept)


def sampled(source: DenseModel, prompts: list, sampling: Sampling) -> Collector:
    """A picture for every prompt, by the host's sampler. ValueError where layers did not run."""
    patcher = source.patcher
    collector = Collector(patcher.model.diffusion_model, ROWS, sampling.seed)
    total = len(prompts) * sampling.steps
    with collector, Progress("Calibrating, steps") as show:
        for i, prompt in enumerate(prompts):
            show(i * sampling.steps, total)
            batch = prompt[0].shape[0]
            latent = torch.zeros(batch, source.config["out_channels"], sampling.height // 8, sampling.width // 8)
            latent = comfy.sample.fix_empty_latent_channels(patcher, latent)
            noise = comfy.sample.prepare_noise(latent, sampling.seed + i)

            def stepped(step: int, *_: object, before: int = i * sampling.steps) -> None:
                show(before + step + 1, total)

            comfy.sample.sample(
                patcher, noise, sampling.steps, 1.0, "euler", "simple", [prompt], [prompt], latent, denoise=1.0, disable_pbar=True,
                callback=stepped, seed=sampling.seed + i,
            )  # fmt: skip
    wanted = {linear.name for linear in host_linears(dims_of(source.config)) if LINEAR.fullmatch(linear.name)}
    if unseen := sorted(wanted - set(collector.names)):
        raise ValueError(
            f"{len(unseen)} layers did not run while sampling ({unseen[0]} and so on): another node skips or replaces them, or runs the "
            "model in its own way (torch.compile). Connect the MODEL without it."
        )
    return collector


# -- progress ---------------------------------------------------------------------------------------------------------------------------


class Progress:
    """`with Progress(what) as show: show(done, total)`: the node's bar, the remaining time under it and on the console; lets a cancel
    through."""

    def __init__(self, what: str):
        self.what = what
        self.bar: comfy.utils.ProgressBar | None = None
        self.console: tqdm | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.console is not None:
            self.console.close()

    def __call__(self, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.console is None:
            self.bar, self.console = comfy.utils.ProgressBar(total), tqdm(total=total, desc=self.what)
        self.console.update(done - self.console.n)
        self.bar.update_absolute(done, total)
        rate = self.console.format_dict["rate"]
        remaining = f", {tqdm.format_interval((total - done) / rate)} left" if rate else ""
        tell(f"{self.what}: {done} of {total}{remaining}")


def tell(text: str) -> None:
    """A line of text under the node that runs, where there is a server with browsers."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    utils = sys.modules.get("comfy_execution.utils")
    context = utils.get_executing_context() if utils is not None else None
    if server is not None and context is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, context.node_id)
