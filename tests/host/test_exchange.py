"""One clone's patches in place of another's: what is not packed is exchanged where it lies, and the books stay right."""

from __future__ import annotations

import gc
import logging
from contextlib import ExitStack, contextmanager

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from tonfa.nodes.host import branches, patcher

from .lab import CPU, conditioning, loaded, made, rel, sample, snr, twin
from .loras import (
    CLOSE,
    HIDDEN,
    Random,
    applied,
    control,
    counted,
    counted_loads,
    misfit,
    mixed,
    one_step,
    one_step_of,
    packed_of,
    packed_only,
    sizes,
    unload,
)
from .loras import unpacked_only as unpacked


@pytest.fixture(scope="module")
def pair():
    ours, theirs = loaded(made()), twin(made())
    return ours, theirs, sample(ours)


def everything(seed: int = 21) -> dict[str, torch.Tensor]:
    return mixed() | unpacked(seed)


@contextmanager
def counted_work():
    """Host loads, host merges and sides made inside."""
    with ExitStack() as stack:
        merges = stack.enter_context(counted(comfy.model_patcher.ModelPatcher, "patch_weight_to_device"))
        yield stack.enter_context(counted_loads()), merges, stack.enter_context(counted(branches, "make_side"))


def held(patcher_) -> dict[str, int]:
    """Where the model's packed weights lie."""
    return {key: leaf.weight.data_ptr() for key, leaf in patcher_.packed.items()}


# -- what is not packed ------------------------------------------------------------------------------------------------------------------


def test_other_patches_on_unpacked_layers_and_biases_reload_nothing(pair):
    ours, theirs, plain = pair
    first, second = everything(), everything(22)
    cases = [(first, 0.7), (first, -0.4), (second, 0.5), (unpacked(23), 1.0), (packed_only(), 0.5)]
    wanted = [sample(applied(theirs, *case)) for case in cases]
    sample(ours)
    places = held(ours)
    with counted_loads() as loads:
        for case, latent in zip(cases, wanted, strict=True):
            got = sample(applied(ours, *case))
            assert snr(got, latent) > CLOSE and rel(got, plain) > 1e-3
        assert torch.equal(sample(ours), plain)
    assert loads == [] and held(ours) == places
    assert not ours.backup


def test_the_same_file_and_strength_again_does_nothing(pair):
    ours, _, _ = pair
    tensors = everything()
    before = sample(applied(ours, tensors, 0.6))
    with counted_work() as (loads, merges, made_sides):
        again = applied(ours, tensors, 0.6)  # new adapters over the same tensors
        assert torch.equal(sample(again), before)
        assert torch.equal(sample(again.clone()), before)
    assert (loads, merges, made_sides) == ([], [], [])


def test_only_what_differs_is_made_anew(pair):
    ours, _, _ = pair
    below = applied(ours, everything(), 0.6)
    sample(below)
    one = {
        f"diffusion_model.double_blocks.0.img_attn.proj.lora_{k}.weight": Random(5)(*s)
        for k, s in (("up", (HIDDEN, 4)), ("down", (4, HIDDEN)))
    }
    with counted_work() as (loads, merges, made_sides):
        sample(applied(below, one, 0.5))
    assert (loads, merges, len(made_sides)) == ([], [], 1)


