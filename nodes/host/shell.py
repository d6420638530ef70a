"""ComfyUI's own FLUX around our blocks: the host's forward, its model class and its sampling, with 4-bit linears inside.

References, control, patches, wrappers and position ids are the host's code; only the two block lists are ours.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import comfy.ldm.flux.layers
import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.supported_models
import comfy.utils
import torch

from ...kernels.targets import resolve_compute, triton_reason
from ...models.flux import build_blocks
from ...models.formats.checkpoint import FluxCheckpoint, open_checkpoint
from ...models.linear import LARGEST_FP16
from ...models.warmup import warm_up
from .merging import dense_for_saving
from .ops import host_runtime
from .patcher import TonfaPatcher

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """Where and in which type a model computes, and where it waits. `asked` is the type that was chosen, when `dtype` stands in for it."""

    load: torch.device
    offload: torch.device
    dtype: torch.dtype
    asked: torch.dtype | None = field(default=None, compare=False)  # for the log: it is no reason to load again


def place(device_id: int, data_type: str) -> Placement:
    """The nearest thing to what was asked for that this machine can do; one log line for a device or a word that is not there.

    device_id counts CUDA (or ROCm) devices. data_type falls back as in the host's loaders, by what `unet_manual_cast` says of the device:
    load_flux says so, once the file has turned out to be one.
    """
    load = comfy.model_management.get_torch_device()
    if load.type == "cuda" and 0 <= device_id < torch.cuda.device_count():
        load = torch.device("cuda", device_id)
    elif device_id != 0:
        log.warning("Nunchaku FLUX DiT Loader: there is no device %d here; using %s.", device_id, load)
    if data_type not in DTYPES:
        log.warning("Nunchaku FLUX DiT Loader: data_type '%s' is not known; using bfloat16.", data_type)
        data_type = "bfloat16"
    wanted = DTYPES[data_type]
    dtype = comfy.model_management.unet_manual_cast(wanted, load, comfy.supported_models.Flux.supported_inference_dtypes) or wanted
    offload = comfy.model_management.unet_offload_device()
    return Placement(load, load if offload.type != "cpu" else offload, dtype, wanted if dtype != wanted else None)


def norm_parameter() -> str:
    """What the host calls the parameter of its q/k norms: `scale` before 2026-02, `weight` since."""
    norm = comfy.ldm.flux.layers.QKNorm(8, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    return next(name for name, _ in norm.query_norm.named_parameters())


class TonfaFlux(comfy.ldm.flux.model.Flux):
    """The host's FLUX, built without blocks, then given ours."""

    def __init__(
        self,
        image_model: str | None = None,
        final_layer: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        operations: object = None,
        *,
        checkpoint: FluxCheckpoint,
        target: torch.device,
        progress: Callable[[int, int], None] | None = None,
        **config: object,
    ):
        bare = {**config, "depth": 0, "depth_single_blocks": 0}
        super().__init__(image_model=image_model, final_layer=final_layer, dtype=dtype, device=device, operations=operations, **bare)
        self.params.depth, self.params.depth_single_blocks = config["depth"], config["depth_single_blocks"]
        self.load_state_dict(outside_blocks(checkpoint), strict=True)  # the block lists are still empty
        self.runtime = host_runtime()
        self.double_blocks, self.single_blocks = build_blocks(
            checkpoint, device=device, runtime=self.runtime, norm_param=norm_parameter(), target=target, progress=progress
        )


class TonfaModel(comfy.model_base.Flux):
    """The host's base model for FLUX (LoRA key maps ask for this class); checkpoints saved from it hold real numbers."""

    def state_dict_for_saving(self, *args: object, **kwargs: object) -> dict:
        saved = super().state_dict_for_saving(*args, **kwargs)
        return dense_for_saving(self, saved, "model.diffusion_model.", self.get_dtype())


def outside_blocks(checkpoint: FluxCheckpoint) -> dict[str, torch.Tensor]:
    """The tensors around the blocks (embedders, final layer), native names."""
    return {name: t for name, t in checkpoint.plain_tensors() if not name.startswith(("double_blocks.", "single_blocks."))}


