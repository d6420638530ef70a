"""Blocks and the standalone FLUX on the golden miniatures: fused against plain, 4-bit against the dense network it stands for."""

import statistics
from pathlib import Path

import pytest
import torch
from tonfa.models import linear
from tonfa.models.blocks import Mod, gated, modulated
from tonfa.models.flux import Flux
from tonfa.models.formats.checkpoint import open_checkpoint
from tonfa.models.linear import PackedLinear, PlainLinear
from tonfa.models.lora import make_side

DATA = Path(__file__).parent.parent / "data"
FILES = ["mini_flux_int4", "mini_flux_int4_hd128", "mini_flux_nvfp4"]
PLAIN = {"optimized_attention_override": object()}  # something wants to look inside: the plain path


def load(name, dtype=torch.float32):
    return Flux(open_checkpoint(DATA / f"{name}.safetensors"), dtype).eval()


def densify(model):
    """The same network with every packed linear replaced by the 16-bit one it stands for."""
    for name, m in list(model.named_modules()):
        if isinstance(m, PackedLinear):
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._modules[leaf] = PlainLinear(*m.dense(), m.runtime)
    return model


def inputs(config, batch=1, dtype=torch.float32, h=8, w=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    return {
        "x": draw(batch, config["in_channels"], h, w),
        "timestep": torch.full((batch,), 0.7),
        "context": draw(batch, 11, config["context_in_dim"]),
        "y": draw(batch, config["vec_in_dim"]),
        "guidance": torch.full((batch,), 3.5) if config["guidance_embed"] else None,
    }


def block_inputs(model, batch, dtype, seed=0):
    from tonfa.models.flux import rope_table

    g = torch.Generator().manual_seed(seed)
    hidden, text, image = model.config["hidden_size"], 5, 12
    ids = torch.randint(0, 9, (1, text + image, 3), generator=g).float()
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    return {
        "img": draw(batch, image, hidden),
        "txt": draw(batch, text, hidden),
        "vec": draw(batch, hidden),
        "pe": rope_table(ids, model.config["axes_dim"], 1e4),
    }


def relative(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


def snr(got, want):
    return float(-20 * torch.log10((got - want).norm() / want.norm()))


def mode(compute, **more):
    return {"tonfa": {"compute": compute}, **more}


@pytest.mark.parametrize("name", FILES)
def test_weight_only_is_the_dense_network(name):
    model = load(name)
    with torch.inference_mode():
        got = {c: model(**inputs(model.config), transformer_options=mode(c)) for c in ("weight_only", "fast", "exact")}
        want = densify(model)(**inputs(model.config), transformer_options=mode("weight_only"))
    assert snr(got["weight_only"], want) > 90
    assert snr(got["fast"], want) > 28 and snr(got["exact"], want) > 12, "one call; whole samplings are measured in tests/host"
    assert snr(got["fast"], want) > snr(got["exact"], want)


@pytest.mark.parametrize("compute, limit", [("weight_only", 3e-3), ("fast", 3e-3), ("exact", 1e-2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FILES)
def test_fused_equals_plain_in_one_block(name, dtype, compute, limit):
    model = load(name, dtype)
    for batch in (1, 2):
        a = block_inputs(model, batch, dtype)
        with torch.inference_mode():
            fused = model.double_blocks[0](**a, transformer_options=mode(compute))
            plain = model.double_blocks[0](**a, transformer_options=mode(compute, **PLAIN))
            x = torch.cat((a["txt"], a["img"]), 1)
            fused += (model.single_blocks[0](x, vec=a["vec"], pe=a["pe"], transformer_options=mode(compute)),)
            plain += (model.single_blocks[0](x, vec=a["vec"], pe=a["pe"], transformer_options=mode(compute, **PLAIN)),)
        for f, p in zip(fused, plain, strict=True):
            assert f.dtype == dtype and relative(f, p) < limit


def test_inputs_are_left_alone_and_unknown_keywords_are_accepted():
    model = load(FILES[0])
    a = block_inputs(model, 1, torch.float32)
    kept = {k: v.clone() for k, v in a.items()}
    for options in (mode("fast"), mode("fast", **PLAIN)):
        with torch.inference_mode():
            model.double_blocks[0](**a, transformer_options=options, something_new=1)
            model.single_blocks[0](a["img"], vec=a["vec"], pe=a["pe"][:, :, :12], transformer_options=options, something_new=1)
    assert all(torch.equal(a[k], kept[k]) for k in a)


def test_batch_of_two_is_two_batches_of_one():
    model = load(FILES[0])
    both = inputs(model.config, batch=2)
    with torch.inference_mode():
        got = model(**both, transformer_options=mode("fast"))
        one = [model(**{k: v[i : i + 1] for k, v in both.items()}, transformer_options=mode("fast")) for i in range(2)]
    assert relative(got, torch.cat(one)) < 1e-3  # a last bit of the CPU's product may flip a code; a mixed-up batch is off by 1


def test_attention_patches_see_and_change_what_the_host_would_show_them():
    model, seen = load(FILES[0]), []

    def before(q, k, v, pe=None, attn_mask=None, extra_options=None):
        seen.append((tuple(q.shape), extra_options["img_slice"], extra_options["mark"]))
        return {"q": q * 2}

    a = block_inputs(model, 1, torch.float32)
    options = mode("weight_only", mark=1, patches={"attn1_patch": [before], "attn1_output_patch": [lambda attn, extra: attn * 0.5]})
    with torch.inference_mode():
        patched = model.double_blocks[0](**a, transformer_options=options)[0]
        base = model.double_blocks[0](**a, transformer_options=mode("weight_only"))[0]
    heads, dim = model.config["num_heads"], model.config["hidden_size"] // model.config["num_heads"]
    assert seen == [((1, heads, 17, dim), [5, 17], 1)]
    assert relative(patched, base) > 1e-2


def test_each_slice_of_tokens_takes_its_own_row_of_the_modulation():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 12, 64, generator=g), torch.randn(2, 12, 64, generator=g)
    both = Mod(*(torch.randn(2, 2, 64, generator=g) for _ in range(3)))
    rows = [Mod(*(t[:, i : i + 1] for t in (both.shift, both.scale, both.gate))) for i in range(2)]
    dims = [(0, 7, 0), (7, 12, 1)]
    got_in, got_out = modulated(x, both, dims), gated(x, y, both.gate, dims)
    for start, end, row in dims:
        assert relative(got_in[:, start:end], modulated(x, rows[row], None)[:, start:end]) < 1e-6
        assert relative(got_out[:, start:end], gated(x, y, rows[row].gate, None)[:, start:end]) < 1e-6
    per_token = Mod(*(torch.cat((t[:, :1].expand(-1, 7, -1), t[:, 1:].expand(-1, 5, -1)), 1) for t in (both.shift, both.scale, both.gate)))
    assert relative(modulated(x, per_token, None), got_in) < 1e-6, "a modulation per token, without slices"


def test_modulation_by_token_slices():
    """One block with two times in one image: the same time twice changes nothing, another one changes its slice."""
    model = load(FILES[0])
    a = block_inputs(model, 1, torch.float32)
    block = model.double_blocks[0]
    other = torch.randn_like(a["vec"])
    two = torch.stack((a["vec"], other), 1)
    same = torch.stack((a["vec"], a["vec"]), 1)
    kw = {"transformer_options": mode("weight_only")}
    with torch.inference_mode():
        base = block(**a, **kw)
        repeated = block(**{**a, "vec": same}, modulation_dims_img=[(0, 7, 0), (7, 12, 1)], **kw)
        mixed = block(**{**a, "vec": two}, modulation_dims_img=[(0, 7, 0), (7, 12, 1)], **kw)
    assert all(relative(r, b) < 1e-5 for r, b in zip(repeated, base, strict=True))
    assert relative(mixed[0][:, 7:], base[0][:, 7:]) > 1e-2


def test_ready_modulations_in_place_of_a_vector():
    model = load(FILES[0])
    a = block_inputs(model, 1, torch.float32)
    block = model.double_blocks[0]
    with torch.inference_mode():
        want = block(**a, transformer_options=mode("fast"))
        ready = tuple(tuple(Mod(m.shift, m.scale, m.gate) for m in mods(a["vec"])) for mods in (block.img_mod, block.txt_mod))
        got = block(**{**a, "vec": ready}, transformer_options=mode("fast"))
    assert all(relative(g, w) < 3e-3 for g, w in zip(got, want, strict=True))


def test_no_text_tokens():
    model = load(FILES[0])
    a = block_inputs(model, 1, torch.float32)
    a = {**a, "txt": a["txt"][:, :0], "pe": a["pe"][:, :, 5:]}
    with torch.inference_mode():
        fused = model.double_blocks[0](**a, transformer_options=mode("fast"))
        plain = model.double_blocks[0](**a, transformer_options=mode("fast", **PLAIN))
    assert fused[1].shape == (1, 0, a["img"].shape[-1]) and relative(fused[0], plain[0]) < 3e-3


def test_cancel_is_asked_once_a_block():
    from dataclasses import replace

    model = load(FILES[0])
    asked = []
    for block in (*model.double_blocks, *model.single_blocks):
        block.runtime = replace(block.runtime, check_cancel=lambda: asked.append(1))
    with torch.inference_mode():
        model(**inputs(model.config), transformer_options=mode("fast"))
    assert len(asked) == len(model.double_blocks) + len(model.single_blocks)


def test_float16_overflow_is_brought_back():
    model = load(FILES[0], torch.float16)
    a = block_inputs(model, 1, torch.float16)
    x = a["img"].clone()
    x[0, 0, 0] = 65504
    with torch.inference_mode():
        out = model.single_blocks[0](x, vec=a["vec"] * 50, pe=a["pe"][:, :, :12], transformer_options=mode("fast"))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("form", ["int8", "e4m3"])
def test_eight_steps_stay_near_the_dense_network(form, monkeypatch):
    """Whole samplings in both code forms: a weight's rounding is the same in every step, so what adds to it shows here first."""
    monkeypatch.setattr("tonfa.models.blocks.code_form", lambda device: form)
    model, dense = load("mini_flux_int4"), densify(load("mini_flux_int4"))

    def sample(network, compute, seed):
        a = inputs(network.config, seed=seed)
        x, times = a.pop("x"), torch.linspace(1, 0, 9)
        for now, then in zip(times, times[1:], strict=False):
            x = x + (then - now) * network(**a | {"x": x, "timestep": now[None]}, transformer_options=mode(compute))
        return x

    with torch.inference_mode():
        want = [sample(dense, "weight_only", seed) for seed in range(5)]
        found = {c: statistics.median(snr(sample(model, c, s), w) for s, w in enumerate(want)) for c in ("fast", "exact")}
    assert found["fast"] > 33 and found["exact"] > 17


@pytest.mark.parametrize("compute", ["fast", "exact"])
def test_row_maxima_that_one_linear_leaves_for_the_next(compute, monkeypatch):
    """The linear before a GELU leaves what the one behind it needs: in every MLP, and nothing of the block changes by a bit."""
    monkeypatch.setattr("tonfa.models.blocks.code_form", lambda device: "e4m3")
    monkeypatch.setattr("tonfa.kernels.w4_matmul._many_rows", lambda rows, target: True)  # exact in the form that has a scale a row
    model, asked = load("mini_flux_int4", torch.bfloat16), []
    a = block_inputs(model, 2, torch.bfloat16)

    def run():
        x = torch.cat((a["txt"], a["img"]), 1)
        single = model.single_blocks[0](x, vec=a["vec"], pe=a["pe"], transformer_options=mode(compute))
        return *model.double_blocks[0](**a, transformer_options=mode(compute)), single

    with torch.inference_mode():
        without = run()
        monkeypatch.setattr("tonfa.models.linear.finds_peak", lambda spec, device, compute, rows: asked.append(rows) or True)
        taken = []
        quantize = linear.quantize_for
        monkeypatch.setattr(linear, "quantize_for", lambda *args: taken.append(args[4]) or quantize(*args))
        left = run()
        assert all(torch.equal(x, y) for x, y in zip(left, without, strict=True))
        text, image = a["txt"].shape[1] * 2, a["img"].shape[1] * 2
        assert asked == [text + image, image, text]
        assert sum(amax is not None and bool((amax > 0).all()) for amax in taken) == 3
        leaf = model.double_blocks[0].img_mlp[2]
        leaf.set_side(make_side(leaf.spec, [], torch.zeros(128, 512), torch.device("cpu"), torch.float32))
        asked.clear()
        assert all(torch.equal(x, y) for x, y in zip(run(), without, strict=True))
        assert len(asked) == 2, "a linear with a dense delta is told nothing: its input is looked at before it is quantised"
