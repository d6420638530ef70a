"""What `dequantize` writes is a model that the stock loader takes: real sizes by their headers, and a one-block model for real."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path

import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.supported_models
import pytest
import tonfa
import torch
from tonfa.models import dequantize as dq
from tonfa.models.formats import flux_names
from tonfa.models.formats.checkpoint import open_checkpoint
from tonfa.models.formats.flux_names import FluxDims
from tonfa.nodes.host.shell import load_model

import nodes

from .lab import FP32, sample, snr

ITEM = {"I8": 1, "I32": 4, "BF16": 2}
BENCHMARKS = Path(tonfa.__file__).parent / "benchmarks"


def full_size(path: Path, in_width: int, guidance: bool, depth: int = 19, single: int = 38) -> Path:
    """A whole INT4 FLUX.1 file whose data is a hole: every name, type and shape is there, and it takes no disk."""
    dims = FluxDims(3072, 128, 12288, depth, single, in_width, 64, 4096, 768, guidance)
    specs = {key: ("BF16", shape) for _, key, shape in flux_names.plain_specs(dims)}
    for prefix, layer in flux_names.layer_specs(dims).items():
        for suffix, (types, shape, required) in flux_names.layer_tensors(layer, "int4", 32).items():
            if required:
                specs[f"{prefix}.{suffix}"] = (types[0], shape)
    header, end = {}, 0
    for key, (dtype, shape) in specs.items():
        size = ITEM[dtype] * torch.Size(shape).numel()
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def dense_shapes(path: Path) -> dict[str, torch.Tensor]:
    """The state dict that dequantize would write, in names and shapes; every tensor is one zero seen many times."""
    checkpoint = open_checkpoint(path)
    state = {name: torch.zeros((), dtype=torch.bfloat16).expand(shape) for name, shape in dq._shapes(checkpoint)}
    checkpoint.close()
    return state


@pytest.mark.parametrize(
    ("kind", "in_width", "guidance", "model", "base"),
    [
        ("dev", 64, True, "Flux", "Flux"),
        ("schnell", 64, False, "FluxSchnell", "Flux"),
        ("canny-dev", 128, True, "Flux", "Flux"),
        ("fill-dev", 384, True, "FluxInpaint", "Flux"),
    ],
)
def test_the_host_detects_full_size_models(kind, in_width, guidance, model, base, tmp_path):
    path = full_size(tmp_path / f"svdq-int4_r32-flux.1-{kind}.safetensors", in_width, guidance)
    state = dense_shapes(path)
    numbers = sum(t.numel() for t in state.values())
    assert 11.8e9 < numbers < 12.0e9  # FLUX.1 is called a 12B model
    config = comfy.model_detection.model_config_from_unet(state, "")
    assert type(config) is getattr(comfy.supported_models, model)
    found = {key: config.unet_config.get(key) for key in ("in_channels", "depth", "depth_single_blocks", "hidden_size", "vec_in_dim")}
    assert found == {"in_channels": in_width // 4, "depth": 19, "depth_single_blocks": 38, "hidden_size": 3072, "vec_in_dim": 768}
    assert config.unet_config["guidance_embed"] is guidance
    assert config.unet_config["out_channels"] == 16 and config.unet_config["axes_dim"] == [16, 56, 56]
    # Every tensor has its place in the model that the host builds, and the model needs no other.
    made = config.get_model(state, "", device=torch.device("meta"))
    assert type(made).__name__ == base
    wanted = {name: tuple(t.shape) for name, t in made.diffusion_model.state_dict().items()}
    assert {name: tuple(t.shape) for name, t in config.process_unet_state_dict(dict(state)).items()} == wanted


def random_file(path: Path) -> Path:
    """One double and one single block of FLUX.1's own widths, with the numbers of the benchmark's checkpoint."""
    spec = importlib.util.spec_from_file_location("make_checkpoint", BENCHMARKS / "make_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    with torch.random.fork_rng(devices=[]):
        module.make(str(path), "flux", module.Plan(depth=1, single_depth=1), device="cpu")
    return path


def text(seed: int = 3) -> list:
    g = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 768, generator=g)
    return [[torch.randn(1, 8, 4096, generator=g), {"pooled_output": pooled, "guidance": 3.5}]]


def test_the_host_loads_a_short_one(tmp_path):
    """Real tensors of real widths, one block of each kind (1.1 GB): the host's loader takes them all and finds none missing."""
    state = dense_shapes(full_size(tmp_path / "short.safetensors", 64, True, depth=1, single=1))
    with torch.inference_mode():
        patcher = comfy.sd.load_diffusion_model_state_dict(dict(state))
    network = patcher.model.diffusion_model
    assert type(patcher.model) is comfy.model_base.Flux
    assert len(network.double_blocks) == len(network.single_blocks) == 1
    assert sum(p.numel() for p in network.parameters()) == sum(t.numel() for t in state.values())
    assert not any(p.any() for p in network.parameters())  # nothing was left as it was allocated


def test_the_stock_loader_loads_the_file_and_samples_the_same(base, tmp_path):
    packed = random_file(tmp_path / "svdq-int4_r32-flux.1-blocks.safetensors")
    dense = Path(base, "models", "diffusion_models", "flux.1-blocks-bf16.safetensors")
    dq.dequantize(packed, dense)
    with torch.inference_mode():
        (stock,) = nodes.UNETLoader().load_unet(dense.name, "default")
    assert type(stock.model) is comfy.model_base.Flux
    wanted = sample(stock, text(), steps=1, size=(4, 4))
    assert wanted.std() > 0.1
    del stock
    comfy.model_management.unload_all_models()
    dense.unlink()
    with torch.inference_mode():
        ours = load_model(str(packed), FP32)
    ours.model_options["transformer_options"]["tonfa"] = {"compute": "weight_only"}
    assert snr(sample(ours, text(), steps=1, size=(4, 4)), wanted) > 35  # what remains is the file's rounding to bfloat16
