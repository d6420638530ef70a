"""open_packed on Qwen-Image and Z-Image files: every layer bit for bit, the host's names, and a sentence for every damage."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tonfa.kernels.layout import dense_bias, dense_weight
from tonfa.models.formats import flux_names, qwen_names, zimage_names
from tonfa.models.formats.checkpoint import CheckpointError, open_checkpoint, open_packed
from tonfa.models.inspect import format_report, inspect


def _beside(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ff, pf = _beside("flux_files"), _beside("packed_files")
FIELDS = ("codes", "scales", "zeros", "smooth", "down", "up", "channel_scale", "bias")
MAKE = {"qwen-image": pf.qwen, "z-image": pf.zimage}


def same_layer(a, b):
    assert (a.precision, a.act_unsigned, a.segments) == (b.precision, b.act_unsigned, b.segments)
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)), name


def opened(path, tensors, meta=None):
    return open_packed(pf.save(path / "m.safetensors", tensors, meta))


def refused(path, tensors, meta, *words):
    with pytest.raises(CheckpointError) as e:
        opened(path, tensors, meta)
    for word in (*words, "m.safetensors"):
        assert word in str(e.value), (word, str(e.value))


def v1_suffixes(tensors):
    back = {v2: v1 for v1, v2 in pf.V2_SUFFIX.items()}
    parts = {key: key.rpartition(".") for key in tensors}
    return {f"{p}{dot}{back.get(s, s)}": tensors[key] for key, (p, dot, s) in parts.items()}


# ---- what opens ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "rank"), [("int4", 32), ("int4", 128), ("nvfp4", 16)])
@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("told", [True, False], ids=["metadata", "bare"])
def test_layers_come_back_bit_for_bit(family, precision, rank, told, tmp_path, caplog):
    tensors, meta, layers = MAKE[family](precision, rank)
    c = opened(tmp_path, tensors, meta if told else None)
    assert c.warnings == [] and caplog.text == ""
    assert (c.family, c.precision, c.rank, c.ranks) == (family, precision, rank, [rank])
    seen = set()
    for host in c.host_linears():
        ((layer, row, col),) = c.load_linear(host)
        (prefix, _, _) = host.parts[0]
        assert (layer.n, layer.k, row, col) == (host.out_features, host.in_features, 0, 0)
        assert host.kind == ("w4a16" if layer.precision == "w4a16" else "w4a4")
        same_layer(layer, layers[prefix])
        seen.add(prefix)
    assert seen == layers.keys()
    c.close()


@pytest.mark.parametrize("family", MAKE)
def test_float16_and_the_older_suffixes(family, tmp_path):
    tensors, meta, layers = MAKE[family](dtype=torch.float16)
    for form in (tensors, v1_suffixes(tensors)):
        c = opened(tmp_path, form, meta)
        assert c.warnings == []
        for host in c.host_linears():
            same_layer(c.load_linear(host)[0][0], layers[host.parts[0][0]])
        c.close()


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_layers_are_what_the_format_says(precision, tmp_path):
    """Against index formulas that share no code with the reader."""
    tensors, meta, _ = pf.qwen(precision, 16, depth=1)
    c, v1 = opened(tmp_path, tensors, meta), v1_suffixes(tensors)
    for name, (n, k) in (("attn.to_qkv", (768, 256)), ("img_mlp.net.2", (256, 1024))):
        prefix = f"transformer_blocks.0.{name}"
        layer = c.load_layer(prefix)
        w, b = ff.reference_w4a4(v1, prefix, n, k, precision, layer.act_unsigned)
        assert layer.act_unsigned == (precision == "int4" and name.endswith("net.2"))
        assert abs(dense_weight(layer).double().numpy() - w).max() < 1e-4 * abs(w).max()
        assert abs(dense_bias(layer).double().numpy() - b).max() < 1e-4 * abs(b).max()
    w, b = ff.reference_modulation(v1, "transformer_blocks.0.txt_mod.1", 6, 256)
    layer = c.load_layer("transformer_blocks.0.txt_mod.1")
    assert abs(dense_weight(layer).double().numpy() - w).max() < 1e-5 * abs(w).max()
    assert abs(layer.bias.double().numpy() - b).max() == 0
    c.close()


@pytest.mark.parametrize("family", MAKE)
def test_tensors_left_alone_come_under_the_hosts_names(family, tmp_path):
    tensors, meta, layers = MAKE[family]()
    c = opened(tmp_path, tensors, meta)
    got = dict(c.plain_tensors())
    assert [(name, tuple(t.shape)) for name, t in got.items()] == [(name, shape) for name, shape, _ in c.plain_specs()]
    taken = {key for key in tensors for prefix in layers if key.startswith(prefix + ".")}
    host_name = {"norm_q": "q_norm", "norm_k": "k_norm"} if family == "z-image" else {}
    for key in tensors.keys() - taken:
        name = key.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")
        name = ".".join(host_name.get(part, part) for part in name.split("."))
        assert torch.equal(got.pop(name), tensors[key]), key
    assert not got
    c.close()


def test_qwen_config(tmp_path):
    tensors, meta, _ = pf.qwen(depth=3)
    want = {
        "image_model": "qwen_image", "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 3, "attention_head_dim": 128,
        "num_attention_heads": 2, "joint_attention_dim": 64, "axes_dims_rope": [16, 56, 56],
    }  # fmt: skip
    assert opened(tmp_path, tensors, meta).config == opened(tmp_path, tensors).config == want
    marked = tensors | {"__index_timestep_zero__": torch.zeros(0)}
    c = opened(tmp_path, marked, meta)
    assert c.config == want | {"default_ref_method": "index_timestep_zero"} and c.warnings == []
    assert dict(c.plain_tensors())["__index_timestep_zero__"].numel() == 0
    told = meta | {"config": json.dumps(json.loads(meta["config"]) | {"zero_cond_t": True})}
    assert opened(tmp_path, tensors, told).config == c.config
    layered = tensors | {"time_text_embed.addition_t_embedding.weight": torch.zeros(2, 256).bfloat16()}
    c = opened(tmp_path, layered, meta)
    assert c.config == want | {"use_additional_t_cond": True, "default_ref_method": "negative_index"} and c.warnings == []


def test_zimage_config(tmp_path):
    tensors, meta, _ = pf.zimage(depth=3, refiners=2)
    want = {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256, "cap_feat_dim": 64, "n_layers": 3, "n_refiner_layers": 2,
        "qk_norm": True, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
        "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
    }  # fmt: skip
    assert opened(tmp_path, tensors, meta).config == opened(tmp_path, tensors).config == want
    bare = {key: t for key, t in tensors.items() if "pad_token" not in key}
    assert "pad_tokens_multiple" not in opened(tmp_path, bare, meta).config


def test_full_sizes():
    """Sizes and counts of the published models; a block of Qwen-Image has 68 tensors in listings of the published INT4 file."""
    d = qwen_names.QwenDims(hidden=3072, head_dim=128, depth=60, in_width=64, out_width=64, context=3584)
    specs = qwen_names.layer_specs(d)
    tensors = {f"{p}.{s}": shape for p, spec in specs.items() for s, (_, shape, _) in flux_names.layer_tensors(spec, "int4", 128).items()}
    assert len(tensors) + len(qwen_names.plain_specs(d)) == 60 * 68 + 13
    p = "transformer_blocks.59."
    assert tensors[f"{p}attn.add_qkv_proj.qweight"] == (9216, 1536) and tensors[f"{p}txt_mlp.net.2.wscales"] == (192, 3072)
    assert tensors[f"{p}img_mod.1.qweight"] == (4608, 1536) and tensors[f"{p}img_mod.1.wzeros"] == (48, 18432)
    assert tensors[f"{p}img_mlp.net.2.lora_down"] == (12288, 128)
    d = zimage_names.ZImageDims(3840, 128, 10240, 30, 2, 64, 64, 2560, pad_tokens=True)
    shapes = {prefix: (spec.n, spec.k) for prefix, spec in zimage_names.layer_specs(d).items()}
    assert len(shapes) == 34 * 4 and shapes["layers.29.feed_forward.net.0.proj"] == (20480, 3840)
    assert shapes["noise_refiner.1.attention.to_qkv"] == (11520, 3840) and shapes["context_refiner.0.feed_forward.net.2"] == (3840, 10240)
    plain = {native: shape for native, _, shape in zimage_names.plain_specs(d)}
    assert plain["layers.0.adaLN_modulation.0.weight"] == (15360, 256) and plain["t_embedder.mlp.2.weight"] == (256, 1024)
    assert "context_refiner.0.adaLN_modulation.0.weight" not in plain
    config = zimage_names.unet_config(d, {}, [])
    assert config["ffn_dim_multiplier"] == 8 / 3 and config["n_heads"] == 30


# ---- stacked linears ----------------------------------------------------------------------------------------------------------------


def test_pieces_of_stacked_linears(tmp_path):
    c = opened(tmp_path, *pf.qwen(depth=1)[:2])
    by_name = {h.name: [(p.name, p.first, p.rows) for p in c.pieces(h)] for h in c.host_linears()}
    a = "transformer_blocks.0.attn."
    assert by_name[f"{a}to_qkv"] == [(f"{a}to_q", 0, 256), (f"{a}to_k", 256, 256), (f"{a}to_v", 512, 256)]
    assert by_name[f"{a}add_qkv_proj"] == [(f"{a}add_{q}_proj", i * 256, 256) for i, q in enumerate("qkv")]
    assert by_name[f"{a}to_add_out"] == [(f"{a}to_add_out", 0, 256)]
    c.close()
    c = opened(tmp_path, *pf.zimage(depth=1)[:2])
    by_name = {h.name: [(p.name, p.first, p.rows) for p in c.pieces(h)] for h in c.host_linears()}
    f = "layers.0.feed_forward."
    assert by_name[f"{f}net.0.proj"] == [(f"{f}w3", 0, 768), (f"{f}w1", 768, 768)]
    assert by_name[f"{f}w2"] == [(f"{f}w2", 0, 256)] and by_name["layers.0.attention.qkv"] == [("layers.0.attention.qkv", 0, 768)]


def test_refiners_in_16_bit(tmp_path):
    """The form of files with skip_refiners: q, k and v apart become the host's qkv, the stacked SwiGLU its w3 and w1."""
    tensors, meta, layers = pf.zimage("nvfp4", skip_refiners=True)
    c = opened(tmp_path, tensors, meta)
    assert c.warnings == []
    kinds = {host.name: host.kind for host in c.host_linears()}
    assert all((kind == "plain") == ("refiner" in name) for name, kind in kinds.items()) and "w4a4" in kinds.values()
    got = dict(c.plain_tensors())
    assert [(name, tuple(t.shape)) for name, t in got.items()] == [(name, shape) for name, shape, _ in c.plain_specs()]
    p = "context_refiner.0."
    stacked = tensors[f"{p}feed_forward.net.0.proj.weight"]
    assert torch.equal(got[f"{p}feed_forward.w3.weight"], stacked[:768]) and torch.equal(got[f"{p}feed_forward.w1.weight"], stacked[768:])
    assert torch.equal(got[f"{p}attention.qkv.weight"], torch.cat([tensors[f"{p}attention.to_{q}.weight"] for q in "qkv"]))
    assert torch.equal(got[f"{p}attention.out.weight"], tensors[f"{p}attention.to_out.0.weight"])
    assert torch.equal(got[f"{p}feed_forward.w2.weight"], tensors[f"{p}feed_forward.net.2.weight"])
    assert not any(name.endswith(("qkv.bias", "w1.bias")) for name in got)
    with pytest.raises(ValueError, match="not quantised"):
        c.load_linear(next(h for h in c.host_linears() if h.kind == "plain"))
    c.close()


