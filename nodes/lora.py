"""The LoRA nodes. Light to import: torch and the host come in when a node is asked for its inputs or run."""

from __future__ import annotations

import math

ROWS, QWEN_ROWS = 15, 10
NOTHING = "None"  # the entry of a stack's row that is not in use
STRENGTH = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
NEXT_TO_NOTHING = 1e-5  # a strength below it leaves the model alone, as it always did


class NunchakuFluxLoraLoader:
    """One LoRA on a MODEL. Inputs, their order and their defaults are those of ComfyUI-nunchaku."""

    TITLE = "Nunchaku FLUX LoRA Loader"
    CATEGORY = "Nunchaku"
    DESCRIPTION = (
        "Applies a FLUX.1 LoRA of any format to a MODEL, 4-bit or not: diffusers, kohya, xlabs, PEFT, BFL control, ComfyUI's own, LyCORIS, "
        "and files that were converted for Nunchaku. Chains with any other LoRA node, in any order."
    )
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The model with the LoRA; the model that came in is not changed.",)
    FUNCTION = "load_lora"
    TONFA = True

    def __init__(self) -> None:
        self._files = None

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802 (the host's name)
        from .host.files import LORAS, names_in

        return {
            "required": {
                "model": ("MODEL", {"tooltip": TOOLTIPS["model"]}),
                "lora_name": (names_in(LORAS), {"tooltip": TOOLTIPS["lora_name"]}),
                "lora_strength": ("FLOAT", {**STRENGTH, "tooltip": TOOLTIPS["lora_strength"]}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name=None, lora_strength=None) -> bool:  # noqa: N802
        """Naming an input here takes the host's list and range checks off it: saved names are resolved when the node runs."""
        return True

    def load_lora(self, model: object, lora_name: str, lora_strength: float = 1.0) -> tuple:
        """(MODEL,): a clone with the LoRA's patches, or the very model that came in where the strength is next to nothing."""
        return (self._with(model, [("lora_name", lora_name, lora_strength)]),)

    def _with(self, model: object, rows: list[tuple[str, str, float]]) -> object:
        """The model with the LoRA of every (input name, file name, strength), in that order."""
        rows = [(widget, name, number(f"The strength of {widget}", strength)) for widget, name, strength in rows]
        rows = [row for row in rows if abs(row[2]) >= NEXT_TO_NOTHING]
        if not rows:
            return model
        if self._files is None:
            from .host.lora_files import LoraFiles

            self._files = LoraFiles()
        return self._files.apply(model, rows)


class NunchakuFluxLoraStack(NunchakuFluxLoraLoader):
    """Up to fifteen LoRAs on a MODEL: the same as a chain of loaders."""

    TITLE = "Nunchaku FLUX LoRA Stack"
    DESCRIPTION = (
        "Applies up to 15 FLUX.1 LoRAs of any format to a MODEL, on top of those that it already has: the same as a chain of "
        "Nunchaku FLUX LoRA Loaders. Rows with None, or with a strength of 0, are skipped."
    )
    OUTPUT_TOOLTIPS = ("The model with the LoRAs; the model that came in is not changed.",)
    FUNCTION = "load_lora_stack"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {"required": {"model": ("MODEL", {"tooltip": TOOLTIPS["model"]})}, "optional": _rows(ROWS)}

    @classmethod
    def VALIDATE_INPUTS(cls, **_: object) -> bool:  # noqa: N802
        """As the loader's, for all rows."""
        return True

    def load_lora_stack(self, model: object, **rows: object) -> tuple:
        """(MODEL,): a clone with the patches of all rows in use, or the very model that came in where there are none."""
        return (self._with(model, _in_use(rows, ROWS)),)


class SVDQuantFluxLoraLoader(NunchakuFluxLoraLoader):
    """The node's name in the first releases (March 2025). Opens old graphs; not offered in the menu."""

    TITLE = "SVDQuant FLUX LoRA Loader (old name)"
    DEPRECATED = True


class NunchakuQwenImageLoraLoader(NunchakuFluxLoraLoader):
    """One LoRA on a MODEL, under the key and with the inputs that graphs made for Qwen-Image have. Those after the strength do nothing.

    They are optional, for the first graphs of that node have none of them.
    """

    TITLE = "Nunchaku Qwen-Image LoRA Loader"
    DESCRIPTION = (
        "Applies a LoRA to a Qwen-Image or Z-Image MODEL, or to one of any other family, 4-bit or not. The same as ComfyUI's own "
        "LoraLoaderModelOnly, which works as well. Chains with any other LoRA node, in any order."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        inputs = super().INPUT_TYPES()
        inputs["required"]["model"] = ("MODEL", {"tooltip": TOOLTIPS["any_model"]})
        return {**inputs, "optional": {**_offload(), **_precompiled()}}

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name=None, lora_strength=None, cpu_offload=None, save_precompiled_lora=None) -> bool:  # noqa: N802
        """As the other's."""
        return True

    def load_lora(
        self, model: object, lora_name: str, lora_strength: float = 1.0, cpu_offload: str = "disable", save_precompiled_lora: bool = False
    ) -> tuple:
        """(MODEL,), as the FLUX LoRA loader's."""
        return super().load_lora(model, lora_name, lora_strength)


class NunchakuQwenImageLoraStack(NunchakuQwenImageLoraLoader):
    """Up to ten LoRAs on a MODEL: the same as a chain of loaders. Only the first lora_count rows count."""

    TITLE = "Nunchaku Qwen-Image LoRA Stack"
    DESCRIPTION = (
        "Applies up to 10 LoRAs to a Qwen-Image or Z-Image MODEL, or to one of any other family, on top of those that it already has: the "
        "same as a chain of LoRA loaders. Rows beyond lora_count, with None, or with a strength of 0, are skipped."
    )
    OUTPUT_TOOLTIPS = NunchakuFluxLoraStack.OUTPUT_TOOLTIPS
    FUNCTION = "load_lora_stack"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        count = {"default": 3, "min": 1, "max": QWEN_ROWS, "step": 1, "tooltip": TOOLTIPS["lora_count"]}
        awq = ("BOOLEAN", {"default": False, "tooltip": TOOLTIPS["apply_awq_mod"]})
        return {
            "required": {"model": ("MODEL", {"tooltip": TOOLTIPS["any_model"]}), "lora_count": ("INT", count)},
            "optional": {**_offload(), "apply_awq_mod": awq, **_precompiled(), **_rows(QWEN_ROWS)},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, **_: object) -> bool:  # noqa: N802
        """As the loader's, for all rows."""
        return True

    def load_lora_stack(self, model: object, lora_count: int = 3, **rows: object) -> tuple:
        """(MODEL,): a clone with the patches of all rows in use, or the very model that came in where there are none."""
        return (self._with(model, _in_use(rows, min(int(number("lora_count", lora_count)), QWEN_ROWS))),)


TOOLTIPS = {
    "any_model": "A Qwen-Image, Z-Image or other model, with or without LoRAs: from one of the Nunchaku DiT loaders, or any other MODEL.",
    "lora_count": "How many of the rows below count; LoRAs in later ones are left out.",
    "cpu_offload": "Kept for saved graphs; does nothing: no LoRA is merged or composed here. Memory is the model loader's cpu_offload.",
    "save_precompiled_lora": "Kept for saved graphs; does nothing: no LoRA is composed here, so there is nothing to save.",
    "apply_awq_mod": "Kept for saved graphs; does nothing: modulation layers always take what a LoRA has for them.",
    "model": "A FLUX.1 model, with or without LoRAs: from Nunchaku FLUX DiT Loader, or any other FLUX.1 MODEL.",
    "lora_name": "A LoRA in models/loras. A name saved on another machine is matched to what is here, and the log says to what.",
    "lora_name_i": "A LoRA in models/loras, or None to leave the row out.",
    "lora_strength": "How much of the LoRA is added. It may be negative; 0 leaves it out.",
}


def number(what: str, given: object) -> float:
    """A number as saved graphs and links bring it (number or text). Raises ValueError naming the input."""
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{what} is {given!r}; it must be a number.")
    return value


def _rows(count: int) -> dict:
    """The inputs of a stack's rows."""
    from .host.files import LORAS, names_in

    names, rows = [NOTHING, *names_in(LORAS)], {}
    for i in range(1, count + 1):
        rows[f"lora_name_{i}"] = (names, {"tooltip": TOOLTIPS["lora_name_i"]})
        rows[f"lora_strength_{i}"] = ("FLOAT", {**STRENGTH, "tooltip": TOOLTIPS["lora_strength"]})
    return rows


def _in_use(rows: dict, count: int) -> list[tuple[str, str, float]]:
    """(input name, file name, strength) of a stack's first `count` rows that name a file."""
    named = [(f"lora_name_{i}", rows.get(f"lora_name_{i}"), rows.get(f"lora_strength_{i}", 1.0)) for i in range(1, count + 1)]
    return [row for row in named if row[1] not in (None, "", NOTHING)]


def _offload() -> dict:
    return {"cpu_offload": (["auto", "enable", "disable"], {"default": "disable", "tooltip": TOOLTIPS["cpu_offload"]})}


def _precompiled() -> dict:
    return {"save_precompiled_lora": ("BOOLEAN", {"default": False, "tooltip": TOOLTIPS["save_precompiled_lora"]})}
