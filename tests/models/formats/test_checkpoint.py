"""open_checkpoint: every published shape and naming, every kind of damage, and every other file a person may pick by mistake."""

import importlib.util
import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tonfa.kernels.layout import dense_bias, dense_weight
from tonfa.models.dequantize import dense_state_dict
from tonfa.models.formats import flux_names
from tonfa.models.formats.checkpoint import CheckpointError, open_checkpoint

_spec = importlib.util.spec_from_file_location("flux_files", Path(__file__).parent / "flux_files.py")
ff = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ff)


def dense(path):
    return dict(dense_state_dict(open_checkpoint(path), torch.float32))


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def refused(path, *words):
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(path)
    for w in words:
        assert w in str(e.value), (w, str(e.value))
    return str(e.value)


# ---- what opens ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ff.MINI)
def test_golden_opens_without_a_warning(name, caplog):
    c = open_checkpoint(ff.DATA / f"{name}.safetensors")
    told = json.loads(c.metadata["comfy_config"])
    assert c.warnings == [] and caplog.text == ""
    assert c.config == told["model_config"] and c.model_class == told["model_class"] and c.family == "flux"
    assert c.precision == name.split("_")[2] and c.ranks == [c.rank]
    assert sum(len(h.parts) for h in c.host_linears()) == 15
    assert {h.kind for h in c.host_linears()} == {"w4a4", "w4a16"}


@pytest.mark.parametrize("name", ff.MINI)
def test_v2_names_and_no_metadata_give_the_same_model(name, tmp_path):
    tensors, meta = ff.mini(name)
    want = dense(ff.DATA / f"{name}.safetensors")
    same(dense(ff.save(tmp_path / "v2.safetensors", ff.as_v2(tensors), meta)), want)
    bare = open_checkpoint(ff.save(tmp_path / "bare.safetensors", tensors))
    full = open_checkpoint(ff.DATA / f"{name}.safetensors")
    assert bare.config == full.config and bare.model_class == full.model_class and bare.precision == full.precision
    same(dict(dense_state_dict(bare, torch.float32)), want)


def legacy(folder, tensors, meta, with_comfy=True):
    folder.mkdir()
    blocks = {k: v for k, v in tensors.items() if "transformer_blocks." in k}
    ff.save(folder / "transformer_blocks.safetensors", blocks)
    ff.save(folder / "unquantized_layers.safetensors", {k: v for k, v in tensors.items() if k not in blocks})
    (folder / "config.json").write_text(meta["config"])
    if with_comfy:
        (folder / "comfy_config.json").write_text(meta["comfy_config"])
    return folder


@pytest.mark.parametrize("with_comfy", [True, False])
def test_legacy_folder(with_comfy, tmp_path):
    tensors, meta = ff.mini("mini_flux_nvfp4")
    folder = legacy(tmp_path / "svdq-fp4-flux.1-dev", tensors, meta, with_comfy)
    want = open_checkpoint(ff.DATA / "mini_flux_nvfp4.safetensors")
    for picked in (folder, folder / "transformer_blocks.safetensors", folder / "unquantized_layers.safetensors"):
        c = open_checkpoint(picked)
        assert c.config == want.config and c.precision == "nvfp4" and c.warnings == []
        same(dict(dense_state_dict(c, torch.float32)), dict(dense_state_dict(want, torch.float32)))


def test_half_a_legacy_folder(tmp_path):
    tensors, meta = ff.mini()
    folder = legacy(tmp_path / "svdq", tensors, meta)
    (folder / "unquantized_layers.safetensors").unlink()
    refused(folder, "without unquantized_layers.safetensors")
    refused(folder / "transformer_blocks.safetensors", "x_embedder.weight is missing")
    only_rest = legacy(tmp_path / "other", tensors, meta)
    (only_rest / "transformer_blocks.safetensors").unlink()
    refused(only_rest / "unquantized_layers.safetensors", "unquantised half", "transformer_blocks.safetensors")


