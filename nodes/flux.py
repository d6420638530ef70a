"""The FLUX loader node. Light to import: torch and the host come in when a node is asked for its inputs or run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

log = logging.getLogger(__name__)

KEY = "NunchakuFluxDiTLoader"
SHARE = {"min": 0.0, "max": 1.0, "step": 0.001}
DEVICE_WIDGET = {"default": 0, "min": 0, "step": 1, "display": "number", "lazy": True}
COMPUTE = ["auto", "exact", "fast", "weight_only"]
ATTENTION = ["nunchaku-fp16", "flash-attention2"]
OFFLOAD = ["auto", "enable", "disable"]
I2F = ["enabled", "always"]


class NunchakuFluxDiTLoader:
    """Loads a 4-bit SVDQuant FLUX.1 checkpoint as a MODEL. Input names, order and defaults are those of ComfyUI-nunchaku, then ours."""

    TITLE = "Nunchaku FLUX DiT Loader"
    CATEGORY = "Nunchaku"
    DESCRIPTION = (
        "Loads a 4-bit SVDQuant FLUX.1 checkpoint (dev, schnell, Fill, Canny, Depth, Kontext, Krea and finetunes; INT4 or NVFP4, any GPU). "
        "The MODEL is an ordinary one: ComfyUI's LoraLoaderModelOnly, ControlNet, patches and memory management work on it."
    )
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_model"
    TONFA = True  # tells this pack's classes from another pack's of the same key, however the pack was imported

    def __init__(self) -> None:
        self._key: tuple | None = None  # what the patcher below was loaded from
        self._patcher = None

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802 (the host's name)
        from .host.files import model_names

        warn_about_other_packs()
        return {
            "required": {
                "model_path": (model_names(), {"tooltip": TOOLTIPS["model_path"]}),
                "cache_threshold": ("FLOAT", {"default": 0, "min": 0, "max": 1, "step": 0.001, "tooltip": TOOLTIPS["cache_threshold"]}),
                "attention": (ATTENTION, {"default": "nunchaku-fp16", "tooltip": TOOLTIPS["attention"]}),
                "cpu_offload": (OFFLOAD, {"default": "auto", "tooltip": TOOLTIPS["cpu_offload"]}),
                "device_id": ("INT", {**DEVICE_WIDGET, "max": last_device(), "tooltip": TOOLTIPS["device_id"]}),
                "data_type": (["bfloat16", "float16"], {"default": "bfloat16", "tooltip": TOOLTIPS["data_type"]}),
            },
            "optional": {
                "i2f_mode": (I2F, {"default": "enabled", "tooltip": TOOLTIPS["i2f_mode"]}),
                "compute": (COMPUTE, {"default": "auto", "tooltip": TOOLTIPS["compute"]}),
                "cache_threshold_single": ("FLOAT", {**SHARE, "default": 0.0, "tooltip": TOOLTIPS["cache_threshold_single"]}),
                "cache_start_percent": ("FLOAT", {**SHARE, "default": 0.0, "tooltip": TOOLTIPS["cache_start_percent"]}),
                "cache_end_percent": ("FLOAT", {**SHARE, "default": 1.0, "tooltip": TOOLTIPS["cache_end_percent"]}),
                "cache_max_reuses": ("INT", {"default": 0, "min": 0, "max": 100, "tooltip": TOOLTIPS["cache_max_reuses"]}),
                "num_blocks_on_gpu": ("INT", {"default": 1, "min": 0, "max": 60, "tooltip": TOOLTIPS["num_blocks_on_gpu"]}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(  # noqa: N802
        cls,
        model_path=None,
        cache_threshold=None,
        attention=None,
        cpu_offload=None,
        device_id=None,
        data_type=None,
        i2f_mode=None,
        compute=None,
        cache_threshold_single=None,
        cache_start_percent=None,
        cache_end_percent=None,
        cache_max_reuses=None,
        num_blocks_on_gpu=None,
    ) -> bool:
        """Naming an input here takes the host's list and range checks off it: unknown saved values are resolved when the node runs."""
        return True

    def check_lazy_status(self, device_id: int | None = None, **_: object) -> list[str]:
        """device_id is marked lazy, as it always was; when it is linked it is needed all the same."""
        return ["device_id"] if device_id is None else []

    def load_model(
        self,
        model_path: str,
        cache_threshold: float = 0,
        attention: str = "nunchaku-fp16",
        cpu_offload: str = "auto",
        device_id: int = 0,
        data_type: str = "bfloat16",
        i2f_mode: str = "enabled",
        compute: str = "auto",
        cache_threshold_single: float = 0.0,
        cache_start_percent: float = 0.0,
        cache_end_percent: float = 1.0,
        cache_max_reuses: int = 0,
        num_blocks_on_gpu: int = 1,
    ) -> tuple:
        """(MODEL,). The file is read again only when it, the device or the type changed; anything else makes a new clone."""
        from ..kernels.int_to_float import set_mode
        from .host.caching import cache_config, use_first_block_cache
        from .host.files import identity
        from .host.lora_files import teach_stock_nodes
        from .host.offloading import Offload
        from .host.shell import load_flux, place

        warn_about_other_packs()
        teach_stock_nodes()
        path = find(model_path)
        where = place(int(device_id or 0), data_type)
        compute = self._known("compute", compute, COMPUTE)
        attention = self._known("attention", attention, ATTENTION)
        set_mode(self._known("i2f_mode", i2f_mode, I2F))
        cpu_offload = self._known("cpu_offload", cpu_offload, OFFLOAD)
        key = (identity(path), where)
        if key != self._key:
            self._key = self._patcher = None  # the old model is let go before the new one takes its place
            self._patcher = load_flux(path, where, compute=compute)
            self._key = key
        model = self._patcher.clone()
        model.model_options["transformer_options"]["tonfa"] = {"compute": compute, "attention": attention}
        model.set_offload(Offload(cpu_offload, max(int(num_blocks_on_gpu), 0)))
        cache = cache_config(cache_threshold, cache_threshold_single, cache_start_percent, cache_end_percent, cache_max_reuses)
        use_first_block_cache(model, cache)
        return (model,)

    def _known(self, name: str, value: str, choices: list[str]) -> str:
        """The value, or the first choice for one that a saved graph has and this version does not know."""
        if value not in choices:
            log.warning("%s: %s '%s' is not known; using %s.", self.TITLE, name, value, choices[0])
        return value if value in choices else choices[0]


