"""FLUX.1's text encoders through our nodes in the real host."""

from __future__ import annotations

import pytest
import tonfa
import torch
from tonfa.models.t5 import PackedT5Linear

from . import encoders
from .lab import rel


@pytest.fixture(scope="module", autouse=True)
def listed():
    """The folder of the small files is one of the host's."""
    import folder_paths

    folder_paths.add_model_folder_path("text_encoders", str(encoders.folder()))
    encoders.clip_l()


def load(first, second, length: int = 256, key: str = "NunchakuTextEncoderLoaderV2", **named: object):
    node = tonfa.NODE_CLASS_MAPPINGS[key]()
    kind = node.INPUT_TYPES()["required"]["model_type"][0][0]
    with torch.inference_mode():
        return node.load_text_encoder(kind, first.name, second.name, length, **named)[0]


def encode(clip, text: str = "a red fox, (very:1.3) small"):
    with torch.inference_mode():
        cond, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    return cond, pooled


def test_both_orders_and_the_error_is_the_weights(listed):
    ours = load(encoders.clip_l(), encoders.t5("4bit"))
    other = load(encoders.t5("4bit"), encoders.clip_l())
    dense = load(encoders.clip_l(), encoders.t5("fp16"))
    cond, pooled = encode(ours)
    again, _ = encode(other)
    want, want_pooled = encode(dense)
    assert torch.equal(cond, again) and torch.equal(pooled, want_pooled)
    print(rel(cond, want), cond.shape)
    assert sum(isinstance(m, PackedT5Linear) for m in ours.cond_stage_model.modules()) == 14
    assert 0 < rel(cond, want) < 0.3
