"""Z-Image in the published SVDQuant files: layers, tensors and their shapes, and the names of the host's NextDiT.

Files have diffusers' names with q, k and v as one layer (`attention.to_qkv`, the host's `attention.qkv`) and the two halves of the SwiGLU
as another: `feed_forward.net.0.proj` has the rows of the host's w3 (value) above those of w1 (gate), and `net.2`, the host's w2, takes
value * silu(gate). The host has no name for the stacked pair, so it keeps the file's. No linear that is quantised has a bias, and the
modulation stays in 16 bit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .flux_names import HostLinear, LayerSpec
from .layout import Layout, Piece, v2_suffix
from .sizes import Sizes, axes_of, contradictions, number_of
from .tensorfile import CheckpointError, Entry

TITLE = "Z-Image"
REFINERS = ("noise_refiner", "context_refiner")
STACKS = ("layers", *REFINERS)
AXES = [32, 48, 48]  # of a head of 128
ADALN = 256  # width of the time embedding that modulates, at most
MULTIPLE = 256  # the host rounds the SwiGLU's width up to a multiple of it


@dataclass(frozen=True)
class ZImageDims:
    """Sizes of a Z-Image transformer: `depth` main blocks, `refiners` blocks in each of the two refiners; mlp is the width inside the
    SwiGLU, in_width and out_width are channels after 2x2 patching. pad_tokens: it has the two learnt tokens to pad with."""

    hidden: int
    head_dim: int
    mlp: int
    depth: int
    refiners: int
    in_width: int
    out_width: int
    context: int
    pad_tokens: bool

    def blocks(self) -> Iterator[tuple[str, str]]:
        """(stack, "layers.0.") of every block."""
        for stack in STACKS:
            for i in range(self.depth if stack == "layers" else self.refiners):
                yield stack, f"{stack}.{i}."


def read_dims(tensors: Mapping[str, Entry], where: str, config: Mapping[str, object]) -> ZImageDims:
    """Sizes from shapes, the numbers of blocks checked with the metadata's config. CheckpointError when they cannot be right."""
    sizes = Sizes(tensors, where, TITLE)
    depth = sizes.blocks("layers", config.get("n_layers"))
    noise, context = (sizes.blocks(stack, config.get("n_refiner_layers")) for stack in REFINERS)
    if noise != context:
        raise CheckpointError(f"{where}: holds {noise} blocks noise_refiner.* and {context} blocks context_refiner.*, expected as many of "
                              "one as of the other: some are missing. Download the file again.")  # fmt: skip
    hidden, in_width = sizes.shape("all_x_embedder.2-1.weight", 2)
    (head_dim,) = sizes.shape("layers.0.attention.norm_q.weight", 1)
    mlp = sizes.inputs("layers.0.feed_forward.net.2")
    out_width = sizes.shape("all_final_layer.2-1.linear.weight", 2)[0]
    sizes.multiples(("hidden size", hidden, 128), ("hidden size", hidden, head_dim), ("head size", head_dim, 2),
                    ("SwiGLU width", mlp, MULTIPLE), ("input width", in_width, 4), ("output width", out_width, 4))  # fmt: skip
    if in_width != out_width:
        raise CheckpointError(f"{where}: all_x_embedder.2-1 takes {in_width} channels and all_final_layer.2-1.linear gives {out_width}, "
                              f"expected the same number for {TITLE}.")  # fmt: skip
    return ZImageDims(
        hidden=hidden, head_dim=head_dim, mlp=mlp, depth=depth, refiners=noise, in_width=in_width, out_width=out_width,
        context=sizes.shape("cap_embedder.1.weight", 2)[1], pad_tokens="x_pad_token" in tensors or "cap_pad_token" in tensors,
    )  # fmt: skip


