"""The FLUX loader node. Light to import: torch and the host come in when a node is asked for its inputs or run."""

from __future__ import annotations

from . import dit_loader as shared
from .dit_loader import ATTENTION, DEVICE_WIDGET, DTYPES, I2F, OFFLOAD, SHARE, DiTLoader, Settings, last_device, warn_about_other_packs


class NunchakuFluxDiTLoader(DiTLoader):
    """Loads a 4-bit SVDQuant FLUX.1 checkpoint as a MODEL. Input names, order and defaults are those of ComfyUI-nunchaku, then ours."""

    TITLE = "Nunchaku FLUX DiT Loader"
    MADE_FOR, WIDGET = "flux", "model_path"
    DESCRIPTION = (
        "Loads a 4-bit SVDQuant FLUX.1 checkpoint (dev, schnell, Fill, Canny, Depth, Kontext, Krea and finetunes; INT4 or NVFP4, any GPU). "
        "The MODEL is an ordinary one: ComfyUI's LoraLoaderModelOnly, ControlNet, patches and memory management work on it."
    )

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
                "device_id": ("INT", {**DEVICE_WIDGET, "lazy": True, "max": last_device(), "tooltip": TOOLTIPS["device_id"]}),
                "data_type": (DTYPES, {"default": "bfloat16", "tooltip": TOOLTIPS["data_type"]}),
            },
            "optional": {
                "i2f_mode": (I2F, {"default": "enabled", "tooltip": TOOLTIPS["i2f_mode"]}),
                **shared.compute_input(),
                "cache_threshold_single": ("FLOAT", {**SHARE, "default": 0.0, "tooltip": TOOLTIPS["cache_threshold_single"]}),
                **shared.reuse_inputs(),
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
        """(MODEL,), a clone of the one that this node holds."""
        settings = Settings(
            cache_threshold=cache_threshold,
            cache_threshold_single=cache_threshold_single,
            cache_start_percent=cache_start_percent,
            cache_end_percent=cache_end_percent,
            cache_max_reuses=cache_max_reuses,
            attention=attention,
            compute=compute,
            i2f_mode=i2f_mode,
            cpu_offload=cpu_offload,
            num_blocks_on_gpu=num_blocks_on_gpu,
            use_pin_memory="enable",
            device_id=device_id,
            data_type=data_type,
        )
        return self._load(model_path, settings)


class SVDQuantFluxDiTLoader(NunchakuFluxDiTLoader):
    """The node's name in the first releases (March 2025). Opens old graphs; not offered in the menu."""

    TITLE = "SVDQuant FLUX DiT Loader (old name)"
    DEPRECATED = True


TOOLTIPS = {
    **shared.TOOLTIPS,
    "model_path": (
        "A SVDQuant FLUX.1 checkpoint in models/diffusion_models: one .safetensors file, or a folder of the old form. "
        "A name saved on another machine is matched to what is here, and the log says to what."
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
    "i2f_mode": (
        "How sums of integer products become floats, on GPUs without 8-bit float units. enabled: by the hardware's conversion, "
        "which is faster where both were timed. always: by an integer addition. Pictures are the same bit for bit."
    ),
    "cache_threshold_single": (
        "A second threshold for the cache: above 0, the single blocks go by the change of their own first one, and cache_threshold decides "
        "for the double blocks alone. 0: cache_threshold decides for all. Does nothing while cache_threshold is 0."
    ),
    "num_blocks_on_gpu": "With cpu_offload on enable: how many of the 57 blocks stay on the GPU. More is faster and takes more memory.",
}
