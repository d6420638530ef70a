"""The first-block cache in the host: how much it reuses, that no two things share a state, and that what the host adds stays right."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator

import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras import nodes_easycache
from tonfa.models.first_block_cache import CacheConfig, Run
from tonfa.nodes.flux import NunchakuFluxDiTLoader
from tonfa.nodes.host import caching

import nodes

from .lab import conditioning, loaded, made, rel, sample, snr
from .loras import mixed, packed_only

HUGE = 1e9
NEGATIVE = conditioning(tokens=12, seed=9)
LONGER = conditioning(tokens=20, seed=9)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The small model's products are too small to share: with more threads than idle cores they take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Counted:
    """A model whose blocks count the batch rows they compute. `plain`: the latent without a cache."""

    def __init__(self, **changes: object):
        self.model = loaded(made(**changes))
        network, self.rows = self.model.model.diffusion_model, []
        modulations = [block.img_mod.lin for block in network.double_blocks] + [block.modulation.lin for block in network.single_blocks]
        for i, modulation in enumerate(modulations):
            self.rows.append(0)
            modulation.forward = self.counting(i, modulation.forward)

    def counting(self, i: int, forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def counted(x: torch.Tensor, *more: object) -> torch.Tensor:
            self.rows[i] += x.shape[0]
            return forward(x, *more)

        return counted

    def cached(self, threshold: float = HUGE, threshold_single: float = 0.0, **how: object):
        return cached(self.model, threshold, threshold_single=threshold_single, **how)

    @contextlib.contextmanager
    def computing(self, *wanted: int) -> Iterator[None]:
        """Rows that the first block of all and every other one compute within; given apart, each block's."""
        self.rows[:] = [0] * len(self.rows)
        yield
        first, *others = wanted
        assert self.rows == [first, *(others * (len(self.rows) - 1) if len(others) == 1 else others)]


def cached(model, threshold: float = HUGE, **how: object):
    """A clone of the model with a cache."""
    model = model.clone()
    caching.use_first_block_cache(model, CacheConfig(threshold, **how))
    return model


@pytest.fixture(scope="module")
def flux() -> Counted:
    counted = Counted()
    counted.plain = sample(counted.model)
    return counted


@pytest.fixture
def runs(monkeypatch) -> list[Run]:
    """The runs that were begun."""
    found, real = [], caching.new_run
    monkeypatch.setattr(caching, "new_run", lambda *args: found.append(real(*args)) or found[-1])
    return found


