"""A tiny autoencoder in the layout and with the key names of TAESD (github.com/madebyollin/taesd): 16 latent channels, one eighth the size.

ComfyUI's VAE loader reads such a file. Latents here are those that FLUX computes with (its latent format applied, about unit variance);
`vae_scale` and `vae_shift` in the file tell the host how to get them from its own: (latent - shift) * scale.
"""

from __future__ import annotations

import os

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .formats.tensorfile import CheckpointError

CHANNELS, WIDTH, DOWNSCALE = 16, 64, 8
SCALE, SHIFT = 0.3611, 0.1159  # of FLUX's latent format
LIMIT = 3.0  # the decoder's soft clamp


class SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / LIMIT) * LIMIT


class Residual(nn.Module):
    """Three convolutions beside an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def _conv(in_channels: int = WIDTH, out_channels: int = WIDTH, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=bias)


def _encoder() -> nn.Sequential:
    levels = [m for _ in range(3) for m in (_conv(stride=2, bias=False), *(Residual() for _ in range(3)))]
    return nn.Sequential(_conv(3), Residual(), *levels, _conv(out_channels=CHANNELS))


def _decoder() -> nn.Sequential:
    levels = [m for _ in range(3) for m in (*(Residual() for _ in range(3)), nn.Upsample(scale_factor=2), _conv(bias=False))]
    return nn.Sequential(SoftClamp(), _conv(CHANNELS), nn.ReLU(), *levels, Residual(), _conv(out_channels=3))


class Autoencoder(nn.Module):
    """Pictures [B, 3, H, W] of 0..1 (H and W multiples of 8) and FLUX's latents [B, 16, H/8, W/8], one from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.taesd_encoder, self.taesd_decoder = _encoder(), _decoder()
        self.register_buffer("vae_scale", torch.tensor(SCALE))
        self.register_buffer("vae_shift", torch.tensor(SHIFT))

    def encode(self, pictures: Tensor) -> Tensor:
        return self.taesd_encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """Not clamped to 0..1."""
        return self.taesd_decoder(latents)


def load_autoencoder(path: str | os.PathLike, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Autoencoder:
    """The autoencoder in a .safetensors file. CheckpointError where a tensor is missing or of another size."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    with torch.device("meta"):
        model = Autoencoder()
    try:
        model.load_state_dict({key: t.to(device, dtype) for key, t in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} is no TAESD autoencoder of {CHANNELS} channels: {str(error).splitlines()[-1].strip()}") from error
    return model.eval().requires_grad_(False)
