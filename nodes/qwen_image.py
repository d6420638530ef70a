"""The Qwen-Image loader node. Light to import: torch and the host come in when a node is asked for its inputs or run."""

from __future__ import annotations

from . import dit_loader as shared
from .dit_loader import OFFLOAD, PIN, DiTLoader, Settings, warn_about_other_packs


class NunchakuQwenImageDiTLoader(DiTLoader):
    """Loads a 4-bit SVDQuant Qwen-Image checkpoint as a MODEL. Input names, order and defaults are those of ComfyUI-nunchaku, then ours."""

    TITLE = "Nunchaku Qwen-Image DiT Loader"
    MADE_FOR, WIDGET = "qwen-image", "model_name"
    DESCRIPTION = (
        "Loads a 4-bit SVDQuant Qwen-Image checkpoint (Qwen-Image, Edit, Edit-2509, Edit-2511, Lightning files; INT4 or NVFP4, any GPU). "
        "The MODEL is an ordinary one: LoRA nodes, ControlNet, reference latents, patches and memory management work on it."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802 (the host's name)
        from .host.files import model_names

        warn_about_other_packs()
        return {
            "required": {"model_name": (model_names(), {"tooltip": TOOLTIPS["model_name"]})},
            "optional": {  # cpu_offload too: graphs of the node's first weeks have model_name alone, and the host asks for required ones
                "cpu_offload": (OFFLOAD, {"default": "auto", "tooltip": TOOLTIPS["cpu_offload"]}),
                "num_blocks_on_gpu": ("INT", {"default": 1, "min": 1, "max": 60, "step": 1, "tooltip": TOOLTIPS["num_blocks_on_gpu"]}),
                "use_pin_memory": (PIN[::-1], {"default": "disable", "tooltip": TOOLTIPS["use_pin_memory"]}),
                **shared.compute_input(),
                **shared.threshold_input(),
                **shared.reuse_inputs(),
                **shared.where_inputs(),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(  # noqa: N802
        cls,
        model_name=None,
        cpu_offload=None,
        num_blocks_on_gpu=None,
        use_pin_memory=None,
        compute=None,
        cache_threshold=None,
        cache_start_percent=None,
        cache_end_percent=None,
        cache_max_reuses=None,
        data_type=None,
        device_id=None,
    ) -> bool:
        """Naming an input here takes the host's list and range checks off it: unknown saved values are resolved when the node runs."""
        return True

    def load_model(
        self,
        model_name: str,
        cpu_offload: str = "auto",
        num_blocks_on_gpu: int = 1,
        use_pin_memory: str = "disable",
        compute: str = "auto",
        cache_threshold: float = 0.0,
        cache_start_percent: float = 0.0,
        cache_end_percent: float = 1.0,
        cache_max_reuses: int = 0,
        data_type: str = "bfloat16",
        device_id: int = 0,
    ) -> tuple:
        """(MODEL,), a clone of the one that this node holds."""
        settings = Settings(
            cache_threshold=cache_threshold,
            cache_start_percent=cache_start_percent,
            cache_end_percent=cache_end_percent,
            cache_max_reuses=cache_max_reuses,
            compute=compute,
            cpu_offload=cpu_offload,
            num_blocks_on_gpu=num_blocks_on_gpu,
            use_pin_memory=use_pin_memory,
            device_id=device_id,
            data_type=data_type,
        )
        return self._load(model_name, settings)


TOOLTIPS = {
    **shared.TOOLTIPS,
    "model_name": (
        "A SVDQuant Qwen-Image checkpoint in models/diffusion_models. A name saved on another machine is matched to what is here, and the "
        "log says to what."
    ),
    "cpu_offload": (
        "auto leaves it to ComfyUI's memory manager, as for any model (the original offloaded below 15 GiB). enable: blocks wait in main "
        "memory and pass through a ring on the GPU. disable: all of it stays on the GPU."
    ),
    "num_blocks_on_gpu": "With cpu_offload on enable: how many of the 60 blocks stay on the GPU. More is faster and takes more memory.",
}
