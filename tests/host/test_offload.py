"""The loader's cpu_offload: blocks streamed by us, all resident, or left to the host. The latent is the same in every way."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.patcher_extension
import pytest
import torch
from comfy.model_management import LoadedModel
from safetensors.torch import save_file
from tonfa.models import streaming
from tonfa.models.linear import Leaf, PackedLinear
from tonfa.models.streaming import Streamer
from tonfa.nodes.host.exchange import is_loaded
from tonfa.nodes.host.offloading import Offload

from .lab import loaded, made, sample
from .loras import packed_only, unload, with_lora


@pytest.fixture(scope="module")
def model(base):
    ours = loaded(made())
    save_file(packed_only(), Path(base, "models", "loras", "streamed.safetensors"))
    return ours, sample(ours)


def clone(model, mode: str, resident: int = 1):
    copy = model.clone()
    copy.set_offload(Offload(mode, resident))
    return copy


def blocks(patcher) -> list:
    network = patcher.model.diffusion_model
    return [*network.double_blocks, *network.single_blocks]


def is_streamed(block) -> bool:
    leaves = [m for m in block.modules() if isinstance(m, Leaf)]
    assert len({leaf.streamer is not None for leaf in leaves}) == 1
    return leaves[0].streamer is not None


@pytest.mark.skipif(not hasattr(comfy.model_management, "unpin_memory"), reason="this ComfyUI locks no memory")
def test_nothing_that_the_host_locked_is_given_back_locked(monkeypatch, caplog):
    """The host locks the weights that it leaves offloaded. Those that we move are unlocked first, and what we hold is not locked again."""
    locked: dict[int, torch.Tensor] = {}

    def pin(tensor):
        assert tensor.data_ptr() not in locked, "locked twice"
        locked[tensor.data_ptr()] = tensor
        return True

    monkeypatch.setattr(comfy.model_management, "pin_memory", pin)
    monkeypatch.setattr(comfy.model_management, "unpin_memory", lambda tensor: locked.pop(tensor.data_ptr()) is not None)
    ours = loaded(made(seed=3))
    ours.partially_load(torch.device("cpu"), 1)  # all of it stays offloaded, and locked
    ours.detach()
    streaming_one = clone(ours, "enable", 1)
    sample(streaming_one)
    assert set(locked) <= {p.data_ptr() for p in streaming_one.model.parameters()}, "memory was given back locked"
    assert not set(locked) & {p.data_ptr() for block in blocks(ours)[1:] for p in block.parameters()}
    sample(ours)  # auto again
    assert not [t for t in locked.values() if t.untyped_storage().nbytes() > t.nbytes]


def sizes(patcher) -> tuple[int, int, int]:
    return patcher.model_size(), patcher.loaded_size(), LoadedModel(patcher).model_offloaded_memory()


@pytest.mark.parametrize("resident", [0, 1, 3, 99])
def test_streaming_gives_the_same_latent(model, resident, monkeypatch):
    ours, want = model
    monkeypatch.setattr(streaming, "AHEAD", 1)
    copies = []
    original = Streamer._copy
    monkeypatch.setattr(Streamer, "_copy", lambda self, i, before: (copies.append(i), original(self, i, before))[1])
    patcher = clone(ours, "enable", resident)
    assert torch.equal(sample(patcher), want)
    assert [is_streamed(b) for b in blocks(patcher)] == [i >= resident for i in range(4)]
    passing = max(4 - resident, 0)
    assert len(copies) == (4 * passing if passing > 1 else passing)  # four steps
    resident_leaves = [m for b in blocks(patcher)[:resident] for m in b.modules() if isinstance(m, Leaf)]
    assert all(is_loaded(leaf) for leaf in resident_leaves if leaf.weight is not None)


def test_what_is_streamed_is_what_is_computed_with(model, monkeypatch):
    ours, want = model
    original = Streamer._copy

    def zeroed(self, i, before):
        original(self, i, before)
        self._targets[i][: self._targets[i].numel() // 2].zero_()

    monkeypatch.setattr(Streamer, "_copy", zeroed)
    assert not torch.equal(sample(clone(ours, "enable", 2)), want)


def test_sizes_count_buffers_in_place_of_streamed_blocks(model, monkeypatch):
    monkeypatch.setattr(streaming, "AHEAD", 2)
    ours, _ = model
    unload()
    whole = ours.model_size()
    patcher = clone(ours, "enable", 0)
    total = patcher.model_size()
    assert total < whole / 1.2 and patcher.loaded_size() == 0
    comfy.model_management.load_models_gpu([patcher])
    assert sizes(patcher) == (total, total, 0)
    streamer = patcher.model.tonfa_streamer
    assert streamer.nbytes < total
    unload()
    assert patcher.loaded_size() == 0 and patcher.model.tonfa_streamer is None
    assert not any(is_streamed(b) for b in blocks(patcher))
    assert sizes(ours)[0] == whole


def test_modes_take_turns_on_one_model(model):
    ours, want = model
    streamed, all_of_it = clone(ours, "enable"), clone(ours, "disable")
    for patcher in (ours, streamed, all_of_it, streamed, ours):
        assert torch.equal(sample(patcher), want)
        assert any(is_streamed(b) for b in blocks(patcher)) == (patcher is streamed)
        total, here, offloaded = sizes(patcher)
        assert here == total and offloaded == 0


def test_a_clone_keeps_the_mode_and_asking_again_changes_nothing(model):
    ours, _ = model
    patcher = clone(ours, "enable", 2)
    again = patcher.clone()
    assert again.offload == Offload("enable", 2)
    before = again.patches_uuid
    again.set_offload(Offload("enable", 2))
    assert again.patches_uuid == before


@pytest.mark.parametrize("mode", ["enable", "disable"])
def test_lora_on_top(model, mode):
    ours, want = model
    lora = sample(with_lora(ours, "streamed.safetensors"))
    assert not torch.equal(lora, want)
    patcher = clone(ours, mode)
    assert torch.equal(sample(with_lora(patcher, "streamed.safetensors")), lora)
    assert torch.equal(sample(patcher), want)  # taken off again
    packed = [m for m in patcher.model.modules() if isinstance(m, PackedLinear)]
    assert not any(m.has_side for m in packed)


def test_disable_stays_resident_where_the_host_has_no_room(model, monkeypatch):
    ours, want = model
    unload()
    patcher = clone(ours, "disable")
    with torch.inference_mode():
        patcher.partially_load(patcher.load_device, 1000)
    assert all(is_loaded(m) for m in patcher.model.modules() if isinstance(m, PackedLinear))
    assert torch.equal(sample(patcher), want)


def test_streaming_inside_the_hosts_low_vram(model):
    """The host gives the model next to nothing: ours is at work, the host's is not."""
    ours, want = model
    unload()
    patcher = clone(ours, "enable")
    with torch.inference_mode():
        patcher.partially_load(patcher.load_device, 1000)
        patcher.partially_load(patcher.load_device, 1000)
    assert [is_streamed(b) for b in blocks(patcher)] == [False, True, True, True]
    assert torch.equal(sample(patcher), want)


