"""What a file of the T5 text encoder that FLUX takes holds: names and sizes (Hugging Face's T5EncoderModel, version 1.1 of T5).

Works on shapes alone, for 16-bit, fp8 and 4-bit files: a linear counts by its prefix, whatever its weight is called.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .identify import identify
from .shards import is_shard
from .tensorfile import CheckpointError

ATTENTION = tuple(f"layer.0.SelfAttention.{name}" for name in "qkvo")
GATES = ("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1")
LAST = "layer.1.DenseReluDense.wo"
NORMS = ("layer.0.layer_norm.weight", "layer.1.layer_norm.weight")
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
FINAL_NORM = "encoder.final_layer_norm.weight"
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # two names of one table; a file has either or both
MODEL_CLASS = "NunchakuT5EncoderModel"

_BLOCK = re.compile(r"encoder\.block\.(\d+)\.")
_CLIP = {(12, 768): "CLIP-L", (32, 1280): "CLIP-G", (24, 1024): "CLIP-H"}


@dataclass(frozen=True)
class T5Dims:
    """Sizes of a T5 encoder. T5-XXL: 24 blocks, model 4096, 64 heads of 64, feed-forward 10240, 32128 tokens, 32 buckets."""

    blocks: int
    model: int
    heads: int
    inner: int
    ff: int
    vocab: int
    buckets: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Prefix -> (N, K) of every linear, in the order of the model: what stands before another linear comes before it."""
        inside = dict.fromkeys(ATTENTION[:3], (self.inner, self.model)) | {ATTENTION[3]: (self.model, self.inner)}
        inside |= dict.fromkeys(GATES, (self.ff, self.model)) | {LAST: (self.model, self.ff)}
        return {f"encoder.block.{i}.{p}": shape for i in range(self.blocks) for p, shape in inside.items()}

    def plain(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every other tensor, the embedding under its first name only."""
        norms = {f"encoder.block.{i}.{name}": (self.model,) for i in range(self.blocks) for name in NORMS}
        return {EMBEDDINGS[0]: (self.vocab, self.model), BIAS: (self.buckets, self.heads)} | norms | {FINAL_NORM: (self.model,)}

    def config(self) -> dict:
        """The `config` of a Hugging Face T5EncoderModel. What shapes do not tell has T5 v1.1's values."""
        return {
            "architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": self.model, "d_kv": self.inner // self.heads,
            "d_ff": self.ff, "num_layers": self.blocks, "num_decoder_layers": self.blocks, "num_heads": self.heads,
            "vocab_size": self.vocab, "relative_attention_num_buckets": self.buckets, "relative_attention_max_distance": 128,
            "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True, "is_encoder_decoder": True,
            "dropout_rate": 0.1, "layer_norm_epsilon": 1e-6, "initializer_factor": 1.0, "tie_word_embeddings": False,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "use_cache": True, "output_past": True,
        }  # fmt: skip

    def metadata(self) -> dict[str, str]:
        """The header of a published 4-bit file; loaders know it by `model_class`."""
        return {"config": json.dumps(self.config()), "model_class": MODEL_CLASS}


def bare_name(name: str) -> str:
    """A tensor's name without ".weight" or ".qweight"."""
    return re.sub(r"\.q?weight$", "", name)


def clip_name(names: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a CLIP text encoder with these tensor names and shapes is, as the end of "... is "; None for anything else."""
    layers = {n.split(".")[3] for n in names if n.startswith("text_model.encoder.layers.")}
    width = next((s[-1] for n, s in names.items() if n.endswith("mlp.fc1.weight") and s), 0)
    if not layers:  # OpenCLIP's names
        layers = {n.split(".")[2] for n in names if n.startswith("transformer.resblocks.")}
        width = next(iter(names.get("transformer.resblocks.0.ln_1.weight", ())), 0)
    return f"a {_CLIP.get((len(layers), width), 'CLIP')} text encoder ({len(layers)} layers of {width} channels)" if layers else None


def what_encoder(names: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> str | None:
    """What a file with these tensor names and shapes is, as the end of "... is "; None for a T5 encoder of version 1.1."""
    blocks = [n for n in names if _BLOCK.match(n)]
    if clip := clip_name(names):
        return f"{clip}, no T5"
    if not any("SelfAttention" in n or "DenseReluDense" in n for n in blocks):
        return identify(dict(names), metadata).what + ", no T5 text encoder"
    if any(n.endswith("relative_attention_bias.weight") and n != BIAS for n in blocks):
        return "a UMT5 text encoder (every block has its own relative_attention_bias), and FLUX takes T5 v1.1"
    if any(".DenseReluDense.wi." in n for n in blocks):
        return "a T5 of the first version (its feed-forward layers have one input, wi), and FLUX takes T5 v1.1"
    return None


def t5_dims(shapes: Mapping[str, tuple[int, ...]], where: str) -> T5Dims:
    """The sizes of a T5 encoder, every linear and plain tensor held against them.

    shapes: tensor name -> logical shape, [N, K] for the weight of a linear, 4-bit or not (under bare_name). Others are not looked at.
    Raises CheckpointError, beginning with `where`, that names what is missing or has another shape.
    """
    found = {bare_name(name): shape for name, shape in shapes.items()}
    embedding = next((name for name in EMBEDDINGS if bare_name(name) in found), EMBEDDINGS[0])
    first = "encoder.block.0."
    needed = (embedding, BIAS, first + ATTENTION[0], first + GATES[0])
    for name in needed:
        if len(found.get(bare_name(name), ())) != 2:
            raise CheckpointError(f"{where} is no whole T5 encoder: {_missing(name, found)}. {_advice(where)}")
    (vocab, model), (buckets, heads), (inner, _), (ff, _) = (found[bare_name(name)] for name in needed)
    if heads < 1 or inner % heads:
        raise CheckpointError(f"{where} is no whole T5 encoder: its {inner} attention channels are not shared out by {heads} heads.")
    blocks = 1 + min(max(int(m[1]) for m in map(_BLOCK.match, shapes) if m), len(shapes))  # a number no file can hold: something is missing
    dims = T5Dims(blocks, model, heads, inner, ff, vocab, buckets)
    wanted = dims.linears() | dims.plain()
    if embedding != EMBEDDINGS[0]:
        wanted[embedding] = wanted.pop(EMBEDDINGS[0])
    wrong = [name for name, shape in wanted.items() if found.get(bare_name(name)) != shape]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{where} is no whole T5 encoder: {_missing(wrong[0], found)}, expected {list(wanted[wrong[0]])}{more}. {_advice(where)}"
        )
    return dims


def _advice(where: str) -> str:
    if is_shard(where):
        return (
            "It is one of several files: take a T5 in one file, or let `tonfa quantize-t5` make a 4-bit one of the folder with all of them."
        )
    return "Download it again."


def _missing(name: str, found: Mapping[str, tuple[int, ...]]) -> str:
    shape = found.get(bare_name(name))
    return f"{name} is missing" if shape is None else f"{name} is {list(shape)}"
