"""read_lora on a generated file of every format: what the state dict does to the weights is what the file was meant to do.

The evaluator below is written from what comfy.lora and comfy.weight_adapter compute, with names from the generators (tests/lora_files.py);
it shares no code with the reader. That the hosts' own load_lora takes every key is tested with the hosts (tests/host).
"""

import functools
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tonfa.models.formats import nunchaku as nk
from tonfa.models.formats.flux_names import to_v2
from tonfa.models.formats.lora import LoraError, lora_family, read_lora

_spec = importlib.util.spec_from_file_location("lora_files", Path(__file__).parents[2] / "lora_files.py")
files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(files)
Flux, lora_file, FILES = files.Flux, files.lora_file, files.FILES
DATA = Path(__file__).resolve().parents[2] / "data"
FLUX = Flux(hidden=64, depth=2, depth_single=2, head_dim=32)
NAME = "style.safetensors"
UPS = (
    ".lora_up.weight",
    "_lora.up.weight",
    ".lora_B.weight",
    ".lora_B.default.weight",
    ".lora_B",
    ".lora.up.weight",
    ".lora_linear_layer.up.weight",
)


def host_names(flux):
    """Every name that both ComfyUI versions have for a weight -> (native name, first row, rows, swapped)."""
    out = {}
    for linear in files.linears(flux):
        out[f"diffusion_model.{linear.native}"] = out["lora_unet_" + linear.native.replace(".", "_")] = (linear.native, 0, linear.n, False)
        for module, first, rows in linear.parts:
            to = (linear.native, first, rows, module == "norm_out.linear")
            flat = module.replace(".", "_")
            out[f"transformer.{module}"] = out[f"lora_transformer_{flat}"] = out[f"lycoris_{flat}"] = to
        if linear.native.endswith("linear1"):
            out[f"diffusion_model.{linear.native}_qkv"] = (linear.native, 0, 3 * linear.k, False)
    for native, module in files.norms(flux):
        out[f"transformer.{module}"] = (native, 0, None, False)
    return out


def merged_delta(parts, w):
    """What an adapter adds to the rows `w` of a weight, after the host's formulas, at strength 1."""
    t = {k: v.float() for k, v in parts.items()}
    alpha = t.get("alpha")
    if up := next((k for k in UPS if k in t), None):
        down = t[
            {".lora_up.weight": ".lora_down.weight", "_lora.up.weight": "_lora.down.weight"}.get(up)
            or up.replace("lora_B", "lora_A").replace(".up.", ".down.")
        ]
        delta = t[up] @ down * (1.0 if alpha is None else alpha / len(down))
    elif ".hada_w1_a" in t:
        delta = (t[".hada_w1_a"] @ t[".hada_w1_b"]) * (t[".hada_w2_a"] @ t[".hada_w2_b"]) * (alpha / len(t[".hada_w1_b"]))
    elif ".lokr_w1" in t:
        w2 = t[".lokr_w2"] if ".lokr_w2" in t else t[".lokr_w2_a"] @ t[".lokr_w2_b"] * (alpha / len(t[".lokr_w2_b"]))
        delta = torch.kron(t[".lokr_w1"], w2)
    elif ".a1.weight" in t:
        a1, a2, b1, b2 = (t[f".{x}.weight"] for x in ("a1", "a2", "b1", "b2"))
        old = a1.shape[0] == a2.shape[1] == b1.shape[0] == b2.shape[1]
        if b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]:
            old = old and a2.shape[0] == w.shape[0] == w.shape[1]
        delta = (b2 @ b1 + w @ a2 @ a1 if old else w @ a1 @ a2 + b1 @ b2) * (alpha / (len(a1) if old else len(a2)))
    elif ".oft_blocks" in t:
        delta = turned(t, alpha, w) - w
    elif ".diff" in t:
        delta = t[".diff"]
    else:
        return t[".set_weight"] - w
    if ".dora_scale" in t:
        rows = t[".dora_scale"].shape[0] == len(w)
        norm = w.norm(dim=1, keepdim=True) if rows else (w + delta).norm(dim=0, keepdim=True)
        delta = (w + delta) * (t[".dora_scale"] / (norm + torch.finfo(torch.float32).eps)) - w
    return delta


def turned(t, alpha, w):
    blocks = t[".oft_blocks"]
    if blocks.ndim == 3:
        return (files.rotation(blocks).transpose(1, 2) @ w.view(len(blocks), -1, w.shape[1])).reshape(w.shape)
    assert alpha == 0  # None raises in both hosts
    out, b = w, blocks.shape[-1]
    for i, r in enumerate(files.rotation(blocks)):
        k = 2**i * (b // 2)
        x = out.unflatten(0, (-1, 2, k)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, b))
        x = torch.einsum("bij,bjk->bik", r, x)
        out = x.flatten(0, 1).unflatten(0, (-1, k, 2)).transpose(1, 2).flatten(0, 2)
    return out


