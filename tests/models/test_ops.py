"""torch.compile on the blocks: one graph, the same bits as eager, and operators that keep their promises."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tonfa.kernels import layout
from tonfa.kernels.norm_gate import norm_gate
from tonfa.kernels.norm_modulate import Norm
from tonfa.models.flux import Flux, rope_table
from tonfa.models.formats.checkpoint import open_checkpoint
from tonfa.models.linear import Ending, PackedLinear, apply_ending
from tonfa.models.lora import Term, make_side

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
MODES = ["fast", "exact", "weight_only"]


@pytest.fixture(autouse=True)
def uncompiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def load(name="mini_flux_int4", dtype=torch.bfloat16):
    return Flux(open_checkpoint(DATA / f"{name}.safetensors"), dtype).eval()


def inputs(model, batch=1, image=12, text=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = model.config["hidden_size"]
    ids = torch.randint(0, 9, (1, text + image, 3), generator=g).float()
    draw = lambda *shape: torch.randn(*shape, generator=g).to(model.dtype)  # noqa: E731
    return {
        "img": draw(batch, image, hidden),
        "txt": draw(batch, text, hidden),
        "vec": draw(batch, hidden),
        "pe": rope_table(ids, model.config["axes_dim"], 1e4),
    }


def whole(block):
    """Compiled, where a graph break is an error."""
    return torch.compile(block, backend="aot_eager", fullgraph=True)


def check(model, a, options):
    """Both kinds of block give the same bits compiled and not."""
    double, single = model.double_blocks[0], model.single_blocks[0]
    x = torch.cat((a["txt"], a["img"]), 1)
    more = {k: a[k] for k in ("vec", "pe", "attn_mask") if k in a}
    with torch.inference_mode():
        want = (*double(**a, transformer_options=options), single(x, **more, transformer_options=options))
        got = (*whole(double)(**a, transformer_options=options), whole(single)(x, **more, transformer_options=options))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("compute", MODES)
@pytest.mark.parametrize("name", ["mini_flux_int4", "mini_flux_nvfp4"])
def test_blocks_are_one_graph_with_the_same_bits(name, compute):
    model = load(name)
    check(model, inputs(model), {"tonfa": {"compute": compute}})


def test_batches_and_the_mode_that_auto_means():
    model = load(dtype=torch.float32)
    check(model, inputs(model, batch=2), {})


def test_the_plain_path_too():
    model = load()
    mask = torch.randn(1, 17, 17, generator=torch.Generator().manual_seed(1)).bfloat16()
    check(model, {**inputs(model), "attn_mask": mask}, {"tonfa": {"compute": "fast"}})


def test_attention_patches_are_traced():
    model = load()
    options = {"tonfa": {"compute": "fast"}, "patches": {"attn1_patch": [lambda q, k, v, pe, attn_mask, extra_options: {"q": q * 2}]}}
    check(model, inputs(model), options)


def test_side_branches():
    model = load()
    g = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, PackedLinear):
            term = Term(torch.randn(m.out_features, 4, generator=g) * 0.1, torch.randn(4, m.in_features, generator=g) * 0.1)
            m.set_side(make_side(m.spec, [term], None, torch.device("cpu"), torch.bfloat16))
    check(model, inputs(model), {"tonfa": {"compute": "fast"}})


def test_a_whole_network_is_one_graph():
    model = load(dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    c = model.config
    a = {"x": torch.randn(1, c["in_channels"], 4, 6, generator=g), "timestep": torch.tensor([0.7]), "guidance": torch.tensor([3.5])}
    a |= {"context": torch.randn(1, 5, c["context_in_dim"], generator=g), "y": torch.randn(1, c["vec_in_dim"], generator=g)}
    with torch.inference_mode():
        assert torch.equal(whole(model)(**a, transformer_options={}), model(**a, transformer_options={}))


def test_blocks_of_one_kind_share_compiled_code():
    model = load()
    a = inputs(model)
    compiled = []

    def backend(graph, example):
        compiled.append(graph)
        return graph.forward

    blocks = model.double_blocks[0], copy.deepcopy(model.double_blocks[0])
    with torch.inference_mode():
        for one in blocks:
            torch.compile(one, backend=backend, fullgraph=True)(**a, transformer_options={"tonfa": {"compute": "fast"}})
    assert len(compiled) == 1


def test_other_image_sizes_share_the_second_compilation():
    model = load()
    block, graphs = model.single_blocks[0], []
    compiled = torch.compile(block, backend=lambda graph, example: graphs.append(graph) or graph.forward, fullgraph=True)
    with torch.inference_mode():
        for image in (12, 20, 28, 36):
            a = inputs(model, image=image, text=0)
            got = compiled(a["img"], vec=a["vec"], pe=a["pe"], transformer_options={"tonfa": {"compute": "fast"}})
            assert torch.equal(got, block(a["img"], vec=a["vec"], pe=a["pe"], transformer_options={"tonfa": {"compute": "fast"}}))
    assert len(graphs) == 2, "one for the first size, one for all others"


def test_the_cancel_check_stays_out_of_the_graph():
    model, asked = load(), []
    block = model.single_blocks[0]
    block.runtime = replace(block.runtime, check_cancel=lambda: asked.append(os.stat(__file__).st_size))
    a = inputs(model)
    with torch.inference_mode():
        whole(block)(a["img"], vec=a["vec"], pe=a["pe"][:, :, :12], transformer_options={})
        assert asked == []
        block(a["img"], vec=a["vec"], pe=a["pe"][:, :, :12], transformer_options={})
    assert len(asked) == 1


def test_operators_declare_what_they_do():
    """torch's own checks: what is written to is declared, nothing else is, and the shape functions tell the truth."""
    from tonfa.models import ops

    model = load()
    a = inputs(model)
    m, mod = model.double_blocks[0].img_attn.qkv, model.double_blocks[0].img_mod.lin
    shift = torch.randn(1, m.in_features).bfloat16()
    blob, bias = m.weight.detach(), m.bias.detach()
    call = ([a["img"]], blob, bias, m.handle, "fast", shift, shift, 12, 1e-6, False, 8, None, None, False, [], [])
    out = torch.zeros(1, 20, m.out_features).bfloat16()[:, 4:16]
    scale = torch.ones(m.out_features // (3 * model.config["num_heads"]))
    qkv = torch.randn(1, 17, m.out_features).bfloat16()
    y, gate = torch.randn_like(a["img"][0]), torch.randn(1, m.in_features)
    q, k, v = torch.randn(3, 1, 17, 2, 16).bfloat16().transpose(2, 3)
    calls = {
        "linear": call,
        "linear_into": (*call, out),
        "norm_modulate": (a["img"][0], shift, shift, 12, 1e-6),
        "norm_gate": (a["img"][0], y, gate, 12, 1e-5),
        "norm_gate_into": (a["img"][0], y, gate, 12, 1e-5, torch.zeros_like(y)),
        "qk_norm_rope_": (qkv, scale, scale, a["pe"], model.config["num_heads"], 1e-6),
        "attend": (q, k, v, None),
    }
    modulation = ([a["vec"][None]], mod.weight.detach(), mod.bias.detach(), mod.handle, "fast", None, None, 1, 1e-6, False)
    modulation += (None, None, None, False, [], [])
    lora = [torch.randn(n, 16).bfloat16() for n in (layout.views(m.spec, blob)[0].spec.k_padded, m.spec.parts[0].n_padded)]
    rms = [("norm_modulate", (a["img"][0], None, gate, 12, 1e-5, True)), ("linear", (*call[:5], None, gate, 12, 1e-5, True, *call[10:]))]
    pairs = in_pairs(m)
    swiglu = (*call[:1], pairs.weight.detach(), bias, pairs.handle, "fast", None, None, 12, 1e-6, False, None, None, None, True, [], [])
    extra = [*rms, ("linear", modulation), ("linear", (*call[:-2], lora, [1, 0])), ("linear", swiglu)]
    extra.append(("linear_into", (*swiglu, torch.zeros(1, 12, m.out_features // 2).bfloat16())))
    for name, arguments in [*calls.items(), *extra]:
        tests = ("test_schema", "test_faketensor")
        assert set(torch.library.opcheck(getattr(ops.OPS, name).default, arguments, test_utils=tests).values()) == {"SUCCESS"}


def in_pairs(m: PackedLinear) -> PackedLinear:
    """The same linear with its rows stored in pairs."""
    part = layout.unpack_view(layout.views(m.spec, m.weight.detach())[0])
    spec = layout.plan(m.out_features, m.in_features, [(part, 0, 0)], "int8", paired=True)
    return PackedLinear(spec, layout.pack(spec, [part]), m.bias.detach(), m.runtime)


@pytest.mark.parametrize("compute", MODES)
def test_swiglu_is_compiled_with_the_same_bits(compute):
    model = load()
    m, x = in_pairs(model.double_blocks[0].img_attn.qkv), inputs(model)["img"]
    out = torch.full((1, 12, m.out_features // 2), float("nan")).bfloat16()

    def run(x: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return m.run(x, compute, ending=Ending(swiglu=True)), m.run(x, compute, ending=Ending(swiglu=True), out=out)

    with torch.inference_mode():
        want = m.run(x, compute, ending=Ending(swiglu=True))
        y, written = whole(run)(x, out)
    assert torch.equal(y, want) and torch.equal(written, want) and torch.equal(out, want)
    with torch.inference_mode():
        assert torch.equal(want, apply_ending(m(x, compute), Ending(swiglu=True)))


def test_rms_norms_and_norm_gate_are_operators_with_the_same_bits():
    """As a block of Z-Image has them: before a linear, and at the end of a branch, into a new stream or in place."""
    from tonfa.models import ops

    model = load()
    m, x = model.double_blocks[0].img_attn.qkv, inputs(model)["img"]
    g = torch.Generator().manual_seed(1)
    scale, gate = (torch.randn(1, m.in_features, generator=g) for _ in range(2))

    def compiled(x: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stream = x.clone()[0]
        y = m.run(x, "fast", norm=Norm(None, scale, 12, 1e-5, rms=True))
        ended = ops.norm_gate(stream, y[0, :, : x.shape[2]], gate, 12, 1e-5)
        return y, ops.norm_gate(ended, stream, gate, 12, 1e-5, ended)

    with torch.inference_mode():
        y, ended = whole(compiled)(x, scale, gate)
        assert torch.equal(y, m.run(x, "fast", norm=Norm(None, scale, 12, 1e-5, rms=True)))
        assert torch.equal(ended, norm_gate(norm_gate(x[0], y[0, :, : x.shape[2]], gate, 12, 1e-5), x[0], gate, 12, 1e-5))


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_is_registered_before_something_is_compiled():
    code = "import sys, torch, tonfa.models.flux; print(hasattr(torch.ops.tonfa, 'linear'), 'torch._dynamo' in sys.modules)"
    assert run(code) == "False False"


def test_two_imports_of_the_pack_do_not_meet():
    """ComfyUI's import by path beside `tonfa`: each has its own operators and its own table of layouts."""
    code = f"""
import importlib.util, sys, torch
def by_path(name):
    spec = importlib.util.spec_from_file_location(name, {str(ROOT / "__init__.py")!r}, submodule_search_locations=[{str(ROOT)!r}])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    return importlib.import_module(name + ".models.ops"), importlib.import_module(name + ".models.linear")
(one, l1), (two, l2) = by_path("a_x_pack"), by_path("tonfa")
l1._SPECS.append("another")
x = torch.randn(3, 8)
shift = torch.zeros(1, 8)
same = torch.equal(one.OPS.norm_modulate(x, shift, shift, 3, 1e-6), two.OPS.norm_modulate(x, shift, shift, 3, 1e-6))
print(one.NAMESPACE, two.NAMESPACE, one.spec_of is l1.spec_of, two.spec_of is l2.spec_of, l2._SPECS, same)
"""
    assert run(code) == "tonfa tonfa_2 True True [] True"
