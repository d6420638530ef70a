"""What reaches FLUX through the host's forward: each feature against the dense twin in the host's own class, and against not using it."""

from __future__ import annotations

import inspect

import comfy.controlnet
import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import comfy.patcher_extension
import pytest
import torch
from comfy_extras import nodes_easycache, nodes_model_advanced
from tonfa.models import attention
from tonfa.nodes.host import ops

import nodes

from .lab import conditioning, loaded, made, rel, sample, snr, twin

HAS_ATTN1 = "attn1_patch" in inspect.getsource(comfy.ldm.flux.layers.DoubleStreamBlock.forward)


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Pair:
    """Our model and its dense twin, with the latents they give when nothing is added."""

    def __init__(self, **changes: object):
        path = made(**changes)
        self.ours, self.theirs = loaded(path), twin(path)
        self.plain = sample(self.ours)

    def check(self, patch=lambda model: model, **how: object) -> None:
        """`patch(model)` and `how` (arguments of sample) give both models the same latents, and others than without them."""
        got, wanted = sample(patch(self.ours.clone()), **how), sample(patch(self.theirs.clone()), **how)
        assert snr(got, wanted) > 50
        if got.shape == self.plain.shape:
            assert rel(got, self.plain) > 1e-3, "the feature changed nothing"


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


def test_the_twins_agree_and_the_sampler_gives_the_same_bits_twice(pair):
    assert snr(pair.plain, sample(pair.theirs)) > 50
    assert torch.equal(pair.plain, sample(pair.ours))


# -- conditioning ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "offset", "index", "uxo"])
def test_kontext_references(pair, method):
    references = [noise(1, 16, 4, 6), noise(1, 16, 6, 4, seed=6)]
    extra = {} if method is None else {"reference_latents_method": method}
    pair.check(positive=conditioning(reference_latents=references, **extra))


def test_reference_methods_differ(pair):
    reference = {"reference_latents": [noise(1, 16, 4, 6)]}
    found = [sample(pair.ours, conditioning(reference_latents_method=m, **reference)) for m in ("offset", "index", "uxo")]
    assert rel(found[0], found[2]) > 1e-3


def test_guidance(pair):
    pair.check(positive=conditioning(guidance=1.0))


def test_true_cfg_with_texts_of_different_length(pair):
    pair.check(negative=conditioning(tokens=20, seed=9), cfg=3.0)


def test_batch_of_three(pair):
    pair.check(batch=3)
    assert sample(pair.ours, batch=3).shape[0] == 3


def test_odd_latent_size(pair):
    pair.check(size=(9, 7))


def test_redux_with_a_strength_masks_attention(pair):
    class StyleModel:
        def get_cond(self, output):
            return noise(1, 5, 96, seed=8)

    def redux(strength: float, kind: str) -> list:
        return nodes.StyleModelApply().apply_stylemodel(conditioning(), StyleModel(), None, strength, kind)[0]

    pair.check(positive=redux(0.3, "attn_bias"))
    unmasked = sample(pair.ours, redux(1.0, "attn_bias"))
    assert rel(sample(pair.ours, redux(0.3, "attn_bias")), unmasked) > 1e-4


class Residuals(comfy.controlnet.ControlBase):
    """What a FLUX ControlNet hands the model: residuals for some blocks, None for others, for part of the tokens or all."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options=None):
        return {"input": [None, noise(1, 24, 128, seed=1)], "output": [noise(1, 10, 128, seed=2), None]}

    def copy(self):
        return self


def test_controlnet_residuals_with_none_entries(pair):
    pair.check(positive=conditioning(control=Residuals(), control_apply_to_uncond=False))


def test_fill_channels():
    fill = Pair(in_channels=96)
    image, mask = noise(1, 16, 8, 12), torch.zeros(1, 1, 64, 96)
    mask[..., :48] = 1
    fill.check(positive=conditioning(concat_latent_image=image, concat_mask=mask))


def test_control_channels():
    control = Pair(in_channels=32)
    control.check(positive=conditioning(concat_latent_image=noise(1, 16, 8, 12)))


def test_schnell_has_no_guidance():
    schnell = Pair(guidance_embed=False)
    assert snr(schnell.plain, sample(schnell.theirs)) > 50
    assert torch.equal(schnell.plain, sample(schnell.ours, conditioning(guidance=1.0)))
    assert type(schnell.ours.model.model_config).__name__ == "FluxSchnell"
    assert schnell.ours.model.model_type == schnell.theirs.model.model_type


def test_empty_latents_of_four_channels_are_fixed_up(pair):
    """The schnell example graph feeds EmptyLatentImage: the host goes by our model's latent_format."""
    assert sample(pair.ours, latent={"samples": torch.zeros(1, 4, 8, 12)}).shape[1] == 16


