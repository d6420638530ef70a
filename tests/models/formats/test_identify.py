"""Kinds of files that need a sentence of their own, told from their tensor names."""

import pytest
from tonfa.models.formats.identify import identify

DIFFUSERS_LORA = [
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
    "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
]
KOHYA_LORA = ["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
FLUX2 = "double_stream_modulation_img.lin"


XLABS_LORA = ["double_blocks.0.processor.qkv_lora1.down.weight", "single_blocks.0.processor.qkv_lora.up.weight"]
LYCORIS = ["lycoris_transformer_blocks_0_attn_to_q.oft_blocks", "lycoris_transformer_blocks_0_attn_to_q.alpha"]
DIFFERENCES = ["diffusion_model.img_in.diff", "diffusion_model.img_in.diff_b"]


@pytest.mark.parametrize("names", [DIFFUSERS_LORA, KOHYA_LORA, XLABS_LORA, LYCORIS, DIFFERENCES])
def test_a_lora_belongs_into_the_stock_loader_or_ours(names):
    kind = identify(names, {})
    assert kind.family == "lora" and "LoraLoaderModelOnly" in kind.advice.split("Nunchaku")[0] and "converted" not in kind.what
    assert "NunchakuFluxLoraLoader" in kind.advice


def test_a_lora_of_another_family_is_called_by_it():
    kind = identify(["lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight", "lora_te2_x.lora_down.weight"], {})
    assert kind.family == "lora" and "SDXL" in kind.what and "NunchakuFluxLoraLoader" not in kind.advice
    kind = identify(["transformer_blocks.0.img_mlp.net.2.lora_A.weight", "transformer_blocks.0.img_mlp.net.2.lora_B.weight"], {})
    assert "Qwen-Image" in kind.what


@pytest.mark.parametrize(
    "layer",
    ["transformer_blocks.3.qkv_proj", "transformer_blocks.3.mlp_context_fc1", "single_transformer_blocks.0.mlp_fc2",
     "transformer_blocks.0.qkv_proj_context", "transformer_blocks.0.out_proj_context"],
)  # fmt: skip
def test_a_converted_lora_belongs_into_our_loader_only(layer):
    kind = identify([f"{layer}.lora_down", f"{layer}.lora_up", "x_embedder.lora_A.weight"], {})
    assert kind.family == "lora" and "converted" in kind.what
    assert "NunchakuFluxLoraLoader" in kind.advice and "no stock node" in kind.advice


@pytest.mark.parametrize(
    "suffix", [["weight.absmax", "weight.quant_map"], ["weight.quant_state.bitsandbytes__nf4"], ["weight.quant_state.bitsandbytes__fp4"]]
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_bitsandbytes(prefix, suffix):
    layer = f"{prefix}double_blocks.0.img_attn.qkv"
    kind = identify([f"{layer}.weight", f"{layer}.bias", *(f"{layer}.{s}" for s in suffix)], {})
    assert kind.family == "nf4" and "bitsandbytes" in kind.what and "UNETLoader" not in kind.advice and not kind.quantised


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_flux2_plain(prefix):
    kind = identify([f"{prefix}{FLUX2}.weight", f"{prefix}double_blocks.0.img_attn.qkv.weight", f"{prefix}img_in.weight"], {})
    assert kind.family == "flux2-plain" and "FLUX.2" in kind.what and "UNETLoader" in kind.advice
    diffusers = ["single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight", "double_stream_modulation_img.linear.weight"]
    assert identify(diffusers, {}).family == "flux2-plain"


@pytest.mark.parametrize(
    "names",
    [
        ["transformer_blocks.0.attn.to_qkv.qweight", "double_stream_modulation_img.linear.weight"],
        ["transformer_blocks.0.attn.to_qkv.qweight", "single_stream_modulation.linear.qweight"],
        ["single_transformer_blocks.0.attn.to_qkv_mlp_proj.qweight"],
    ],
)
def test_flux2_in_4_bit_is_not_taken_for_a_damaged_flux1(names):
    kind = identify(names, {})
    assert kind.family == "flux2" and kind.quantised and "FLUX.2" in kind.advice and "ownload" not in kind.advice


def test_flux1_is_still_flux1():
    assert identify(["transformer_blocks.0.qkv_proj.qweight", "single_transformer_blocks.0.mlp_fc1.qweight"], {}).family == "flux"
    assert identify(["transformer_blocks.0.attn.to_qkv.qweight", "single_transformer_blocks.0.attn.to_qkv.qweight"], {}).family == "flux"
    assert identify(["double_blocks.0.img_attn.qkv.weight"], {}).family == "flux-plain"


def test_a_t5_belongs_into_the_text_encoder_loader():
    four_bit = identify(["encoder.block.0.layer.0.SelfAttention.q.qweight", "shared.weight"], {})
    assert four_bit.family == "t5" and four_bit.quantised and "4-bit" in four_bit.what
    assert "Load it with NunchakuTextEncoderLoaderV2" in four_bit.advice and "DualCLIPLoader" not in four_bit.advice
    plain = identify(["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], {})
    assert plain.family == "t5" and not plain.quantised
    assert "DualCLIPLoader" in plain.advice and "NunchakuTextEncoderLoaderV2" in plain.advice
    assert all("models/text_encoders" in kind.advice for kind in (four_bit, plain))
