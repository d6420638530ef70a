"""What every linear of a FLUX gets to see: statistics of its inputs, gathered while pictures are sampled.

`Collector` watches any network with the host's names. `calibrate` samples without a host: all prompts go through a block before the next is
read, so that one block's weights are on the device. FLUX.1 in bf16: a double block 680 MB, a single one 283 MB; 16 pictures of 1024 x 1024
in between 453 MB a tensor, two of them alive; one picture inside a block about 1 GB. A card of 8 GB will do.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .dense_flux import DenseFlux, assemble, load_block
from .formats.tensorfile import TORCH_NAMES, CheckpointError, Slot, TensorFile, stream_save
from .svdquant import InputStatistics

log = logging.getLogger(__name__)

LINEAR = re.compile(r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12]")
PROMPTS, TOKENS = 16, 256  # of what is drawn where no prompts are given
GUIDANCE = 3.5
HOW_TO = (
    "A calibration file is a .safetensors file of the tensors context [prompts, tokens, channels] (T5's output) and pooled [prompts, "
    "channels] (CLIP's), as the CONDITIONING of ComfyUI's CLIPTextEncode holds them, and perhaps guidance [prompts]."
)


class StreamedBlock(nn.Module):
    """A block that is loaded when it is called and let go of afterwards. Pictures of a batch pass through it one by one.

    load: makes the block. loaded: told of it before it computes.
    """

    def __init__(self, load: Callable[[], nn.Module]):
        super().__init__()
        self.load = load
        self.loaded: Callable[[nn.Module], None] | None = None

    def forward(self, x: Tensor | None = None, *, img: Tensor | None = None, txt: Tensor | None = None, vec: Tensor, pe: Tensor,
                transformer_options: dict | None = None) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """As the blocks of models/flux.py. What goes in is written over."""
        block = self.load()
        if self.loaded is not None:
            self.loaded(block)
        for i in range(vec.shape[0]):
            one = slice(i, i + 1)
            shared = {"vec": vec[one], "pe": pe[one] if pe.shape[0] > 1 else pe, "transformer_options": transformer_options}
            if x is None:
                img[one], txt[one] = block(img=img[one], txt=txt[one], **shared)
            else:
                x[one] = block(x[one], **shared)
        return (img, txt) if x is None else x


@dataclass
class _Seen:
    """Of one linear. amax [K] fp32 and squares (their sum) [K] fp64 on the inputs' device; sample [S, K] on the CPU, a random key a row."""

    amax: Tensor
    squares: Tensor
    sample: Tensor
    keys: Tensor
    draw: torch.Generator
    count: int = 0


class Collector:
    """Gathers the inputs of every linear of a network while it is the context: `with Collector(network) as seen: network(...)`.

    network   modules named as the host's: its own FLUX, models/flux.py's Flux, or one of StreamedBlocks
    rows      how many input rows to keep of each linear: uniformly, over all calls together (each row gets a random number, the rows of
              the smallest numbers stay: Vitter's reservoir in one piece)
    The same seed and the same calls give the same sample.
    """

    def __init__(self, network: nn.Module, rows: int = 512, seed: int = 0):
        self.network, self.rows, self.seed = network, rows, seed
        self._seen: dict[str, _Seen] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Collector:
        for name, module in self.network.named_modules():
            if isinstance(module, StreamedBlock):
                module.loaded = partial(self._watch, prefix=f"{name}.")
        self._watch(self.network, "", self._handles)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self.network.modules():
            if isinstance(module, StreamedBlock):
                module.loaded = None

    @property
    def names(self) -> list[str]:
        """The linears whose inputs were seen."""
        return list(self._seen)

    def statistics(self, name: str) -> InputStatistics:
        """Of the inputs of a linear, on the CPU. KeyError when none were seen; ValueError when they were not finite."""
        s = self._seen[name]
        amax, square = s.amax.cpu(), (s.squares / s.count).float().cpu()
        if not torch.isfinite(square).all():
            raise ValueError(f"the inputs of {name} are not finite: compute in bfloat16 or float32, and look at the model's pictures.")
        taken = torch.isfinite(s.keys)  # all of them, unless there were fewer rows
        return InputStatistics(amax, square, s.sample if taken.all() else s.sample[taken], s.count)

    def _watch(self, module: nn.Module, prefix: str = "", handles: list | None = None) -> None:
        for name, inner in module.named_modules(prefix=prefix.removesuffix(".")):
            if LINEAR.fullmatch(name):
                handle = inner.register_forward_pre_hook(partial(self._see, name))
                if handles is not None:
                    handles.append(handle)

    def _see(self, name: str, module: nn.Module, inputs: tuple) -> None:
        with torch.inference_mode(False), torch.no_grad():
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            if not len(x):
                return
            s = self._seen.get(name) or self._begin(name, x)
            s.amax = torch.maximum(s.amax, torch.linalg.vector_norm(x, math.inf, dim=0, dtype=torch.float32).to(s.amax.device))
            s.squares = s.squares + torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).double().square().to(s.squares.device)
            self._keep(s, x)
            s.count += len(x)

    def _begin(self, name: str, x: Tensor) -> _Seen:
        k = x.shape[1]
        draw = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
        sample = torch.empty(self.rows, k, dtype=x.dtype)
        keys = torch.full((self.rows,), math.inf, dtype=torch.float64)
        zeros = torch.zeros(k, device=x.device)
        self._seen[name] = _Seen(zeros, zeros.double(), sample, keys, draw)
        return self._seen[name]

    def _keep(self, s: _Seen, x: Tensor) -> None:
        """Puts the rows of x that stay in the places of those that go."""
        if not self.rows:
            return
        keys = torch.rand(len(x), generator=s.draw, dtype=torch.float64)
        new = torch.nonzero(keys < s.keys.max()).flatten()
        if not len(new):
            return
        ranked = torch.cat((s.keys, keys[new])).argsort(stable=True)
        goes, comes = ranked[self.rows :], ranked[: self.rows]
        goes, comes = goes[goes < self.rows], comes[comes >= self.rows] - self.rows
        s.sample[goes] = x[new[comes].to(x.device)].to("cpu", s.sample.dtype)
        s.keys[goes] = keys[new[comes]]