@pytest.mark.parametrize("stacked", [True, False])
def test_qkv_left_in_16_bit(stacked, tmp_path):
    tensors, meta, _ = pf.qwen(depth=1)
    a = "transformer_blocks.0.attn."
    tensors = {key: t for key, t in tensors.items() if not key.startswith(f"{a}to_qkv.")}
    weight, bias = torch.randn(768, 256).bfloat16(), torch.randn(768).bfloat16()
    if stacked:
        tensors |= {f"{a}to_qkv.weight": weight, f"{a}to_qkv.bias": bias}
    else:
        for i, q in enumerate("qkv"):
            tensors |= {f"{a}to_{q}.weight": weight[256 * i : 256 * (i + 1)], f"{a}to_{q}.bias": bias[256 * i : 256 * (i + 1)]}
    c = opened(tmp_path, tensors, meta)
    assert c.warnings == [] and {h.name for h in c.host_linears() if h.kind == "plain"} == {f"{a}to_qkv"}
    got = dict(c.plain_tensors())
    assert torch.equal(torch.cat([got[f"{a}to_{q}.weight"] for q in "qkv"]), weight)
    assert torch.equal(torch.cat([got[f"{a}to_{q}.bias"] for q in "qkv"]), bias)
    with pytest.raises(KeyError):
        c.load_layer(f"{a}to_qkv")
    c.close()
    if not stacked:
        del tensors[f"{a}to_k.weight"]
        refused(tmp_path, tensors, meta, f"{a}to_k.weight is missing", "[256, 256]")


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("modulation", ["w4a4", "plain"])
def test_modulation_in_other_precisions(modulation, precision, tmp_path):
    """As third parties make it: in W4A4 (read as an ordinary layer, with a warning), or left in 16 bit."""
    tensors, meta, layers = pf.qwen(precision, modulation=modulation)
    c = opened(tmp_path, tensors, meta)
    mods = [host for host in c.host_linears() if "_mod." in host.name]
    assert len(mods) == 4 and {host.kind for host in mods} == {modulation}
    if modulation == "w4a4":
        assert len(c.warnings) == 1 and "transformer_blocks.0.img_mod.1" in c.warnings[0]
        for host in mods:
            same_layer(c.load_linear(host)[0][0], layers[host.name])
    else:
        assert c.warnings == []
        got = dict(c.plain_tensors())
        assert all(torch.equal(got[f"{host.name}.{s}"], tensors[f"{host.name}.{s}"]) for host in mods for s in ("weight", "bias"))
    c.close()


