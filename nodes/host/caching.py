"""First-block cache in ComfyUI: two wrappers on one clone's patcher. One makes a run's state and drops it, one a call's.

All state lies in the transformer_options of one sampling run, where no other run, clone or model can meet it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from ...models.first_block_cache import KEY, CacheConfig, Call, Run

log = logging.getLogger(__name__)

RUN = "tonfa_first_block_cache_run"  # of transformer_options: the Run under way


def cache_config(threshold: float, single: float, start: float, end: float, most: int, title: str) -> CacheConfig:
    """The node's values, which any saved graph may hold: with one that means nothing the cache is off, and the log says why.

    title: the node's, for the log.
    """
    shares = {"cache_threshold": threshold, "cache_threshold_single": single, "cache_start_percent": start, "cache_end_percent": end}
    for name, value in shares.items():
        if not 0 <= value <= 1:
            log.warning("%s: %s is %s, not a number from 0 to 1: the first-block cache is off.", title, name, value)
            return CacheConfig()
    if threshold > 0 and start >= end:
        log.warning("%s: cache_start_percent %s is not before cache_end_percent %s: the first-block cache is off.", title, start, end)
        return CacheConfig()
    return CacheConfig(threshold, single, start, end, max(int(most), 0))


def use_first_block_cache(model: comfy.model_patcher.ModelPatcher, config: CacheConfig) -> None:
    """Gives this clone the cache, or takes it off; others keep what they have."""
    wrappers = {WrappersMP.OUTER_SAMPLE: in_run(config), WrappersMP.APPLY_MODEL: in_call}
    for kind, wrapper in wrappers.items():
        model.remove_wrappers_with_key(kind, KEY)
        if config.threshold > 0:
            model.add_wrapper_with_key(kind, KEY, wrapper)


def in_run(config: CacheConfig) -> Callable:
    """Around one sampling run: its state, and at the end, whatever the end is, its one line in the log."""

    def sampled(executor: WrapperExecutor, *args: object, **kwargs: object) -> Tensor:
        guider = executor.class_obj
        before, run = guider.model_options, new_run(guider.model_patcher, config)
        guider.model_options = comfy.model_patcher.create_model_options_clone(before)
        guider.model_options.setdefault("transformer_options", {})[RUN] = run
        try:
            return executor(*args, **kwargs)
        finally:
            guider.model_options = before
            run.close()
            log.info("First-block cache: %s.", run.summary())

    return sampled


def new_run(patcher: comfy.model_patcher.ModelPatcher, config: CacheConfig) -> Run:
    """A run's empty state. Percents become sigmas as for the host's own nodes."""
    network, sampling = patcher.model.diffusion_model, patcher.get_model_object("model_sampling")
    high = math.inf if config.start <= 0 else float(sampling.percent_to_sigma(config.start))
    low = -math.inf if config.end >= 1 else float(sampling.percent_to_sigma(config.end))
    return Run(config, *network.cached_blocks(), low, high, has_room)


def has_room(device: torch.device, size: int) -> bool:
    """Whether so many bytes more leave at least as much free again."""
    return comfy.model_management.get_free_memory(device) > 2 * size


def in_call(
    executor: WrapperExecutor,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None = None,
    c_crossattn: Tensor | None = None,
    control: dict | None = None,
    transformer_options: dict | None = None,
    *args: object,
    **kwargs: object,
) -> Tensor:
    """Around one model call of such a run: the blocks find the Call in their transformer_options."""
    options = transformer_options or {}
    call = new_call(executor.class_obj, control, options)
    if call is not None:
        options = {**options, KEY: call}
    try:
        return executor(x, t, c_concat, c_crossattn, control, options, *args, **kwargs)
    finally:
        if call is not None:
            call.end()


def new_call(model: torch.nn.Module, control: dict | None, options: dict) -> Call | None:
    """The Call of a model call with these options; None where it is nobody's, or where reuse might be wrong."""
    run, whose, sigmas = options.get(RUN), options.get("uuids"), options.get("sigmas")
    if run is None or run.closed:
        return None
    if not whose or sigmas is None or options.get("patches_replace", {}).get("dit") or torch.is_grad_enabled():
        run.off += 1
        return None
    whose = (tuple(whose), tuple(options.get("cond_or_uncond", ())))
    return Call(run, whose, sigmas, (hooked(model), controlled(control)))


def hooked(model: torch.nn.Module) -> tuple:
    """The weight hooks in force, with their strengths of the moment."""
    hooks = getattr(getattr(model, "current_patcher", None), "current_hooks", None)
    return () if hooks is None else tuple((hook.hook_ref, hook.strength) for hook in hooks.hooks)


def controlled(control: dict | None) -> tuple:
    """Between which blocks ControlNet adds something: it comes on and goes off in the middle of a run."""
    return tuple((where, tuple(add is not None for add in adds)) for where, adds in sorted((control or {}).items()))