@pytest.mark.parametrize(("in_width", "channels"), [(64, 16), (128, 32), (384, 96)], ids=["dev", "canny-depth", "fill"])
def test_model_shapes(in_width, channels, tmp_path):
    tensors, meta = ff.mini()
    tensors["x_embedder.weight"] = torch.randn(128, in_width).bfloat16()
    for m in (None, meta | {"comfy_config": meta["comfy_config"].replace('"in_channels": 16', f'"in_channels": {channels}'),
                            "config": meta["config"].replace('"in_channels": 64', f'"in_channels": {in_width}')}):  # fmt: skip
        c = open_checkpoint(ff.save(tmp_path / "m.safetensors", tensors, m))
        assert c.config["in_channels"] == channels and c.config["out_channels"] == 16
        assert c.warnings == ([] if m else c.warnings)


def test_schnell_without_guidance(tmp_path):
    tensors, meta = ff.mini()
    tensors = {k: v for k, v in tensors.items() if "guidance" not in k}
    c = open_checkpoint(ff.save(tmp_path / "bare.safetensors", tensors))
    assert c.config["guidance_embed"] is False and c.model_class == "FluxSchnell"
    assert not any(name.startswith("guidance") for name, _ in c.plain_tensors())
    comfy = json.loads(meta["comfy_config"])
    comfy["model_class"], comfy["model_config"]["guidance_embed"] = "FluxSchnell", False
    told = {"comfy_config": json.dumps(comfy), "config": meta["config"].replace("true", "false")}
    c = open_checkpoint(ff.save(tmp_path / "told.safetensors", tensors, told))
    assert c.model_class == "FluxSchnell" and c.warnings == []
    refused(ff.save(tmp_path / "lost.safetensors", tensors, meta), "guidance_embedder.linear_1.weight is missing")


def test_depth_is_counted(tmp_path):
    tensors, _ = ff.mini()
    c = open_checkpoint(ff.save(tmp_path / "deep.safetensors", ff.deeper(tensors, 3, 12)))
    assert (c.config["depth"], c.config["depth_single_blocks"]) == (3, 12)
    assert len(c.host_linears()) == 3 * 10 + 12 * 3
    names = [name for name, _ in c.plain_tensors()]
    assert len(names) == len(set(names)) == 20 + 4 * 3 + 2 * 12


def test_full_size_key_counts():
    """Tensor counts of FLUX.1-dev as the format states them."""
    d = flux_names.FluxDims(3072, 128, 12288, 19, 38, 64, 64, 4096, 768, True)
    for precision, want in (("int4", 2604), ("nvfp4", 2908)):
        layers = sum(len(flux_names.layer_tensors(s, precision, 32)) for s in flux_names.layer_specs(d).values())
        top_scales_written = 1 if precision == "nvfp4" else 0  # one of the two optional ones
        layers -= top_scales_written * sum(not s.chunks for s in flux_names.layer_specs(d).values())
        assert layers + len(flux_names.plain_specs(d)) == want
    assert len(flux_names.host_linears(d)) == 19 * 10 + 38 * 3


def test_ranks_may_differ(tmp_path):
    tensors, meta = ff.mini()
    p = "single_transformer_blocks.0.qkv_proj."
    tensors[p + "lora_down"], tensors[p + "lora_up"] = torch.randn(128, 48).bfloat16(), torch.randn(384, 48).bfloat16()
    c = open_checkpoint(ff.save(tmp_path / "m.safetensors", tensors, meta))
    assert c.ranks == [16, 48] and c.rank == 16
    host = next(h for h in c.host_linears() if h.name == "single_blocks.0.linear1")
    ((layer, row, col),) = c.load_linear(host)
    w, b = ff.reference_w4a4(tensors, p[:-1], 384, 128, "int4", False)
    assert (row, col, layer.rank, layer.segments) == (0, 0, 48, (0, 384))
    assert abs(dense_weight(layer)[:384].double().numpy() - w).max() < 1e-4
    assert abs(dense_bias(layer)[:384].double().numpy() - b).max() == 0