# ---- damage -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MAKE)
def test_every_tensor_is_missed_and_misshapen_by_name(family, tmp_path):
    """Tensor by tensor: taken out, its last dimension doubled, its type changed. The message has its name."""
    tensors, meta, layers = MAKE[family](rank=16, depth=1)
    first = next(iter(layers))
    for key in tensors:
        layer = next((p for p in layers if key.startswith(p + ".")), None)
        if layer not in (None, first) and "mod" not in key:
            continue  # one W4A4 layer stands for all
        less = {k: t for k, t in tensors.items() if k != key}
        if key.endswith("smooth_factor_orig"):
            assert opened(tmp_path, less, meta).warnings == []
        elif layer and key.endswith("qweight"):
            refused(tmp_path, less, meta, "is missing", layer)
        elif not key.endswith("pad_token"):
            refused(tmp_path, less, meta, f"{key} is missing")
        if key != "img_in.weight":  # which says how wide the input is
            refused(tmp_path, tensors | {key: torch.cat([tensors[key]] * 2, -1)}, meta, "expected")
        if not key.endswith("qweight"):
            refused(tmp_path, tensors | {key: tensors[key].int()}, meta, key, "I32", "expected")


@pytest.mark.parametrize(
    ("family", "key", "t", "words"),
    [
        ("qwen-image", "transformer_blocks.1.attn.to_qkv.proj_up", torch.zeros(768, 16).bfloat16(), ("BF16 [768, 16]", "[768, 32]")),
        ("qwen-image", "transformer_blocks.1.img_mod.1.wzeros", torch.zeros(4, 1536).bfloat16(), ("BF16 [4, 1536]", "[16, 1536]")),
        ("z-image", "layers.1.feed_forward.net.2.wscales", torch.zeros(12, 128).bfloat16(), ("[12, 128]", "BF16 or F16 [12, 256]")),
        ("z-image", "layers.0.attention.to_out.0.proj_down", torch.zeros(256, 24).bfloat16(), ("[256, 24]", "multiple of 16")),
        ("z-image", "noise_refiner.0.adaLN_modulation.0.weight", torch.zeros(768, 256).bfloat16(), ("[768, 256]", "[1024, 256]")),
    ],
)
def test_shapes_found_and_expected_are_told(family, key, t, words, tmp_path):
    tensors, meta, _ = MAKE[family]()
    refused(tmp_path, tensors | {key: t}, meta, key, *words)