def effect(state, flux, weights):
    """What the host would do with a state dict: (deltas, biases, added, values), as in Made. Fails on a key that the host does not take."""
    names, left = host_names(flux), dict(state)
    shapes = {x.native: (x.n, x.k) for x in files.linears(flux)}
    out = files.Made()
    for key in [k for k in left if k.endswith((".bias.set_weight", ".reshape_weight"))]:
        left.pop(key)
    for name, (native, first, rows, swapped) in names.items():
        parts = {k[len(name) :]: left.pop(k) for k in list(left) if k.startswith(name) and k[len(name) :] in SUFFIXES}
        if "_norm" in native:
            for suffix, table in ((".diff", out.added), (".w_norm", out.added), (".set_weight", out.values)):
                if suffix in parts:
                    table[native] = parts.pop(suffix).float()
        if ".diff_b" in parts:
            assert rows == shapes[native][0] and not swapped, f"{name}.diff_b is lost by the host"
            out.biases[native] = parts.pop(".diff_b").float()
        if ".alpha" in parts:
            parts["alpha"] = parts.pop(".alpha")
        if parts:
            n, k = shapes[native]
            w = weights.get(native, torch.zeros(n, k))[first : first + rows]
            delta = merged_delta(parts, w)
            delta = torch.cat(delta.chunk(2)[::-1]) if swapped else delta
            if native not in out.deltas:
                out.deltas[native] = torch.zeros(n, delta.shape[1])
            out.deltas[native][first : first + rows] += delta
    assert not left, f"the host would not load {list(left)[:3]}"
    return out


