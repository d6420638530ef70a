"""The first-block cache without a host: its decision, its state and its bookkeeping on a toy network whose blocks are easy to follow."""

import math
from pathlib import Path

import pytest
import torch
from tonfa.models import first_block_cache as cache
from tonfa.models.first_block_cache import KEY, CacheConfig, Call, Run, Stage, cached, stages
from tonfa.models.flux import Flux
from tonfa.models.formats.checkpoint import open_checkpoint
from torch import nn

DATA = Path(__file__).parent.parent / "data"
HUGE = 1e9
TEXT, IMAGE, WIDTH = 3, 5, 4


class Double(nn.Module):
    def __init__(self, position):
        super().__init__()
        self.position, self.calls, self.weight = position, 0, 0.1 * (position + 1)

    def forward(self, img, txt, vec, transformer_options=None):
        def work():
            self.calls += 1
            return img + (img * self.weight + txt.mean(1, keepdim=True)) * vec, txt + torch.sin(txt + self.weight) * vec

        return cached(self.position, (img, txt), transformer_options or {}, work)


class Single(nn.Module):
    def __init__(self, position):
        super().__init__()
        self.position, self.calls, self.weight = position, 0, 0.1 * (position + 1)

    def forward(self, x, vec, transformer_options=None):
        def work():
            self.calls += 1
            return (x + torch.cos(x * self.weight) * vec,)

        return cached(self.position, (x,), transformer_options or {}, work)[0]


class Toy:
    """The host's loop over `doubles` and `singles` blocks, ControlNet's residuals between them included."""

    def __init__(self, doubles=3, singles=3):
        self.doubles = [Double(i) for i in range(doubles)]
        self.singles = [Single(doubles + i) for i in range(singles)]

    def __call__(self, img, txt, vec, call=None, control=None):
        options, control = {} if call is None else {KEY: call}, control or {}
        img, txt, vec = img.clone(), txt.clone(), torch.as_tensor(vec, dtype=img.dtype)
        for i, block in enumerate(self.doubles):
            img, txt = block(img=img, txt=txt, vec=vec, transformer_options=options)
            if i in control.get("input", {}):
                img[:, :2] += control["input"][i]
        x = torch.cat((txt, img), 1)
        for i, block in enumerate(self.singles):
            x = block(x, vec=vec, transformer_options=options)
            if i in control.get("output", {}):
                x[:, TEXT : TEXT + 2] += control["output"][i]
        return x[:, TEXT:]

    def calls(self):
        """Computations of every block since the last look."""
        found = [block.calls for block in (*self.doubles, *self.singles)]
        for block in (*self.doubles, *self.singles):
            block.calls = 0
        return found


def streams(seed=0, batch=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, IMAGE, WIDTH, generator=g).to(dtype), torch.randn(batch, TEXT, WIDTH, generator=g).to(dtype)


def run_of(toy, threshold=HUGE, **how):
    config = {k: how.pop(k) for k in list(how) if k in CacheConfig.__dataclass_fields__}
    return Run(CacheConfig(threshold, **config), len(toy.doubles), len(toy.singles), **how)


def step(toy, run, sigma, vec=None, whose="a", given=None, control=None, like=(), sigmas=None):
    """One model call -> (result, whether anything was reused)."""
    call = Call(run, whose, torch.tensor([sigma]) if sigmas is None else sigmas, like)
    toy.calls()
    out = toy(*(given or streams()), vec=sigma if vec is None else vec, call=call, control=control)
    return out, 0 in toy.calls()


# -- the rule ------------------------------------------------------------------------------------------------------------------------


def test_without_a_call_blocks_do_what_they_do():
    toy = Toy()
    out = toy(*streams(), vec=0.5)
    assert toy.calls() == [1] * 6 and out.isfinite().all()


@pytest.mark.parametrize(("threshold", "reused"), [(0.12, True), (0.08, False)])
def test_the_change_is_relative_to_the_last_computed_first_residual(threshold, reused):
    """The toy's first block adds something times vec: 1.0, then 1.1 of it is a change of 0.1."""
    toy = Toy()
    run = run_of(toy, threshold)
    assert not step(toy, run, 1.0)[1]
    assert step(toy, run, 0.9, vec=1.1)[1] == reused


