"""LoRA by weight hooks, on one side of the conditioning and by schedule: as the host's own, and made once for all the times it comes on."""

from __future__ import annotations

import logging

import comfy.hooks
import comfy.model_management
import pytest
import torch
from tonfa.nodes.host import branches

from .lab import CPU, conditioning, loaded, made, rel, sample, snr, twin
from .loras import CLOSE, HIDDEN, Random, applied, counted, misfit, mixed, one_step, packed_of, packed_only, sizes, unload, unpacked_only

NEGATIVE = conditioning(tokens=20, seed=9)


@pytest.fixture(scope="module")
def pair():
    ours, theirs = loaded(made()), twin(made())
    return ours, theirs, sample(ours)


def group(tensors: dict[str, torch.Tensor], strength: float = 0.7, schedule: tuple = ()) -> comfy.hooks.HookGroup:
    """As Create Hook LoRA makes it; schedule: (strength, start) of keyframes."""
    hooks = comfy.hooks.create_hook_lora(lora=tensors, strength_model=strength, strength_clip=0.0)
    if schedule:
        keyframes = comfy.hooks.HookKeyframeGroup()
        for value, start in schedule:
            keyframes.add(comfy.hooks.HookKeyframe(strength=value, start_percent=start))
        hooks.set_keyframes_on_hooks(keyframes)
    return hooks


def hooked(*args: object, **kwargs: object) -> list:
    return comfy.hooks.set_hooks_for_conditioning(conditioning(), group(*args, **kwargs))


def register(model, hooks: comfy.hooks.HookGroup) -> comfy.hooks.HookGroup:
    model.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model), {})
    return hooks


