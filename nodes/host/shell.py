"""From a checkpoint of any family to a MODEL: where it computes, the host's model around our blocks, the patcher."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch

from ...kernels.targets import resolve_compute, triton_reason
from ...models.formats.checkpoint import open_packed
from ...models.formats.packed import PackedCheckpoint
from ...models.linear import LARGEST_FP16
from ...models.warmup import warm_up
from .patcher import TonfaPatcher

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# family -> (module with `settings` and `make`, its class of the transformer). Imported when asked for: a host may lack one.
SHELLS = {
    "flux": ("flux_shell", "TonfaFlux"),
    "qwen-image": ("qwen_shell", "TonfaQwenImage"),
    "z-image": ("z_shell", "TonfaZImage"),
}


@dataclass(frozen=True)
class Placement:
    """Where and in which type a model is to compute, and where it waits. load_model settles the type when it knows the model."""

    load: torch.device
    offload: torch.device
    dtype: torch.dtype


def place(device_id: int, data_type: str, title: str) -> Placement:
    """The nearest thing to what was asked for that this machine has; one log line for a device or a word that is not there.

    device_id counts CUDA (or ROCm) devices. title: the node's, for the log.
    """
    load = comfy.model_management.get_torch_device()
    if load.type == "cuda" and 0 <= device_id < torch.cuda.device_count():
        load = torch.device("cuda", device_id)
    elif device_id != 0:
        log.warning("%s: there is no device %d here; using %s.", title, device_id, load)
    if data_type not in DTYPES:
        log.warning("%s: data_type '%s' is not known; using bfloat16.", title, data_type)
        data_type = "bfloat16"
    offload = comfy.model_management.unet_offload_device()
    return Placement(load, load if offload.type != "cpu" else offload, DTYPES[data_type])


def nearest(wanted: torch.dtype, device: torch.device, supported: list[torch.dtype]) -> torch.dtype:
    """`wanted` where a model may compute in it and the device does, by the host's rules; else what the host would take."""
    wanted = wanted if wanted in supported else supported[0]
    return comfy.model_management.unet_manual_cast(wanted, device, supported) or wanted


def fitting(where: Placement, supported: list[torch.dtype], checkpoint: PackedCheckpoint, title: str) -> torch.dtype:
    """The type to compute in: the one asked for, unless the host's rules for this model and device have another, or, if it is float16,
    a 16-bit layer of the file has values beyond its range. One log line then."""
    wanted = where.dtype
    if wanted == torch.float32:  # not on the node: no rule is asked
        return wanted
    dtype = nearest(wanted, where.load, supported)
    if dtype != wanted:
        asked, used = (str(t).removeprefix("torch.") for t in (wanted, dtype))
        log.info("%s: %s does not compute this model in %s by ComfyUI's rules; it computes in %s.", title, where.load, asked, used)
    if dtype == torch.float16:
        for name, tensor in checkpoint.outside_blocks().items():
            if tensor.numel() and tensor.abs().max() > LARGEST_FP16:
                dtype = nearest(torch.bfloat16, where.load, [torch.bfloat16, torch.float32])
                log.warning("%s: %s has values beyond float16's range, so the model computes in %s.", checkpoint.path, name, dtype)
                break
    return dtype


def load_model(
    path: str, where: Placement, disable_dynamic: bool = False, compute: str = "auto", title: str = "Nunchaku DiT Loader"
) -> TonfaPatcher:
    """A MODEL of the checkpoint at `path`, of whatever family. disable_dynamic: the host's keyword for rebuilding a model; ours is never
    dynamic. compute: the mode whose kernels are made ready meanwhile. title: the node's, for the log.

    Raises CheckpointError, a sentence for the user, when the file is something else, or of a family that this host does not have.
    """
    checkpoint = open_packed(path)
    module, network = SHELLS[checkpoint.family]
    shell = importlib.import_module(f"{__package__}.{module}")
    config = shell.settings(checkpoint)
    dtype = fitting(where, config.supported_inference_dtypes, checkpoint, title)
    config.set_inference_dtype(dtype, None)
    if where.load.type == "cuda":
        comfy.model_management.free_memory(2 << 30, where.load)  # room to re-pack a layer, and to run a block of each kind
    target = where.load if where.load.type == "cuda" else torch.device("cpu")  # other back ends lack types that re-packing needs
    ready = warm_up(checkpoint, where.load, dtype, compute)
    network = functools.partial(getattr(shell, network), checkpoint=checkpoint, target=target, progress=progress_bar())
    try:
        model = shell.make(config, checkpoint, where.offload, network)
    finally:
        ready()  # it reads from the file
    model.tonfa_family = checkpoint.family
    model.diffusion_model.eval()
    checkpoint.close()
    patcher = TonfaPatcher(model, load_device=where.load, offload_device=where.offload)
    patcher.cached_patcher_init = (load_model, (path, where))
    log_kernels(checkpoint, where, dtype)
    return patcher


def family_of(patcher: object) -> str:
    """ "flux", "qwen-image" or "z-image" of a MODEL that load_model made; "" of any other."""
    return getattr(getattr(patcher, "model", None), "tonfa_family", "")


def log_kernels(checkpoint: PackedCheckpoint, where: Placement, dtype: torch.dtype) -> None:
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