# ---- statistics on disk -------------------------------------------------------------------------------------------------------------


def save_statistics(path: str | os.PathLike, collector: Collector) -> None:
    """Writes what was gathered as a .safetensors file, for StatisticsFile. FLUX.1 with 512 rows: 1.6 GB."""
    slots, counts = [], {}
    for name in collector.names:
        s = collector.statistics(name)
        counts[name] = s.count
        sample = s.sample if s.sample.dtype in TORCH_NAMES else s.sample.float()
        for key, t in (("amax", s.amax), ("square", s.square), ("sample", sample)):
            slots.append(Slot(f"{name}.{key}", t.dtype, tuple(t.shape), lambda t=t: t))
    stream_save(path, slots, {"counts": json.dumps(counts)})


class StatisticsFile:
    """The statistics in a file that save_statistics wrote, read one linear at a time."""

    def __init__(self, path: str | os.PathLike):
        self.file = TensorFile(path)
        self.counts: dict[str, int] = json.loads(self.file.metadata["counts"])

    def __call__(self, name: str) -> InputStatistics:
        """KeyError for a linear that is not there."""
        count = self.counts[name]
        return InputStatistics(*(self.file.load(f"{name}.{key}").clone() for key in ("amax", "square", "sample")), count)

    def close(self) -> None:
        self.file.close()


# ---- sampling -----------------------------------------------------------------------------------------------------------------------


@dataclass
class Conditioning:
    """What pictures are sampled for: context [P, L, context_in_dim], pooled [P, vec_in_dim], guidance [P].

    beside [P, C, h, w]: for models with more input than output channels (Fill, Canny, Depth), what is joined to the latent.
    """

    context: Tensor
    pooled: Tensor
    guidance: Tensor
    beside: Tensor | None = None


def read_conditioning(path: str | os.PathLike, config: dict) -> Conditioning:
    """The conditioning in a calibration file. CheckpointError says what is missing or does not fit the model."""
    file = TensorFile(path)
    with contextlib.closing(file):
        found = {key: file.load(key).float() for key in ("context", "pooled", "guidance", "beside") if key in file.entries}
    if missing := [key for key in ("context", "pooled") if key not in found]:
        raise CheckpointError(f"{path} has no tensor {missing[0]}. {HOW_TO}")
    context, pooled = found["context"], found["pooled"]
    prompts = len(context)
    guidance = found.get("guidance", torch.full((prompts,), GUIDANCE)).flatten()
    if context.ndim != 3 or context.shape[2] != config["context_in_dim"] or not prompts:
        raise CheckpointError(f"{path}: context is {list(context.shape)}, expected [prompts, tokens, {config['context_in_dim']}]. {HOW_TO}")
    if tuple(pooled.shape) != (prompts, config["vec_in_dim"]) or tuple(guidance.shape) != (prompts,):
        raise CheckpointError(f"{path}: pooled is {list(pooled.shape)}, guidance {list(guidance.shape)}, expected "
                              f"[{prompts}, {config['vec_in_dim']}] and [{prompts}]. {HOW_TO}")  # fmt: skip
    if not all(torch.isfinite(t).all() for t in found.values()):
        raise CheckpointError(f"{path} holds NaN or infinite values. {HOW_TO}")
    beside, more = found.get("beside"), config["in_channels"] - config["out_channels"]
    if more and (beside is None or beside.ndim != 4 or tuple(beside.shape[:2]) != (prompts, more)):
        raise CheckpointError(
            f"This model takes {more} channels beside the latent: {path} needs a tensor beside [{prompts}, {more}, height / 8, width / 8]."
        )
    return Conditioning(context, pooled, guidance, beside if more else None)