class SVDQuantFluxDiTLoader(NunchakuFluxDiTLoader):
    """The node's name in the first releases (March 2025). Opens old graphs; not offered in the menu."""

    TITLE = "SVDQuant FLUX DiT Loader (old name)"
    DEPRECATED = True


TOOLTIPS = {
    "model_path": (
        "A SVDQuant FLUX.1 checkpoint in models/diffusion_models: one .safetensors file, or a folder of the old form. "
        "A name saved on another machine is matched to what is here, and the log says to what."
    ),
    "cache_threshold": (
        "First-block cache: when the first block's result changes by less than this since the last full step, the rest of that step is "
        "reused. Higher is faster and further from the full picture. 0: off. 0.12 is usual with 20 steps and more."
    ),
    "attention": (
        "Exact attention either way; what ComfyUI was started with (--use-sage-attention and so on), overrides and masks go before it. "
        "nunchaku-fp16: the fastest that is known for this GPU; where PyTorch has no fused attention, a kernel of this pack that "
        "multiplies in fp16. flash-attention2: never that kernel."
    ),
    "cpu_offload": (
        "auto leaves it to ComfyUI's memory manager, as for any model: at 6.3 GiB it fits a 12 GiB card (the original offloaded below "
        "14 GiB, which would slow those down for nothing). enable: blocks wait in main memory and pass through a ring on the GPU. "
        "disable: all of it stays on the GPU."
    ),
    "device_id": "The CUDA (or ROCm) device that computes. If it is not there, ComfyUI's own device does, and the log says so.",
    "data_type": ("The type of activations and of the layers that are not 4-bit. A device without it computes in what ComfyUI would take."),
    "i2f_mode": (
        "How sums of integer products become floats, on GPUs without 8-bit float units. enabled: by the hardware's conversion, "
        "which is faster where both were timed. always: by an integer addition. Pictures are the same bit for bit."
    ),
    "compute": (
        "How the 4-bit layers multiply. exact: activations rounded to 4 bit, as the original program does. fast: activations kept in 8 bit "
        "(16 bit for NVFP4 files), closer to the unquantised model. weight_only: weights expanded to 16 bit at each use, closest and slow. "
        "auto: fast where this GPU has Triton and matrix units, else weight_only."
    ),
    "cache_threshold_single": (
        "A second threshold for the cache: above 0, the single blocks go by the change of their own first one, and cache_threshold decides "
        "for the double blocks alone. 0: cache_threshold decides for all. Does nothing while cache_threshold is 0."
    ),
    "cache_start_percent": "The cache reuses nothing before this part of sampling (0 to 1, as in ComfyUI's own nodes).",
    "cache_end_percent": "The cache reuses nothing after this part of sampling (0 to 1, as in ComfyUI's own nodes).",
    "cache_max_reuses": "After so many reused steps in a row, one is computed in full. 0: no limit.",
    "num_blocks_on_gpu": "With cpu_offload on enable: how many of the 57 blocks stay on the GPU. More is faster and takes more memory.",
}


def last_device() -> int:
    """The highest device index to offer: 0 without a GPU, so that the widget's range is never empty."""
    import torch

    return max(torch.cuda.device_count() - 1, 0)


def find(asked: str) -> str:
    """The path of the checkpoint that a saved name means today; one log line when that is not the very entry."""
    from .host.files import model_names, model_path, resolve

    found = resolve(asked, model_names())
    if found.how is not None:
        log.warning("Model '%s' is not here; using '%s' (%s).", asked, found.name, found.how)
    return model_path(found.name)


_warned = False


def warn_about_other_packs() -> None:
    """One log line, once, when another pack registers our node keys: ComfyUI lets the pack that loads last win, in silence."""
    global _warned
    if _warned:
        return
    _warned = True
    rivals = other_packs()
    if rivals:
        log.warning(
            "%s registers the same node names as ComfyUI-Tonfa, and ComfyUI uses the pack that it loads last. "
            "Keep one of the two in custom_nodes (rename the other's folder to end in .disabled).",
            " and ".join(rivals),
        )


def other_packs() -> list[str]:
    """Folder names of the loaded packs, other than this one, that map our loader's key to a class of theirs."""
    names = set()
    for module in list(sys.modules.values()):
        theirs = getattr(module, "__dict__", {}).get("NODE_CLASS_MAPPINGS")
        file = getattr(module, "__file__", None)
        if not isinstance(theirs, dict) or KEY not in theirs or not file or Path(file).name != "__init__.py":
            continue  # the host's own table is in nodes.py
        if not getattr(theirs[KEY], "TONFA", False):
            names.add(Path(file).parent.name)
    return sorted(names)
