"""The miniature's nodes: a FLUX of 11 million parameters that comes with the pack. Light to import: all else comes in when they run."""

from __future__ import annotations

CAPTION = "a large red striped circle left of a small blue star on green"


class TonfaMiniatureLoader:
    """The miniature in 16 bit, in ComfyUI's own FLUX class, and its autoencoder."""

    TITLE = "Tonfa Miniature FLUX"
    CATEGORY = "Nunchaku"
    DESCRIPTION = (
        "A FLUX of 11 million parameters that comes with this pack and draws simple scenes of 128 x 128: for trying out quantising, LoRA "
        "and samplers in seconds, without a download. The MODEL is in 16 bit; Tonfa Quantize FLUX makes its 4-bit form."
    )
    RETURN_TYPES = ("MODEL", "VAE")
    OUTPUT_TOOLTIPS = ("The 16-bit model, in ComfyUI's own FLUX class.", "Its autoencoder, as ComfyUI's VAE loader reads it.")
    FUNCTION = "load"
    TONFA = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802 (the host's name)
        return {"required": {}}

    @classmethod
    def VALIDATE_INPUTS(cls) -> bool:  # noqa: N802
        return True

    def load(self) -> tuple:
        """(MODEL, VAE). CheckpointError when a file of the miniature is missing."""
        from .host.miniature import autoencoder, model

        return model(), autoencoder()


class TonfaMiniatureCaption:
    """Conditioning from a caption by the miniature's own table of words."""

    TITLE = "Tonfa Miniature Caption"
    CATEGORY = "Nunchaku"
    DESCRIPTION = (
        "What the miniature is to draw: sizes (small, medium, large), colours, textures (plain, striped, dotted, shaded), shapes (circle, "
        "square, triangle, star, ring, cross, the digits), places and a background (on blue). An unknown word is an error that lists all."
    )
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    TONFA = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {"required": {"caption": ("STRING", {"default": CAPTION, "multiline": True, "tooltip": TOOLTIPS["caption"]})}}

    @classmethod
    def VALIDATE_INPUTS(cls, caption=None) -> bool:  # noqa: N802
        return True

    def encode(self, caption: str = CAPTION) -> tuple:
        """(CONDITIONING,), one entry for each line. ValueError names unknown words."""
        from ..models.miniature import CAPTIONS, FOLDER, load_captions

        tables, found = load_captions(FOLDER / CAPTIONS), []
        for line in filter(None, map(str.strip, caption.splitlines())):
            context, pooled = tables.encode([line])
            found.append([context, {"pooled_output": pooled}])
        if not found:
            raise ValueError("The caption is empty. Write one such as: " + CAPTION)
        return (found,)


TOOLTIPS = {
    "caption": (
        "A scene of one or two objects, such as: large red striped circle left of small blue star on green. Several lines are several "
        "prompts, for Tonfa Quantize FLUX to calibrate with; a sampler mixes them."
    ),
}
