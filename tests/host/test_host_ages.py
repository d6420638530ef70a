"""What hosts of other months take: fields that a class of the host does not know, files that it has no class for."""

from __future__ import annotations

import comfy.ldm.qwen_image.model
import pytest
import torch
from tonfa.nodes.host import qwen_shell
from tonfa.nodes.host.base_model import accepted
from tonfa.nodes.host.shell import Placement, load_model

from .families import LIKE_2511, made, needs_z_image, packed_files
from .lab import CPU


def test_a_class_is_given_what_it_takes():
    def old(dim, n_layers=1):
        return dim

    def new(dim, **more):
        return dim

    config = {"dim": 3, "n_layers": 2, "allow_fp16": True}
    assert accepted(old, config) == {"dim": 3, "n_layers": 2}
    assert accepted(new, config) == config


@needs_z_image
def test_z_image_on_a_host_whose_class_takes_no_further_keywords(monkeypatch):
    """As from November 2025 to January 2026."""
    from tonfa.nodes.host import z_shell

    given, original = [], z_shell.accepted

    def old_host(function, config):
        given.append(set(config))
        return {key: value for key, value in original(function, config).items() if key != "allow_fp16"}

    monkeypatch.setattr(z_shell, "accepted", old_host)
    with torch.inference_mode():
        model = load_model(str(made("z-image")), Placement(CPU, CPU, torch.float32)).model
    assert "allow_fp16" in given[0] and len(model.diffusion_model.layers) == 2
    dtypes = model.model_config.supported_inference_dtypes
    assert model.model_config.unet_config["allow_fp16"] or torch.float16 not in dtypes


@pytest.mark.skipif(LIKE_2511, reason="this ComfyUI has Qwen-Image-Layered")
def test_a_layered_file_on_a_host_without_it(tmp_path):
    tensors, metadata, _ = packed_files.qwen("int4", 16)
    tensors["time_text_embed.addition_t_embedding.weight"] = torch.zeros(2, packed_files.HIDDEN).bfloat16()
    path = packed_files.save(tmp_path / "layered.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match="Qwen-Image-Layered, which this ComfyUI does not have. Update ComfyUI"):
        load_model(str(path), Placement(CPU, CPU, torch.float32))


@pytest.mark.skipif(not LIKE_2511, reason="this ComfyUI has no Qwen-Image-Layered")
def test_a_layered_file(tmp_path):
    tensors, metadata, _ = packed_files.qwen("int4", 16)
    tensors["time_text_embed.addition_t_embedding.weight"] = torch.zeros(2, packed_files.HIDDEN).bfloat16()
    path = packed_files.save(tmp_path / "layered.safetensors", tensors, metadata)
    with torch.inference_mode():
        network = load_model(str(path), Placement(CPU, CPU, torch.float32)).model.diffusion_model
    assert network.default_ref_method == "negative_index"
    assert isinstance(network, qwen_shell.TonfaQwenImage) and isinstance(network, comfy.ldm.qwen_image.model.QwenImageTransformer2DModel)