def _multiplier(d: ZImageDims) -> float:
    """The factor by which the host comes from the hidden size to the width of the SwiGLU: 8/3 where that gives it."""
    usual = 8 / 3
    return usual if MULTIPLE * -(-int(usual * d.hidden) // MULTIPLE) == d.mlp else d.mlp / d.hidden


def unet_config(d: ZImageDims, config: Mapping[str, object], warnings: list[str]) -> dict:
    """The host's config of these sizes: arguments of its NextDiT, without `allow_fp16`, which values decide. Warns of metadata that the
    tensors contradict."""
    heads = d.hidden // d.head_dim
    axes = AXES if d.head_dim == sum(AXES) else _axes(d.head_dim)
    out = {
        "image_model": "lumina2", "patch_size": 2, "in_channels": d.in_width // 4, "dim": d.hidden, "cap_feat_dim": d.context,
        "n_layers": d.depth, "n_refiner_layers": d.refiners, "qk_norm": True, "n_heads": heads, "n_kv_heads": heads,
        "axes_dims": axes_of(config.get("axes_dims"), list(axes), d.head_dim, warnings), "axes_lens": [1536, 512, 512],
        "rope_theta": number_of(config, "rope_theta", 256.0, warnings), "ffn_dim_multiplier": _multiplier(d), "z_image_modulation": True,
        "time_scale": number_of(config, "t_scale", 1000.0, warnings),
    }  # fmt: skip
    if d.pad_tokens:
        out["pad_tokens_multiple"] = 32
    told = ("in_channels", "dim", "cap_feat_dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads")
    contradictions(config, {key: out[key] for key in told}, warnings)
    return out


def _axes(head_dim: int) -> list[int]:
    """Rotary split of a head of another size: 32:48:48 in proportion, every part even."""
    side = 2 * (head_dim * 3 // 16)
    return [head_dim - 2 * side, side, side]


def _block_layers(d: ZImageDims, block: str) -> list[tuple[str, str, LayerSpec]]:
    """(name of the linear, prefix in the file, LayerSpec) of one block."""
    h, ff = d.hidden, f"{block}feed_forward."
    return [
        (f"{block}attention.qkv", f"{block}attention.to_qkv", LayerSpec(3 * h, h)),
        (f"{block}attention.out", f"{block}attention.to_out.0", LayerSpec(h, h)),
        (f"{ff}net.0.proj", f"{ff}net.0.proj", LayerSpec(2 * d.mlp, h)),
        (f"{ff}w2", f"{ff}net.2", LayerSpec(h, d.mlp)),
    ]


def layer_specs(d: ZImageDims) -> dict[str, LayerSpec]:
    """prefix -> LayerSpec of every layer that the format may quantise; those of the refiners are 16-bit in many files."""
    return {prefix: spec for _, block in d.blocks() for _, prefix, spec in _block_layers(d, block)}


def host_linears(d: ZImageDims) -> list[HostLinear]:
    """Every linear of the blocks that the format may quantise, block by block."""
    return [
        HostLinear(name, spec.n, spec.k, "w4a4", ((prefix, 0, 0),))
        for _, block in d.blocks()
        for name, prefix, spec in _block_layers(d, block)
    ]


def plain_specs(d: ZImageDims) -> list[tuple[str, str, tuple[int, ...]]]:
    """(native name, key, shape) of every tensor that the format leaves alone."""
    h, time, adaln = d.hidden, min(d.hidden, 1024), min(d.hidden, ADALN)
    out = []
    for native, key, n, k in (
        ("x_embedder", "all_x_embedder.2-1", h, d.in_width),
        ("cap_embedder.1", "cap_embedder.1", h, d.context),
        ("t_embedder.mlp.0", "t_embedder.mlp.0", time, 256),
        ("t_embedder.mlp.2", "t_embedder.mlp.2", ADALN, time),
        ("final_layer.linear", "all_final_layer.2-1.linear", d.out_width, h),
        ("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1", h, adaln),
    ):
        out += [(f"{native}.weight", f"{key}.weight", (n, k)), (f"{native}.bias", f"{key}.bias", (n,))]
    out.append(("cap_embedder.0.weight", "cap_embedder.0.weight", (d.context,)))
    if d.pad_tokens:
        out += [(name, name, (1, h)) for name in ("x_pad_token", "cap_pad_token")]
    for stack, block in d.blocks():
        out += [(f"{block}attention.{q}_norm.weight", f"{block}attention.norm_{q}.weight", (d.head_dim,)) for q in ("q", "k")]
        norms = [f"{block}{norm}.weight" for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")]
        out += [(name, name, (h,)) for name in norms]
        if stack != "context_refiner":
            mod = f"{block}adaLN_modulation.0"
            out += [(f"{mod}.weight", f"{mod}.weight", (4 * h, adaln)), (f"{mod}.bias", f"{mod}.bias", (4 * h,))]
    return out


def layout(d: ZImageDims) -> Layout:
    """What a Z-Image file of these sizes holds."""
    natives, splits = {}, {}
    for _, block in d.blocks():
        ff, attention = f"{block}feed_forward.", f"{block}attention."
        natives[f"{ff}net.0.proj"] = (Piece(f"{ff}w3", 0, d.mlp), Piece(f"{ff}w1", d.mlp, d.mlp))
        splits[f"{attention}to_qkv"] = tuple(Piece(f"{attention}to_{q}", i * d.hidden, d.hidden) for i, q in enumerate("qkv"))
    return Layout(TITLE, host_linears(d), layer_specs(d), plain_specs(d), v2_suffix, natives=natives, splits=splits, biases=False)