def unet_config(found: Mapping) -> dict:
    """A checkpoint's configuration as this host's FluxParams takes it: no field unknown to it, none missing that newer hosts ask for."""
    known = comfy.ldm.flux.model.FluxParams.__dataclass_fields__
    config = {"image_model": "flux", **{k: v for k, v in found.items() if k in known}}
    if "txt_ids_dims" in known:
        config.setdefault("txt_ids_dims", [])
    return config


def fitting(dtype: torch.dtype, checkpoint: FluxCheckpoint, device: torch.device) -> torch.dtype:
    """`dtype`, unless it is float16 and a 16-bit layer of the file has values beyond its range: then what the host would take instead."""
    if dtype != torch.float16:
        return dtype
    for name, tensor in outside_blocks(checkpoint).items():
        if tensor.abs().max() > LARGEST_FP16:
            other = comfy.model_management.unet_manual_cast(torch.bfloat16, device, [torch.bfloat16, torch.float32]) or torch.bfloat16
            log.warning("%s: %s has values beyond float16's range, so the model computes in %s.", checkpoint.path, name, other)
            return other
    return dtype


def load_flux(path: str, where: Placement, disable_dynamic: bool = False, compute: str = "auto") -> TonfaPatcher:
    """A MODEL of the checkpoint at `path`. disable_dynamic: the host's keyword for rebuilding a model; ours is never dynamic.

    compute: the mode whose kernels are made ready meanwhile.

    Raises CheckpointError, a sentence for the user, when the file is something else.
    """
    checkpoint = open_checkpoint(path)
    if where.asked is not None:
        asked, taken = (str(dtype).removeprefix("torch.") for dtype in (where.asked, where.dtype))
        log.info(
            "Nunchaku FLUX DiT Loader: %s does not compute in %s by ComfyUI's rules; the model computes in %s.", where.load, asked, taken
        )
    dtype = fitting(where.dtype, checkpoint, where.load)
    schnell = checkpoint.model_class == "FluxSchnell"
    config = (comfy.supported_models.FluxSchnell if schnell else comfy.supported_models.Flux)(unet_config(checkpoint.config))
    config.set_inference_dtype(dtype, None)
    model_type = comfy.model_base.ModelType.FLOW if schnell else comfy.model_base.ModelType.FLUX
    if where.load.type == "cuda":
        comfy.model_management.free_memory(2 << 30, where.load)  # room to re-pack a layer, and to run a block of each kind
    target = where.load if where.load.type == "cuda" else torch.device("cpu")  # other back ends lack types that re-packing needs
    ready = warm_up(checkpoint, where.load, dtype, compute)
    network = functools.partial(TonfaFlux, checkpoint=checkpoint, target=target, progress=progress_bar())
    try:
        model = TonfaModel(config, model_type=model_type, device=where.offload, unet_model=network)
    finally:
        ready()  # it reads from the file
    model.diffusion_model.eval()
    checkpoint.close()
    patcher = TonfaPatcher(model, load_device=where.load, offload_device=where.offload)
    patcher.cached_patcher_init = (load_flux, (path, where))
    log_kernels(checkpoint, where, dtype)
    return patcher


def log_kernels(checkpoint: FluxCheckpoint, where: Placement, dtype: torch.dtype) -> None:
    """One line a load: what the file is, and which kernels and which compute mode `auto` means for it here."""
    reason = triton_reason(where.load)
    kernels = "Triton kernels" if reason is None else f"the torch path, which is slower ({reason})"
    what = f"{checkpoint.path}: {checkpoint.precision.upper()} rank {checkpoint.rank}, {str(dtype).removeprefix('torch.')}"
    log.info("%s on %s by %s; compute auto is %s.", what, where.load, kernels, resolve_compute("auto", where.load))


def progress_bar() -> Callable[[int, int], None]:
    """progress(done, total) on the node, which also lets a cancel through."""
    bar = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return show