# -- patches ---------------------------------------------------------------------------------------------------------------------


def test_model_sampling_flux(pair):
    pair.check(lambda model: nodes_model_advanced.ModelSamplingFlux().patch(model, 2.5, 0.9, 1024, 768)[0])


@pytest.mark.parametrize("kind", ["double_block", "single_block"])
def test_replaced_block(pair, kind):
    def replaced(model):
        def patch(args, extra):
            out = extra["original_block"]({**args, "img": args["img"] * 1.1})
            return {**out, "img": out["img"] * 0.9}

        model.set_model_patch_replace(patch, "dit", kind, 1)
        return model

    pair.check(replaced)


def test_skipped_block(pair):
    def skipped(model):
        model.set_model_patch_replace(lambda args, extra: {"img": args["img"], "txt": args["txt"]}, "dit", "double_block", 0)
        return model

    pair.check(skipped)


def test_post_input(pair):
    def patched(model):
        model.set_model_patch(lambda d: {**d, "img": d["img"] * 1.2}, "post_input")
        return model

    pair.check(patched)


@pytest.mark.skipif(not HAS_ATTN1, reason="this ComfyUI's FLUX blocks do not call attn1_patch (newer ones do)")
def test_attn1_patch(pair):
    seen = set()

    def patched(model):
        def patch(q, k, v, pe=None, attn_mask=None, extra_options=None):
            seen.add((extra_options["block_type"], extra_options["block_index"], tuple(extra_options["img_slice"])))
            return {"q": q * 1.3, "k": k, "v": v}

        model.set_model_attn1_patch(patch)
        return model

    pair.check(patched)
    assert seen == {(kind, i, (12, 36)) for kind in ("double", "single") for i in (0, 1)}


@pytest.mark.skipif(not HAS_ATTN1, reason="this ComfyUI's FLUX blocks do not call attn1_output_patch (newer ones do)")
def test_attn1_output_patch(pair):
    def patched(model):
        model.set_model_attn1_output_patch(lambda attn, extra: attn * 0.8)
        return model

    pair.check(patched)


def test_attention_override(pair):
    def overridden(model):
        model.model_options["transformer_options"]["optimized_attention_override"] = lambda run, *a, **k: run(*a, **k) * 0.7
        return model

    pair.check(overridden)


def test_diffusion_model_wrapper_gets_eight_positional_arguments(pair):
    counts = []

    def wrapped(model):
        def wrapper(executor, *args, **kwargs):
            counts.append(len(args))
            return executor(*args, **kwargs) * 0.5

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", wrapper)
        return model

    pair.check(wrapped)
    assert set(counts) == {8}


def test_easycache(pair):
    def cached(model):
        return nodes_easycache.EasyCacheNode.execute(model, 0.9, 0.1, 0.9, False).args[0]

    got, wanted = sample(cached(pair.ours), steps=8), sample(cached(pair.theirs), steps=8)
    assert snr(got, wanted) > 50
    assert rel(got, sample(pair.ours, steps=8)) > 1e-3, "no step was skipped"


def test_rope_options(pair):
    if not hasattr(pair.ours, "set_model_rope_options"):
        pytest.skip("this ComfyUI has no rope options (newer ones do)")

    def scaled(model):
        model.set_model_rope_options(scale_x=1.5, shift_x=0.0, scale_y=1.5, shift_y=2.0, scale_t=1.0, shift_t=0.0)
        return model

    pair.check(scaled)