def test_blocks_that_are_missing(tmp_path):
    tensors, meta, _ = pf.qwen(depth=3)
    refused(tmp_path, {k: t for k, t in tensors.items() if "blocks.1." not in k}, meta, "transformer_blocks.1 is missing", "2 of 3")
    refused(tmp_path, {k: t for k, t in tensors.items() if "blocks.2." not in k}, meta, "transformer_blocks.2 is missing", "says 3")
    tensors, meta, _ = pf.zimage(refiners=2)
    less = {k: t for k, t in tensors.items() if not k.startswith("context_refiner.1.")}
    refused(tmp_path, less, meta, "context_refiner.1 is missing")
    refused(tmp_path, less, None, "2 blocks noise_refiner.* and 1 blocks context_refiner.*")
    none = {k: t for k, t in tensors.items() if not k.startswith("noise_refiner.")}
    refused(tmp_path, none, meta, "holds no block noise_refiner.0")


def test_sizes_that_cannot_be(tmp_path):
    tensors, meta, _ = pf.qwen(depth=1)
    p = "transformer_blocks.0.img_mlp.net.2.qweight"
    refused(tmp_path, tensors | {p: torch.zeros(256, 256, dtype=torch.int8)}, meta, "512 inputs", "expected 1024")
    refused(tmp_path, tensors | {"img_in.weight": torch.zeros(200, 64)}, None, "hidden size is 200", "multiple of 128")
    tensors, meta, _ = pf.zimage(depth=1)
    refused(tmp_path, tensors | {"all_x_embedder.2-1.weight": torch.zeros(256, 32)}, None, "takes 32", "gives 64")
    refused(tmp_path, tensors | {"layers.0.feed_forward.net.2.qweight": torch.zeros(256, 320, dtype=torch.int8)}, None, "640", "256")