def twice(
    model, positive: list | None = None, negative: list | None = None, cfg: float = 1.0, size: tuple = (8, 12), mode=torch.inference_mode
) -> float:
    """The model called twice at as good as the same sigma: how far the second result, reused, is from the first."""
    found = []

    def sampler(network, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma in (0.8, 0.8 - 1e-6):
            found.append(network(x, x.new_full((x.shape[0],), sigma), **extra_args))
        return x

    latent, positive = torch.zeros(1, 16, *size), conditioning() if positive is None else positive
    with torch.inference_mode():
        noise, sigmas = comfy.sample.prepare_noise(latent, 1), torch.tensor([0.8, 0.0])
        sampler = comfy.samplers.KSAMPLER(sampler)
        comfy.sample.sample_custom(model, noise, cfg, sampler, sigmas, positive, positive if negative is None else negative, latent)
    return rel(found[1], found[0])


def said(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == caching.log.name]


# -- how much ------------------------------------------------------------------------------------------------------------------------


def test_zero_is_no_cache_at_all(flux, runs):
    off = flux.cached(0)
    assert torch.equal(sample(off), flux.plain)
    assert not runs and not any(keys for kind in off.wrappers.values() for keys in kind.values())
    again = flux.cached()
    caching.use_first_block_cache(again, CacheConfig())
    assert torch.equal(sample(again), flux.plain) and not runs


def test_a_cache_that_never_reuses_changes_no_bit(flux):
    with flux.computing(4, 4):
        assert torch.equal(sample(flux.cached(1e-9)), flux.plain)


def test_a_huge_threshold_reuses_all_but_the_first_step(flux, caplog):
    with flux.computing(6, 1), caplog.at_level(logging.INFO, logger=caching.log.name):
        assert sample(flux.cached(), steps=6).isfinite().all()
    assert said(caplog) == ["First-block cache: 5 of 6 steps reused."]


def test_a_medium_one_reuses_some_and_stays_close(flux, runs):
    wanted = sample(flux.model, steps=16)
    got, far = sample(flux.cached(0.45), steps=16), sample(flux.cached(), steps=16)
    (some,), (all_but_one,) = (run.tallies.values() for run in runs)
    assert 3 <= some.reused_steps < 14 and all_but_one.reused_steps == 15
    assert 1e-4 < rel(got, wanted) < 0.03 < rel(far, wanted)


def test_two_thresholds(flux, caplog):
    with caplog.at_level(logging.INFO, logger=caching.log.name):
        with flux.computing(4, 1, 4, 4):
            sample(flux.cached(threshold_single=1e-9))
        with flux.computing(4, 4, 4, 1):
            sample(flux.cached(1e-9, threshold_single=HUGE))
    assert said(caplog)[0] == "First-block cache: double blocks 3 of 4 steps reused; single blocks 0 of 4 steps reused."
    assert twice(flux.cached(threshold_single=HUGE)) < 1e-4


def test_part_of_sampling(flux):
    sigmas = comfy.samplers.calculate_sigmas(flux.model.get_model_object("model_sampling"), "simple", 8)
    there = flux.model.get_model_object("model_sampling").percent_to_sigma(0.4)
    early, late = int((sigmas > there).sum()), int((sigmas[:-1] <= there).sum())
    assert early > 1 and late > 1
    with flux.computing(8, early):
        sample(flux.cached(start=0.4), steps=8)
    with flux.computing(8, 1 + late):
        sample(flux.cached(end=0.4), steps=8)


def test_a_cap_on_reuses_in_a_row(flux):
    with flux.computing(8, 3):
        sample(flux.cached(most=2), steps=8)


@pytest.mark.parametrize(
    "depth", [{"depth": 1}, {"depth_single_blocks": 1}, {"depth_single_blocks": 0}, {"depth": 1, "depth_single_blocks": 0}]
)
@pytest.mark.parametrize("single", [0.0, HUGE])
def test_few_blocks(depth, single):
    counted = Counted(**depth)
    assert twice(counted.cached(threshold_single=single)) < 1e-4
    assert min(counted.rows) == (1 if len(counted.rows) > 1 else 2)


# -- a new run, another size, LoRA or reference ------------------------------------------------------------------------------------------


def with_lora(model):
    return comfy.sd.load_lora_for_models(model, None, mixed(), 1.0, 0.0)[0]


@pytest.mark.parametrize(
    ("patch", "how"),
    [
        (None, {"seed": 2}),
        (None, {"size": (12, 8)}),
        (None, {"size": (16, 16)}),
        (with_lora, {}),
        (None, {"positive": conditioning(reference_latents=[torch.ones(1, 16, 4, 6)])}),
        (None, {"positive": conditioning(seed=4)}),
    ],
    ids=["run", "turned", "size", "lora", "reference", "prompt"],
)
def test_nothing_is_left_of_the_run_before(flux, patch, how):
    def model():
        return (patch or (lambda model: model))(flux.cached())

    wanted = sample(model(), **how)
    before = flux.cached()
    with flux.computing(8, 2):
        sample(before)
        got = sample((patch or (lambda model: model))(before), **how)
    assert torch.equal(got, wanted)


def test_a_run_lets_go_of_its_state_however_it_ends(flux, runs):
    kept = []

    def stop(args):
        kept.append(len(runs[-1].kept))
        raise error

    sample(flux.cached())
    for error in (RuntimeError("x"), comfy.model_management.InterruptProcessingException()):
        model = flux.cached()
        model.set_model_sampler_post_cfg_function(stop)
        with pytest.raises(type(error)):
            sample(model)
    assert kept == [1, 1] and len(runs) == 3
    assert all(run.closed and not run.kept and not run.places for run in runs)
    assert torch.equal(sample(flux.model), flux.plain)


def test_a_cancel_between_blocks(flux, runs):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(flux.cached())
    assert runs[0].closed and sample(flux.cached()).isfinite().all()


def test_clones_have_their_own(flux):
    one = flux.cached()
    two, none = cached(one, most=1), cached(one, 0)
    for _ in range(2):
        with flux.computing(4, 1):
            sample(one)
        with flux.computing(4, 2):
            sample(two)
        with flux.computing(4, 4):
            assert torch.equal(sample(none), flux.plain)


# -- several conditionings, images, tiles, samplings --------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_by_one(model) -> Iterator[None]:
    """The host finds no memory to batch conditionings."""
    real = model.model.memory_required
    model.model.memory_required = lambda *args, **kwargs: 1e18
    try:
        yield
    finally:
        model.model.memory_required = real


def test_cfg_batched_and_apart(flux):
    with flux.computing(8, 2):
        together = sample(flux.cached(), negative=NEGATIVE, cfg=3.0)
    with flux.computing(8, 2), one_by_one(flux.model):
        apart = sample(flux.cached(), negative=NEGATIVE, cfg=3.0)
    assert snr(apart, together) > 80
    assert rel(together, sample(flux.cached())) > 1e-2


def test_cfg_with_texts_of_different_length(flux, caplog):
    with flux.computing(8, 2), caplog.at_level(logging.INFO, logger=caching.log.name):
        sample(flux.cached(), negative=LONGER, cfg=3.0)
    assert said(caplog) == ["First-block cache: 3 of 4 steps reused (6 of 8 model calls)."]
    assert twice(flux.cached(), negative=LONGER, cfg=3.0) < 1e-4


def test_batching_that_changes_on_the_way(flux):
    """A state belongs to the conditionings that were computed together: other company, another state."""
    model, steps = flux.cached(), []

    def sometimes(args):
        steps.append(1)
        flux.model.model.memory_required = (lambda *a, **k: 1e18) if len(steps) == 2 else real
        return args["denoised"]

    real = flux.model.model.memory_required
    model.set_model_sampler_post_cfg_function(sometimes)
    with flux.computing(8, 4):
        assert sample(model, negative=NEGATIVE, cfg=3.0).isfinite().all()


def test_a_batch_of_images(flux):
    def latent(*indices: int) -> dict:
        return {"samples": torch.zeros(len(indices), 16, 8, 12), "batch_index": list(indices)}

    together = sample(flux.cached(), latent=latent(0, 1, 2))
    assert snr(together, torch.cat([sample(flux.cached(), latent=latent(i)) for i in range(3)])) > 80


def regional() -> list:
    """Two texts for two halves, and one for a corner."""
    corner = nodes.ConditioningSetArea().append(conditioning(seed=5), 64, 32, 0, 0, 1.0)[0]
    left, right = (nodes.ConditioningSetArea().append(conditioning(seed=seed), 48, 64, x, 0, 1.0)[0] for seed, x in ((6, 0), (7, 48)))
    return conditioning() + left + right + corner


def test_regions_batched_and_apart(flux):
    together = sample(flux.cached(), positive=regional())
    with flux.computing(16, 4), one_by_one(flux.model):
        apart = sample(flux.cached(), positive=regional())
    assert snr(apart, together) > 80
    assert twice(flux.cached(), positive=regional()) < 1e-4


@pytest.mark.parametrize("copied", [False, True])
def test_tiles(flux, copied):
    """Several calls of one conditioning at one sigma, as tiled samplers make them, against calls that say which tile they are."""

    def tiled(model, named: bool):
        def wrapper(apply, args):
            parts = []
            for i in (0, 1):
                c, options = args["c"], args["c"]["transformer_options"]
                if named:
                    options = {**options, "uuids": [(uuid, i) for uuid in options["uuids"]]}
                if copied:
                    options = {**options, "sigmas": options["sigmas"].clone()}
                parts.append(apply(args["input"][..., 6 * i : 6 * i + 6], args["timestep"], **{**c, "transformer_options": options}))
            return torch.cat(parts, -1)

        model.set_model_unet_function_wrapper(wrapper)
        return model

    wanted = sample(tiled(flux.cached(), named=True))
    with flux.computing(8, 2):
        got = sample(tiled(flux.cached(), named=False))
    assert torch.equal(got, wanted)


def test_one_sampling_within_another(flux):
    outer, inner = flux.cached(), flux.cached()
    wanted, within, steps = sample(outer), sample(inner, conditioning(seed=4), seed=5), []

    def nested(args):
        steps.append(1)
        if len(steps) == 2:
            assert torch.equal(sample(inner, conditioning(seed=4), seed=5), within)
            flux.model.model.current_patcher = outer  # the host's inner run takes it away
        return args["denoised"]

    outer.set_model_sampler_post_cfg_function(nested)
    assert torch.equal(sample(outer), wanted) and len(steps) == 4


# -- what else the host does ---------------------------------------------------------------------------------------------------------------


class Residuals(comfy.controlnet.ControlBase):
    """ControlNet's residuals for these blocks; from the second half of its calls on nothing, when it ends early."""

    def __init__(self, ends_early: bool = False, **blocks: list[int]):
        super().__init__()
        self.blocks, self.ends_early, self.calls = blocks, ends_early, 0

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options=None):
        self.calls += 1
        if self.ends_early and self.calls > 4:
            return None
        g = torch.Generator().manual_seed(1)
        return {
            where: [torch.randn(1, 24, 128, generator=g) if i in self.blocks.get(where, ()) else None for i in (0, 1)]
            for where in ("input", "output")
        }

    def copy(self):
        return self


