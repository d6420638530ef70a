"""Which text encoder a file is, from names, shapes and header."""

import pytest
import torch
from tonfa.kernels.t5_layout import T5Linear
from tonfa.models.formats.awq import pack_linear
from tonfa.models.formats.t5 import EMBEDDINGS, FINAL_NORM, T5Dims
from tonfa.models.formats.tensorfile import CheckpointError
from tonfa.models.formats.text_encoders import check_types, recognise

from .t5_files import DIMS, scaled_fp8, tiny_t5

Shapes = dict[str, tuple[int, ...]]
WO = "encoder.block.1.layer.1.DenseReluDense.wo"
XXL = T5Dims(blocks=24, model=4096, heads=64, inner=4096, ff=10240, vocab=32128, buckets=32)


def shapes(tensors: dict[str, torch.Tensor]) -> Shapes:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def whole(dims: T5Dims) -> Shapes:
    return {f"{prefix}.weight": shape for prefix, shape in dims.linears().items()} | dims.plain()


def clip(layers: int, width: int) -> Shapes:
    inside = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")))
    modules = [f"text_model.encoder.layers.{i}.{name}" for i in range(layers) for name in inside] + ["text_model.final_layer_norm"]
    names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    return dict.fromkeys((f"text_model.embeddings.{t}_embedding.weight" for t in ("token", "position")), (77, width)) | dict.fromkeys(
        names, (4 * width, width)
    )


def open_clip(layers: int, width: int) -> Shapes:
    inside = ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj", "attn.out_proj", "attn.in_proj")
    names = [f"transformer.resblocks.{i}.{name}.{kind}" for i in range(layers) for name in inside for kind in ("weight", "bias")]
    names = [name.replace("in_proj.", "in_proj_") for name in names] + ["ln_final.weight", "ln_final.bias"]
    return dict.fromkeys((*names, "token_embedding.weight", "positional_embedding"), (width,))


def four_bit(plain: tuple[str, ...] = ()) -> Shapes:
    tensors = tiny_t5()
    for prefix in DIMS.linears():
        if prefix not in plain:
            weight = tensors.pop(f"{prefix}.weight")
            tensors |= {f"{prefix}.{s}": t for s, t in packed(*weight.shape).items()}
    return shapes(tensors)