def test_linear1_with_two_smooth_vectors_is_two_parts(tmp_path):
    tensors, meta = ff.mini()
    p = "single_transformer_blocks.0.mlp_fc1."
    tensors[p + "smooth"] = tensors[p + "smooth"] * 2
    c = open_checkpoint(ff.save(tmp_path / "m.safetensors", tensors, meta))
    host = next(h for h in c.host_linears() if h.name == "single_blocks.0.linear1")
    parts = c.load_linear(host)
    assert [(layer.n, row, col) for layer, row, col in parts] == [(384, 0, 0), (512, 384, 0)]
    for layer, row, _ in parts:
        w, b = ff.reference_w4a4(tensors, host.parts[row > 0][0], layer.n, 128, "int4", False)
        assert abs(dense_weight(layer).double().numpy() - w).max() < 1e-5 and abs(dense_bias(layer).double().numpy() - b).max() < 1e-5


def test_linear2_bias_is_the_sum_of_both(tmp_path):
    tensors, meta = ff.mini("mini_flux_nvfp4")
    tensors["single_transformer_blocks.0.out_proj.bias"] = torch.randn(128).bfloat16()
    path = ff.save(tmp_path / "m.safetensors", tensors, meta)
    c = open_checkpoint(path)
    (a, _, col_a), (b, _, col_b) = c.load_linear(next(h for h in c.host_linears() if h.name == "single_blocks.0.linear2"))
    assert a.bias is None and (col_a, col_b) == (0, 128)
    want = ff.reference_flux(tensors, "nvfp4", 128, 512)["single_blocks.0.linear2.bias"]
    assert abs(b.bias.double().numpy() - want).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), ()])
def test_top_scale_types_and_both_multiplied(dtype, shape, tmp_path):
    tensors, meta = ff.mini("mini_flux_nvfp4")
    p = "transformer_blocks.0.qkv_proj"
    tensors[f"{p}.wtscale"] = torch.full(shape, 0.75, dtype=dtype)
    c = open_checkpoint(ff.save(tmp_path / "m.safetensors", tensors, meta))
    ((layer, _, _),) = c.load_linear(next(h for h in c.host_linears() if h.name == "double_blocks.0.img_attn.qkv"))
    w, _ = ff.reference_w4a4({**tensors, f"{p}.wtscale": torch.full((1,), 0.75)}, p, 384, 128, "nvfp4", False)
    assert abs(dense_weight(layer).double().numpy() - w).max() < 1e-5


def test_missing_top_scales_count_as_one_and_are_told(tmp_path):
    tensors, meta = ff.mini("mini_flux_nvfp4")
    del tensors["transformer_blocks.0.mlp_fc1.wtscale"]
    c = open_checkpoint(ff.save(tmp_path / "m.safetensors", tensors, meta))
    assert len(c.warnings) == 1 and "transformer_blocks.0.mlp_fc1 " in c.warnings[0]
    ((layer, _, _),) = c.load_linear(next(h for h in c.host_linears() if h.name == "double_blocks.0.img_mlp.0"))
    assert layer.channel_scale is None


def test_fp16_file(tmp_path):
    tensors, meta = ff.mini()
    half = {k: v.half() if v.dtype == torch.bfloat16 else v for k, v in tensors.items()}
    c = open_checkpoint(ff.save(tmp_path / "m.safetensors", half, meta))
    assert c.warnings == []
    want = ff.reference_flux(half, "int4", 128, 512)
    for key, t in dense_state_dict(c, torch.float32):
        assert abs(t.double().numpy() - want[key]).max() < 1e-5 * max(1, abs(want[key]).max()), key


