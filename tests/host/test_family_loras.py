"""LoRA on Qwen-Image and Z-Image, through the stock loader and through our nodes: as the host's own merge on the dense twin."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.hooks
import comfy.sd
import pytest
import torch
from safetensors.torch import save_file
from tonfa.nodes.host.lora_files import teach_stock_nodes
from tonfa.nodes.lora import NunchakuQwenImageLoraLoader, NunchakuQwenImageLoraStack

from .families import FAMILIES, conditioning, loaded, made, packed_files, sample, twin
from .lab import rel

H, RANK, ALPHA = packed_files.HIDDEN, 8, 4.0
LAYERS = {  # of a block, the host's or diffusers' names: outputs, inputs
    "qwen-image": {
        **{f"attn.{n}": (H, H) for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")},
        **{f"{s}_mlp.net.0.proj": (packed_files.QWEN_MLP, H) for s in ("img", "txt")},
        **{f"{s}_mlp.net.2": (H, packed_files.QWEN_MLP) for s in ("img", "txt")},
        **{f"{s}_mod.1": (6 * H, H) for s in ("img", "txt")},
    },
    "z-image": {
        **{f"attention.{n}": (H, H) for n in ("to_q", "to_k", "to_v", "to_out.0")},
        "feed_forward.w1": (packed_files.Z_MLP, H), "feed_forward.w3": (packed_files.Z_MLP, H), "feed_forward.w2": (H, packed_files.Z_MLP),
        "adaLN_modulation.0": (4 * H, 256),
    },
}  # fmt: skip
STACKS = {"qwen-image": ("transformer_blocks.0", "transformer_blocks.1"), "z-image": ("layers.0", "layers.1", "noise_refiner.0")}
PART = {  # layers of one stacked linear, not all of it
    "qwen-image": ("attn.to_k", "attn.add_v_proj"), "z-image": ("feed_forward.w1", "attention.to_v"),
}  # fmt: skip


def pairs(family: str, only: tuple[str, ...] = (), seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> (up [N, RANK], down [RANK, K]); every layer has its own down."""
    g, found = torch.Generator().manual_seed(seed), {}
    for stack in STACKS[family]:
        for name, (n, k) in LAYERS[family].items():
            if not only or name in only:
                up = torch.randn(n, RANK, generator=g) * (0.5 * RANK**-0.5)
                found[f"{stack}.{name}"] = up, torch.randn(RANK, k, generator=g) * k**-0.5
    return found


def under(name: str) -> str:
    return name.replace(".", "_")


DOWN, A = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
FORMATS = {  # of a layer's name to that in the file; the pair's suffixes; whether there is an alpha
    "diffusers": (lambda n: f"transformer.{n}", A, False),
    "diffusers, an adapter called default": (lambda n: f"transformer.{n}", ("lora_A.default.weight", "lora_B.default.weight"), False),
    "Lightning": (lambda n: n, DOWN, True),
    "kohya, musubi": (lambda n: f"lora_unet_{under(n)}", DOWN, True),
    "PEFT": (lambda n: f"base_model.model.{n}", A, False),
    "ComfyUI": (lambda n: f"diffusion_model.{n}", DOWN, True),
    "OneTrainer": (lambda n: f"lora_transformer_{under(n)}", DOWN, True),
}