def test_it_is_compared_with_the_last_computed_step_and_not_the_last_one():
    """Each step changes by less than the threshold, but they add up."""
    toy = Toy()
    run = run_of(toy, 0.12)
    assert [step(toy, run, 1 - vec / 10, vec=vec)[1] for vec in (1.0, 1.05, 1.1, 1.15, 1.2, 1.3)] == [False, True, True, False, True, False]


def test_a_reused_step_is_the_first_block_and_the_cached_change_of_the_rest():
    toy, (img, txt) = Toy(), streams()
    run = run_of(toy)
    whole = step(toy, run, 1.0)[0]
    vec = torch.tensor(1.1)
    first, then = toy.doubles[0](img, txt, torch.tensor(1.0))[0], toy.doubles[0](img, txt, vec)[0]
    got, reused = step(toy, run, 0.9, vec=1.1)
    assert reused and torch.allclose(got, then + (whole - first), atol=1e-6)
    assert not torch.allclose(got, toy(img, txt, vec), atol=1e-2)


def test_only_the_first_block_runs_on_reuse():
    toy = Toy()
    run = run_of(toy)
    for sigma, calls in ((1.0, [1] * 6), (0.9, [1, 0, 0, 0, 0, 0])):
        toy.calls()
        toy(*streams(), vec=1.0, call=Call(run, "a", torch.tensor([sigma])))
        assert toy.calls() == calls


def test_a_batch_is_reused_only_when_every_image_may():
    toy, (img, txt) = Toy(), streams(batch=3)
    run = run_of(toy, 0.5)
    step(toy, run, 1.0, vec=1.0, given=(img, txt))
    assert step(toy, run, 0.9, vec=1.0, given=(img, txt))[1]
    other = img.clone()
    other[1] *= 5
    assert not step(toy, run, 0.8, vec=1.0, given=(other, txt))[1]


def test_zeros_and_not_a_number_are_never_reused():
    toy, (img, txt) = Toy(), streams()
    for vec in (0.0, math.nan):
        run = run_of(toy)
        assert [step(toy, run, sigma, vec=vec)[1] for sigma in (1.0, 0.9)] == [False, False]
    assert img.isfinite().all() and txt.isfinite().all()


# -- stages --------------------------------------------------------------------------------------------------------------------------


def test_stages():
    both, two = CacheConfig(0.1), CacheConfig(0.1, threshold_single=0.2)
    assert stages(both, 19, 38) == [Stage("", 0, 56, 0.1)]
    assert stages(two, 19, 38) == [Stage("double blocks", 0, 18, 0.1), Stage("single blocks", 19, 56, 0.2)]
    assert stages(two, 1, 3) == [Stage("single blocks", 1, 3, 0.2)], "one double block saves nothing"
    assert stages(two, 3, 1) == [Stage("", 0, 3, 0.1)], "one single block cannot decide for others"
    assert stages(both, 2, 0) == [Stage("", 0, 1, 0.1)] and stages(both, 1, 1) == [Stage("", 0, 1, 0.1)]
    assert stages(both, 1, 0) == stages(both, 0, 4) == []


@pytest.mark.parametrize(("doubles", "singles"), [(3, 3), (1, 3), (3, 1), (1, 1), (3, 0), (1, 0)])
@pytest.mark.parametrize("single", [0.0, HUGE])
def test_the_same_step_again_gives_the_same_in_every_network(doubles, singles, single):
    toy = Toy(doubles, singles)
    run = run_of(toy, threshold_single=single)
    wanted, _ = step(toy, run, 1.0)
    got, reused = step(toy, run, 0.9, vec=1.0)
    assert torch.allclose(got, wanted, atol=1e-6)
    assert reused == (doubles + singles > 1)


@pytest.mark.parametrize(("double", "single", "calls"), [(HUGE, 1e-9, [1, 0, 0, 1, 1, 1]), (1e-9, HUGE, [1, 1, 1, 1, 0, 0])])
def test_two_thresholds_decide_apart(double, single, calls):
    toy = Toy()
    run = run_of(toy, double, threshold_single=single)
    step(toy, run, 1.0)
    toy.calls()
    toy(*streams(), vec=1.1, call=Call(run, "a", torch.tensor([0.9])))
    assert toy.calls() == calls
    assert run.summary() == f"double blocks {int(double > 1)} of 2 steps reused; single blocks {int(single > 1)} of 2 steps reused"