def test_cancel_in_the_middle_of_a_step(model, monkeypatch):
    ours, want = model
    patcher = clone(ours, "enable", 0)
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 7:
            raise comfy.model_management.InterruptProcessingException

    runtime = patcher.model.diffusion_model.runtime
    object.__setattr__(runtime, "check_cancel", stop)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(patcher)
    finally:
        from tonfa.nodes.host.ops import check_cancel

        object.__setattr__(runtime, "check_cancel", check_cancel)
    assert torch.equal(sample(patcher), want)


def test_the_node_sets_it_and_the_attention(base, caplog):
    import shutil

    import tonfa

    from .lab import DATA

    shutil.copy(DATA / "mini_flux_int4.safetensors", Path(base, "models", "diffusion_models", "streamed.safetensors"))
    node = tonfa.NODE_CLASS_MAPPINGS["NunchakuFluxDiTLoader"]()
    with torch.inference_mode():
        (first,) = node.load_model("streamed.safetensors", 0, "flash-attention2", "enable", num_blocks_on_gpu=3)
        (second,) = node.load_model("streamed.safetensors", 0, "sage", "never")
    assert first.offload == Offload("enable", 3) and second.offload == Offload("auto", 1)
    assert first.model is second.model
    of = [m.model_options["transformer_options"]["tonfa"]["attention"] for m in (first, second)]
    assert of == ["flash-attention2", "nunchaku-fp16"]
    assert "attention 'sage' is not known; using nunchaku-fp16" in caplog.text and "cpu_offload 'never' is not known" in caplog.text
