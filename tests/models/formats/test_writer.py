"""Writing: what goes in comes out, bit for bit; the quantiser is as good as it should be; nothing half written stays."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tonfa.kernels.layout import E2M1, LogicalLinear, dense_bias, dense_weight
from tonfa.models.dequantize import dense_state_dict
from tonfa.models.formats import flux_names, quantize, writer
from tonfa.models.formats.checkpoint import CheckpointError, open_checkpoint
from tonfa.models.formats.tensorfile import Slot, stream_save

_spec = importlib.util.spec_from_file_location("flux_files", Path(__file__).parent / "flux_files.py")
ff = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ff)

CONFIG = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 48, "context_in_dim": 40,
    "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 4, "depth": 1, "depth_single_blocks": 2, "qkv_bias": True, "guidance_embed": True,
    "axes_dim": [8, 28, 28], "theta": 10000,
}  # fmt: skip
FIELDS = ("codes", "scales", "zeros", "smooth", "down", "up", "channel_scale", "bias")


def dense_flux(config=CONFIG, seed=0):
    """A random dense FLUX in native names."""
    gen = torch.Generator().manual_seed(seed)
    d = writer.dims_of(config)
    out = {}
    for h in flux_names.host_linears(d):
        out[f"{h.name}.weight"] = torch.randn(h.out_features, h.in_features, generator=gen) / h.in_features**0.5
        out[f"{h.name}.bias"] = torch.randn(h.out_features, generator=gen) * 0.1
    for name, _, shape in flux_names.plain_specs(d):
        out[name] = torch.randn(shape, generator=gen).bfloat16()
    return out


def same_layer(a: LogicalLinear, b: LogicalLinear):
    assert (a.precision, a.act_unsigned, a.segments) == (b.precision, b.act_unsigned, b.segments)
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_layers_come_back_bit_for_bit(precision, dtype, tmp_path, monkeypatch):
    written = {}
    pack = writer._packed
    monkeypatch.setattr(writer, "_packed", lambda layer, prefix, spec: written.setdefault(prefix, layer) and pack(layer, prefix, spec))
    state, steps = dense_flux(), []
    path = tmp_path / "m.safetensors"
    writer.write_flux(path, state, CONFIG, rank=16, precision=precision, dtype=dtype, progress=lambda *a: steps.append(a))
    c = open_checkpoint(path)
    assert c.warnings == [] and c.config == CONFIG and c.precision == precision and c.ranks == [16] and c.model_class == "Flux"
    assert steps[-1][0] == steps[-1][1] == len(steps)
    specs = flux_names.layer_specs(c.dims)
    assert written.keys() == specs.keys()
    for prefix, layer in written.items():
        same_layer(c.load_layer(prefix, "cpu"), layer)
    for name, t in c.plain_tensors():
        assert torch.equal(t, state[name].to(dtype)), name


@pytest.mark.parametrize("name", ff.MINI)
def test_golden_is_rewritten_byte_for_byte(name, tmp_path):
    """Read a published-layout file into logical layers and write it again: every tensor of it comes out the same."""
    tensors, _ = ff.mini(name)
    c = open_checkpoint(ff.DATA / f"{name}.safetensors")
    plain = dict(c.plain_tensors())
    writer.write_layers(tmp_path / "m.safetensors", c.config, lambda p: c.load_layer(p, "cpu"), plain.__getitem__, c.precision, c.rank)
    with safe_open(tmp_path / "m.safetensors", "pt") as f:
        assert set(f.keys()) == set(tensors)
        for key in tensors:
            if not key.endswith("smooth_orig"):  # no reader keeps it
                assert f.get_slice(key).get_dtype() and torch.equal(f.get_tensor(key).view(torch.uint8), tensors[key].view(torch.uint8)), (
                    key
                )


def test_metadata_is_the_published_one(tmp_path):
    writer.write_flux(tmp_path / "m.safetensors", dense_flux(), CONFIG, rank=32, precision="nvfp4")
    meta = open_checkpoint(tmp_path / "m.safetensors").metadata
    golden = open_checkpoint(ff.DATA / "mini_flux_nvfp4.safetensors").metadata
    assert json.loads(meta["quantization_config"]) == json.loads(golden["quantization_config"]) | {"rank": 32}
    assert meta["model_class"] == golden["model_class"]
    assert json.loads(golden["config"]).keys() <= json.loads(meta["config"]).keys()
    comfy = json.loads(meta["comfy_config"])
    assert comfy["model_class"] == "Flux" and json.loads(golden["comfy_config"])["model_config"].keys() <= comfy["model_config"].keys()


def test_schnell_and_other_widths(tmp_path):
    config = CONFIG | {"guidance_embed": False, "in_channels": 96, "depth": 2, "depth_single_blocks": 0}
    writer.write_flux(tmp_path / "m.safetensors", dense_flux(config), config, rank=16, precision="int4")
    c = open_checkpoint(tmp_path / "m.safetensors")
    assert c.model_class == "FluxSchnell" and c.config == config and c.warnings == []


@pytest.mark.parametrize(("precision", "limit"), [("int4", 0.12), ("nvfp4", 0.10)])
def test_the_whole_model_is_close_to_the_dense_one(precision, limit, tmp_path):
    state = dense_flux()
    writer.write_flux(tmp_path / "m.safetensors", state, CONFIG, rank=32, precision=precision)
    got = dict(dense_state_dict(open_checkpoint(tmp_path / "m.safetensors"), torch.float32))
    assert got.keys() == state.keys()
    for key, t in state.items():
        t = t.float()
        if t.ndim == 2:
            assert (got[key] - t).norm() < limit * t.norm(), key
        else:
            assert (got[key] - t).abs().max() < 0.01 * max(1, t.abs().max()), key


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_quantiser_beats_no_low_rank_and_keeps_smooth(precision):
    gen = torch.Generator().manual_seed(3)
    outliers = torch.exp(torch.randn(256, generator=gen))
    w = torch.randn(128, 256, generator=gen) * outliers
    bias = torch.randn(128, generator=gen)
    smooth = 1 / outliers
    errors = [((dense_weight(quantize.quantize_linear(w, bias, r, precision, smooth=smooth)) - w) / outliers).norm() for r in (16, 64, 128)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02 * (w / outliers).norm()
    layer = quantize.quantize_linear(w, bias, 16, precision, smooth=smooth)
    assert torch.equal(layer.smooth, smooth.bfloat16())


def test_shifted_bias_is_taken_back():
    gen = torch.Generator().manual_seed(4)
    w, bias = torch.randn(128, 256, generator=gen) + 0.3, torch.randn(128, generator=gen)
    layer = quantize.quantize_linear(w, bias, 16, "int4", act_unsigned=True)
    assert (layer.bias.float() - bias).abs().max() > 0.1
    assert (dense_bias(layer) - bias).abs().max() < 0.05
    assert torch.equal(dense_bias(quantize.quantize_linear(w, bias, 16, "int4")), bias.bfloat16().float())


def test_zero_weight():
    for precision in ("int4", "nvfp4"):
        layer = quantize.quantize_linear(torch.zeros(128, 128), None, 16, precision)
        assert torch.equal(dense_weight(layer), torch.zeros(128, 128)) and not layer.scales.float().isnan().any()
    assert torch.equal(dense_weight(quantize.quantize_modulation(torch.zeros(384, 128), None)), torch.zeros(384, 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modulation_ranges_are_searched(dtype):
    gen = torch.Generator().manual_seed(8)
    w = torch.randn(384, 128, generator=gen) * torch.randn(384, 128, generator=gen).abs() + 0.3
    layer = quantize.quantize_modulation(w, None, dtype)
    groups = w.unflatten(1, (-1, 64))
    low = groups.amin(-1).to(dtype).float()[..., None]
    scale = ((groups.amax(-1)[..., None] - low) / 15).to(dtype).float()
    plain = (((groups - low) / scale).round().clamp(0, 15) * scale + low - groups).square().sum(-1)
    found = (dense_weight(layer) - w).square().unflatten(1, (-1, 64)).sum(-1)
    assert (found <= plain * 1.0001).all() and found.sum() < 0.9 * plain.sum()


def test_nearest_e2m1():
    table = torch.tensor(E2M1[:8])
    x = torch.cat([torch.linspace(-8, 8, 4001), table, (table[1:] + table[:-1]) / 2, torch.tensor([0.0, 1e30, -1e30])])
    codes = quantize.nearest_e2m1(x)
    values = torch.tensor(E2M1)[codes.long()]
    best = (x[:, None].clamp(-6, 6) - torch.tensor(E2M1)).abs().amin(1)
    assert torch.equal((x.clamp(-6, 6) - values).abs(), best)
    ties = quantize.nearest_e2m1((table[1:] + table[:-1]) / 2)
    assert (ties % 2 == 0).all()
    assert (codes[x == 0] == 0).all()


def test_large_low_rank_is_nearly_the_best():
    gen = torch.Generator().manual_seed(6)
    w = torch.randn(900, 1100, generator=gen) + 3 * torch.randn(900, 8, generator=gen) @ torch.randn(8, 1100, generator=gen)
    up, down = quantize.low_rank(w, 16)
    s = torch.linalg.svdvals(w)
    assert (w - up @ down).norm() < 1.02 * s[16:].norm()
    again = quantize.low_rank(w, 16)
    assert torch.equal(up, again[0]) and torch.equal(down, again[1])


def test_wrong_input_is_told(tmp_path):
    with pytest.raises(ValueError, match="multiples of 128"):
        quantize.quantize_linear(torch.zeros(128, 192), None, 16, "int4")
    with pytest.raises(ValueError, match="multiple of 16"):
        quantize.quantize_linear(torch.zeros(128, 128), None, 10, "int4")
    with pytest.raises(ValueError, match="int4 or nvfp4"):
        quantize.quantize_linear(torch.zeros(128, 128), None, 16, "fp8")
    with pytest.raises(ValueError, match="3 or 6 times"):
        quantize.quantize_modulation(torch.zeros(256, 128), None)
    state = dense_flux()
    state["single_blocks.1.linear2.weight"] = state["single_blocks.1.linear2.weight"].T
    with pytest.raises(ValueError, match="single_blocks.1.linear2.weight"):
        writer.write_flux(tmp_path / "m.safetensors", state, CONFIG, 16, "int4")
    assert list(tmp_path.iterdir()) == []


def test_stream_save_leaves_nothing_half_written(tmp_path):
    def fail():
        raise KeyboardInterrupt

    slots = [Slot("a", torch.float32, (4,), lambda: torch.ones(4)), Slot("b", torch.float32, (4,), fail)]
    with pytest.raises(KeyboardInterrupt):
        stream_save(tmp_path / "m.safetensors", slots)
    wrong = [Slot("a", torch.float32, (4,), lambda: torch.ones(5))]
    with pytest.raises(ValueError, match="announced"):
        stream_save(tmp_path / "m.safetensors", wrong)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="twice"):
        stream_save(tmp_path / "m.safetensors", [slots[0], slots[0]])
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "m.safetensors")
