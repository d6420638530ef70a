"""What the three DiT loaders share. Light to import: torch and the host come in when a node is asked for its inputs or run."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path

log = logging.getLogger(__name__)

TITLES = {"flux": "FLUX.1", "qwen-image": "Qwen-Image", "z-image": "Z-Image"}
SHARE = {"min": 0.0, "max": 1.0, "step": 0.001}
DEVICE_WIDGET = {"default": 0, "min": 0, "step": 1, "display": "number"}
DTYPES = ["bfloat16", "float16"]
COMPUTE = ["auto", "exact", "fast", "weight_only"]
ATTENTION = ["nunchaku-fp16", "flash-attention2"]
OFFLOAD = ["auto", "enable", "disable"]
PIN = ["disable", "enable"]
I2F = ["enabled", "always"]


@dataclass(frozen=True)
class Settings:
    """A loader's inputs as saved graphs bring them. i2f_mode: None leaves it as it is. use_pin_memory: of the blocks that are streamed."""

    cache_threshold: float = 0.0
    cache_threshold_single: float = 0.0
    cache_start_percent: float = 0.0
    cache_end_percent: float = 1.0
    cache_max_reuses: int = 0
    attention: str = ATTENTION[0]
    compute: str = COMPUTE[0]
    i2f_mode: str | None = None
    cpu_offload: str = OFFLOAD[0]
    num_blocks_on_gpu: int = 1
    use_pin_memory: str = PIN[0]
    device_id: int = 0
    data_type: str = DTYPES[0]


class DiTLoader:
    """A node that holds the model it has loaded. Each family's loader names its inputs; any of them opens a file of any family."""

    TITLE: str
    MADE_FOR: str  # a key of TITLES
    WIDGET: str  # the input that names the file
    CATEGORY = "Nunchaku"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_model"
    TONFA = True  # tells this pack's classes from another pack's of the same key, however the pack was imported

    def __init__(self) -> None:
        self._key: tuple | None = None  # what the patcher below was loaded from
        self._patcher = None

    def _load(self, asked: str, settings: Settings) -> tuple:
        """(MODEL,). The file is read again only when it, the device or the type changed; anything else makes a new clone."""
        from ..kernels.int_to_float import set_mode
        from .host.caching import cache_config, use_first_block_cache
        from .host.files import identity
        from .host.lora_files import teach_stock_nodes
        from .host.offloading import Offload
        from .host.shell import load_model, place

        warn_about_other_packs()
        teach_stock_nodes()
        path = find(asked, self.WIDGET)
        where = place(int(settings.device_id or 0), settings.data_type, self.TITLE)
        compute = self._known("compute", settings.compute, COMPUTE)
        attention = self._known("attention", settings.attention, ATTENTION)
        if settings.i2f_mode is not None:
            set_mode(self._known("i2f_mode", settings.i2f_mode, I2F))
        offload = self._known("cpu_offload", settings.cpu_offload, OFFLOAD)
        pin = self._known("use_pin_memory", settings.use_pin_memory, PIN) == "enable"
        key = (identity(path), where)
        if key != self._key:
            self._key = self._patcher = None  # the old model is let go before the new one takes its place
            self._patcher = load_model(path, where, compute=compute, title=self.TITLE)
            self._key = key
            self._tell_family(path)
        model = self._patcher.clone()
        model.model_options["transformer_options"]["tonfa"] = {"compute": compute, "attention": attention}
        model.set_offload(Offload(offload, max(int(settings.num_blocks_on_gpu), 0), pin))
        thresholds = (settings.cache_threshold, settings.cache_threshold_single)
        part = (settings.cache_start_percent, settings.cache_end_percent)
        use_first_block_cache(model, cache_config(*thresholds, *part, settings.cache_max_reuses, title=self.TITLE))
        return (model,)

    def _tell_family(self, path: str) -> None:
        """One log line for a file of another family than the node's name says."""
        from .host.shell import family_of

        family = family_of(self._patcher)
        if family != self.MADE_FOR:
            log.info("%s: %s is %s; loaded as that.", self.TITLE, Path(path).name, TITLES[family])

    def _known(self, name: str, value: str, choices: list[str]) -> str:
        """The value, or the first choice for one that a saved graph has and this version does not know."""
        if value not in choices:
            log.warning("%s: %s '%s' is not known; using %s.", self.TITLE, name, value, choices[0])
        return value if value in choices else choices[0]


