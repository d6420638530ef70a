"""Generated LoRAs for the small model of lab.py, and what tests do with patched models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from tonfa.models.linear import PackedLinear

import nodes

from .lab import CPU

HIDDEN, DEPTH = 128, 2
CLOSE = 60  # dB: 1e-3


class Random:
    def __init__(self, seed: int):
        self.g = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.g) * 0.2


def packed_only(seed: int = 7, rank: int = 4) -> dict[str, torch.Tensor]:
    """Low-rank patches on packed layers only: split q, k, v (row offsets in the host) and, in kohya's form with alpha, single blocks."""
    r, sd = Random(seed), {}
    for i in range(DEPTH):
        for name in ("to_q", "to_k", "to_v", "add_q_proj"):
            sd[f"transformer.transformer_blocks.{i}.attn.{name}.lora_A.weight"] = r(rank, HIDDEN)
            sd[f"transformer.transformer_blocks.{i}.attn.{name}.lora_B.weight"] = r(HIDDEN, rank)
        sd[f"transformer.transformer_blocks.{i}.norm1.linear.lora_A.weight"] = r(rank, HIDDEN)
        sd[f"transformer.transformer_blocks.{i}.norm1.linear.lora_B.weight"] = r(6 * HIDDEN, rank)
        for name, n, k in (("linear1", 7, 1), ("linear2", 1, 5)):
            sd[f"lora_unet_single_blocks_{i}_{name}.lora_down.weight"] = r(rank, k * HIDDEN)
            sd[f"lora_unet_single_blocks_{i}_{name}.lora_up.weight"] = r(n * HIDDEN, rank)
            sd[f"lora_unet_single_blocks_{i}_{name}.alpha"] = torch.tensor(2.0)
    return sd