@pytest.mark.parametrize("family", MAKE)
def test_precision_and_values(family, tmp_path):
    tensors, _, layers = MAKE[family]("int4", depth=1)
    _, meta, _ = MAKE[family]("nvfp4", depth=1)
    refused(tmp_path, tensors, meta, "NVFP4", "INT4")
    prefix = next(iter(layers))
    c = opened(tmp_path, tensors | {f"{prefix}.smooth_factor": torch.zeros(256).bfloat16()})
    with pytest.raises(CheckpointError, match=rf"{prefix}.smooth_factor holds .*zero"):
        c.load_layer(prefix)
    c.close()
    twice = tensors | {f"{prefix}.lora_up": tensors[f"{prefix}.proj_up"]}
    refused(tmp_path, twice, None, f"{prefix}.lora_up", f"{prefix}.proj_up", "two names")


def test_metadata_that_contradicts_warns(tmp_path):
    for make, changes in (
        (pf.qwen, {"attention_head_dim": 64, "in_channels": 16, "num_layers": 1, "axes_dims_rope": [1, 2, 3]}),
        (pf.zimage, {"dim": 128, "n_heads": 30, "n_layers": 1, "rope_theta": "hot", "axes_dims": None, "t_scale": 7.0}),
    ):
        tensors, meta, _ = make()
        plain = opened(tmp_path, tensors, meta).config
        c = opened(tmp_path, tensors, meta | {"config": json.dumps(json.loads(meta["config"]) | changes)})
        assert len(c.warnings) == sum(value is not None for value in changes.values()), c.warnings
        believed = {"time_scale": 7.0} if "t_scale" in changes else {}
        assert c.config == plain | believed
        c.close()