def test_layers_left_in_16_bit(tmp_path):
    """Third parties leave layers unquantised: they come as plain tensors under their native names."""
    tensors, meta = ff.mini()
    truth = load_file(ff.DATA / "mini_flux_int4.logical.safetensors")
    s = "single_transformer_blocks.0."
    for layer in ("transformer_blocks.0.qkv_proj", s + "out_proj", s + "mlp_fc2", s + "norm.linear"):
        tensors = {k: v for k, v in tensors.items() if not k.startswith(layer + ".")}
        tensors |= {f"{layer}.{kind}": truth[f"{layer}.{kind}"] for kind in ("weight", "bias")}
    c = open_checkpoint(ff.save(tmp_path / "m.safetensors", ff.as_v2(tensors), meta))
    plain = {h.name for h in c.host_linears() if h.kind == "plain"}
    assert plain == {"double_blocks.0.img_attn.qkv", "single_blocks.0.linear2", "single_blocks.0.modulation.lin"}
    got = dict(c.plain_tensors())
    assert [(name, tuple(t.shape)) for name, t in got.items()] == [(n, s) for n, s, _ in c.plain_specs()]
    assert torch.equal(got["double_blocks.0.img_attn.qkv.weight"], truth["transformer_blocks.0.qkv_proj.weight"])
    linear2 = torch.cat([truth[s + "out_proj.weight"], truth[s + "mlp_fc2.weight"]], 1)
    assert torch.equal(got["single_blocks.0.linear2.weight"], linear2)
    bias = truth[s + "out_proj.bias"].float() + truth[s + "mlp_fc2.bias"].float()
    assert torch.equal(got["single_blocks.0.linear2.bias"], bias.bfloat16())
    assert torch.equal(dict(dense_state_dict(c, torch.float32))["single_blocks.0.linear2.weight"], linear2.float())
    with pytest.raises(ValueError, match="not quantised"):
        c.load_linear(next(h for h in c.host_linears() if h.kind == "plain"))


def test_half_of_a_host_linear_left_in_16_bit_is_named(tmp_path):
    tensors, meta = ff.mini()
    tensors = {k: v for k, v in tensors.items() if not k.startswith("single_transformer_blocks.0.mlp_fc2.")}
    tensors["single_transformer_blocks.0.mlp_fc2.weight"] = torch.zeros(128, 512).bfloat16()
    refused(ff.save(tmp_path / "m.safetensors", tensors, meta), "single_transformer_blocks.0.mlp_fc2", "both halves")


def test_unknown_tensors_are_one_warning(tmp_path, caplog):
    tensors, meta = ff.mini()
    tensors |= {f"extra.{i:02d}": torch.zeros(1) for i in range(13)}
    with caplog.at_level(logging.WARNING):
        c = open_checkpoint(ff.save(tmp_path / "m.safetensors", tensors, meta))
    assert len(caplog.records) == len(c.warnings) == 1
    assert "extra.00" in caplog.text and "extra.09" in caplog.text and "extra.10" not in caplog.text and "13 tensors" in caplog.text


def test_opening_reads_no_weights_and_reading_maps(monkeypatch):
    c = open_checkpoint(ff.DATA / "mini_flux_int4.safetensors")
    assert all(f._handle is None for f in c.files)
    c.load_linear(c.host_linears()[0])
    assert all(f._handle is not None for f in c.files)
    c.close()
    assert all(f._handle is None for f in c.files)
    c.load_linear(c.host_linears()[0])


# ---- metadata -----------------------------------------------------------------------------------------------------------------------


def with_comfy(meta, **changes):
    comfy = json.loads(meta["comfy_config"])
    comfy["model_config"] |= changes
    return meta | {"comfy_config": json.dumps(comfy)}


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": 256}, {"num_heads": 3}, {"in_channels": 96}, {"mlp_ratio": 3.0}, {"context_in_dim": "x"}, {"depth": 0},
     {"axes_dim": [4, 5, 7]}, {"axes_dim": None}, {"theta": "hot"}, {"theta": float("nan")}, {"guidance_embed": False}],
    ids=str,
)  # fmt: skip
def test_wrong_metadata_warns_and_the_tensors_win(change, tmp_path):
    tensors, meta = ff.mini()
    c = open_checkpoint(ff.save(tmp_path / "m.safetensors", tensors, with_comfy(meta, **change)))
    assert c.warnings
    assert c.config == open_checkpoint(ff.DATA / "mini_flux_int4.safetensors").config


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"model_config": 3}', "{" * 100000])
@pytest.mark.parametrize("key", ["comfy_config", "config", "quantization_config"])
def test_broken_metadata(key, text, tmp_path):
    tensors, meta = ff.mini()
    c = open_checkpoint(ff.save(tmp_path / "m.safetensors", tensors, meta | {key: text}))
    assert c.config == open_checkpoint(ff.DATA / "mini_flux_int4.safetensors").config and c.model_class == "Flux"
    assert c.warnings or text == '{"model_config": 3}'


