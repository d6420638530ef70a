"""Dense FLUX files of every kind give the same linears and the same network; others are refused in a sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tonfa.models.dense_flux import dense_flux, load_block, open_dense
from tonfa.models.dequantize import dense_state_dict
from tonfa.models.flux import Flux
from tonfa.models.formats.checkpoint import open_checkpoint
from tonfa.models.formats.tensorfile import CheckpointError
from tonfa.models.linear import PackedLinear, PlainLinear

from .dense_files import CONFIG, block_linears, dense_state, in_diffusers_names, write_dense

DATA = Path(__file__).resolve().parents[1] / "data"
QKV = "double_blocks.0.img_attn.qkv"


def same_model(path: Path, state: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    """Every tensor of the source is the state's, and the configuration is CONFIG."""
    source = open_dense(path)
    assert source.config == CONFIG and source.model_class == "Flux" and source.warnings == []
    linears = block_linears()
    for name in linears:
        weight, bias = source.linear(name)
        for got, want in ((weight, state[f"{name}.weight"]), (bias, state[f"{name}.bias"])):
            assert got.shape == want.shape
            assert (got.float() - want.float()).abs().max() <= tolerance * want.float().abs().max(), name
    rest = [name for name in state if name.rpartition(".")[0] not in linears]
    assert len(rest) == 28
    for name in rest:
        assert torch.equal(source.tensor(name).float(), state[name].float()), name


# -- every form ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_native_names_in_16_and_32_bits(tmp_path, dtype):
    state = dense_state(dtype)
    path = write_dense(tmp_path, state)
    same_model(path, state)
    assert open_dense(path).linear(QKV)[0].dtype == dtype


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer."])
def test_a_prefix_and_other_models_beside(tmp_path, prefix):
    state = dense_state()
    file = {prefix + name: t for name, t in state.items()} | {
        "vae.decoder.conv_in.weight": torch.zeros(4),
        "text_encoders.a": torch.zeros(4),
    }
    same_model(write_dense(tmp_path, file), state)