def both(pair, positive, **how: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and the twin's latents. positive: makes the conditioning, anew for each."""
    found = []
    for model in pair[:2]:
        found.append(sample(applied(model, packed_only(seed=11), 0.5), positive(), NEGATIVE, cfg=2.0, **how))
        unload()
    return found[0], found[1]


@pytest.mark.parametrize("tensors", [packed_only, mixed, unpacked_only])
def test_hook_lora_on_one_side_over_an_ordinary_one(pair, tensors):
    got, wanted = both(pair, lambda: hooked(tensors()))
    without, _ = both(pair, conditioning)
    assert snr(got, wanted) > CLOSE and rel(got, without) > 1e-3
    assert torch.equal(sample(pair[0]), pair[2])


def test_what_hooks_add_is_made_once(pair):
    model, tensors = pair[0].clone(), packed_only()
    keys = 2 * (1 + 1 + 1 + 2)  # img qkv, txt qkv, modulation and two linears of single blocks, twice each
    with counted(branches, "make_side") as calls, counted(type(model), "get_key_patches") as listed:
        first = sample(model, hooked(tensors), NEGATIVE, cfg=2.0, steps=6)
    assert len(calls) == keys and len(listed) == 1
    model.set_hook_mode(comfy.hooks.EnumHookMode.MinVram)
    with counted(branches, "make_side") as calls:
        assert torch.equal(sample(model, hooked(tensors), NEGATIVE, cfg=2.0, steps=6), first)
    assert len(calls) > 2 * keys


def test_scheduled_hook_lora(pair):
    schedule = ((1.0, 0.0), (0.5, 0.3), (0.0, 0.6), (-0.5, 0.8))
    got, wanted = both(pair, lambda: hooked(mixed(), schedule=schedule), steps=8)
    assert snr(got, wanted) > CLOSE
    with counted(branches, "make_side") as calls:
        sample(pair[0], hooked(packed_only(), schedule=schedule), NEGATIVE, cfg=2.0, steps=8)
    assert len(calls) <= 10 * len(schedule)


def test_two_groups_of_hooks_in_turn(pair):
    positive, negative = (lambda: hooked(packed_only())), (lambda: hooked(packed_only(seed=13), 0.4))
    found = []
    for model in pair[:2]:
        with counted(branches, "make_side") as calls:
            found.append(sample(model, positive(), negative(), cfg=2.0, steps=6))
        assert len(calls) == (20 if model is pair[0] else 0)
        unload()
    assert snr(*found) > CLOSE


def test_hooks_by_hand_count_and_give_everything_back(pair):
    model = applied(pair[0], packed_only(seed=11), 0.5)
    hooks = group(packed_only())
    with torch.inference_mode():
        model.patch_model(CPU)
        before, (size,) = one_step(model), sizes(model)
        register(model, hooks)
        model.patch_hooks(hooks)
        (on,) = sizes(model)
        assert rel(one_step(model), before) > 1e-3 and on[0] == on[1] > size[1]
        model.unpatch_hooks()
        assert torch.equal(one_step(model), before)
        assert sizes(model) == [on], "what is kept for the next turn has to count"
        sizes(pair[0])
        model.clean_hooks()
        assert sizes(model) == [size]
        model.patch_hooks(hooks)
        model.partially_unload(CPU, size[0] // 2)
        sizes(model, pair[0])
        model.unpatch_model(CPU)
        assert sizes(model) == [(size[0], 0)]
    assert not any(m.has_side for m in packed_of(model))


def test_nothing_is_kept_where_memory_is_short(pair, monkeypatch):
    model, hooks = pair[0].clone(), group(packed_only())
    with torch.inference_mode():
        model.patch_model(CPU)
        register(model, hooks)
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *a, **k: 1 << 20)
        (size,) = sizes(model)
        model.patch_hooks(hooks)
        model.unpatch_hooks()
        assert sizes(model) == [size]
        monkeypatch.undo()
        model.unpatch_model(CPU)


def test_what_a_hook_cannot_apply_is_said_once(pair, caplog):
    schedule = ((1.0, 0.0), (0.5, 0.4))
    wanted = sample(pair[1], hooked(misfit(), schedule=schedule), NEGATIVE, cfg=2.0)
    unload()
    model = pair[0].clone()
    model.set_hook_mode(comfy.hooks.EnumHookMode.MinVram)
    with caplog.at_level(logging.WARNING, logger="tonfa"):
        got = sample(model, hooked(misfit(), schedule=schedule), NEGATIVE, cfg=2.0)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("tonfa")]
    assert len(said) == 1 and "diffusion_model.single_blocks.0.linear2.weight is 128 x 640, the LoRA 128 x 768" in said[0]
    assert snr(got, wanted) > CLOSE


def test_boft_without_alpha_by_hook_and_by_loader(pair):
    """The host's own model cannot: it compares None with 0."""
    r = Random(3)
    names = ("double_blocks.0.img_attn.proj", "img_in")
    tensors = {f"diffusion_model.{name}.oft_blocks": r(2, HIDDEN // 8, 8, 8) for name in names}
    constrained = tensors | {f"diffusion_model.{name}.alpha": torch.tensor(0.0) for name in names}  # which is what a missing one means
    wanted = sample(pair[1], hooked(constrained), NEGATIVE, cfg=2.0)
    assert rel(wanted, sample(pair[1], negative=NEGATIVE, cfg=2.0)) > 1e-3
    wanted_loader = sample(applied(pair[1], constrained))
    unload()
    assert snr(sample(pair[0], hooked(tensors), NEGATIVE, cfg=2.0), wanted) > CLOSE
    assert snr(sample(applied(pair[0], tensors)), wanted_loader) > CLOSE


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_as_lora(pair, lora):
    """Create Hook Model as LoRA: differences to the weights of another dense model, biases among them."""
    other = comfy.hooks.get_patch_weights_from_model(twin(made(seed=1)))
    found = []
    for model in pair[:2]:
        hooks = comfy.hooks.create_hook_model_as_lora(other, None, 0.3, 0.0)
        model = applied(model, mixed()) if lora else model
        found.append(sample(model, comfy.hooks.set_hooks_for_conditioning(conditioning(), hooks)))
        unload()
    assert snr(*found) > CLOSE and rel(found[0], pair[2]) > 1e-2
