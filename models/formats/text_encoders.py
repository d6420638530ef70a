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
class _Naming:
    """Names of a CLIP-L's text model: of its blocks, of what is in each of them, and of the rest."""

    blocks: str
    inside: tuple[str, ...]
    rest: tuple[str, ...]

    def all(self) -> list[str]:
        return [*self.rest, *(f"{self.blocks}.{i}.{name}" for i in range(12) for name in self.inside)]


def _both(*modules: str) -> tuple[str, ...]:
    return tuple(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))


_HUGGING_FACE = _Naming(
    "text_model.encoder.layers",
    _both("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out"))),
    (
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        *_both("text_model.final_layer_norm"),
    ),
)
_OPEN_CLIP = _Naming(
    "transformer.resblocks",
    (*_both("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj", "attn.out_proj"), "attn.in_proj_weight", "attn.in_proj_bias"),
    ("token_embedding.weight", "positional_embedding", *_both("ln_final")),
)


@dataclass(frozen=True)
class Encoder:
    """kind: "clip_l", "t5", "t5_4bit" or "other". what: as the end of "... is ". dims: a T5's sizes, None where its shapes do not tell."""

    kind: str
    what: str
    dims: T5Dims | None = None


def recognise(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], where: str) -> Encoder:
    """The encoder with these tensors. Raises CheckpointError, beginning with `where`, for a CLIP-L, or a T5 of 16 or 8 bit, with a hole."""
    clip = clip_name({name: shape for name, shape in shapes.items() if not name.startswith(_PICTURES)})
    if clip is not None:
        if not clip.startswith("a CLIP-L"):
            return Encoder("other", clip)
        naming = _OPEN_CLIP if "transformer.resblocks.0.ln_1.weight" in shapes else _HUGGING_FACE
        missing = [name for name in naming.all() if name not in shapes]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CheckpointError(f"{where} is no whole CLIP-L: {missing[0]} is missing{more}. Download it again.")
        return Encoder("clip_l", clip)
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


def check_types(types: Mapping[str, str], where: str) -> None:
    """Raises CheckpointError, beginning with `where`, for weights of whole numbers without what they are to be multiplied by.

    types: tensor name -> safetensors dtype name. A host would take such numbers for the weights.
    """
    marked = {_QUANTISED.sub("", name).removesuffix(".weight") for name in types if _QUANTISED.search(name)}
    for name, dtype in types.items():
        if name.endswith(".weight") and dtype in ("I8", "U8") and name.removesuffix(".weight") not in marked:
            raise CheckpointError(f"{where} cannot be used: {name} is {dtype} and nothing says what it stands for. Take another T5 file.")