# -- what the host adds between blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("single", [0.0, HUGE])
@pytest.mark.parametrize("where", [{"input": {0: 2.0}}, {"input": {1: 2.0, 2: 1.0}}, {"output": {0: 2.0, 1: 1.0}}, {"output": {2: 3.0}}])
def test_residuals_between_blocks_count_once(where, single):
    toy = Toy()
    run = run_of(toy, threshold_single=single)
    wanted, _ = step(toy, run, 1.0, control=where)
    got, reused = step(toy, run, 0.9, vec=1.0, control=where)
    assert reused and torch.allclose(got, wanted, atol=1e-6)


def test_residuals_behind_the_last_block_are_those_of_the_step():
    toy = Toy()
    run = run_of(toy)
    plain, _ = step(toy, run, 1.0, control={"output": {2: 0.0}})
    got, _ = step(toy, run, 0.9, vec=1.0, control={"output": {2: 3.0}})
    plain[:, :2] += 3
    assert torch.allclose(got, plain, atol=1e-6)


# -- state ---------------------------------------------------------------------------------------------------------------------------


def test_conditionings_do_not_mix():
    toy, a, b = Toy(), streams(0), streams(1)
    run = run_of(toy)
    whole = {who: step(toy, run, 1.0, whose=who, given=given) for who, given in (("a", a), ("b", b))}
    assert not whole["a"][1] and not whole["b"][1]
    for who, given in (("b", b), ("a", a)):
        got, reused = step(toy, run, 0.9, vec=1.0, whose=who, given=given)
        assert reused and torch.allclose(got, whole[who][0], atol=1e-6)


@pytest.mark.parametrize("copied", [False, True])
def test_calls_at_one_sigma_do_not_mix(copied):
    """Tiles: the host's tensor of the sigma is the same for all of them, or another with the same number."""
    toy, tiles = Toy(), [streams(seed) for seed in range(3)]
    run, whole = run_of(toy), []
    for sigma in (1.0, 0.9, 0.8):
        sigmas = torch.tensor([sigma])
        for i, tile in enumerate(tiles):
            got, reused = step(toy, run, sigma, vec=1.0, given=tile, sigmas=sigmas.clone() if copied else sigmas)
            assert reused == (sigma < 1)
            whole.append(got)
            assert torch.allclose(got, whole[i], atol=1e-6)
    assert run.summary() == "2 of 3 steps reused (6 of 9 model calls)"


@pytest.mark.parametrize(
    "changed", [{"like": ("a lora",)}, {"given": streams(batch=2)}, {"given": (torch.ones(1, 7, WIDTH), torch.ones(1, TEXT, WIDTH))}]
)
def test_whatever_differs_is_computed_and_takes_the_place(changed):
    toy = Toy()
    run = run_of(toy)
    step(toy, run, 1.0)
    assert not step(toy, run, 0.9, **changed)[1]
    assert step(toy, run, 0.8, **changed)[1]
    assert len(run.kept) == 1
    assert not step(toy, run, 0.7)[1]


def test_a_type_is_no_other():
    toy = Toy()
    run = run_of(toy)
    step(toy, run, 1.0)
    assert not step(toy, run, 0.9, given=streams(dtype=torch.bfloat16))[1]


def test_a_cap_on_reuses_in_a_row():
    toy = Toy()
    run = run_of(toy, most=2)
    assert [step(toy, run, 1 - i / 10)[1] for i in range(8)] == [False, True, True, False, True, True, False, True]


def test_reuse_only_between_two_sigmas():
    toy = Toy()
    run = run_of(toy, low=0.35, high=0.75)
    assert [step(toy, run, 1 - i / 10)[1] for i in range(8)] == [False, False, False, True, True, True, True, False]


def test_a_failed_step_leaves_the_last_computed_one():
    toy = Toy()
    run = run_of(toy, 0.12)
    step(toy, run, 1.0)
    toy.doubles[1].weight = None
    with pytest.raises(TypeError):
        step(toy, run, 0.9, vec=2.0)
    toy.doubles[1].weight = 0.2
    assert step(toy, run, 0.8, vec=1.0)[1]
    assert not step(toy, run, 0.7, vec=2.0)[1]


def test_a_closed_run_keeps_nothing():
    toy = Toy()
    run = run_of(toy)
    step(toy, run, 1.0)
    assert run.kept and run.places
    run.close()
    assert not run.kept and not run.places and run.closed


