"""What a refused file is told about nodes, against the nodes that there are: advice must not name an absent loader as if it were there."""

import inspect
import re

import pytest
from tonfa import nodes
from tonfa.models.formats import identify as module
from tonfa.models.formats.identify import ABSENT, NOT_YET, identify

KEYS = {key for family in nodes.FAMILIES.values() for key in family}
NAMED = re.compile(r"\b(?:Nunchaku|SVDQuant)\w*(?:Loader|Stack)\w*")


def test_no_loader_is_called_absent_once_it_is_there():
    assert not KEYS.intersection(NOT_YET), "take it out of NOT_YET in models/formats/identify.py"


def test_every_loader_that_is_named_is_either_there_or_called_absent():
    there = {"NunchakuFluxDiTLoader", "NunchakuFluxLoraLoader", "NunchakuTextEncoderLoaderV2"}
    assert set(NAMED.findall(inspect.getsource(module))) == {*there, *NOT_YET}
    assert there <= KEYS


FILES = {
    "qwen": ["transformer_blocks.0.img_mod.1.qweight"],
    "z-image": ["layers.0.attention.to_qkv.qweight"],
    "t5": ["encoder.block.0.layer.0.SelfAttention.q.qweight"],
    "lora": ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"],
    "converted": ["transformer_blocks.0.qkv_proj.lora_down", "transformer_blocks.0.qkv_proj.lora_up"],
    "flux": ["transformer_blocks.0.qkv_proj.qweight"],
    "plain t5": ["encoder.block.0.layer.0.SelfAttention.q.weight"],
    "plain flux": ["double_blocks.0.img_attn.qkv.weight"],
    "nothing known": ["some.weight"],
}


@pytest.mark.parametrize("name", FILES)
def test_the_sentence_says_absent_of_absent_loaders_only(name):
    advice = identify(FILES[name], {}).advice
    named = NAMED.findall(advice)
    assert (ABSENT in advice) == any(key not in KEYS for key in named)
    assert len(named) == len(set(named)) <= 1
