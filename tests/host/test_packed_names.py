"""What a Qwen-Image or Z-Image file gives is all that the host's own class needs: every parameter by its name and shape, real sizes too,
and the config is the one that the host would have found out."""

from __future__ import annotations

import inspect

import comfy.ldm.lumina.model
import comfy.ldm.qwen_image.model
import comfy.model_detection
import comfy.ops
import pytest
import torch
from tonfa.models.formats import qwen_names, zimage_names
from tonfa.models.formats.qwen_names import QwenDims
from tonfa.models.formats.zimage_names import ZImageDims

QWEN = [
    QwenDims(256, 128, 2, 64, 64, 64),
    QwenDims(3072, 128, 60, 64, 64, 3584),
    QwenDims(3072, 128, 60, 64, 64, 3584, marked=True),
    QwenDims(3072, 128, 60, 64, 64, 3584, added_timestep=True),
]
Z_IMAGE = [
    ZImageDims(256, 128, 768, 2, 1, 64, 64, 64, pad_tokens=True),
    ZImageDims(3840, 128, 10240, 30, 2, 64, 64, 2560, pad_tokens=True),
    ZImageDims(3840, 128, 10240, 30, 2, 64, 64, 2560, pad_tokens=False),
]


def given(layout):
    """native name -> shape of everything that a file of this layout gives."""
    shapes = {native: tuple(shape) for native, _, shape in layout.plains}
    for host in layout.linears:
        for piece in layout.pieces(host):
            shapes[f"{piece.name}.weight"] = (piece.rows, host.in_features)
            if layout.biases:
                shapes[f"{piece.name}.bias"] = (piece.rows,)
    return shapes


def hold_against(host_class, config, layout):
    unknown = config.keys() - inspect.signature(host_class).parameters.keys()
    if unknown:
        pytest.skip(f"this ComfyUI's {host_class.__name__} does not take {sorted(unknown)}")
    model = host_class(**config, dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init)
    shapes = given(layout)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == shapes
    found = comfy.model_detection.detect_unet_config({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}, "")
    found.pop("allow_fp16", None)  # values decide, not names
    return found


@pytest.mark.parametrize("dims", QWEN, ids=str)
def test_qwen_image(dims):
    config = qwen_names.unet_config(dims, {}, [])
    found = hold_against(comfy.ldm.qwen_image.model.QwenImageTransformer2DModel, config, qwen_names.layout(dims))
    assert found == {key: config[key] for key in found} and found["image_model"] == "qwen_image"


@pytest.mark.parametrize("dims", Z_IMAGE, ids=str)
def test_z_image(dims):
    config = zimage_names.unet_config(dims, {}, [])
    found = hold_against(comfy.ldm.lumina.model.NextDiT, config, zimage_names.layout(dims))
    if dims.hidden == 3840:  # the host knows Z-Image by its hidden size
        assert found == {key: config[key] for key in found} and found["z_image_modulation"]
