"""The text-encoder loader nodes for FLUX.1. Light to import: torch and the host come in when a node is asked for its inputs or run."""

from __future__ import annotations

import logging
from dataclasses import replace

log = logging.getLogger(__name__)

LENGTH = {"default": 512, "min": 256, "max": 1024, "step": 128, "display": "number", "lazy": True}
NONE = "none"


class NunchakuTextEncoderLoaderV2:
    """CLIP-L and T5 as a CLIP. Inputs, their order and their defaults are those of ComfyUI-nunchaku."""

    TITLE = "Nunchaku Text Encoder Loader V2"
    CATEGORY = "Nunchaku"
    DESCRIPTION = (
        "Loads FLUX.1's two text encoders, CLIP-L and T5-XXL, in either order. The T5 may be in 16 bit, fp8, scaled fp8, or in 4 bit "
        "(awq-int4-flux.1-t5xxl.safetensors, a third of the memory). The CLIP is an ordinary one: prompt weights, embeddings, LoRA and "
        "ComfyUI's memory management work on it."
    )
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load_text_encoder"
    TONFA = True
    TYPES = ["flux.1"]

    def __init__(self) -> None:
        self._key: tuple | None = None  # what the CLIP below was loaded from
        self._clip = None

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802 (the host's name)
        from .host.files import TEXT_ENCODERS, names_in

        names = names_in(TEXT_ENCODERS)
        return {
            "required": {
                "model_type": (cls.TYPES, {"tooltip": TOOLTIPS["model_type"]}),
                "text_encoder1": (names, {"tooltip": TOOLTIPS["text_encoder"]}),
                "text_encoder2": (names, {"tooltip": TOOLTIPS["text_encoder"]}),
                "t5_min_length": ("INT", {**LENGTH, "tooltip": TOOLTIPS["t5_min_length"]}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_type=None, text_encoder1=None, text_encoder2=None, t5_min_length=None) -> bool:  # noqa: N802
        """Naming an input here takes the host's list and range checks off it: saved names are resolved when the node runs."""
        return True

    def check_lazy_status(self, t5_min_length: int | None = None, **_: object) -> list[str]:
        """t5_min_length is marked lazy, as it always was; when it is linked it is needed all the same."""
        return ["t5_min_length"] if t5_min_length is None else []

    def load_text_encoder(self, model_type: str, text_encoder1: str, text_encoder2: str, t5_min_length: int = 512) -> tuple:
        """(CLIP,). The files are read again only when one of them changed."""
        return (self._load(model_type, text_encoder1, text_encoder2, t5_min_length),)

    def _load(self, model_type: str, first: str, second: str, length: int, four_bit_folder: str | None = None) -> object:
        from .host.files import identity, text_encoder_folder
        from .host.lora_files import teach_stock_nodes
        from .host.text_encoders import Slot, load_clip, sort_out, with_min_length

        if model_type not in NunchakuTextEncoderLoader.TYPES + NunchakuTextEncoderLoaderV2.TYPES:
            raise ValueError(f"{self.TITLE}: model_type is '{model_type}'; this node loads the text encoders of FLUX.1 (flux.1) only.")
        least = tokens(length)
        teach_stock_nodes()
        slots = [Slot(widget, *find(name, widget)) for widget, name in (("text_encoder1", first), ("text_encoder2", second))]
        folder = None
        if four_bit_folder is not None:
            folder = Slot("int4_model", four_bit_folder, text_encoder_folder(four_bit_folder))
        key = tuple(identity(slot.path) for slot in (*slots, folder) if slot is not None)
        if self._key != key:
            self._key = self._clip = None
            self._clip = load_clip(sort_out(*slots, folder))
            self._key = key
        return with_min_length(self._clip, least)


class NunchakuTextEncoderLoader(NunchakuTextEncoderLoaderV2):
    """The first form of the node, with a switch for a 4-bit T5 in a folder of its own. Opens old graphs."""

    TITLE = "Nunchaku Text Encoder Loader (Deprecated)"
    DESCRIPTION = (
        "Use Nunchaku Text Encoder Loader V2, which takes every form of T5 in its two slots. This node is kept for saved graphs: it also "
        "takes a 4-bit T5 that lies in a folder of its own."
    )
    DEPRECATED = True
    TYPES = ["flux"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        from .host.files import text_encoder_folders

        inputs = super().INPUT_TYPES()
        inputs["required"]["use_4bit_t5"] = (["disable", "enable"], {"tooltip": TOOLTIPS["use_4bit_t5"]})
        inputs["required"]["int4_model"] = ([NONE, *text_encoder_folders()], {"tooltip": TOOLTIPS["int4_model"]})
        return inputs

    @classmethod
    def VALIDATE_INPUTS(  # noqa: N802
        cls, model_type=None, text_encoder1=None, text_encoder2=None, t5_min_length=None, use_4bit_t5=None, int4_model=None
    ) -> bool:
        """As the other's."""
        return True

    def load_text_encoder(
        self,
        model_type: str,
        text_encoder1: str,
        text_encoder2: str,
        t5_min_length: int = 512,
        use_4bit_t5: str = "disable",
        int4_model: str = NONE,
    ) -> tuple:
        """(CLIP,), with the T5 of the folder int4_model where use_4bit_t5 asks for it."""
        folder = int4_model if use_4bit_t5 in ("enable", "INT4") else None  # INT4: as graphs of March 2025 have it
        if folder in (NONE, ""):
            raise ValueError(
                "use_4bit_t5 is 'enable', but int4_model names no folder. Choose a folder of models/text_encoders that holds a 4-bit T5, "
                "or put its .safetensors file into text_encoder2 and leave use_4bit_t5 on 'disable'."
            )
        return (self._load(model_type, text_encoder1, text_encoder2, t5_min_length, folder),)


class SVDQuantTextEncoderLoader(NunchakuTextEncoderLoader):
    """The node's name in the first releases (March 2025). Not offered in the menu."""

    TITLE = "SVDQuant Text Encoder Loader (old name)"


TOOLTIPS = {
    "model_type": "FLUX.1 is the only family that these two encoders are for here.",
    "text_encoder": (
        "A file in models/text_encoders: CLIP-L (clip_l.safetensors) or a T5-XXL (t5xxl_fp16, fp8, or awq-int4-flux.1-t5xxl). The order of "
        "the two does not matter. A name saved on another machine is matched to what is here, and the log says to what."
    ),
    "t5_min_length": "The T5 gets at least so many tokens, filled up with padding: 512 as diffusers does, 256 as ComfyUI's own loader.",
    "use_4bit_t5": "enable takes the T5 of the folder int4_model in place of the one in a slot.",
    "int4_model": "A folder in models/text_encoders with a 4-bit T5; only read with use_4bit_t5.",
}


def find(asked: str, widget: str) -> tuple[str, str]:
    """(name, path) of the file that a saved name means today; one log line when that is not the very entry."""
    from .host.files import TEXT_ENCODERS, names_in, path_in, resolve

    try:
        found = resolve(asked, names_in(TEXT_ENCODERS), replace(TEXT_ENCODERS, widget=widget))
        path = path_in(TEXT_ENCODERS, found.name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{widget}: {error}") from error
    if found.how is not None:
        log.warning("%s: '%s' is not here; using '%s' (%s).", widget, asked, found.name, found.how)
    return found.name, path


def tokens(length: object) -> int:
    """t5_min_length as saved graphs and links bring it. Raises ValueError naming the input."""
    try:
        return max(int(length), 1)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"t5_min_length is {length!r}; it must be a number of tokens, such as 512.") from error
