"""The miniature's nodes in the real host: its FLUX and its VAE in the host's classes, captions, and the demo's graph."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
import torch
from tonfa.models import demo
from tonfa.models.dense_flux import dense_flux, open_dense
from tonfa.models.miniature import load_miniature
from tonfa.models.quantize_flux import Options, quantize_flux
from tonfa.nodes.host import demo as inside
from tonfa.nodes.host.miniature import model
from tonfa.nodes.miniature import CAPTION, TonfaMiniatureCaption, TonfaMiniatureLoader

import nodes


@pytest.fixture(scope="module")
def miniature():
    return load_miniature()


def sampled(patcher, conditioning, seed: int, steps: int) -> torch.Tensor:
    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    with torch.inference_mode():
        out = nodes.common_ksampler(patcher, seed, steps, 1.0, "euler", "simple", conditioning, conditioning, latent)
    return out[0]["samples"]


def test_the_host_draws_what_the_miniature_draws_alone(miniature):
    (conditioning,) = TonfaMiniatureCaption().encode(CAPTION)
    _, vae = TonfaMiniatureLoader().load()
    seen = vae.decode(sampled(model(dtype=torch.float32), conditioning, 5, 6)).permute(0, 3, 1, 2)
    latents = miniature.latents(dense_flux(miniature.flux, torch.float32), [CAPTION], [5], steps=6)
    alone = miniature.pictures(latents)
    assert seen.shape == (1, 3, 128, 128) and alone.std() > 0.1
    assert (seen - alone).abs().max() < 0.02  # the host's schedule has a thousand steps to choose from, and 8 bits of rounding


def test_the_vae_keeps_a_picture(miniature):
    _, vae = TonfaMiniatureLoader().load()
    drawn = miniature.pictures(miniature.latents(dense_flux(miniature.flux, torch.float32), [CAPTION], [1], steps=8))
    again = vae.decode(vae.encode(drawn.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    assert (again - drawn).square().mean() < 1e-3


def test_captions(miniature):
    (one,) = TonfaMiniatureCaption().encode(f"  {CAPTION}\n\n")
    (two,) = TonfaMiniatureCaption().encode(f"{CAPTION}\nlarge blue square on red")
    assert len(one) == 1 and len(two) == 2 and torch.equal(one[0][0], two[0][0]) and not torch.equal(two[0][0], two[1][0])
    assert torch.equal(one[0][1]["pooled_output"], miniature.captions.encode([CAPTION])[1])
    with pytest.raises(ValueError, match="does not know 'elephant'"):
        TonfaMiniatureCaption().encode("a large elephant")
    with pytest.raises(ValueError, match="The caption is empty"):
        TonfaMiniatureCaption().encode(" \n ")


def test_the_demos_half_in_the_host(miniature, monkeypatch, tmp_path):
    """The graph of each run, by the host's executor, with two captions and two steps."""
    import folder_paths

    with closing(open_dense(miniature.flux)) as source:
        quantize_flux(source, tmp_path / demo.FILE, Options(mode="naive"))
    there, kinds = folder_paths.folder_names_and_paths["diffusion_models"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([*there, str(tmp_path)], kinds))
    monkeypatch.setattr(inside, "CAPTIONS", demo.CAPTIONS[:2])
    monkeypatch.setattr(inside, "STEPS", 2)
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", dict(nodes.NODE_CLASS_MAPPINGS))
    host = inside.executor()
    (tmp_path / "results").mkdir()
    for name in ("16 bit", "exact"):
        demo.write_run(tmp_path / "results", inside.drawn(host, name))
    dense, four = (demo.read_run(tmp_path / "results", name) for name in ("16 bit", "exact"))
    assert dense.pictures.shape == four.pictures.shape == (2, 3, 128, 128) and not torch.equal(*dense.pictures)
    assert 0 < (dense.pictures - four.pictures).abs().mean() < 0.1
    assert dense.nbytes > 2 * four.nbytes and four.dtype == dense.dtype == "float32" and four.seconds > 0


def test_a_graph_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(inside, "CAPTIONS", ("a large elephant",))
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", dict(nodes.NODE_CLASS_MAPPINGS))
    host = inside.executor()
    with pytest.raises(SystemExit, match="elephant"):
        inside.execute(host, json.loads(json.dumps(inside.graph("16 bit"))), ["kept_latent"])
