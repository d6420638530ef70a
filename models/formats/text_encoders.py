"""Which of FLUX.1's two text encoders a file is, from its names, shapes and header."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .awq import is_awq_t5
from .t5 import T5Dims, clip_name, t5_dims, what_encoder
from .tensorfile import CheckpointError

_QUANTISED = re.compile(r"\.(comfy_quant|weight_scale|weight_scale_2|quant_state\S*|absmax)$")
_PICTURES = ("vision_model.", "visual.")  # the other half of a whole CLIP, which the host leaves out


@dataclass(frozen=True)
class Encoder:
    """kind: "clip_l", "t5", "t5_4bit" or "other". what: as the end of "... is ". dims: a T5's sizes, None where its shapes do not tell."""

    kind: str
    what: str
    dims: T5Dims | None = None


def recognise(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], where: str) -> Encoder:
    """The encoder with these tensors. Raises CheckpointError, beginning with `where`, for a T5 of 16 or 8 bit that is not whole."""
    clip = clip_name({name: shape for name, shape in shapes.items() if not name.startswith(_PICTURES)})
    if clip is not None:
        return Encoder("clip_l" if clip.startswith("a CLIP-L") else "other", clip)
    if is_awq_t5(shapes, metadata):
        return Encoder("t5_4bit", "a 4-bit T5 text encoder")
    other = what_encoder(shapes, metadata)
    if other is not None:
        return Encoder("other", other)
    try:
        dims = t5_dims(shapes, where)
    except CheckpointError:
        if not any(_QUANTISED.search(name) for name in shapes):  # a form of the host's own, whose shapes are not the weights'
            raise
        dims = None
    return Encoder("t5", "a T5 text encoder", dims)