def test_where_there_is_no_room_nothing_is_kept():
    toy, asked = Toy(), []
    run = run_of(toy, room=lambda device, size: asked.append(size))
    assert [step(toy, run, sigma)[1] for sigma in (1.0, 0.9)] == [False, False]
    assert asked == [(IMAGE + TEXT + IMAGE) * WIDTH * 4] * 2 and not run.kept
    assert "memory is short" in run.summary()


def test_a_network_that_cuts_tokens_on_the_way_is_never_reused():
    toy = Toy()
    run = run_of(toy)
    for sigma in (1.0, 0.9):
        toy.calls()
        call = Call(run, "a", torch.tensor([sigma]))
        img, txt = toy.doubles[0](*streams(), torch.tensor(1.0), transformer_options={KEY: call})
        toy.singles[-1](torch.cat((txt, img[:, :2]), 1), torch.tensor(1.0), transformer_options={KEY: call})
        assert toy.singles[-1].calls == 1


def test_float16_stays_in_range():
    toy = Toy(2, 0)
    img, txt = streams(dtype=torch.float16)
    run = run_of(toy)
    call = Call(run, "a", torch.tensor([1.0]))
    call.decide(run.stages[0], (img, txt), (img * 0 - 60000, txt))
    call.keep((img * 0 + 60000, txt))
    (kept,) = run.kept.values()
    assert kept.rest.isfinite().all() and kept.rest.max() == 65504
    again = Call(run, "a", torch.tensor([0.9]))
    again.decide(run.stages[0], (img, txt), (img * 0 + 60000, txt))
    again.reusing, again.kept = True, kept
    assert again.restored((img, txt))[0].isfinite().all()


def test_one_wait_for_the_device_a_step(monkeypatch):
    waits = []
    for name in ("tolist", "item"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, real=real: waits.append(1) or real(t))
    toy = Toy()
    run = run_of(toy)
    for sigma in (1.0, 0.9, 0.8):
        step(toy, run, sigma)
    assert len(waits) == 3


def test_a_step_counts_as_reused_when_all_its_calls_are():
    toy = Toy()
    run = run_of(toy, 0.5)
    for sigma, vecs in ((1.0, (1.0, 1.0)), (0.9, (1.0, 1.0)), (0.8, (1.0, 3.0)), (0.7, (3.0, 3.0))):
        for who, vec in zip("ab", vecs, strict=True):
            step(toy, run, sigma, vec=vec, whose=who)
    assert run.summary() == "1 of 4 steps reused (4 of 8 model calls)"


# -- in the real network -----------------------------------------------------------------------------------------------------------------


def inputs(config):
    """One call of the network [1, C, 8, 12]."""
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (config["in_channels"], 8, 12), "context": (11, config["context_in_dim"]), "y": (config["vec_in_dim"],)}
    drawn = {name: torch.randn(1, *shape, generator=g) for name, shape in shapes.items()}
    return {**drawn, "timestep": torch.full((1,), 0.7), "guidance": torch.full((1,), 3.5)}


@pytest.fixture(scope="module")
def flux():
    return Flux(open_checkpoint(DATA / "mini_flux_int4.safetensors"), torch.float32).eval()


def test_blocks_know_their_position(flux):
    assert [block.position for block in (*flux.double_blocks, *flux.single_blocks)] == list(
        range(len(flux.double_blocks) + len(flux.single_blocks))
    )


def test_a_network_computes_the_same_with_and_without_a_call_that_never_reuses(flux):
    given = inputs(flux.config)
    run = Run(CacheConfig(HUGE), len(flux.double_blocks), len(flux.single_blocks), low=math.inf)
    with torch.inference_mode():
        wanted = flux(**given)
        for sigma in (1.0, 0.9):
            assert torch.equal(flux(**given, transformer_options={KEY: Call(run, "a", torch.tensor([sigma]))}), wanted)


def test_compiled_blocks_decide_alike(flux):
    """The decision is no part of what is compiled; the blocks' own work is."""
    torch._dynamo.reset()
    given, found = inputs(flux.config), []
    for network in (flux, torch.compile(flux, backend="eager")):
        run = Run(CacheConfig(HUGE, most=1), len(flux.double_blocks), len(flux.single_blocks))
        with torch.inference_mode():
            for sigma in (1.0, 0.9, 0.8):
                given["timestep"] = torch.full((1,), sigma)
                found.append(network(**given, transformer_options={KEY: Call(run, "a", torch.tensor([sigma]))}))
        assert run.summary() == "1 of 3 steps reused"
    assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:], strict=True))
    assert cache.uncompiled() is cache.uncompiled()