def test_precision_that_contradicts_the_tensors(tmp_path):
    tensors, _ = ff.mini()
    _, meta = ff.mini("mini_flux_nvfp4")
    refused(ff.save(tmp_path / "m.safetensors", tensors, meta), "NVFP4", "INT4")


# ---- damage -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mini_flux_int4", "mini_flux_nvfp4"])
def test_every_tensor_is_missed_by_name(name, tmp_path):
    tensors, meta = ff.mini(name)
    for key in tensors:
        if key.endswith(("smooth_orig", "wtscale", "wcscales")):
            continue
        left = {k: v for k, v in tensors.items() if k != key}
        message = refused(save_fast(tmp_path / "m.safetensors", left, meta), "missing", "m.safetensors")
        named = key if not key.endswith("qweight") else key.rpartition(".")[0]
        assert named in message, (key, message)


def save_fast(path, tensors, meta):
    save_file(tensors, str(path), meta)
    return path


def test_missing_names_follow_the_generation(tmp_path):
    tensors, meta = ff.mini()
    del tensors["transformer_blocks.0.mlp_context_fc2.lora_up"]
    refused(ff.save(tmp_path / "m.safetensors", ff.as_v2(tensors), meta), "transformer_blocks.0.ff_context.net.2.proj_up is missing")


@pytest.mark.parametrize("name", ["mini_flux_int4", "mini_flux_nvfp4"])
def test_every_tensor_is_checked_for_shape_and_dtype(name, tmp_path):
    tensors, meta = ff.mini(name)
    for key, t in tensors.items():
        flat = tensors | {key: t.reshape(1, *t.shape)}
        message = refused(save_fast(tmp_path / "m.safetensors", flat, meta), "expected")
        assert key in message or key in ("x_embedder.weight",) or key.endswith((".norm_q.weight", "qweight", "lora_down")), (key, message)
        other = torch.zeros(t.shape, dtype=torch.int64)
        message = refused(save_fast(tmp_path / "m.safetensors", tensors | {key: other}, meta), "expected")
        assert key in message and "I64" in message, (key, message)


def test_mixed_16_bit_types_in_a_layer(tmp_path):
    tensors, meta = ff.mini()
    key = "transformer_blocks.0.mlp_fc1.lora_up"
    refused(ff.save(tmp_path / "m.safetensors", tensors | {key: tensors[key].view(torch.float16)}, meta), key, "F16", "BF16")
    key = "x_embedder.bias"
    c = open_checkpoint(ff.save(tmp_path / "m.safetensors", tensors | {key: tensors[key].view(torch.float16)}, meta))
    assert len(c.warnings) == 1 and key in c.warnings[0]


def test_int4_with_a_top_scale(tmp_path):
    tensors, meta = ff.mini()
    tensors["transformer_blocks.0.mlp_fc1.wtscale"] = torch.ones(1).bfloat16()
    refused(ff.save(tmp_path / "m.safetensors", tensors, meta), "mlp_fc1.wtscale", "INT4")


