"""The miniature: a FLUX of 11 million parameters that draws simple scenes from captions, with its words and its autoencoder.

Trained by miniature/train.py; the files lie in that folder. Its captions are sums of learned vectors: one per word and one per place in the
caption make the context, the words' mean another one the pooled vector. Rectified flow: x_t = (1 - t) latent + t noise, t from 1 to 0.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .comfyui import PACK
from .flux import Flux
from .formats.tensorfile import CheckpointError
from .taesd import CHANNELS, DOWNSCALE, Autoencoder, load_autoencoder

FOLDER = PACK / "miniature"
FLUX, AUTOENCODER, CAPTIONS = "flux.safetensors", "autoencoder.safetensors", "captions.safetensors"
SIZE, STEPS, BATCH = 128, 20, 64
FILLERS = frozenset(
    ["a", "an", "the", "at", "in", "is", "it", "with", "background", "digit", "number", "coloured", "colored", "corner", "side"]
)  # say nothing new
SPELLINGS = {"center": "centre", "middle": "centre", "gray": "grey", "under": "below", "over": "above"}


@dataclass(frozen=True)
class Captions:
    """What captions are made of: the words [W, C], the places in a caption [L, C], and the pooled vector's words [W, V], fp32."""

    vocabulary: tuple[str, ...]
    words: Tensor
    places: Tensor
    pooled: Tensor

    def word_ids(self, caption: str) -> list[int]:
        """Ids of a caption's words, those that say nothing left out. ValueError names unknown words, and says when there are too many."""
        said = re.findall(r"\w+", caption.lower())
        words = [SPELLINGS.get(w, w) for w in said if w not in FILLERS]
        known = {word: i for i, word in enumerate(self.vocabulary) if word}
        if unknown := [w for w in words if w not in known]:
            raise ValueError(f"The miniature does not know {', '.join(map(repr, unknown))}. Its words are: {', '.join(known)}.")
        if not 1 <= len(words) <= self.places.shape[0]:
            raise ValueError(f"The caption {caption!r} has {len(words)} words that count, expected 1 to {self.places.shape[0]}.")
        return [known[w] for w in words]

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(context fp32 [B, L, C], pooled fp32 [B, V]) for a FLUX. ValueError as `word_ids`."""
        ids = torch.zeros(len(captions), self.places.shape[0], dtype=torch.int64)
        for row, caption in zip(ids, captions, strict=True):
            found = self.word_ids(caption)
            row[: len(found)] = torch.tensor(found)
        ids = ids.to(self.words.device)
        return self.words[ids] + self.places, self.pooled[ids].mean(1)


@dataclass(frozen=True)
class Miniature:
    """Everything but the FLUX itself: that is `flux` in 16 bits (models/dense_flux.py), or a 4-bit checkpoint made of it."""

    flux: Path
    captions: Captions
    autoencoder: Autoencoder

    @property
    def device(self) -> torch.device:
        return self.captions.words.device

    @torch.inference_mode()
    def latents(
        self, model: Flux, captions: Sequence[str], seeds: Sequence[int], steps: int = STEPS, compute: str = "auto", size: int = SIZE
    ) -> Tensor:
        """FLUX's latents fp32 [B, 16, size / 8, size / 8] by Euler steps of equal size, as ComfyUI's `euler` with `simple` takes them.

        A picture depends on its own seed alone. compute: as the loader's. ValueError for words that are not known.
        """
        context, pooled = self.captions.encode(captions)
        side, options = size // DOWNSCALE, {"tonfa": {"compute": compute}}
        noise = [torch.randn(CHANNELS, side, side, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        x = torch.stack(noise).to(self.device)
        for i in range(steps):
            sigma = torch.full((x.shape[0],), 1 - i / steps, device=x.device)
            x = x - model(x.to(model.dtype), sigma, context, pooled, transformer_options=options).float() / steps
        return x

    @torch.inference_mode()
    def pictures(self, latents: Tensor) -> Tensor:
        """fp32 [B, 3, H, W] in 0..1 of FLUX's latents."""
        dtype = self.autoencoder.taesd_decoder[1].weight.dtype
        return torch.cat([self.autoencoder.decode(part.to(dtype)).float().clamp(0, 1) for part in latents.split(BATCH)])

    def sample(self, model: Flux, captions: Sequence[str], seed: int = 0, steps: int = STEPS, compute: str = "auto") -> Tensor:
        """Pictures fp32 [B, 3, 128, 128] in 0..1, the first from `seed`, the next from seed + 1. Parameters and errors as `latents`."""
        made = []
        for start in range(0, len(captions), BATCH):
            part = captions[start : start + BATCH]
            made.append(self.pictures(self.latents(model, part, range(seed + start, seed + start + len(part)), steps, compute)))
        return torch.cat(made)


def load_miniature(folder: str | os.PathLike = FOLDER, device: torch.device | str = "cpu") -> Miniature:
    """The miniature in a folder. CheckpointError when a file is missing or is none of its."""
    folder = Path(folder)
    for name in (FLUX, AUTOENCODER, CAPTIONS):
        if not (folder / name).is_file():
            raise CheckpointError(f"There is no {name} in {folder}: clone the pack as a whole, or train it with miniature/train.py.")
    return Miniature(folder / FLUX, load_captions(folder / CAPTIONS, device), load_autoencoder(folder / AUTOENCODER, device))


def load_captions(path: str | os.PathLike, device: torch.device | str = "cpu") -> Captions:
    """The tables of a captions file. CheckpointError when it is none."""
    try:
        with safe_open(path, "pt") as file:
            vocabulary = tuple(json.loads((file.metadata() or {})["vocabulary"]))
            tables = {name: file.get_tensor(name).to(device, torch.float32) for name in ("words", "places", "pooled")}
    except Exception as error:  # safetensors raises its own, JSON others
        raise CheckpointError(f"{path} is no captions file of the miniature ({error}). Download it again.") from error
    if not len(vocabulary) == tables["words"].shape[0] == tables["pooled"].shape[0]:
        raise CheckpointError(f"{path} names {len(vocabulary)} words and has {tables['words'].shape[0]} vectors. Download it again.")
    return Captions(vocabulary, **tables)