def packed(n: int, k: int) -> dict[str, torch.Tensor]:
    return pack_linear(T5Linear(torch.zeros(n, k, dtype=torch.uint8), *(torch.zeros(n, k // 128).half() for _ in range(2))))


def renamed_embedding(tensors: Shapes) -> Shapes:
    return {name.replace(EMBEDDINGS[0], EMBEDDINGS[1]): shape for name, shape in tensors.items()}


PICTURES = {f"vision_model.encoder.layers.{i}.mlp.fc1.weight": (4096, 1024) for i in range(24)}
T5S = {
    "16 bit": (shapes(tiny_t5()), DIMS),
    "T5-XXL": (whole(XXL), XXL),
    "scaled fp8": (shapes(scaled_fp8(tiny_t5())), DIMS),
    "scaled fp8, new name": (shapes(scaled_fp8(tiny_t5(), "weight_scale")), DIMS),
    "embedding under its other name": (renamed_embedding(shapes(tiny_t5())), DIMS),
    "with a decoder": (shapes(tiny_t5()) | {"decoder.block.0.layer.0.SelfAttention.q.weight": (8, 8), "lm_head.weight": (64, 8)}, DIMS),
    "nvfp4": (whole(DIMS) | {f"{WO}.weight": (128, 128), f"{WO}.weight_scale": (128, 16), f"{WO}.weight_scale_2": ()}, None),
    "bitsandbytes": (whole(DIMS) | {f"{WO}.weight": (16384, 1), f"{WO}.weight.quant_state.bitsandbytes__nf4": (9,)}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", T5S)
def test_a_t5_and_its_sizes(name):
    """None where the host's own forms of quantisation hide them."""
    tensors, dims = T5S[name]
    found = recognise(tensors, {"format": "pt"}, "text_encoder2: x")
    assert (found.kind, found.what, found.dims) == ("t5", "a T5 text encoder", dims)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [(four_bit(), {}), (four_bit((WO,)), {}), (shapes(tiny_t5()), {"model_class": "NunchakuT5EncoderModel"})],
    ids=["by its tensors", "mixed", "by its header"],
)
def test_a_4_bit_t5(tensors, metadata):
    found = recognise(tensors, metadata, "text_encoder2: x")
    assert (found.kind, found.what) == ("t5_4bit", "a 4-bit T5 text encoder")


@pytest.mark.parametrize(
    "tensors",
    [clip(12, 768), open_clip(12, 768), PICTURES | clip(12, 768), {"visual.proj": (1024, 768)} | open_clip(12, 768)],
    ids=["clip_l", "OpenCLIP's names", "with its vision half first", "OpenCLIP's with its vision half"],
)
def test_a_clip_l(tensors):
    found = recognise(tensors, {}, "text_encoder1: x")
    assert found.kind == "clip_l" and found.what == "a CLIP-L text encoder (12 layers of 768 channels)"


@pytest.mark.parametrize(
    ("whole", "name"),
    [
        (clip(12, 768), "text_model.embeddings.token_embedding.weight"),
        (clip(12, 768), "text_model.encoder.layers.5.mlp.fc2.bias"),
        (clip(12, 768), "text_model.final_layer_norm.weight"),
        (open_clip(12, 768), "transformer.resblocks.11.attn.in_proj_weight"),
        (open_clip(12, 768), "positional_embedding"),
    ],
)
def test_a_clip_l_that_is_not_whole(whole, name):
    with pytest.raises(CheckpointError, match=f"^text_encoder1: x is no whole CLIP-L: {name} is missing. Download it again.$"):
        recognise({n: s for n, s in whole.items() if n != name}, {}, "text_encoder1: x")


def test_whole_numbers_need_a_mark():
    types = {f"{WO}.weight": "I8", f"{WO}.weight_scale": "F32", "shared.weight": "F16", f"{WO}.comfy_quant": "U8"}
    check_types(types, "text_encoder2: x")
    for marks in ({f"{WO}.comfy_quant"}, {f"{WO}.weight_scale"}):
        check_types({n: t for n, t in types.items() if n not in marks}, "text_encoder2: x")
    check_types({f"{WO}.weight": "U8", f"{WO}.weight.quant_state.bitsandbytes__nf4": "U8"}, "text_encoder2: x")
    with pytest.raises(CheckpointError, match=f"^text_encoder2: x cannot be used: {WO}.weight is I8"):
        check_types({f"{WO}.weight": "I8"}, "text_encoder2: x")


OTHERS = {
    "CLIP-G": (clip(32, 1280), "a CLIP-G text encoder (32 layers of 1280 channels)"),
    "CLIP-G, OpenCLIP's names": (open_clip(32, 1280), "a CLIP-G text encoder"),
    "CLIP-H": (clip(24, 1024), "a CLIP-H text encoder"),
    "another CLIP": (clip(12, 512), "a CLIP text encoder (12 layers of 512 channels)"),
    "a vision half alone": (PICTURES, "no T5 text encoder"),
    "UMT5": (shapes(tiny_t5()) | {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": (32, 2)}, "a UMT5 text encoder"),
    "T5 1.0": (
        {name.replace("wi_0", "wi"): s for name, s in shapes(tiny_t5()).items() if "wi_1" not in name},
        "a T5 of the first version",
    ),
    "FLUX in 4 bit": ({"transformer_blocks.0.qkv_proj.qweight": (4, 4)}, "a FLUX.1 SVDQuant file"),
    "VAE": ({"decoder.conv_in.weight": (4,)}, "a VAE"),
    "LoRA": ({"lora_te2_x.lora_up.weight": (4, 4), "lora_te2_x.lora_down.weight": (4, 4)}, "a LoRA"),
    "nothing known": ({"a": (4,)}, "no T5 text encoder"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_called_by_its_name(name):
    tensors, what = OTHERS[name]
    found = recognise(tensors, {}, "text_encoder1: x")
    assert found.kind == "other" and what in found.what and found.dims is None


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (FINAL_NORM, f"{FINAL_NORM} is missing"),
        (f"{WO}.weight", f"{WO} is missing"),
        (EMBEDDINGS[0], f"{EMBEDDINGS[0]} is missing"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "wi_0 is missing"),
    ],
)
def test_a_t5_that_is_not_whole(missing, said):
    tensors = {name: shape for name, shape in shapes(tiny_t5()).items() if name != missing}
    with pytest.raises(CheckpointError) as raised:
        recognise(tensors, {}, "text_encoder2: x")
    assert str(raised.value).startswith("text_encoder2: x is no whole T5 encoder") and said in str(raised.value)