TOOLTIPS = {
    "cache_threshold": (
        "First-block cache: when the first block's result changes by less than this since the last full step, the rest of that step is "
        "reused. Higher is faster and further from the full picture. 0: off. 0.12 is usual with 20 steps and more."
    ),
    "cache_start_percent": "The cache reuses nothing before this part of sampling (0 to 1, as in ComfyUI's own nodes).",
    "cache_end_percent": "The cache reuses nothing after this part of sampling (0 to 1, as in ComfyUI's own nodes).",
    "cache_max_reuses": "After so many reused steps in a row, one is computed in full. 0: no limit.",
    "device_id": "The CUDA (or ROCm) device that computes. If it is not there, ComfyUI's own device does, and the log says so.",
    "data_type": "The type of activations and of the layers that are not 4-bit. A device without it computes in what ComfyUI would take.",
    "compute": (
        "How the 4-bit layers multiply. exact: activations rounded to 4 bit, as the original program does. fast: activations kept in 8 bit "
        "(16 bit for NVFP4 files), closer to the unquantised model. weight_only: weights expanded to 16 bit at each use, closest and slow. "
        "auto: fast where this GPU has Triton and matrix units, else weight_only."
    ),
    "use_pin_memory": (
        "With cpu_offload on enable. enable: blocks wait in page-locked main memory, from which they reach the GPU faster; so much memory "
        "is then taken for good, from all programs. disable: ordinary memory."
    ),
}


def compute_input() -> dict:
    """The optional input that chooses how 4-bit layers multiply."""
    return {"compute": (COMPUTE, {"default": COMPUTE[0], "tooltip": TOOLTIPS["compute"]})}


def threshold_input() -> dict:
    """The optional input that turns the first-block cache on."""
    return {"cache_threshold": ("FLOAT", {**SHARE, "default": 0.0, "tooltip": TOOLTIPS["cache_threshold"]})}


def reuse_inputs() -> dict:
    """The optional inputs that limit the first-block cache."""
    return {
        "cache_start_percent": ("FLOAT", {**SHARE, "default": 0.0, "tooltip": TOOLTIPS["cache_start_percent"]}),
        "cache_end_percent": ("FLOAT", {**SHARE, "default": 1.0, "tooltip": TOOLTIPS["cache_end_percent"]}),
        "cache_max_reuses": ("INT", {"default": 0, "min": 0, "max": 100, "tooltip": TOOLTIPS["cache_max_reuses"]}),
    }


def where_inputs() -> dict:
    """The optional inputs that say where and in which type the model computes."""
    return {
        "data_type": (DTYPES, {"default": DTYPES[0], "tooltip": TOOLTIPS["data_type"]}),
        "device_id": ("INT", {**DEVICE_WIDGET, "max": last_device(), "tooltip": TOOLTIPS["device_id"]}),
    }


def last_device() -> int:
    """The highest device index to offer: 0 without a GPU, so that the widget's range is never empty."""
    import torch

    return max(torch.cuda.device_count() - 1, 0)


def find(asked: str, widget: str) -> str:
    """The path of the checkpoint that a saved name means today; one log line when that is not the very entry."""
    from .host.files import MODELS, model_names, model_path, resolve

    found = resolve(asked, model_names(), replace(MODELS, widget=widget))
    if found.how is not None:
        log.warning("Model '%s' is not here; using '%s' (%s).", asked, found.name, found.how)
    return model_path(found.name)


_warned = False


def warn_about_other_packs() -> None:
    """One log line, once, when another pack registers node keys of ours: ComfyUI lets the pack that loads last win, in silence."""
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
    """Folder names of the loaded packs, other than this one, that map one of our keys to a class of theirs."""
    from . import FAMILIES

    ours, names = {key for family in FAMILIES.values() for key in family}, set()
    for module in list(sys.modules.values()):
        theirs = getattr(module, "__dict__", {}).get("NODE_CLASS_MAPPINGS")
        file = getattr(module, "__file__", None)
        if not isinstance(theirs, dict) or not file or Path(file).name != "__init__.py":
            continue  # the host's own table is in nodes.py
        if any(not getattr(theirs[key], "TONFA", False) for key in ours.intersection(theirs)):
            names.add(Path(file).parent.name)
    return sorted(names)