def mixed() -> dict[str, torch.Tensor]:
    """That, and what is not low-rank (LoKr, LoHa, DoRA, a full difference), biases, and layers that are not packed."""
    r, sd = Random(8), packed_only()
    sd["lora_unet_double_blocks_0_txt_mlp_0.lokr_w1"] = r(4, 4)
    sd["lora_unet_double_blocks_0_txt_mlp_0.lokr_w2"] = r(HIDDEN, HIDDEN // 4)
    for key, shape in (("hada_w1_a", (HIDDEN, 4)), ("hada_w1_b", (4, HIDDEN)), ("hada_w2_a", (HIDDEN, 4)), ("hada_w2_b", (4, HIDDEN))):
        sd[f"lora_unet_double_blocks_1_img_attn_proj.{key}"] = r(*shape)
    sd["lora_unet_double_blocks_1_img_mlp_0.lora_down.weight"] = r(4, HIDDEN)
    sd["lora_unet_double_blocks_1_img_mlp_0.lora_up.weight"] = r(4 * HIDDEN, 4)
    sd["lora_unet_double_blocks_1_img_mlp_0.dora_scale"] = 1 + r(4 * HIDDEN, 1)
    sd["diffusion_model.double_blocks.0.txt_mlp.2.diff"] = r(HIDDEN, 4 * HIDDEN) * 0.2
    sd["diffusion_model.double_blocks.0.txt_mlp.2.diff_b"] = r(HIDDEN)
    sd["diffusion_model.double_blocks.1.img_attn.proj.diff_b"] = r(HIDDEN)
    sd["diffusion_model.img_in.lora_up.weight"] = r(HIDDEN, 2)
    sd["diffusion_model.img_in.lora_down.weight"] = r(2, 64)
    return sd


def misfit() -> dict[str, torch.Tensor]:
    """A LoRA of a wider model on one layer, a right one on another."""
    r = Random(9)
    sd = {f"lora_unet_single_blocks_0_linear2.lora_{k}.weight": r(*s) for k, s in (("down", (4, 6 * HIDDEN)), ("up", (HIDDEN, 4)))}
    return sd | {f"lora_unet_single_blocks_1_linear2.lora_{k}.weight": r(*s) for k, s in (("down", (4, 5 * HIDDEN)), ("up", (HIDDEN, 4)))}


def unpacked_only(seed: int = 21) -> dict[str, torch.Tensor]:
    """Low-rank patches, differences and new values on what is not packed: embedders, final layer, norms, biases."""
    r = Random(seed)
    sd = {f"diffusion_model.{name}.lora_up.weight": r(n, 2) for name, n in (("img_in", HIDDEN), ("final_layer.linear", 64))}
    sd |= {f"diffusion_model.{name}.lora_down.weight": r(2, k) for name, k in (("img_in", 64), ("final_layer.linear", HIDDEN))}
    sd["transformer.norm_out.linear.lora_up.weight"] = r(2 * HIDDEN, 2)  # the host swaps the halves by a function
    sd["transformer.norm_out.linear.lora_down.weight"] = r(2, HIDDEN)
    sd["diffusion_model.final_layer.linear.diff_b"] = r(64)
    sd["diffusion_model.double_blocks.0.img_mlp.2.diff_b"] = r(HIDDEN)
    sd["diffusion_model.double_blocks.1.txt_attn.qkv.diff_b"] = r(3 * HIDDEN)
    sd["transformer.transformer_blocks.0.attn.norm_q.diff"] = r(HIDDEN // 2)
    return sd


def control() -> dict[str, torch.Tensor]:
    """A FLUX tools LoRA: img_in takes twice as many channels."""
    r = Random(31)
    sd = {"img_in.lora_A.weight": r(4, 128), "img_in.lora_B.weight": r(HIDDEN, 4), "img_in.lora_B.bias": r(HIDDEN)}
    sd |= {"double_blocks.0.img_attn.proj.lora_A.weight": r(4, HIDDEN), "double_blocks.0.img_attn.proj.lora_B.weight": r(HIDDEN, 4)}
    return sd | {"single_blocks.0.norm.key_norm.scale": 1 + r(HIDDEN // 2)}


def applied(model, tensors: dict[str, torch.Tensor], strength: float = 0.7):
    """The model with a LoRA by what the host's loader node calls."""
    return comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0.0)[0]


def with_lora(model, file: str, strength: float = 0.7):
    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, file, strength)[0]


def unload() -> None:
    comfy.model_management.unload_all_models()


def packed_of(patcher) -> list[PackedLinear]:
    return [m for m in patcher.model.modules() if isinstance(m, PackedLinear)]


@contextlib.contextmanager
def counted(owner: object, name: str) -> Iterator[list[tuple]]:
    """Collects the arguments of every call of a function or method inside."""
    calls, function = [], getattr(owner, name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(owner, name, lambda *a, **k: (calls.append(a), function(*a, **k))[1])
        yield calls


def counted_loads() -> contextlib.AbstractContextManager[list[tuple]]:
    """Counts the host's loads of weights inside."""
    return counted(comfy.model_patcher.ModelPatcher, "load")


def sizes(*patchers: object) -> list[tuple[int, int]]:
    """(total, loaded) of each, after a look at whether they can be so."""
    found = [(p.model_size(), p.loaded_size()) for p in patchers]
    assert all(0 <= loaded <= total for total, loaded in found), found
    for m in comfy.model_management.current_loaded_models:
        assert m.model is None or 0 <= m.model_offloaded_memory() <= m.model_memory()
    return found


def one_step(patcher, seed: int = 6) -> torch.Tensor:
    """The model on one latent as it is loaded now, without the manager's help."""
    g = torch.Generator().manual_seed(seed)
    x, context, y = (torch.randn(s, generator=g) for s in ((1, 16, 8, 12), (1, 12, 96), (1, 64)))
    patcher.model.current_patcher = patcher
    options = {"tonfa": {"compute": "weight_only"}}
    with torch.inference_mode():
        return patcher.model.apply_model(
            x, torch.tensor([0.5]), c_crossattn=context, y=y, guidance=torch.tensor([3.5]), transformer_options=options
        )


def one_step_of(patcher) -> torch.Tensor:
    with torch.inference_mode():
        patcher.patch_model(CPU)
        out = one_step(patcher)
        patcher.unpatch_model(CPU)
    return out
