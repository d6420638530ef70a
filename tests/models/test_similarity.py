"""models/similarity.py against definitions written out."""

import math

import pytest
import torch
from tonfa.models.similarity import psnr, ssim


def pictures(seed: int) -> torch.Tensor:
    return torch.rand(3, 3, 24, 20, generator=torch.Generator().manual_seed(seed))


def test_psnr():
    a, b = pictures(0), pictures(1)
    for i, found in enumerate(psnr(a, b).tolist()):
        error = sum((x - y) ** 2 for x, y in zip(a[i].flatten().tolist(), b[i].flatten().tolist(), strict=True)) / a[i].numel()
        assert found == pytest.approx(-10 * math.log10(error), abs=1e-4)
    assert psnr(a, a).tolist() == [100.0] * 3
    assert psnr(a, (a + 0.1)).tolist() == pytest.approx([20.0] * 3, abs=1e-3)


def test_ssim_at_one_place():
    """One window of 11 x 11 is the whole picture: its Gaussian moments by hand."""
    g = torch.Generator().manual_seed(2)
    a, b = (torch.rand(1, 3, 11, 11, generator=g).double() for _ in range(2))
    weights = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)]
    w = torch.tensor(weights).double()
    w = w / w.sum()
    wanted = []
    for x, y in zip(a[0], b[0], strict=True):
        mx, my = (w * x).sum(), (w * y).sum()
        vx, vy, both = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
        wanted.append((2 * mx * my + 1e-4) * (2 * both + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert float(ssim(a, b)) == pytest.approx(float(torch.stack(wanted).mean()), abs=1e-5)


def test_ssim_of_equal_and_of_worse_pictures():
    a = pictures(3)
    assert ssim(a, a).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(4))
    assert (ssim(a, a + 0.02 * noise) > ssim(a, a + 0.1 * noise)).all()