@pytest.mark.parametrize("text", ["{", "[]", "null", "{" * 100000])
@pytest.mark.parametrize("family", MAKE)
def test_broken_metadata(family, text, tmp_path):
    tensors, meta, _ = MAKE[family](depth=1)
    c = opened(tmp_path, tensors, {"config": text, "quantization_config": text})
    assert len(c.warnings) == 2 and c.config == opened(tmp_path, tensors, meta).config


@pytest.mark.parametrize("family", MAKE)
def test_unknown_tensors_and_a_bias_that_nothing_takes_warn(family, tmp_path):
    tensors, meta, _ = MAKE[family](depth=1)
    extra = {"layers.0.attention.to_out.0.bias": torch.zeros(256).bfloat16(), "vae.x": torch.zeros(3)}
    c = opened(tmp_path, tensors | extra, meta)
    assert len(c.warnings) == 1 and all(key in c.warnings[0] for key in extra)
    assert {"qwen-image": "Qwen-Image", "z-image": "Z-Image"}[family] in c.warnings[0]


def test_other_files(tmp_path):
    c = open_packed(ff.DATA / "mini_flux_nvfp4.safetensors")
    assert (c.family, c.precision, c.model_class) == ("flux", "nvfp4", "Flux")
    c.close()
    t5 = {"encoder.block.0.layer.0.SelfAttention.q.qweight": torch.zeros(4, 4, dtype=torch.int16)}
    refused(tmp_path, t5, None, "T5", "FLUX.1, Qwen-Image or Z-Image")
    for family, make in MAKE.items():
        path = pf.save(tmp_path / "m.safetensors", *make(depth=1)[:2])
        with pytest.raises(CheckpointError, match="not a SVDQuant FLUX.1 checkpoint"):
            open_checkpoint(path)
        assert open_packed(path).family == family


# ---- inspect ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MAKE)
def test_inspect_shows_everything(family, tmp_path):
    tensors, meta, layers = MAKE[family]("nvfp4", 16)
    path = pf.save(tmp_path / "m.safetensors", tensors, meta)
    r = inspect(path)
    assert (r["family"], r["precision"], r["rank"], r["names"], r["warnings"]) == (family, "nvfp4", 16, "v2", [])
    assert r["tensors"] == len(tensors) and sum(r["bytes_by_kind"].values()) == r["bytes"]
    assert r["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert r["bytes_by_kind"]["codes"] == sum(x.n * x.k // 2 for x in layers.values() if x.precision != "w4a16")
    blocks = {"blocks": 2} if family == "qwen-image" else {"layers": 2, "noise_refiner": 1, "context_refiner": 1}
    linears = {"w4a16": 4, "w4a4": 16} if family == "qwen-image" else {"w4a4": 16}
    assert r["layers"] == blocks | {"linears": linears}
    assert json.loads(json.dumps(r)) == r
    text = format_report(r)
    for word in ("NVFP4", "rank 16", "low rank", "image_model", "2 blocks" if family == "qwen-image" else "2 layers, 1 noise_refiner"):
        assert word in text, text
    assert r["usable"] and "Load it with Nunchaku" in r["sentence"]
    if family == "z-image":
        del tensors["layers.1.attention.to_qkv.smooth_factor"]
        r = inspect(pf.save(path, tensors, meta))
        assert not r["usable"] and "Z-Image SVDQuant checkpoint that cannot be used" in r["sentence"]
        assert "to_qkv.smooth_factor is missing" in format_report(r)