@pytest.mark.parametrize("stack", ["transformer_blocks", "single_transformer_blocks"])
def test_missing_blocks(stack, tmp_path):
    tensors, meta = ff.mini()
    deep = ff.deeper(tensors, 9, 9)
    middle = {k: v for k, v in deep.items() if not k.startswith(f"{stack}.7.")}
    refused(ff.save(tmp_path / "m.safetensors", middle), f"{stack}.7 is missing", "8 of 9")
    last = {k: v for k, v in deep.items() if not k.startswith(f"{stack}.8.")}
    told = with_comfy(meta, depth=9, depth_single_blocks=9)
    refused(ff.save(tmp_path / "m.safetensors", last, told), f"{stack}.8 is missing", "says 9")


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("suffix", ["wscales", "smooth", "lora_down", "bias"])
def test_values_that_cannot_be_right(value, suffix, tmp_path):
    tensors, meta = ff.mini()
    key = f"transformer_blocks.0.mlp_context_fc1.{suffix}"
    tensors[key].view(-1)[5] = float(value)
    c = open_checkpoint(ff.save(tmp_path / "m.safetensors", tensors, meta))
    host = next(h for h in c.host_linears() if h.name == "double_blocks.0.txt_mlp.0")
    with pytest.raises(CheckpointError, match=f"{key.replace('.', '[.]')} holds NaN"):
        c.load_linear(host)


def test_zero_smooth(tmp_path):
    tensors, meta = ff.mini()
    tensors["transformer_blocks.0.mlp_fc1.smooth"][0] = 0
    c = open_checkpoint(ff.save(tmp_path / "m.safetensors", tensors, meta))
    with pytest.raises(CheckpointError, match="mlp_fc1.smooth"):
        c.load_linear(next(h for h in c.host_linears() if h.name == "double_blocks.0.img_mlp.0"))


@pytest.mark.parametrize("byte", [0x7F, 0xFF, 0x88])
def test_e4m3_scales_that_cannot_be_right(byte, tmp_path):
    tensors, meta = ff.mini("mini_flux_nvfp4")
    key = "single_transformer_blocks.0.out_proj.wscales"
    tensors[key].view(torch.uint8).view(-1)[77] = byte
    c = open_checkpoint(ff.save(tmp_path / "m.safetensors", tensors, meta))
    with pytest.raises(CheckpointError, match="out_proj.wscales holds NaN or negative"):
        c.load_linear(next(h for h in c.host_linears() if h.name == "single_blocks.0.linear2"))


def test_non_finite_plain_tensor(tmp_path):
    tensors, meta = ff.mini()
    tensors["proj_out.bias"][0] = float("inf")
    c = open_checkpoint(ff.save(tmp_path / "m.safetensors", tensors, meta))
    with pytest.raises(CheckpointError, match="proj_out.bias"):
        list(c.plain_tensors())