SUFFIXES = {
    *UPS, ".lora_down.weight", "_lora.down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora_A", ".lora.down.weight",
    ".lora_linear_layer.down.weight", ".alpha", ".dora_scale", ".diff", ".diff_b", ".set_weight", ".w_norm", ".oft_blocks", ".rescale",
    ".reshape_weight", ".bias.set_weight", ".bias.diff",
    *(f".hada_{p}" for p in ("w1_a", "w1_b", "w2_a", "w2_b")), *(f".{p}.weight" for p in ("a1", "a2", "b1", "b2")),
    *(f".lokr_{p}" for p in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b")),
}  # fmt: skip


def close(got, wanted, tolerance=2e-6):
    """Two tables of tensors agree, in the Frobenius norm of each."""
    assert got.keys() == wanted.keys(), got.keys() ^ wanted.keys()
    for key in wanted:
        error = (got[key] - wanted[key]).norm() / wanted[key].norm().clamp(min=1e-12)
        assert error < tolerance, (key, float(error))


def does_what_it_should(file, made, flux=FLUX, tolerance=2e-6):
    got = effect(file.state, flux, made.weights)
    for table in ("deltas", "biases", "added", "values"):
        close(getattr(got, table), getattr(made, table), tolerance)


# -- every format ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_every_format_does_what_it_is_meant_to_do(file):
    made = lora_file(file, FLUX)
    style, host_reads, _ = FILES[file]
    read = read_lora(made.tensors, NAME, hidden=FLUX.hidden, depths=(FLUX.depth, FLUX.depth_single))
    assert (read.format, read.ignored, read.text_encoder, read.host_reads) == (style, [], [], host_reads)
    does_what_it_should(read, made)
    if host_reads and file != "control":
        assert read.state.keys() == made.tensors.keys() and all(read.state[k] is made.tensors[k] for k in read.state)


LOW_RANK = ["diffusers", "diffusers bare", "kohya", "kohya split", "xlabs singles", "peft bfl", "bfl", "comfyui", "control"]


@pytest.mark.parametrize("file", LOW_RANK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_tensors_of_every_type_pass_untouched(file, dtype):
    made = lora_file(file, FLUX, dtype=dtype)
    read = read_lora(made.tensors, NAME)
    factors = [t for t in read.state.values() if t.ndim == 2]
    assert factors and all(t.dtype == dtype for t in factors)
    originals = {t.data_ptr() for t in made.tensors.values()}
    assert all(t.data_ptr() in originals for t in factors)
    does_what_it_should(read, made)


@pytest.mark.parametrize("file", LOW_RANK)
@pytest.mark.parametrize("rank", [1, 3, 32, 512])
@pytest.mark.parametrize("alpha", [None, 8.0])
def test_every_rank_with_and_without_alpha(file, rank, alpha):
    made = lora_file(file, Flux(hidden=32, depth=1, depth_single=1), rank=rank, alpha=alpha)
    does_what_it_should(read_lora(made.tensors, NAME), made, Flux(hidden=32, depth=1, depth_single=1))


@pytest.mark.parametrize(
    "file", ["diffusers", "diffusers bare", "kohya split", "onetrainer", "peft diffusers", "control diffusers", "biases split", "dora peft"]
)
@pytest.mark.parametrize(
    "skip", [("to_k", "add_k_proj"), ("to_q", "to_v", "proj_mlp"), ("to_q", "to_k", "to_v"), ("single_",), ("to_out",)]
)
def test_parts_of_a_fused_layer_may_be_missing(file, skip):
    made = lora_file(file, FLUX, skip=skip)
    assert not any(s in k for s in skip for k in made.tensors)
    does_what_it_should(read_lora(made.tensors, NAME, hidden=FLUX.hidden), made)


def test_the_whole_of_the_files_that_the_host_converts_itself():
    big = Flux(hidden=16, depth=19, depth_single=38)
    made = lora_file("xlabs singles", big, rank=1)
    read = read_lora(made.tensors, NAME)
    assert read.host_reads and read.format == "xlabs"
    does_what_it_should(read, made, big)


def test_text_encoder_keys_are_left_to_the_host():
    made = lora_file("kohya", FLUX)
    text = {f"lora_te{i}_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(1, 4) for i in (1, 2, 3)}
    text["text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"] = torch.ones(1, 4)
    read = read_lora(made.tensors | text, NAME)
    assert read.text_encoder == list(text) and read.host_reads and text.keys() <= read.state.keys() and not read.ignored
    made = lora_file("xlabs", FLUX)
    read = read_lora(made.tensors | text, NAME)
    assert read.text_encoder == list(text) and text.keys() <= read.state.keys() and not read.ignored
    with pytest.raises(LoraError, match="style.safetensors changes text encoders only .*lora_te1"):
        read_lora(text, NAME)


def test_unknown_keys_are_named_and_the_rest_is_read():
    made = lora_file("diffusers", FLUX)
    odd = {"transformer.transformer_blocks.0.attn.to_q.lora_C.weight": torch.ones(3), "step": torch.tensor(5)}
    odd["transformer.transformer_blocks.1.no_such_layer.lora_A.weight"] = torch.ones(1, 4)
    read = read_lora(made.tensors | odd, NAME)
    assert sorted(read.ignored) == sorted(odd) and not read.host_reads
    does_what_it_should(read, made)


def test_an_alpha_without_a_patch_changes_nothing():
    made = lora_file("kohya", FLUX, alpha=2.0, skip=("linear2",))
    read = read_lora(made.tensors | {"lora_unet_single_blocks_0_linear2.alpha": torch.tensor(1.0)}, NAME)
    assert read.ignored == ["lora_unet_single_blocks_0_linear2.alpha"]
    does_what_it_should(read, made)


def dora_on_lokr(m, _, w):
    tensors, delta = files.lokr(m, "", w)
    norm = w.norm(dim=1, keepdim=True)
    scale = (norm * 1.1).bfloat16()
    return tensors | {"dora_scale": scale}, (w + delta) * (scale.float() / (norm + torch.finfo(torch.float32).eps)) - w


def test_the_last_layer_of_diffusers_has_its_halves_swapped():
    """Whatever the patch is: some the host swaps, the rest come swapped."""
    made = [files.lokr, files.loha, files.glora, files.oft, files.dora, files.whole, files.replaced, dora_on_lokr]
    made += [
        functools.partial(files.glora, old=True),
        functools.partial(files.dora, columns=True),
        functools.partial(files.dora, peft=True),
    ]
    for make in made:
        m = files.Maker(FLUX)
        linear = files.linears_outside(FLUX)[-1]
        weight = m.weight(linear)
        ours = torch.cat(weight.chunk(2)[::-1])  # as diffusers has it
        tensors, delta = make(m, "", ours)
        m.made.tensors = {f"transformer.norm_out.linear.{k}": t for k, t in tensors.items()}
        m.add(linear, "norm_out.linear", 0, delta)
        does_what_it_should(read_lora(m.made.tensors, NAME), m.made)


def test_biases_are_scaled_as_the_pair_beside_them_and_added_up():
    """lora_B.bias is part of lora_B, so alpha / rank holds for it; with a patch of the whole bias besides, both count."""
    key = "base_model.model.transformer_blocks.0.attn.to_k"
    tensors = {f"{key}.lora_A.weight": torch.ones(4, 64), f"{key}.lora_B.weight": torch.ones(64, 4), f"{key}.alpha": torch.tensor(2.0)}
    tensors |= {f"{key}.lora_B.bias": torch.ones(64), "diffusion_model.double_blocks.0.img_attn.qkv.diff_b": torch.ones(192)}
    got = read_lora(tensors, NAME).state["diffusion_model.double_blocks.0.img_attn.qkv.diff_b"]
    assert torch.equal(got, torch.tensor([1.0] * 64 + [1.5] * 64 + [1.0] * 64))


def test_bias_patches_under_their_own_names():
    tensors = {
        "diffusion_model.single_blocks.1.linear1.bias.diff": torch.ones(7 * 64),
        "diffusion_model.single_blocks.1.linear2.bias.set_weight": torch.ones(64),
    }
    read = read_lora(tensors, NAME)
    assert read.host_reads and read.state.keys() == tensors.keys()
    tensors["base_model.model.img_in.lora_A.weight"], tensors["base_model.model.img_in.lora_B.weight"] = (
        torch.ones(2, 64),
        torch.ones(64, 2),
    )
    read = read_lora(tensors, NAME)
    assert not read.host_reads and not read.ignored
    assert {"diffusion_model.single_blocks.1.linear1.diff_b", "diffusion_model.single_blocks.1.linear2.bias.set_weight"} < read.state.keys()


# -- img_in of other widths --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["control", "control prefix", "control diffusers", "control peft"])
@pytest.mark.parametrize("in_width", [None, 64, 128])
def test_a_control_lora_widens_img_in(file, in_width):
    read = read_lora(lora_file(file, FLUX).tensors, NAME, in_width=in_width)
    shape = read.state.get("diffusion_model.img_in.reshape_weight")
    assert (shape is None and in_width == 128) or shape.tolist() == [64, 128]
    assert read.state["diffusion_model.img_in.lora_A.weight"].shape[1] == 128


@pytest.mark.parametrize("file", ["diffusers", "kohya", "bfl", "diff outside", "loha outside"])
def test_a_plain_lora_is_padded_for_a_wider_model(file):
    wide = 384
    if file.endswith("outside"):
        m = files.Maker(FLUX)
        linear = next(x for x in files.linears_outside(FLUX) if x.native == "img_in")
        tensors, delta = (files.whole if file == "diff outside" else files.loha)(m, "", m.weight(linear))
        m.made.tensors = {f"lora_unet_img_in.{k}": t for k, t in tensors.items()}
        m.add(linear, "img_in", 0, delta)
        made = m.made
    else:
        made = lora_file(file, FLUX)
    read = read_lora(made.tensors, NAME, in_width=wide)
    assert not read.host_reads and not any("reshape" in k for k in read.state)
    made.deltas["img_in"] = torch.nn.functional.pad(made.deltas["img_in"], (0, wide - 64))
    does_what_it_should(read, made, Flux(**{**vars(FLUX), "in_width": wide}))


def test_what_cannot_be_fitted_to_img_in_is_told():
    m = files.Maker(Flux(hidden=64, in_width=128))
    tensors = {f"lora_unet_img_in.{k}": t for k, t in files.lokr(m, "", torch.zeros(64, 128))[0].items()}
    with pytest.raises(LoraError, match="lora_unet_img_in.lokr_w1 is for a model with 128 input channels, the loaded one has 64"):
        read_lora(tensors, NAME, in_width=64)
    with pytest.raises(LoraError, match="128 input channels, the loaded one has 384"):
        read_lora(tensors, NAME, in_width=384)
    assert read_lora(tensors, NAME, in_width=128).host_reads
    made = lora_file("control", FLUX).tensors | {"img_in.reshape_weight": torch.tensor([64, 96])}
    with pytest.raises(LoraError, match=r"img_in.reshape_weight says \[64, 96\], the tensors beside it are for \[64, 128\]"):
        read_lora(made, NAME)


# -- files that nunchaku converted -------------------------------------------------------------------------------------------------------


def unpacked(tensors):
    """base callable over the packed low-rank factors of a checkpoint's tensors."""

    def base(layer):
        if f"{layer}.lora_down" not in tensors:
            return None
        down, up = tensors[f"{layer}.lora_down"], tensors[f"{layer}.lora_up"]
        return nk.unpack_down(down, *down.shape).t(), nk.unpack_up(up, *up.shape)

    return base


def test_the_columns_of_the_golden_are_those_that_were_put_in():
    """lora_mini_flux_int4 holds the diffusers LoRA beside what nunchaku's converter made of it for mini_flux_int4."""
    golden, checkpoint = (load_file(DATA / f"{f}.safetensors") for f in ("lora_mini_flux_int4", "mini_flux_int4"))
    source, made = ({k.split(".", 1)[1]: t for k, t in golden.items() if k.startswith(start)} for start in ("input.", "output."))
    read = read_lora(made, NAME, unpacked(checkpoint), hidden=128, depths=(1, 1), in_width=64)
    assert (read.format, read.ignored, read.host_reads) == ("Nunchaku", [], False)
    state = dict(read.state)

    def columns(name):
        return state.pop(f"diffusion_model.{name}.lora_A.weight"), state.pop(f"diffusion_model.{name}.lora_B.weight")

    qkv = [f"transformer.transformer_blocks.0.attn.to_{p}" for p in "qkv"]
    down, up = columns("double_blocks.0.img_attn.qkv")
    assert torch.equal(down, torch.cat([source[f"{p}.lora_A.weight"] for p in qkv]))
    assert torch.equal(up, torch.block_diag(*[source[f"{p}.lora_B.weight"].float() for p in qkv]).bfloat16())
    for native, theirs in (
        ("double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_out.0"),
        ("double_blocks.0.img_mlp.0", "transformer_blocks.0.ff.net.0.proj"),
        ("double_blocks.0.img_mlp.2", "transformer_blocks.0.ff.net.2"),
        ("double_blocks.0.img_mod.lin", "transformer_blocks.0.norm1.linear"),
        ("single_blocks.0.linear2", "single_transformer_blocks.0.proj_out"),
        ("single_blocks.0.modulation.lin", "single_transformer_blocks.0.norm.linear"),
        ("img_in", "x_embedder"),
    ):
        down, up = columns(native)
        assert torch.equal(down, source[f"transformer.{theirs}.lora_A.weight"]), native
        assert torch.equal(up, source[f"transformer.{theirs}.lora_B.weight"]), native
    mlp = "transformer.single_transformer_blocks.0.proj_mlp"
    assert torch.equal(state.pop(f"{mlp}.lora_A.weight"), source[f"{mlp}.lora_A.weight"])
    assert torch.equal(state.pop(f"{mlp}.lora_B.weight"), source[f"{mlp}.lora_B.weight"])
    assert not state  # layers that the LoRA leaves alone are in the file, and are left out


@pytest.mark.parametrize("rank, base_rank", [(1, 16), (8, 32), (16, 128), (40, 48)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_converted_file_is_read_without_the_base(rank, base_rank, dtype):
    flux = Flux(hidden=128, depth=1, depth_single=2, head_dim=64)
    base = files.base_pairs(flux, base_rank, dtype)
    made = files.converted_file(base, flux, rank=rank)
    read = read_lora(made.tensors, NAME, base.get, hidden=128, depths=(1, 2), in_width=64)
    assert read.format == "Nunchaku" and not read.ignored
    assert read.state["diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight"].shape == (rank, 128)
    does_what_it_should(read, made, flux)
    newer = {to_v2(k): t for k, t in made.tensors.items()}
    assert any("attn.to_qkv.proj_down" in k for k in newer)
    does_what_it_should(read_lora(newer, NAME, base.get), made, flux)


def test_a_converted_file_with_vectors():
    """Biases and norms lie beside the columns, plain, in diffusers' names without prefix."""
    flux = Flux(hidden=128, depth=1, depth_single=1, head_dim=64)
    base = files.base_pairs(flux)
    made = files.converted_file(base, flux)
    control = lora_file("control diffusers", Flux(**{**vars(flux), "in_width": 32}))
    vectors = {k.removeprefix("transformer."): t for k, t in control.tensors.items() if t.ndim == 1}
    vectors = {k.replace(".lora_B.bias", ".bias"): t for k, t in vectors.items()}
    for part in ("transformer_blocks.0.attn.to_{}", "transformer_blocks.0.attn.add_{}_proj", "single_transformer_blocks.0.attn.to_{}"):
        fused = torch.cat([vectors.pop(part.format(p) + ".bias") for p in "qkv"])
        vectors[part.format("qkv") + ".bias"] = fused
    made.biases, made.values = control.biases, control.values
    read = read_lora(made.tensors | vectors, NAME, base.get)
    assert read.format == "Nunchaku" and not read.ignored
    does_what_it_should(read, made, flux)


def test_another_base_is_told():
    flux = Flux(hidden=128, depth=1, depth_single=1)
    base, other = files.base_pairs(flux), files.base_pairs(flux, seed=3)
    tensors = files.converted_file(base, flux, rank=4).tensors
    with pytest.raises(LoraError, match=r"style.*converted for another 4-bit model.*transformer_blocks.0.qkv_proj"):
        read_lora(tensors, NAME, other.get)
    one_bit = {k: (d.clone(), u.clone()) for k, (d, u) in base.items()}
    one_bit["single_transformer_blocks.0.mlp_fc2"][1].view(torch.int16)[5, 3] ^= 1
    with pytest.raises(LoraError, match="its columns of single_transformer_blocks.0.mlp_fc2 do not begin"):
        read_lora(tensors, NAME, one_bit.get)
    with pytest.raises(LoraError, match="its rank is 32 at most, the loaded model's 128"):
        read_lora(tensors, NAME, files.base_pairs(flux, 128).get)
    wide = files.converted_file(files.base_pairs(flux, 128), flux).tensors
    with pytest.raises(LoraError, match="its rank seems to be 144 or more, the loaded model's 32"):
        read_lora(wide, NAME, files.base_pairs(flux, 32).get)
    with pytest.raises(LoraError, match="transformer_blocks.0.qkv_proj is 384 x 128 there and 192 x 64 in the loaded model"):
        read_lora(tensors, NAME, files.base_pairs(Flux(hidden=64, depth=1, depth_single=1)).get)
    with pytest.raises(LoraError, match="single_transformer_blocks.0.* which the loaded model has not"):
        read_lora(tensors, NAME, {k: v for k, v in base.items() if not k.startswith("single")}.get)
    with pytest.raises(LoraError, match="NunchakuFluxLoraLoader behind the loader of that model"):
        read_lora(tensors, NAME)


def test_a_damaged_converted_file_is_told():
    flux = Flux(hidden=128, depth=1, depth_single=1)
    base = files.base_pairs(flux)
    for key, change, match in (
        ("transformer_blocks.0.qkv_proj.lora_up", None, "qkv_proj.lora_down is there, but the other factor"),
        ("transformer_blocks.0.norm1.linear.lora_down", None, "norm1.linear.lora_up is there, but the other factor"),
        ("transformer_blocks.0.mlp_fc1.lora_up", lambda t: t[:, :16], "same number of columns, a multiple of 16"),
        ("transformer_blocks.0.mlp_fc1.lora_up", lambda t: t[:100], "cannot be unpacked"),
        ("transformer_blocks.0.mlp_fc1.lora_up", lambda t: t * float("nan"), "transformer_blocks.0.mlp_fc1.*(NaN|begin)"),
        ("single_transformer_blocks.0.norm.linear.lora_up", lambda t: t[:7], "multiple of 3 belong"),
        ("single_transformer_blocks.00.norm.linear.lora_up", lambda t: t, "single_transformer_blocks.0.norm.linear.lora_down is there"),
        ("single_transformer_blocks.0.norm.linear.lora_up", lambda t: t * float("inf"), "holds NaN or infinity"),
    ):
        tensors = files.converted_file(base, flux).tensors
        old = tensors.pop(key.replace("00", "0"))
        if change is not None:
            tensors[key] = change(old)
        with pytest.raises(LoraError, match=match):
            read_lora(tensors, NAME, base.get)


# -- what is no LoRA for FLUX.1 ----------------------------------------------------------------------------------------------------------


def pair(name, n, k, suffixes=files.PEFT, r=2):
    return {f"{name}.{suffixes[0]}": torch.ones(r, k), f"{name}.{suffixes[1]}": torch.ones(n, r)}


def stack(pattern, count, *shape, **kwargs):
    return {k: t for i in range(count) for k, t in pair(pattern.format(i), *shape, **kwargs).items()}


K = {"suffixes": files.KOHYA}
FOREIGN = {
    "SDXL kohya": ("SDXL", pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_k", 640, 2048, **K)),
    "SDXL original": ("SDXL", pair("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_k", 640, 640, **K)),
    "SDXL by width": ("SDXL", pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 640, 2048, **K)),
    "SD 1.5": ("Stable Diffusion 1.5", pair("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 320, 768, **K)),
    "SD 1.5 diffusers": ("Stable Diffusion 1.5", pair("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", 320, 768)),
    "SD or SDXL": ("Stable Diffusion 1.5 or SDXL", pair("lora_unet_mid_block_attentions_0_proj_in", 1280, 1280, **K)),
    "Qwen-Image": (
        "Qwen-Image",
        pair("transformer_blocks.0.attn.to_q", 3072, 3072) | pair("transformer_blocks.0.img_mlp.net.2", 3072, 12288),
    ),
    "Qwen-Image kohya": ("Qwen-Image", pair("lora_unet_transformer_blocks_0_img_mod_1", 18432, 3072, **K)),
    "Qwen-Image attention": ("Qwen-Image", stack("transformer.transformer_blocks.{}.attn.to_q", 60, 64, 64)),
    "SD3": ("Stable Diffusion 3", stack("transformer.transformer_blocks.{}.attn.to_q", 24, 64, 64)),
    "SD3 of few blocks": ("Stable Diffusion 3", pair("transformer.transformer_blocks.3.attn.to_out.0", 1536, 1536)),
    "SD3 kohya": ("Stable Diffusion 3", pair("lora_unet_joint_blocks_0_context_block_attn_qkv", 4608, 1536, **K)),
    "FLUX.2": ("FLUX.2", pair("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 27648, 3072)),
    "FLUX.2 modulation": ("FLUX.2", pair("diffusion_model.double_stream_modulation_img.lin", 18432, 3072)),
    "FLUX.2 by shape": ("FLUX.2", pair("diffusion_model.single_blocks.0.linear1", 576, 64) | pair("diffusion_model.img_in", 64, 128)),
    "FLUX.2 by depth": ("FLUX.2", stack("diffusion_model.single_blocks.{}.modulation.lin", 48, 192, 64)),
    "HunyuanVideo": ("HunyuanVideo", pair("diffusion_model.double_blocks.0.img_attn_qkv", 9216, 3072)),
    "HunyuanVideo musubi": ("HunyuanVideo", pair("lora_unet_double_blocks_0_img_mlp_fc1", 12288, 3072, **K)),
    "HunyuanVideo diffusers": ("HunyuanVideo", stack("transformer.single_transformer_blocks.{}.attn.to_q", 40, 64, 64)),
    "Chroma": ("Chroma", pair("diffusion_model.distilled_guidance_layer.layers.0.in_layer", 5120, 5120)),
    "Wan": ("Wan", pair("diffusion_model.blocks.0.self_attn.q", 5120, 5120)),
    "Wan Fun": ("Wan", pair("lora_unet__blocks_0_cross_attn_k", 5120, 5120, **K)),
    "Z-Image": ("Z-Image or Lumina", pair("diffusion_model.layers.0.attention.to_q", 3840, 3840)),
    "HiDream": ("HiDream", pair("diffusion_model.double_stream_blocks.0.block.attn1.to_q", 2560, 2560)),
    "LTX-Video": ("LTX-Video, PixArt, SANA or CogVideoX", pair("diffusion_model.transformer_blocks.0.attn1.to_q", 2048, 2048)),
    "AuraFlow": ("AuraFlow", pair("transformer.joint_transformer_blocks.0.attn.to_q", 3072, 3072)),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_lora_of_another_family_is_named(case):
    family, tensors = FOREIGN[case]
    with pytest.raises(LoraError, match=rf"^style\.safetensors .*for {family}[,:].*Choose a LoRA that was made for FLUX\.1\.$") as told:
        read_lora(tensors, NAME, hidden=64, depths=(2, 2))
    assert any(k in str(told.value) for k in tensors)
    assert lora_family(tensors) == family
    with pytest.raises(LoraError):
        read_lora(tensors, NAME)


def test_families_by_keys_alone():
    assert {lora_family(list(lora_file(f, FLUX).tensors)) for f in FILES} == {"FLUX.1"}
    assert lora_family(["transformer_blocks.0.attn.to_qkv.proj_down", "single_transformer_blocks.0.attn.to_out.proj_up"]) == "FLUX.1"
    assert lora_family(["a.b.lora_A.weight"]) == lora_family([]) == "unknown"
    assert lora_family(["lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha"]) == "unknown"


@pytest.mark.parametrize(
    "names, what",
    [
        (["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.norm.query_norm.scale"], "an ordinary .* FLUX model"),
        (["decoder.conv_in.weight", "decoder.mid.block_1.conv1.weight"], "a VAE"),
        (["transformer_blocks.0.qkv_proj.qweight", "transformer_blocks.0.qkv_proj.lora_down"], "a FLUX.1 SVDQuant file"),
        (["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"], "a safetensors file without any model"),
        ([], "an empty safetensors file"),
    ],
)
def test_what_is_no_lora_is_named(names, what):
    with pytest.raises(LoraError, match=f"^style.safetensors is not a LoRA but {what}"):
        read_lora({k: torch.ones(4, 4) for k in names}, NAME)


def test_a_lora_with_nothing_for_flux():
    with pytest.raises(LoraError, match="style.safetensors has nothing that FLUX.1 could take .*'some.layer.lora_A.weight'"):
        read_lora(pair("some.layer", 4, 4), NAME)


def test_another_size_of_model_is_told():
    made = lora_file("kohya", Flux(hidden=96, depth=1, depth_single=1))
    with pytest.raises(
        LoraError,
        match=r"does not fit the model: lora_unet_\S+ is for .* 576 x 96 .* 384 x 64 is right for the loaded model .hidden size 64",
    ):
        read_lora(made.tensors, NAME, hidden=64)
    made.tensors["lora_unet_single_blocks_0_linear2.lora_up.weight"] = torch.ones(95, 4)
    with pytest.raises(
        LoraError, match="contradicts itself: lora_unet_single_blocks_0_linear2.* 95 x 480 .* 96 x 480 is right by the other"
    ):
        read_lora(made.tensors, NAME)
    last = pair("transformer.proj_out", 32, 64)
    with pytest.raises(LoraError, match="transformer.proj_out.lora_A.weight is for a layer of 32 x 64 .* 64 x 64 is right for"):
        read_lora(last, NAME, hidden=64)
    with pytest.raises(LoraError, match="is for a layer of 3072 x 2048 .* 3072 x 4096 is right for"):
        read_lora(pair("transformer.context_embedder", 3072, 2048), NAME, hidden=3072)
    with pytest.raises(LoraError, match="norm_q.set_weight is for a layer of 64 x any .* 128 x any is right for"):
        read_lora({"transformer.transformer_blocks.0.attn.norm_q.set_weight": torch.ones(64)}, NAME, hidden=3072)
    assert read_lora(pair("transformer.context_embedder", 64, 2048), NAME, hidden=64).host_reads


def test_blocks_that_the_model_lacks_are_left_out_and_named():
    made = lora_file("diffusers", Flux(hidden=64, depth=3, depth_single=4))
    read = read_lora(made.tensors, NAME, hidden=64, depths=(2, 2))
    gone = ("transformer.transformer_blocks.2.", "transformer.single_transformer_blocks.2.", "transformer.single_transformer_blocks.3.")
    assert sorted(read.ignored) == sorted(k for k in made.tensors if k.startswith(gone)) and not read.host_reads
    does_what_it_should(read, lora_file("diffusers", FLUX, skip=gone), FLUX, tolerance=9)  # other random numbers, the same layers


# -- damage ------------------------------------------------------------------------------------------------------------------------------

QKV = "lora_unet_double_blocks_0_img_attn_qkv"


@pytest.mark.parametrize(
    "change, match",
    [
        ({f"{QKV}.lora_down.weight": None}, f"{QKV}.lora_up.weight is there, but its lora_down .lora_A. is not"),
        ({f"{QKV}.lora_up.weight": None}, f"{QKV}.lora_down.weight is there, but its lora_up .lora_B. is not"),
        ({f"{QKV}.lora_up.weight": torch.ones(192, 5)}, r"up.weight is \[192, 5\] and .*down.weight is \[4, 64\]: their ranks differ"),
        ({f"{QKV}.lora_up.weight": torch.ones(192)}, r"lora_up.weight should be a matrix, it is \[192\]"),
        ({f"{QKV}.lora_up.weight": torch.ones(192, 4, 3, 3)}, "should be a matrix"),
        ({f"{QKV}.lora_up.weight": torch.ones(192, 0), f"{QKV}.lora_down.weight": torch.ones(0, 64)}, "should be a matrix"),
        ({f"{QKV}.lora_up.weight": torch.full((192, 4), float("nan"))}, f"{QKV}.lora_up.weight holds NaN or infinity"),
        ({f"{QKV}.lora_up.weight": torch.full((192, 4), float("inf")).to(torch.float8_e5m2)}, "holds NaN or infinity"),
        ({f"{QKV}.lora_up.weight": torch.full((192, 4), float("nan")).to(torch.float8_e4m3fn)}, "holds NaN or infinity"),
        ({f"{QKV}.lora_up.weight": torch.ones(192, 4).to(torch.int8)}, "is stored as torch.int8"),
        ({f"{QKV}.alpha": torch.ones(2)}, f"{QKV}.alpha should be one number"),
        ({f"{QKV}.alpha": torch.tensor(float("nan"))}, f"{QKV}.alpha holds NaN"),
        ({f"{QKV}.lora_mid.weight": torch.ones(4, 4)}, f"{QKV}.lora_mid.weight is for a convolution"),
        ({f"{QKV}.diff": torch.ones(192, 64)}, f"{QKV}.lora_.* and {QKV}.diff patch the same weight in two ways"),
        ({f"{QKV}.hada_w1_a": torch.ones(192, 4)}, "patch the same weight in two ways"),
        ({f"{QKV}.diff_b": torch.ones(191)}, "diff_b has 191 elements"),
        ({f"{QKV}.dora_scale": torch.ones(191, 1)}, r"dora_scale is \[191, 1\], expected \[192\] or \[192, 1\] or \[1, 64\]"),
        ({"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(4, 64)}, "are two names of the same thing"),
        ({f"{QKV}.lora_B.weight": torch.ones(192, 4)}, "are two names of the same thing"),
        ({"lora_unet_single_blocks_0_linear1.lokr_w1": torch.ones(8, 8), "lora_unet_single_blocks_0_linear1.lora_up.weight": None,
          "lora_unet_single_blocks_0_linear1.lora_down.weight": None}, "w1 is there, but its lokr_w2 or lokr_w2_a and lokr_w2_b is not"),
        ({"lora_unet_img_in.dora_scale": torch.ones(64, 1), "lora_unet_img_in.lora_up.weight": None,
          "lora_unet_img_in.lora_down.weight": None}, "dora_scale is there, but nothing that it scales"),
        ({"transformer.norm_out.linear.lora_A.weight": torch.ones(4, 64), "transformer.norm_out.linear.lora_B.weight": torch.ones(128, 4)},
         "are two names of the same thing"),
    ],
)  # fmt: skip
def test_damage_is_told_with_the_key(change, match):
    tensors = lora_file("kohya", FLUX).tensors
    for key, t in change.items():
        tensors.pop(key, None)
        if t is not None:
            tensors[key] = t
    with pytest.raises(LoraError, match=match) as told:
        read_lora(tensors, NAME)
    assert str(told.value).startswith(NAME)


@pytest.mark.parametrize("file", ["loha", "lokr decomposed", "glora", "oft", "boft", "dora rows", "dora peft", "diff", "set"])
def test_adapters_in_pieces_or_of_other_shapes_are_told(file):
    """Whatever part is dropped or cut: a LoraError, or a file that still does something."""
    made = lora_file(file, Flux(hidden=32, depth=1, depth_single=0))
    for key in [k for k in made.tensors if "qkv" in k or "to_q" in k]:
        rest = {k: t for k, t in made.tensors.items() if k != key}
        if not key.endswith(("alpha", "dora_scale", "magnitude_vector")) and len([k for k in rest if k.startswith(key.split(".")[0])]):
            try:
                assert not read_lora(rest, NAME).ignored or file in ("oft", "diff", "set")
            except LoraError as told:
                assert key.rsplit(".", 2)[0] in str(told) or key.rsplit(".", 1)[0] in str(told)
        if made.tensors[key].ndim > 1:
            with pytest.raises(LoraError, match=NAME):
                read_lora(rest | {key: made.tensors[key][..., :-1]}, NAME)


SMALL = Flux(hidden=16, depth=1, depth_single=1, in_width=16, context=16, vec=16, head_dim=16)
BIG = Flux(hidden=128, depth=1, depth_single=1)  # packed layers come in multiples of 128
BASE = files.base_pairs(BIG)


@functools.cache
def small(file):
    if file == "converted":
        return files.converted_file(BASE, BIG, rank=2).tensors
    return lora_file(file, SMALL, rank=2).tensors


@given(st.sampled_from([*FILES, "converted"]), st.data())
@settings(max_examples=150, deadline=None)
def test_no_file_raises_anything_but_a_lora_error(file, data):
    """Keys dropped, renamed, given another's tensor, cut, or made of nonsense."""
    tensors = dict(small(file))
    for _ in range(data.draw(st.integers(1, 4))):
        key = data.draw(st.sampled_from(sorted(tensors)))
        other = data.draw(st.sampled_from(sorted(tensors)))
        match data.draw(st.sampled_from(["drop", "rename", "swap", "cut", "flat", "type", "scalar", "suffix"])):
            case "drop":
                del tensors[key]
            case "rename":
                tensors[data.draw(st.text(st.sampled_from("._0aq"), max_size=3)) + key[data.draw(st.integers(0, 12)) :]] = tensors.pop(key)
            case "swap":
                tensors[key] = tensors[other]
            case "cut":
                tensors[key] = tensors[key][: data.draw(st.integers(0, 3))] if tensors[key].ndim else tensors[key]
            case "flat":
                tensors[key] = tensors[key].reshape(-1)
            case "type":
                tensors[key] = tensors[key].to(data.draw(st.sampled_from([torch.int64, torch.float64, torch.complex64, torch.bool])))
            case "scalar":
                tensors[key] = torch.tensor(1.0)
            case "suffix":
                tensors[key.rsplit(".", 1)[0] + "." + other.rsplit(".", 1)[1]] = tensors[key]
        if not tensors:
            return
    flux = BIG if file == "converted" else SMALL
    sizes = {"hidden": flux.hidden, "depths": (1, 1), "in_width": flux.in_width}
    try:
        read = read_lora(tensors, NAME, BASE.get, **data.draw(st.sampled_from([{}, sizes])))
    except LoraError as told:
        assert str(told).startswith(NAME) and len(str(told)) < 1000
    else:
        assert set(read.ignored) <= tensors.keys() and all(isinstance(t, torch.Tensor) for t in read.state.values())
        names = host_names(flux)
        deeper = {k for k in read.state if re.search(r"blocks[._][1-9]", k)}
        left = [k for k in read.state.keys() - deeper if not any(k.startswith(n) and k[len(n) :] in SUFFIXES for n in names)]
        assert not left
