"""What a refused file is told about nodes, against the nodes that there are."""

import inspect
import re

import pytest
from tonfa import nodes
from tonfa.models.formats import identify as module
from tonfa.models.formats.identify import identify

KEYS = {key for family in nodes.FAMILIES.values() for key in family}
NAMED = re.compile(r"\b(?:Nunchaku|SVDQuant)\w*(?:Loader|Stack)\w*")


def test_every_loader_that_is_named_is_there():
    named = set(NAMED.findall(inspect.getsource(module)))
    assert named <= KEYS and {"NunchakuFluxDiTLoader", "NunchakuQwenImageDiTLoader", "NunchakuZImageDiTLoader"} <= named


FILES = {  # names of a file's tensors, the node that takes it
    "qwen": (["transformer_blocks.0.img_mod.1.qweight"], "NunchakuQwenImageDiTLoader"),
    "z-image": (["layers.0.attention.to_qkv.qweight"], "NunchakuZImageDiTLoader"),
    "t5": (["encoder.block.0.layer.0.SelfAttention.q.qweight"], "NunchakuTextEncoderLoaderV2"),
    "lora": (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "NunchakuFluxLoraLoader"),
    "qwen lora": (["transformer_blocks.0.img_mlp.net.2.lora_A.weight"], "NunchakuQwenImageLoraLoader"),
    "z-image lora": (["diffusion_model.layers.0.attention.to_q.lora_A.weight"], "NunchakuQwenImageLoraLoader"),
    "sdxl lora": (["lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight"], None),
    "converted": (["transformer_blocks.0.qkv_proj.lora_down", "transformer_blocks.0.qkv_proj.lora_up"], "NunchakuFluxLoraLoader"),
    "flux": (["transformer_blocks.0.qkv_proj.qweight"], "NunchakuFluxDiTLoader"),
    "plain t5": (["encoder.block.0.layer.0.SelfAttention.q.weight"], "NunchakuTextEncoderLoaderV2"),
    "plain flux": (["double_blocks.0.img_attn.qkv.weight"], None),
    "nothing known": (["some.weight"], None),
}


@pytest.mark.parametrize("name", FILES)
def test_the_sentence_names_the_node_that_takes_the_file(name):
    names, key = FILES[name]
    advice = identify(names, {}).advice
    assert NAMED.findall(advice) == ([key] if key else [])
    assert key is None or f"{key} ({nodes.NODE_DISPLAY_NAME_MAPPINGS[key]})" in advice