def controlled(*args: object, **kwargs: object) -> list:
    return conditioning(control=Residuals(*args, **kwargs), control_apply_to_uncond=False)


@pytest.mark.parametrize("single", [0.0, HUGE])
@pytest.mark.parametrize("blocks", [{"input": [0]}, {"input": [0, 1], "output": [0, 1]}, {"output": [1]}])
def test_controlnet_counts_once(flux, blocks, single):
    model, positive = flux.cached(threshold_single=single), controlled(**blocks)
    assert rel(sample(flux.model, positive, steps=1), sample(flux.model, steps=1)) > 1e-2
    assert twice(model, positive) < 1e-4


def test_controlnet_that_ends_on_the_way_starts_anew(flux):
    with flux.computing(8, 2):
        sample(flux.cached(), controlled(ends_early=True, input=[0]), steps=8)


def test_kontext_references(flux):
    positive = conditioning(reference_latents=[torch.ones(1, 16, 4, 6), torch.ones(1, 16, 6, 4)])
    assert twice(flux.cached(), positive) < 1e-4
    assert twice(flux.cached(threshold_single=HUGE), positive, size=(9, 7)) < 1e-4


@pytest.mark.parametrize("kind", ["double_block", "single_block"])
def test_replaced_blocks_turn_it_off(flux, kind, caplog):
    def replaced(model):
        def patch(args, extra):
            return {k: v * 0.9 for k, v in extra["original_block"](args).items()}

        model.set_model_patch_replace(patch, "dit", kind, 0)
        return model

    wanted = sample(replaced(flux.model.clone()))
    with caplog.at_level(logging.INFO, logger=caching.log.name):
        assert torch.equal(sample(replaced(flux.cached())), wanted)
    assert len(said(caplog)) == 1 and "off for 4 model call(s)" in said(caplog)[0] and "0 of 0 steps" in said(caplog)[0]