def test_norms_called_weight(tmp_path):
    state = dense_state()
    same_model(write_dense(tmp_path, {name.replace("_norm.scale", "_norm.weight"): t for name, t in state.items()}), state)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_diffusers_names(tmp_path, prefix):
    state = dense_state()
    same_model(write_dense(tmp_path, {prefix + name: t for name, t in in_diffusers_names(state).items()}), state)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_a_diffusers_folder_of_shards(tmp_path, index, inner):
    state = dense_state()
    tensors = in_diffusers_names(state)
    folder = tmp_path / "transformer" if inner else tmp_path
    folder.mkdir(exist_ok=True)
    shards = [f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors" for i in range(3)]
    where = {name: shards[i % 3] for i, name in enumerate(tensors)}
    for shard in shards:
        save_file({name: tensors[name] for name, at in where.items() if at == shard}, folder / shard)
    if index:
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        save_file({"x_embedder.weight": torch.zeros(4)}, folder / "other.safetensors")  # not in the list: not read
    (folder / "config.json").write_text(json.dumps({"num_layers": 1, "num_single_layers": 2, "axes_dims_rope": [16, 56, 56]}))
    same_model(tmp_path, state)
    assert len(open_dense(tmp_path).identity()) == 3
    if index:
        (folder / shards[1]).unlink()
        with pytest.raises(CheckpointError, match=f"lacks {shards[1]}"):
            open_dense(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_without_scales_is_exact(tmp_path, dtype):
    stored = {name: t.to(dtype) if t.ndim == 2 else t for name, t in dense_state().items()}
    path = write_dense(tmp_path, stored)
    same_model(path, {name: t.bfloat16() for name, t in stored.items()})
    assert open_dense(path).linear(QKV)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_fp8(tmp_path, suffix, per_row):
    state, stored = dense_state(torch.float32), {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, t in state.items():
        stem, _, kind = name.rpartition(".")
        if stem not in block_linears() or kind != "weight":
            stored[name] = t
            continue
        scale = (t.abs().amax(1) if per_row else t.abs().max()) / 448
        stored[name] = (t / scale.reshape(-1, *[1] * (scale.ndim > 0))).to(torch.float8_e4m3fn)
        stored |= {
            f"{stem}.{suffix}": scale,
            f"{stem}.scale_input": torch.ones(()),
            f"{stem}.comfy_quant": torch.zeros(8, dtype=torch.uint8),
        }
    same_model(write_dense(tmp_path, stored), state, tolerance=0.04)


def test_scales_of_diffusers_pieces(tmp_path):
    stored = in_diffusers_names(dense_state(torch.float32))
    for i, piece in enumerate(("to_q", "to_k", "to_v")):
        stem = f"transformer_blocks.0.attn.{piece}"
        stored[f"{stem}.weight"] = stored[f"{stem}.weight"].to(torch.float8_e4m3fn)
        stored[f"{stem}.weight_scale"] = torch.tensor(2.0**i)
    weight, _ = open_dense(write_dense(tmp_path, stored)).linear(QKV)
    plain = torch.cat([stored[f"transformer_blocks.0.attn.{p}.weight"].float() * 2.0**i for i, p in enumerate(("to_q", "to_k", "to_v"))])
    assert torch.equal(weight, plain)


def test_config_in_the_metadata(tmp_path):
    theirs = CONFIG | {"theta": 5000, "axes_dim": [32, 48, 48]}
    source = open_dense(write_dense(tmp_path, metadata={"config": json.dumps(theirs)}))
    assert source.config == theirs and len(source.warnings) == 2  # both are unusual, and both are said


def test_schnell_has_no_guidance(tmp_path):
    source = open_dense(write_dense(tmp_path, {n: t for n, t in dense_state().items() if not n.startswith("guidance_in.")}))
    assert source.model_class == "FluxSchnell" and source.config["guidance_embed"] is False


def test_block_linears_without_bias(tmp_path):
    source = open_dense(write_dense(tmp_path, {n: t for n, t in dense_state().items() if n != f"{QKV}.bias"}))
    assert source.linear(QKV)[1] is None and source.linear("double_blocks.0.txt_attn.qkv")[1] is not None
    with pytest.raises(KeyError):
        source.linear("img_in")


# -- the network --------------------------------------------------------------------------------------------------------------------


def velocity(network: Flux) -> torch.Tensor:
    gen = torch.Generator().manual_seed(5)
    x, context = torch.randn(2, 16, 8, 12, generator=gen), torch.randn(2, 7, 128, generator=gen)
    with torch.no_grad():
        return network(x, torch.tensor([0.3, 0.9]), context, torch.randn(2, 64, generator=gen), torch.tensor([3.5, 4.0]))


def test_the_network_is_the_one_of_its_4_bit_twin(tmp_path):
    """The weights of a 4-bit file, expanded, through both ways to a Flux."""
    from tonfa.models.formats.writer import write_flux

    write_flux(tmp_path / "four.safetensors", dense_state(torch.float32), CONFIG, rank=16)
    checkpoint = open_checkpoint(tmp_path / "four.safetensors")
    state = {name: t.contiguous() for name, t in dense_state_dict(checkpoint, torch.float32)}
    twin = Flux(checkpoint, torch.float32)
    for module in list(twin.modules()):
        for child, linear in list(module.named_children()):
            if isinstance(linear, PackedLinear):
                setattr(module, child, PlainLinear(*linear.dense(), linear.runtime))
    network = dense_flux(write_dense(tmp_path, state), torch.float32)
    assert {p.dtype for p in network.parameters()} == {torch.float32} and network.config == CONFIG
    want = velocity(twin)
    assert want.abs().mean() > 1e-3
    torch.testing.assert_close(velocity(network), want, rtol=1e-5, atol=1e-5)


def test_types_of_the_network(tmp_path):
    path = write_dense(tmp_path, dense_state(torch.float32))
    for dtype in (torch.bfloat16, torch.float16):
        block = load_block(open_dense(path), "single_blocks.1", dtype, "cpu")
        assert block.linear1.weight.dtype == block.linear2.bias.dtype == dtype
    reference = velocity(dense_flux(path, torch.float32))
    assert (velocity(dense_flux(path, torch.bfloat16)) - reference).norm() < 0.03 * reference.norm()
    state = dense_state(torch.float32)
    state[f"{QKV}.weight"][0, 0] = 1e5
    with pytest.raises(CheckpointError, match=r"double_blocks.0.img_attn.qkv has values beyond float16"):
        dense_flux(write_dense(tmp_path, state), torch.float16)


# -- refusals -----------------------------------------------------------------------------------------------------------------------


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The state with tensors replaced, added, or (None) left out; keys have __ for dots."""
    state = dense_state()
    for key, t in tensors.items():
        name = key.replace("__", ".")
        state.pop(name, None)
        if t is not None:
            state[name] = t
    return state


ZERO = torch.zeros(4)
OTHERS = {
    "SDXL": (lambda: {"model.diffusion_model.input_blocks.0.0.weight": ZERO}, ["an ordinary Stable Diffusion UNet"]),
    "T5": (lambda: {"encoder.block.0.layer.0.SelfAttention.q.weight": ZERO}, ["T5 text encoder"]),
    "LoRA": (lambda: {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": ZERO}, ["a LoRA"]),
    "FLUX.2": (lambda: {"double_stream_modulation_img.lin.weight": ZERO}, ["FLUX.2"]),
    "NF4": (lambda: dense_state() | {f"{QKV}.weight.absmax": ZERO}, ["bitsandbytes"]),
    "Chroma": (lambda: dense_state() | {"distilled_guidance_layer.in_proj.weight": ZERO}, ["a Chroma model"]),
    "8-bit integers": (lambda: changed(double_blocks__0__img_attn__qkv__weight=torch.zeros(768, 256, dtype=torch.int8)), ["is I8"]),
    "block scales": (
        lambda: dense_state() | {f"{QKV}.weight_scale": torch.ones(768, 8)},
        [f"{QKV}.weight_scale (F32 [768, 8]) is nothing"],
    ),
    "nvfp4 of others": (lambda: dense_state() | {f"{QKV}.weight_scale_2": ZERO}, ["weight_scale_2", "is nothing"]),
    "a linear missing": (lambda: changed(single_blocks__1__linear2__weight=None), ["single_blocks.1.linear2.weight is missing"]),
    "a norm missing": (lambda: changed(single_blocks__1__norm__key_norm__scale=None), ["single_blocks.1.norm.key_norm.scale is missing"]),
    "no img_in": (lambda: changed(img_in__weight=None), ["no img_in.weight"]),
    "wrong shape": (lambda: changed(single_blocks__0__linear2__weight=torch.zeros(256, 1024)), ["[256, 1024]", "expected [256, 1280]"]),
    "no blocks": (lambda: {n: t for n, t in dense_state().items() if "_blocks." not in n or "single" in n}, ["a safetensors file without"]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_refused(tmp_path, name):
    make, words = OTHERS[name]
    path = write_dense(tmp_path, make())
    with pytest.raises(CheckpointError) as raised:
        open_dense(path)
    said = str(raised.value)
    assert all(word in said for word in (str(path), *words)) and "\n" not in said, said


def test_four_bit_gguf_pickle_and_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="a FLUX.1 SVDQuant file: it is 4-bit already"):
        open_dense(DATA / "mini_flux_int4.safetensors")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match="is a GGUF file"):
        open_dense(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="There is no file"):
        open_dense(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="without .safetensors files"):
        open_dense(tmp_path / "empty")


def test_a_number_that_is_none_names_its_tensor(tmp_path):
    state = dense_state()
    state["single_blocks.0.linear1.weight"][7, 7] = float("nan")
    with pytest.raises(CheckpointError, match="single_blocks.0.linear1.weight holds NaN"):
        open_dense(write_dense(tmp_path, state)).linear("single_blocks.0.linear1")


def test_the_same_tensor_in_two_files(tmp_path):
    tensors = in_diffusers_names(dense_state())
    save_file(tensors, tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match="is in both model.fp16.safetensors and model.safetensors"):
        open_dense(tmp_path)