@pytest.mark.parametrize("share", [2, 6, 100])
def test_exchanged_in_a_partially_loaded_model(pair, share):
    ours, theirs, _ = pair
    first, second = applied(ours, everything()), applied(ours, everything(22), 0.5)
    wanted = [one_step_of(applied(theirs, everything())), one_step_of(applied(theirs, everything(22), 0.5)), one_step_of(theirs)]
    with torch.inference_mode():
        first.patch_model(CPU, lowvram_model_memory=max(first.model_size() // share, 1))
        assert sum(m.comfy_cast_weights for m in packed_of(ours)) > 0
        for model, latent in zip((first, second, ours, first), (*wanted, wanted[0]), strict=True):
            model.partially_load(CPU, 0.1)
            assert snr(one_step(model), latent) > CLOSE
            sizes(first, second, ours)
        first.unpatch_model(CPU)
        assert not any(m.weight_function or m.bias_function for m in packed_of(ours))
        assert ours.model.lowvram_patch_counter == 0


def test_loading_more_of_a_partially_loaded_model_merges_nothing_twice(pair):
    """Where a larger layer takes the room of small ones, the host marks these as streamed and leaves them loaded, with their patches."""
    ours, theirs, _ = pair
    model, wanted = applied(ours, everything()), one_step_of(applied(theirs, everything()))
    biggest = max(leaf.weight.nbytes for leaf in ours.packed.values())
    with torch.inference_mode():
        for tenths in range(1, 10):
            model.patch_model(CPU, lowvram_model_memory=model.model_size() * tenths // 10)
            for more in (biggest // 8, biggest // 2, biggest - 1000, biggest + 1000):
                before = model.loaded_size()
                model.partially_load(CPU, more)
                assert snr(one_step(model), wanted) > CLOSE
                assert model.loaded_size() <= before + more
                sizes(model, ours)
            model.unpatch_model(CPU)


def test_patches_added_to_a_loaded_clone_are_found(pair):
    ours, theirs, _ = pair
    found = []
    for model in (ours, theirs):
        clone = applied(model, everything())
        sample(clone)
        clone.add_patches({"diffusion_model.final_layer.linear.bias": ("diff", (torch.full((64,), 0.3),))}, 0.5)
        clone.add_patches({"diffusion_model.double_blocks.0.img_attn.proj.weight": ("diff", (torch.full((HIDDEN, HIDDEN), 0.01),))}, 0.5)
        found.append(sample(clone))
        unload()
    assert snr(*found) > CLOSE


def test_a_clone_that_is_gone_leaves_its_parent_with_right_books(pair):
    """The manager asks the parent when a LoRA's clone has been collected, and unloads through it."""
    ours, theirs, plain = pair
    wanted = sample(applied(theirs, everything()))
    clone = applied(ours, everything())
    sample(clone)
    del clone
    gc.collect()
    ((total, held_bytes),) = sizes(ours)
    assert held_bytes == total
    with torch.inference_mode():
        assert ours.partially_unload(CPU, total // 2) >= total // 2
    sizes(ours)
    again = applied(ours, everything())
    assert snr(sample(again), wanted) > CLOSE
    assert rel(sample(ours), plain) < 1e-6


def test_a_failing_exchange_unloads_as_the_hosts_load_does(pair, monkeypatch):
    ours, _, plain = pair
    sample(ours)
    monkeypatch.setattr(patcher, "make_branch", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        sample(applied(ours, packed_only()))
    monkeypatch.undo()
    assert ours.loaded_size() == 0 and torch.equal(sample(ours), plain)


# -- a wider img_in ----------------------------------------------------------------------------------------------------------------------


def image() -> list:
    return conditioning(concat_latent_image=torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(2)))


def width(model) -> int:
    return model.model.diffusion_model.img_in.weight.shape[1]


def test_a_wider_img_in_comes_and_goes_with_its_clone(pair):
    ours, theirs, plain = pair
    wanted = sample(applied(theirs, control(), 1.0), image())
    wide = applied(ours, control(), 1.0)
    sample(ours)
    with counted_loads() as loads:
        for _ in range(2):
            assert snr(sample(wide, image()), wanted) > CLOSE and width(ours) == 128
            assert torch.equal(sample(ours), plain) and width(ours) == 64
            assert rel(sample(applied(wide, packed_only()), image()), wanted) > 1e-3 and width(ours) == 128
    assert loads == []


@pytest.mark.parametrize("share", [2, 6, 100])
def test_a_wider_img_in_stays_loaded_in_a_partial_load(pair, share, monkeypatch):
    """The host streams it, and then nobody sees how wide it is: its own model fails here."""
    ours, theirs, plain = pair
    wide = applied(ours, control(), 1.0)
    wanted = sample(applied(theirs, control(), 1.0), image())
    monkeypatch.setattr(wide, "partially_load", lambda *a, **k: patcher.TonfaPatcher.partially_load(wide, CPU, wide.model_size() // share))
    got = sample(wide, image())
    assert wide.model.model_lowvram and width(wide) == 128 and snr(got, wanted) > CLOSE
    sizes(wide, ours)
    with torch.inference_mode():
        wide.partially_unload(CPU, wide.model_size())
        assert width(wide) == 128
        sizes(wide, ours)
        other = applied(ours, packed_only())
        other.partially_load(CPU, 0.1)
        assert width(ours) == 64
        sizes(wide, ours, other)
        wide.partially_load(CPU, 0.1)
        assert width(ours) == 128
        sizes(wide, ours, other)
    unload()
    assert width(ours) == 64 and torch.equal(sample(ours), plain)


def test_a_norm_that_is_not_streamed_gets_its_patch_all_the_same(pair):
    """Older hosts' norms have no function that the host could call on them."""
    ours, theirs, _ = pair
    tensors = unpacked()
    wanted = one_step_of(applied(theirs, tensors))
    model = applied(ours, tensors)
    with torch.inference_mode():
        model.patch_model(CPU, lowvram_model_memory=1)
        assert snr(one_step(model), wanted) > CLOSE
        model.unpatch_model(CPU)


@pytest.mark.parametrize("share", [1, 6])
def test_what_does_not_fit_an_unpacked_layer_is_named_and_the_model_runs(share, caplog):
    """A control LoRA on a model that is wider already, and a value of another shape: the host's own model raises."""
    fill = loaded(made(in_channels=96))
    plain = sample(fill)
    tensors = control() | {"diffusion_model.final_layer.linear.set_weight": torch.ones(3, 5)}
    tensors = {
        k: v for k, v in tensors.items() if k in ("img_in.lora_A.weight", "img_in.lora_B.weight", "single_blocks.0.norm.key_norm.scale")
    }
    model = applied(fill, tensors, 1.0)
    model.add_patches({"diffusion_model.txt_in.weight": ("set", (torch.ones(3, 5),))})
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        for _ in range(2):
            assert rel(sample(model), plain) < 0.5
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "diffusion_model.img_in.weight" in said[0] and "diffusion_model.txt_in.weight" in said[0]


# -- sizes -------------------------------------------------------------------------------------------------------------------------------


def dense_everywhere() -> dict[str, torch.Tensor]:
    """No low-rank form, on two layers, and one that has it though it does not look so."""
    r = Random(61)
    sd = {
        f"diffusion_model.double_blocks.0.{name}.diff": r(*shape) for name, shape in (("img_mlp.0", (512, 128)), ("img_mlp.2", (128, 512)))
    }
    return sd | {"diffusion_model.double_blocks.1.img_mlp.0.diff": r(512, 2) @ r(2, 128)}


KINDS = {"plain": dict, "packed": packed_only, "everything": everything, "misfit": misfit, "dense": dense_everywhere, "control": control}


@pytest.mark.parametrize("partial", [False, True])
def test_sizes_are_consistent_for_every_clone_whatever_is_loaded(pair, partial, monkeypatch):
    ours, _, plain = pair
    clones = {name: applied(ours, make()) for name, make in KINDS.items()}
    order = [*KINDS, "plain", "everything", "dense", "packed", "plain"]
    sizes(*clones.values())
    with torch.inference_mode():
        if partial:
            clones["plain"].patch_model(CPU, lowvram_model_memory=ours.model_size() // 2)
        for name in order:
            clones[name].partially_load(CPU, 0.1 if partial else 1e32)
            found = dict(zip(clones, sizes(*clones.values()), strict=True))
            total, here = found[name]
            assert partial or total == here == ours.size + sum(t.nbytes for m in packed_of(ours) for t in m.side_tensors())
            assert found["plain"][0] == ours.size
            weights = ours.model.model_loaded_weight_memory
            assert all(loaded - weights <= size - ours.size for size, loaded in found.values()), "another's bytes are not a clone's own"
        clones["dense"].partially_load(CPU, 0.1 if partial else 1e32)
        freed = clones["dense"].partially_unload(CPU, clones["dense"].loaded_size() // 2)
        assert freed > 0
        sizes(*clones.values())
        clones["dense"].unpatch_model(CPU)
        assert all(here == 0 for _, here in sizes(*clones.values()))
    unload()
    assert torch.equal(sample(ours), plain)


@pytest.mark.parametrize("room", [0.1, 3000, 30000, 1e9])
def test_what_is_exchanged_keeps_to_the_memory_there_is(pair, room):
    """The manager says how much more a clone may take: a loaded model gives up layers for its LoRA where that is not enough."""
    ours, theirs, _ = pair
    wanted = one_step_of(applied(theirs, packed_only()))
    with torch.inference_mode():
        ours.patch_model(CPU)
        used, model = ours.loaded_size(), applied(ours, packed_only())
        taken = model.partially_load(CPU, room)
        ((total, here),) = sizes(model)
        assert here - used <= room and taken == here - used and (here == total) == (room == 1e9)
        assert snr(one_step(model), wanted) > CLOSE
        model.unpatch_model(CPU)


def test_memory_returns_when_a_lora_goes(pair):
    ours, _, _ = pair
    sample(ours)
    alone = sizes(ours)
    sample(applied(ours, packed_only()))
    assert sum(t.nbytes for m in packed_of(ours) for t in m.side_tensors()) > 0
    sample(ours)
    assert sizes(ours) == alone and not any(m.has_side for m in packed_of(ours))