def test_a_lora_hook_that_changes_strength_starts_anew(flux):
    hooks = comfy.hooks.create_hook_lora(lora=packed_only(), strength_model=0.7, strength_clip=0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.3, 0.5)):
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(keyframes)
    with flux.computing(8, 2):
        sample(flux.cached(), comfy.hooks.set_hooks_for_conditioning(conditioning(), hooks), steps=8)


def test_a_lora_and_partial_loading(flux):
    model = with_lora(flux.cached(most=1))
    wanted = sample(model)
    comfy.model_management.unload_all_models()
    with torch.inference_mode():
        model.patch_model(model.load_device, lowvram_model_memory=model.model_size() // 2)
    assert snr(sample(model), wanted) > 80


def test_training_is_left_alone(flux):
    """With gradients on, every block has to be in the graph."""
    run = Run(CacheConfig(HUGE), 2, 2)
    options = {caching.RUN: run, "uuids": [1], "sigmas": torch.ones(1)}
    with torch.no_grad():
        assert caching.new_call(flux.model.model, None, options) is not None and run.off == 0
    with torch.enable_grad():
        assert caching.new_call(flux.model.model, None, options) is None and run.off == 1


@pytest.mark.parametrize("first", [True, False])
def test_easycache_beside_it(flux, first):
    def easy(model):
        return nodes_easycache.EasyCacheNode.execute(model, 0.9, 0.1, 0.9, False).args[0]

    alone = sample(easy(flux.model.clone()), steps=8)
    assert torch.equal(sample(easy(flux.cached(1e-9)) if first else cached(easy(flux.model.clone()), 1e-9), steps=8), alone)
    assert sample(easy(flux.cached()), steps=8).isfinite().all()


def test_a_compiled_model():
    """As TorchCompileModel does it."""
    small = Counted(depth=1, depth_single_blocks=1)
    torch._dynamo.reset()
    wanted = sample(small.cached(most=1), steps=3)
    model = small.cached(most=1)
    set_torch_compile_wrapper(model, backend="eager")
    with small.computing(3, 2):
        got = sample(model, steps=3)
    assert snr(got, wanted) > 80
    torch._dynamo.reset()


def test_calls_outside_a_run_are_ordinary_ones(flux, runs):
    model = flux.cached()
    options = {"wrappers": model.wrappers, "uuids": [1], "sigmas": torch.ones(1)}
    given = {"c_crossattn": conditioning()[0][0], "y": conditioning()[0][1]["pooled_output"], "guidance": torch.ones(1)}
    with torch.inference_mode():
        x = torch.ones(1, 16, 8, 12)
        a, b = (model.model.apply_model(x, torch.ones(1), transformer_options=o, **given) for o in (options, {}))
    assert torch.equal(a, b) and not runs


# -- the node ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def load(monkeypatch) -> Callable:
    """The loader node on a made checkpoint, wherever it looks for it."""
    path, node = str(made()), NunchakuFluxDiTLoader()
    monkeypatch.setattr("tonfa.nodes.dit_loader.find", lambda asked, widget: path)

    def run(**values: object):
        with torch.inference_mode():
            return node.load_model("made", compute="weight_only", **values)[0]

    return run


def test_the_node_sets_it_on_the_clone_it_hands_out(load, runs):
    model = load(cache_threshold=1, cache_threshold_single=0.5, cache_start_percent=0.1, cache_end_percent=0.9, cache_max_reuses=3)
    off = load()
    sample(model)
    assert runs[0].config == CacheConfig(1, 0.5, 0.1, 0.9, 3)
    assert 0 < runs[0].low < runs[0].high < 1
    sample(off)
    assert len(runs) == 1 and off.is_clone(model)


@pytest.mark.parametrize(
    "values",
    [
        {"cache_threshold": 3.5},
        {"cache_threshold": -1},
        {"cache_threshold": float("nan")},
        {"cache_threshold": 0.1, "cache_threshold_single": 2},
        {"cache_threshold": 0.1, "cache_start_percent": 0.6, "cache_end_percent": 0.4},
    ],
)
def test_values_that_mean_nothing_turn_it_off_with_one_line(load, caplog, runs, values):
    with caplog.at_level(logging.WARNING, logger=caching.log.name):
        model = load(**values)
    assert len(said(caplog)) == 1 and list(values)[-1].split("_percent")[0] in said(caplog)[0] and "off" in said(caplog)[0]
    assert not model.get_wrappers(WrappersMP.OUTER_SAMPLE, caching.KEY) and not runs


def test_the_saved_positions_of_the_known_inputs_stay():
    """A graph stores values by position."""
    names = [*NunchakuFluxDiTLoader.INPUT_TYPES()["required"], *NunchakuFluxDiTLoader.INPUT_TYPES()["optional"]]
    assert names[:8] == ["model_path", "cache_threshold", "attention", "cpu_offload", "device_id", "data_type", "i2f_mode", "compute"]
    assert names == list(inspect.signature(NunchakuFluxDiTLoader.load_model).parameters)[1:]