def test_truncated_everywhere(tmp_path):
    blob = (ff.DATA / "mini_flux_int4.safetensors").read_bytes()
    for size in (1, 7, 8, 9, 100, 10_000, len(blob) // 2, len(blob) - 1):
        (tmp_path / "m.safetensors").write_bytes(blob[:size])
        refused(tmp_path / "m.safetensors", "m.safetensors", "Download it again")
    (tmp_path / "m.safetensors").write_bytes(blob + b"x")
    refused(tmp_path / "m.safetensors", "1 bytes follow the last tensor")


def test_duplicate_names(tmp_path):
    text, data = ff.raw_header(ff.DATA / "mini_flux_int4.safetensors")
    first = text.index('"context_embedder.bias"')
    entry = text[first : text.index("}", first) + 1]
    refused(ff.write_raw(tmp_path / "m.safetensors", text[:first] + entry + "," + text[first:], data), "context_embedder.bias", "twice")
    tensors, _ = ff.mini()
    tensors["transformer_blocks.0.attn.to_qkv.bias"] = tensors["transformer_blocks.0.qkv_proj.bias"].clone()
    refused(ff.save(tmp_path / "m.safetensors", tensors), "two names of the same tensor")


# ---- other files --------------------------------------------------------------------------------------------------------------------


def zeros(*names, shape=(2, 2)):
    return {n: torch.zeros(shape).bfloat16() for n in names}


OTHER = {
    "qwen": (zeros("transformer_blocks.0.img_mod.1.qweight", "transformer_blocks.0.attn.to_qkv.qweight", "txt_norm.weight"),
             ["Qwen-Image SVDQuant", "NunchakuQwenImageDiTLoader"]),
    "z-image": (zeros("layers.0.attention.to_qkv.qweight", "layers.0.attention_norm1.weight"), ["Z-Image", "NunchakuZImageDiTLoader"]),
    "t5": (zeros("encoder.block.0.layer.0.SelfAttention.q.qweight", "shared.weight"), ["T5", "NunchakuTextEncoderLoaderV2"]),
    "sana": (zeros("transformer_blocks.0.attn.qkv_proj.qweight", "transformer_blocks.0.scale_shift_table"), ["SANA"]),
    "sdxl": (zeros("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_qkv.qweight"), ["SDXL"]),
    "flux-native": (zeros("double_blocks.0.img_attn.qkv.weight", "img_in.weight"), ["ordinary", "FLUX", "Load Diffusion Model"]),
    "flux-prefixed": (zeros("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "model.diffusion_model.img_in.weight"),
                      ["ordinary", "FLUX", "Load Diffusion Model"]),
    "flux-whole": (zeros("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "vae.decoder.conv_in.weight"),
                   ["FLUX", "Load Checkpoint"]),
    "flux-diffusers": (zeros("transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.proj_mlp.weight", "x_embedder.weight"),
                       ["FLUX", "diffusers", "Load Diffusion Model"]),
    "qwen-plain": (zeros("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"), ["Qwen-Image", "Load Diffusion Model"]),
    "lora": (zeros("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"),
             ["LoRA", "NunchakuFluxLoraLoader"]),
    "kohya": (zeros("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "lora_unet_double_blocks_0_img_attn_qkv.alpha"),
              ["LoRA", "LoraLoaderModelOnly"]),
    "vae": (zeros("decoder.conv_in.weight", "encoder.conv_in.weight"), ["VAE", "Load VAE"]),
    "clip": (zeros("text_model.encoder.layers.0.self_attn.q_proj.weight"), ["CLIP", "DualCLIPLoader"]),
    "controlnet": (zeros("controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"), ["ControlNet"]),
    "other": (zeros("some.weight"), ["without any model", "some.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_other_models_are_told_apart(name, tmp_path):
    tensors, words = OTHER[name]
    refused(ff.save(tmp_path / "m.safetensors", tensors), "m.safetensors", *words)


def test_files_that_are_no_safetensors(tmp_path):
    path = tmp_path / "m.safetensors"
    torch.save({"a": torch.zeros(3)}, path)
    refused(path, "pickle")
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    refused(path, "pickle")
    path.write_bytes(b"GGUF\x03\0\0\0" + b"\0" * 100)
    refused(path, "GGUF")
    path.write_bytes(b"")
    refused(path, "empty (0 bytes)")
    path.write_bytes(b"<!DOCTYPE html><html>log in</html>")
    refused(path, "web page")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(path, "git lfs pull")
    path.write_bytes(bytes(range(256)) * 20)
    refused(path, "not a safetensors file")
    ff.write_raw(path, {}, b"")
    refused(path, "no tensors")
    refused(tmp_path, "folder", "transformer_blocks.safetensors")
    refused(tmp_path / "absent.safetensors", "does not exist")


def test_a_header_whose_length_looks_like_a_pickle(tmp_path):
    """A header of 640 bytes starts the file with 0x80 0x02, the mark of pickle protocol 2."""
    text = json.dumps({"a.weight": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
    refused(ff.write_raw(tmp_path / "m.safetensors", text + " " * (640 - len(text)), b"\0"), "without any model")


def test_rank_is_checked(tmp_path):
    tensors, meta = ff.mini()
    p = "transformer_blocks.0.mlp_fc1."
    bad = tensors | {p + "lora_down": torch.zeros(128, 24).bfloat16(), p + "lora_up": torch.zeros(512, 24).bfloat16()}
    refused(ff.save(tmp_path / "m.safetensors", bad, meta), p + "lora_down", "multiple of 16")


def test_a_smaller_block_count_in_the_metadata_is_only_a_warning(tmp_path):
    tensors, meta = ff.mini()
    c = open_checkpoint(ff.save(tmp_path / "m.safetensors", ff.deeper(tensors, 2, 1), meta))
    assert c.config["depth"] == 2 and any("2" in w for w in c.warnings)
