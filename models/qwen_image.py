"""Qwen-Image's blocks over 4-bit linears, filled from a checkpoint: FLUX's joint block under the names of the host's class.

q, k and v are one linear, as in the files (`attn.to_qkv`, `attn.add_qkv_proj`), where the host has three.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .blocks import JointBlock, Leaves, RMSNorm, Stream, stand_in
from .first_block_cache import cached
from .formats.packed import PackedCheckpoint
from .formats.qwen_names import STACK
from .linear import Linear
from .runtime import Runtime


class Attention(nn.Module):
    def __init__(self, leaf: Callable[[str], Linear], norm: Callable[[str], RMSNorm]):
        super().__init__()
        self.to_qkv, self.add_qkv_proj = leaf("attn.to_qkv"), leaf("attn.add_qkv_proj")
        self.norm_q, self.norm_k = norm("attn.norm_q"), norm("attn.norm_k")
        self.norm_added_q, self.norm_added_k = norm("attn.norm_added_q"), norm("attn.norm_added_k")
        self.to_out = nn.ModuleList([leaf("attn.to_out.0"), nn.Dropout(0.0)])
        self.to_add_out = leaf("attn.to_add_out")
        for stacked in (self.to_qkv, self.add_qkv_proj):
            stand_in(self, stacked)


class GELU(nn.Module):
    """The first half of the host's FeedForward; what follows the linear is done inside it."""

    def __init__(self, proj: Linear):
        super().__init__()
        self.proj = proj


class FeedForward(nn.Module):
    def __init__(self, proj: Linear, out: Linear):
        super().__init__()
        self.net = nn.ModuleList([GELU(proj), nn.Dropout(0.0), out])


class QwenImageBlock(JointBlock):
    """Image and text streams with joint attention. Called as the host calls its own: see `forward`."""

    def __init__(self, leaf: Callable[[str], Linear], norm: Callable[[str], RMSNorm], heads: int, runtime: Runtime):
        super().__init__(heads, runtime)
        for s in ("img", "txt"):
            self.add_module(f"{s}_mod", nn.Sequential(nn.SiLU(), leaf(f"{s}_mod.1")))
            self.add_module(f"{s}_mlp", FeedForward(leaf(f"{s}_mlp.net.0.proj"), leaf(f"{s}_mlp.net.2")))
        self.attn = Attention(leaf, norm)
        self.dim = self.attn.to_qkv.in_features

    def stream(self, side: str) -> Stream:
        a = self.attn
        if side == "img":
            return Stream(self.img_mod[1], a.to_qkv, (a.norm_q, a.norm_k), a.to_out[0], self.img_mlp.net[0].proj, self.img_mlp.net[2])
        norms = a.norm_added_q, a.norm_added_k
        return Stream(self.txt_mod[1], a.add_qkv_proj, norms, a.to_add_out, self.txt_mlp.net[0].proj, self.txt_mlp.net[2])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
        timestep_zero_index: int | None = None,
        transformer_options: dict | None = None,
        **unknown: object,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [B, Li, D] (image and references), encoder_hidden_states [B, Lt, D] -> (text, image).

        encoder_hidden_states_mask: None, or what is added to the scores of the text's keys, [B, Lt] or [B, 1, Lt]. temb: [B, D], or with
        timestep_zero_index [2B, D], of which the second half modulates the image tokens from that one on. image_rotary_emb:
        [B|1, 1, Lt + Li, d/2, 2, 2], text first, or with the second and third dimension exchanged (hosts of 2025).
        Unknown keywords are ignored.
        """
        img, txt, options = hidden_states, encoder_hidden_states, transformer_options or {}
        vec, dims = temb, None
        if timestep_zero_index is not None:
            vec = torch.stack(temb.chunk(2, dim=0), 1)
            dims = [(0, timestep_zero_index, 0), (timestep_zero_index, img.shape[1], 1)]
        mask = text_mask(encoder_hidden_states_mask, txt, img)
        pe = tokens_third(image_rotary_emb, txt.shape[1] + img.shape[1])

        def work() -> tuple[Tensor, Tensor]:
            return self.joint(img, txt, vec, pe, mask, dims, None, options)

        img, txt = cached(self.position, (img, txt), options, work)
        return txt, img


def text_mask(mask: Tensor | None, txt: Tensor, img: Tensor) -> Tensor | None:
    """What is added to the scores of all keys, [B, 1, Lt + Li], from that of the text's."""
    if mask is None:
        return None
    n = txt.shape[1]
    out = img.new_zeros(img.shape[0], 1, n + img.shape[1])
    out[:, 0, :n] = mask.view(mask.shape[0], n)
    return out


def tokens_third(pe: Tensor, tokens: int) -> Tensor:
    """pe [B|1, 1, L, d/2, 2, 2], whichever of the two the host gives: the other is [B|1, L, 1, d/2, 2, 2]."""
    return pe.transpose(1, 2) if pe.ndim == 6 and pe.shape[1] == tokens and pe.shape[2] == 1 else pe


def build_blocks(
    checkpoint: PackedCheckpoint,
    *,
    device: torch.device | str = "cpu",
    runtime: Runtime | None = None,
    target: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> nn.ModuleList:
    """All blocks of the checkpoint. Arguments and errors as `Leaves`."""
    leaves = Leaves(checkpoint, device, runtime, target, progress)
    heads, blocks = checkpoint.config["num_attention_heads"], nn.ModuleList()
    with torch.inference_mode(False), torch.no_grad():
        for i in range(checkpoint.config["num_layers"]):
            p = f"{STACK}.{i}."
            block = QwenImageBlock(lambda n, p=p: leaves.linear(p + n), lambda n, p=p: leaves.norm(f"{p}{n}.weight"), heads, leaves.runtime)
            block.position = i
            blocks.append(block)
    return blocks
