"""The quantising node. Light to import: torch and the host come in when the node is run."""

from __future__ import annotations

PRECISIONS = ["int4", "nvfp4"]
MODES = ["calibrated", "data-free"]
SIZE = {"default": 1024, "min": 64, "max": 4096, "step": 16}


class TonfaQuantizeFlux:
    """Makes a 4-bit SVDQuant checkpoint of any FLUX.1 MODEL, LoRAs included, saves it and loads it."""

    TITLE = "Tonfa Quantize FLUX"
    CATEGORY = "Nunchaku"
    DESCRIPTION = (
        "Makes a 4-bit SVDQuant checkpoint of a FLUX.1 MODEL (16 bits, fp8 or GGUF, with the LoRAs that are on it), saves it as one file "
        "in models/diffusion_models and gives the 4-bit MODEL. Takes minutes to an hour; when it is cancelled, the next run goes on."
    )
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The 4-bit model, as Nunchaku FLUX DiT Loader would load it from the file.",)
    FUNCTION = "quantize"
    OUTPUT_NODE = True
    TONFA = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802 (the host's name)
        seed = {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": False}
        rank = {"default": 32, "min": 16, "max": 256, "step": 16}
        budget = {"default": 0.0, "min": 0.0, "max": 24.0, "step": 0.1}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": TOOLTIPS["model"]}),
                "filename": ("STRING", {"default": "my-flux-4bit", "tooltip": TOOLTIPS["filename"]}),
                "precision": (PRECISIONS, {"default": "int4", "tooltip": TOOLTIPS["precision"]}),
                "rank": ("INT", {**rank, "tooltip": TOOLTIPS["rank"]}),
                "mode": (MODES, {"default": "calibrated", "tooltip": TOOLTIPS["mode"]}),
            },
            "optional": {
                "conditioning": ("CONDITIONING", {"tooltip": TOOLTIPS["conditioning"]}),
                "steps": ("INT", {"default": 8, "min": 1, "max": 100, "tooltip": TOOLTIPS["steps"]}),
                "width": ("INT", {**SIZE, "tooltip": TOOLTIPS["width"]}),
                "height": ("INT", {**SIZE, "tooltip": TOOLTIPS["height"]}),
                "calibration_seed": ("INT", {**seed, "tooltip": TOOLTIPS["calibration_seed"]}),
                "size_gb": ("FLOAT", {**budget, "tooltip": TOOLTIPS["size_gb"]}),
                "gptq": ("BOOLEAN", {"default": False, "tooltip": TOOLTIPS["gptq"]}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(  # noqa: N802
        cls,
        filename=None,
        precision=None,
        rank=None,
        mode=None,
        steps=None,
        width=None,
        height=None,
        calibration_seed=None,
        size_gb=None,
        gptq=None,
    ) -> bool:
        """Naming an input here takes the host's checks off it: the node's own say what to do."""
        return True

    def quantize(
        self,
        model: object,
        filename: str,
        precision: str = "int4",
        rank: int = 32,
        mode: str = "calibrated",
        conditioning: list | None = None,
        steps: int = 8,
        width: int = 1024,
        height: int = 1024,
        calibration_seed: int = 0,
        size_gb: float = 0.0,
        gptq: bool = False,
    ) -> dict:
        """The host's dict with the 4-bit MODEL as result and what was made as text. ValueError for inputs that cannot be."""
        from ..models.quantize_flux import Options
        from .flux import NunchakuFluxDiTLoader
        from .host.quantizing import Sampling, quantize_model, target, tell
        from .tools import file_name

        if mode not in MODES:
            raise ValueError(f"mode is '{mode}'; expected one of {', '.join(MODES)}.")
        name = file_name(filename, "filename")
        options = Options(precision, int(rank), mode, gptq=bool(gptq), size_budget=int(float(size_gb) * 1e9) or None)
        sampling = Sampling(int(steps), int(width), int(height), int(calibration_seed))
        report = quantize_model(model, name, options, conditioning, sampling)
        lines = report.lines() if report is not None else ["The file was there already, of the same model and settings."]
        lines = [f"Saved as {target(name)}", *lines]
        tell("\n".join(lines))
        return {"ui": {"text": lines}, "result": NunchakuFluxDiTLoader().load_model(name, **like(model))}


def like(model: object) -> dict:
    """The loader's device and type nearest to those that a MODEL has."""
    import torch

    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    return {"device_id": model.load_device.index or 0, "data_type": "float16" if dtype == torch.float16 else "bfloat16"}


TOOLTIPS = {
    "model": (
        "Any FLUX.1 MODEL that ComfyUI loads: 16 bits, fp8, GGUF (through ComfyUI-GGUF), LoRAs applied before this node included. "
        "It is not changed."
    ),
    "filename": "Name of the file in models/diffusion_models; .safetensors is added. A file of another model is not written over.",
    "precision": "Both run on any GPU. int4 is faster; nvfp4 is closer to the 16-bit model.",
    "rank": "Of the 16-bit branch beside the 4-bit weights: more is closer to the 16-bit model, larger and slower. 32 is usual.",
    "mode": (
        "calibrated: pictures are sampled first, and every layer is fitted to what it sees in them; needs conditioning. "
        "data-free: fitted to the weights alone; quicker, and not as close."
    ),
    "conditioning": (
        "Prompts to calibrate with, of the kind you use. Several: join CLIP Text Encode nodes by Conditioning (Combine); each is sampled "
        "as a picture of its own. A dozen or more is good."
    ),
    "steps": "Sampling steps for each calibration picture.",
    "width": "Width of the calibration pictures.",
    "height": "Height of the calibration pictures.",
    "calibration_seed": "Seed of the calibration pictures, and of what is kept of them.",
    "size_gb": "Above 0: the file stays under so many GB, and each layer gets its own rank from 16 to 128; rank is then not looked at.",
    "gptq": "Rounds weights with feedback between columns (GPTQ). Calibrated only; takes longer, and is mostly closer.",
}