# -- attention -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain_host(monkeypatch):
    """The host as it is on a GPU where nobody chose an attention: torch's. What our own choice was asked, and made to answer."""
    asked = []

    def answer(q, k, v, mask, fp16):
        asked.append(tuple(q.shape))
        return None if answer.declines else torch.full((q.shape[0], q.shape[2], q.shape[1] * q.shape[3]), 7.0)

    answer.declines = False
    stock = comfy.ldm.modules.attention.attention_pytorch
    monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention", stock)
    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", stock)
    monkeypatch.setattr(ops, "fastest", answer)
    return asked, answer


QKV = [noise(1, 2, 5, 8, seed=i) for i in range(3)]


def test_the_fastest_attention_is_taken_where_the_host_made_no_choice(plain_host):
    asked, answer = plain_host
    assert (ops.attend(*QKV, 2) == 7).all() and (ops.attention(*QKV, 2) == 7).all()
    assert asked == [(1, 2, 5, 8)] * 2
    answer.declines = True
    wanted = torch.nn.functional.scaled_dot_product_attention(*QKV).transpose(1, 2).flatten(2)
    assert rel(ops.attend(*QKV, 2), wanted) < 1e-6, "the host's own, where nothing is known to be faster"


@pytest.mark.parametrize("where", ["option", "general", "flux", "flux function", "patched before us"])
def test_the_hosts_choice_of_attention_always_wins(plain_host, monkeypatch, where):
    options = {}

    def chosen(q, k, v, *args, **kwargs):
        return torch.full((1, 5, 16), 3.0)

    if where == "option":
        options["optimized_attention_override"] = lambda run, *args, **kwargs: chosen(*args, **kwargs)
    elif where == "general":
        monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention", chosen)
        monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", chosen)
    elif where == "flux":
        monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", chosen)
    elif where == "flux function":
        monkeypatch.setattr(comfy.ldm.flux.math, "attention", chosen)
    else:
        monkeypatch.setattr(comfy.ldm.modules.attention, "attention_pytorch", chosen)
        monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention", chosen)
        monkeypatch.setattr(ops, "STOCK_ATTENTION", ops.host_made(chosen, comfy.ldm.modules.attention))
    assert (ops.attention(*QKV, 2, None, None, options) == 3).all()
    if where != "flux function":  # positions are applied already: that function is not asked
        assert (ops.attend(*QKV, 2, None, options) == 3).all()
    assert plain_host[0] == []


def test_fused_and_plain_path_attend_alike(pair, plain_host, monkeypatch):
    """A patch that changes nothing sends the blocks down the plain path: both go to the one back end, before and after RoPE."""
    asked, _ = plain_host
    monkeypatch.setattr(ops, "fastest", lambda q, k, v, mask, fp16: asked.append(1) or attention.attend(q, k, v, q.shape[1], mask))

    def looked_at(model):
        model.set_model_patch(lambda attn, extra: attn, "attn1_output_patch")
        return model

    fused = sample(pair.ours)
    calls = len(asked)
    plain = sample(looked_at(pair.ours.clone()))
    assert calls == 16 and len(asked) == 2 * calls, "4 blocks, 4 steps"
    assert snr(plain, fused) > 80


def test_blocks_compile_into_one_graph_in_the_host(pair, plain_host, monkeypatch):
    """Weights at home, torch's attention: nothing of ours or the host's breaks the graph, and it gives the same bits."""
    monkeypatch.setattr(ops, "fastest", attention.fastest)
    model = pair.ours.model.diffusion_model
    g = torch.Generator().manual_seed(0)
    img, txt, vec = (torch.randn(1, *shape, generator=g) for shape in ((24, 128), (12, 128), (128,)))
    pe = model.pe_embedder(torch.rand(1, 36, 3, generator=g) * 9)
    double = {"img": img, "txt": txt, "vec": vec, "pe": pe, "transformer_options": {"tonfa": {"compute": "fast"}}}
    single = {k: v for k, v in double.items() if k not in ("img", "txt")} | {"x": torch.cat((txt, img), 1)}
    with torch.inference_mode():
        for block, arguments in ((model.double_blocks[0], double), (model.single_blocks[0], single)):
            torch._dynamo.reset()
            wanted, got = block(**arguments), torch.compile(block, backend="aot_eager", fullgraph=True)(**arguments)
            assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))