def drawn_conditioning(config: dict, prompts: int = PROMPTS, seed: int = 0) -> Conditioning:
    """Prompts of nobody: tokens that share a direction a prompt and differ from each other. Their scale (0.15 a channel, 1 a channel of the
    pooled vector) is about that of T5's and CLIP's outputs. They show the network's outlier channels; real prompts are better.

    CheckpointError for a model that needs more than a prompt.
    """
    if config["in_channels"] != config["out_channels"]:
        raise CheckpointError("This model takes an image beside the prompt, which cannot be drawn at random: calibrate it with a file, or "
                              f"quantise it data-free. {HOW_TO}")  # fmt: skip
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    context = 0.7 * randn(prompts, 1, config["context_in_dim"]) + 0.7 * randn(prompts, TOKENS, config["context_in_dim"])
    return Conditioning(0.15 * context, randn(prompts, config["vec_in_dim"]), torch.full((prompts,), GUIDANCE))


def sigmas(steps: int, tokens: int, shifted: bool) -> list[float]:
    """Noise levels 1 .. 0. Shifted as FLUX.1-dev is: s e^m / (1 + (e^m - 1) s), m from 0.5 at 256 image tokens to 1.15 at 4096."""
    e = math.exp(0.5 + 0.65 * (tokens - 256) / 3840) if shifted else 1.0
    return [e * s / (1 + (e - 1) * s) for s in (1 - i / steps for i in range(steps + 1))]


def check_sampling(steps: int, pixels: int) -> None:
    """Raises ValueError for steps and pixels that cannot be."""
    if steps < 1 or pixels < 16 or pixels % 16:
        raise ValueError(f"steps is {steps}, pixels {pixels}: expected at least one step, and a multiple of 16 pixels")


def calibrate(source: DenseFlux, conditioning: Conditioning, steps: int = 8, device: str | torch.device = "cpu", *, pixels: int = 1024,
              dtype: torch.dtype = torch.bfloat16, rows: int = 512, seed: int = 0,
              progress: Callable[[int, int], None] | None = None) -> Collector:  # fmt: skip
    """Samples a picture of pixels x pixels for every prompt and gathers what the linears see.

    source: anything with config, model_class, linear() and tensor(). progress(done, total) counts blocks of all steps; what it raises
    ends the sampling. ValueError when steps or pixels cannot be.
    """
    check_sampling(steps, pixels)
    done, total = 0, steps * (source.config["depth"] + source.config["depth_single_blocks"])

    def load(name: str) -> nn.Module:
        nonlocal done
        if progress is not None:
            progress(done, total)
        done += 1
        return load_block(source, name, dtype, device)

    network = assemble(source, dtype, device, lambda name: StreamedBlock(partial(load, name)))
    collector = Collector(network, rows, seed)
    with torch.no_grad(), collector:
        _sample(network, conditioning, steps, device, pixels, source.model_class != "FluxSchnell", seed)
    if progress is not None:
        progress(total, total)
    return collector


def _sample(network: nn.Module, c: Conditioning, steps: int, device: str | torch.device, pixels: int, shifted: bool, seed: int) -> Tensor:
    """The latents [P, C, h, w] after all steps of x <- x + (next sigma - sigma) * velocity, from noise on."""
    height, width = (pixels // 8, pixels // 8) if c.beside is None else c.beside.shape[2:]
    prompts, channels = len(c.context), network.config["out_channels"]
    x = torch.randn(prompts, channels, height, width, generator=torch.Generator().manual_seed(seed)).to(device)
    context, pooled, guidance = (t.to(device, torch.float32) for t in (c.context, c.pooled, c.guidance))
    beside = None if c.beside is None else c.beside.to(device)
    levels = sigmas(steps, height * width // 4, shifted)
    for level, following in zip(levels, levels[1:], strict=False):
        entry = x if beside is None else torch.cat((x, beside), 1)
        velocity = network(entry, torch.full((prompts,), level, device=device), context, pooled, guidance)
        x = x + (following - level) * velocity
    return x
