"""How alike two sets of pictures are: peak signal to noise, and structural similarity (Wang et al. 2004)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, DEVIATION = 11, 1.5


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """dB of each picture [B, 3, H, W] of 0..1 -> [B]; 100 at most, which equal ones get."""
    return -10 * torch.log10((pictures - reference).double().square().mean((1, 2, 3)).clamp(min=1e-10))


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Of each picture [B, 3, H, W] of 0..1 -> [B]: Gaussian window of 11 pixels and deviation 1.5, mean of the channels."""
    line = torch.exp(-((torch.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * DEVIATION**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, WINDOW, WINDOW).to(pictures.device)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)

    a, b = pictures.float(), reference.float()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, both = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return value.mean((1, 2, 3))