def lora(form: str, layers: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The layers' pairs in a format; where it has an alpha, up makes up for it."""
    rename, (first, second), alpha = FORMATS[form]
    found = {}
    for name, (up, down) in layers.items():
        found[f"{rename(name)}.{first}"] = down.clone()
        found[f"{rename(name)}.{second}"] = up * (RANK / ALPHA) if alpha else up.clone()
        if alpha:
            found[f"{rename(name)}.alpha"] = torch.tensor(ALPHA)
    return found


def lokr(family: str) -> dict[str, torch.Tensor]:
    g, found = torch.Generator().manual_seed(7), {}
    for stack in STACKS[family]:
        for name, (n, k) in LAYERS[family].items():
            key = f"lycoris_{under(f'{stack}.{name}')}"
            found[f"{key}.lokr_w1"] = torch.randn(4, 4, generator=g) * 0.5
            found[f"{key}.lokr_w2"] = torch.randn(n // 4, k // 4, generator=g) * k**-0.5
            found[f"{key}.alpha"] = torch.tensor(1.0)
    return found


def stock(model, tensors: dict[str, torch.Tensor], strength: float = 1.0):
    """What LoraLoaderModelOnly makes of a file's tensors."""
    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]


@pytest.fixture(scope="module")
def models() -> dict:
    return {}


@pytest.fixture(params=FAMILIES)
def both(request, models) -> tuple:
    """(family, ours, the dense twin, our latent, the twin's with a LoRA on every layer)."""
    family = request.param
    if family not in models:
        teach_stock_nodes()  # as the loader nodes do
        path = made(family)
        ours, dense = loaded(path), twin(path)
        plain = sample(ours, family, steps=2)
        want = sample(stock(dense, lora("diffusers", pairs(family)), 0.8), family, steps=2)
        assert rel(want, plain) > 0.01
        models[family] = family, ours, dense, plain, want
    return models[family]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_through_the_stock_loader(both, form, caplog):
    family, ours, _, plain, want = both
    with caplog.at_level(logging.WARNING):
        model = stock(ours, lora(form, pairs(family)), 0.8)
    assert "not loaded" not in caplog.text.lower(), caplog.text
    assert rel(sample(model, family, steps=2), want) < 1e-3
    assert torch.equal(sample(ours, family, steps=2), plain)  # and it leaves no trace


def test_layers_of_a_stacked_linear_alone(both):
    family, ours, dense, plain, _ = both
    tensors = lora("diffusers", pairs(family, PART[family]))
    got, want = (sample(stock(m, tensors), family, steps=2) for m in (ours, dense))
    assert rel(got, want) < 1e-3 and rel(got, plain) > 1e-3


def test_lokr(both):
    family, ours, dense, plain, _ = both
    got, want = (sample(stock(m, lokr(family), 0.5), family, steps=2) for m in (ours, dense))
    assert rel(got, want) < 1e-2 and rel(got, plain) > 0.015


def test_two_loras_and_another_strength(both):
    family, ours, dense, _, _ = both
    one, two = lora("diffusers", pairs(family)), lora("diffusers", pairs(family, seed=1))
    got, want = (sample(stock(stock(m, one, 0.5), two, -0.4), family, steps=2) for m in (ours, dense))
    assert rel(got, want) < 1e-3


def test_deltas_of_biases_and_norms(both):
    family, ours, dense, plain, _ = both
    g = torch.Generator().manual_seed(2)
    if family == "qwen-image":
        tensors = {
            "diffusion_model.transformer_blocks.0.attn.to_k.diff_b": torch.randn(H, generator=g) * 0.3,
            "diffusion_model.transformer_blocks.0.img_mlp.net.2.diff_b": torch.randn(H, generator=g) * 0.3,
            "diffusion_model.transformer_blocks.1.attn.norm_q.diff": torch.randn(packed_files.HEAD, generator=g) * 0.3,
            "diffusion_model.img_in.diff_b": torch.randn(H, generator=g) * 0.3,
        }
    else:
        tensors = {
            "diffusion_model.layers.0.attention_norm1.diff": torch.randn(H, generator=g) * 0.3,
            "diffusion_model.layers.1.attention.q_norm.diff": torch.randn(packed_files.HEAD, generator=g) * 0.3,
            "diffusion_model.layers.0.adaLN_modulation.0.diff_b": torch.randn(4 * H, generator=g) * 0.3,
            "diffusion_model.x_embedder.diff_b": torch.randn(H, generator=g) * 0.3,
        }
    got, want = (sample(stock(m, dict(tensors)), family, steps=2) for m in (ours, dense))
    assert rel(got, want) < 1e-3 and rel(got, plain) > 1e-3


def test_fast_runs_the_columns_too(both):
    family, ours, _, _, want = both
    model = stock(ours, lora("diffusers", pairs(family)), 0.8)
    model.model_options["transformer_options"]["tonfa"] = {"compute": "fast"}
    assert rel(sample(model, family, steps=2), want) < 0.05


# -- our nodes -------------------------------------------------------------------------------------------------------------------------


def test_our_nodes(both, base):
    family, ours, _, plain, want = both
    folder = Path(base, "models", "loras")
    save_file(lora("kohya, musubi", pairs(family)), folder / f"{family}-one.safetensors")
    model = NunchakuQwenImageLoraLoader().load_lora(ours, f"{family}-one.safetensors", 0.8, "disable")[0]
    assert rel(sample(model, family, steps=2), want) < 1e-3
    assert NunchakuQwenImageLoraLoader().load_lora(ours, f"{family}-one.safetensors", 0.0, "disable")[0] is ours
    rows = {"lora_name_1": f"{family}-one.safetensors", "lora_strength_1": 0.5, "lora_name_2": f"{family}-one.safetensors",
            "lora_strength_2": 0.3, "lora_name_3": f"{family}-one.safetensors", "lora_strength_3": 9.0}  # fmt: skip
    stacked = NunchakuQwenImageLoraStack().load_lora_stack(ours, lora_count=2, cpu_offload="disable", **rows)[0]
    assert rel(sample(stacked, family, steps=2), want) < 1e-3
    assert torch.equal(sample(ours, family, steps=2), plain)


def test_a_foreign_lora_is_refused(both, base):
    family, ours, _, plain, _ = both
    path = Path(base, "models", "loras", "sdxl.safetensors")
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lora_down.weight": torch.zeros(4, 64), f"{name}.lora_up.weight": torch.zeros(64, 4)}, path)
    with pytest.raises(ValueError, match="nothing for this model"):
        NunchakuQwenImageLoraLoader().load_lora(ours, "sdxl.safetensors", 1.0, "disable")
    assert torch.equal(sample(ours, family, steps=2), plain)


# -- what looks a layer up by its key ----------------------------------------------------------------------------------------------------


def hooked(model, family: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """A latent with the LoRA as a weight hook on the conditioning (Create Hook LoRA), as ComfyUI's own nodes set it up."""
    hooks = comfy.hooks.create_hook_lora(lora=tensors, strength_model=0.8, strength_clip=0.0)
    clone = model.clone()
    clone.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    return sample(clone, family, steps=2, positive=[[c, {**extra, "hooks": hooks}] for c, extra in conditioning()])


def test_a_lora_by_hooks(both, caplog):
    family, ours, dense, plain, _ = both
    tensors = lora("ComfyUI", pairs(family, PART[family]))
    if family == "qwen-image":
        tensors["diffusion_model.transformer_blocks.0.attn.to_k.diff_b"] = torch.randn(H, generator=torch.Generator().manual_seed(2))
    with caplog.at_level(logging.WARNING):
        got = hooked(ours, family, tensors)
    want = hooked(dense, family, tensors)
    assert rel(got, want) < 1e-3 and rel(want, plain) > 1e-3
    assert "does not exist in model" not in caplog.text
    assert torch.equal(sample(ours, family, steps=2), plain)


def test_a_model_as_a_hook_on_stacked_layers(both):
    """Create Hook Model as LoRA: the difference to another model's weights, q, k and v or value and gate apart."""
    family, ours, dense, plain, _ = both
    keys = [f"diffusion_model.{stack}.{name}.weight" for stack in STACKS[family][:1] for name in PART[family] if name != "attention.to_v"]
    state = dense.model.state_dict()
    target = {key: state[key] + 0.02 * torch.randn(state[key].shape, generator=torch.Generator().manual_seed(5)) for key in keys}
    found = []
    for model in (ours, dense):
        clone = model.clone()
        clone.add_patches({key: ("model_as_lora", (tensor,)) for key, tensor in target.items()}, 1.0)
        if model is ours:
            found.append(sample(clone, family, steps=2))
        else:
            diff = {key: ("diff", (target[key] - state[key],)) for key in keys}
            clone = model.clone()
            clone.add_patches(diff, 1.0)
            found.append(sample(clone, family, steps=2))
    assert rel(*found) < 1e-3 and rel(found[0], plain) > 1e-3


def test_extract_lora_finds_the_hosts_layers(both):
    family, ours, _, _, _ = both
    nodes_lora_extract = pytest.importorskip("comfy_extras.nodes_lora_extract")
    kind = nodes_lora_extract.LORAType.STANDARD
    made = nodes_lora_extract.calc_lora_model(stock(ours, lora("diffusers", pairs(family))), 4, "diffusion_model.", "", {}, kind)
    name = f"{STACKS[family][0]}.{PART[family][0]}"
    up, down = made[f"{name}.lora_up.weight"], made[f"{name}.lora_down.weight"]
    assert (up.shape[0], down.shape[1]) == LAYERS[family][PART[family][0]]
    assert not any("to_qkv" in key or "net.0.proj" in key and family == "z-image" for key in made)
