"""The node maps. Each family is imported under its own guard: one that fails keeps its keys and says why when it is run."""

from __future__ import annotations

import importlib

# module -> {key: (attribute, title, output types)}: what a saved graph needs even when the module cannot be imported.
FAMILIES: dict[str, dict[str, tuple[str, str, tuple[str, ...]]]] = {
    "flux": {
        "NunchakuFluxDiTLoader": ("NunchakuFluxDiTLoader", "Nunchaku FLUX DiT Loader", ("MODEL",)),
        "SVDQuantFluxDiTLoader": ("SVDQuantFluxDiTLoader", "SVDQuant FLUX DiT Loader (old name)", ("MODEL",)),
    },
    "qwen_image": {
        "NunchakuQwenImageDiTLoader": ("NunchakuQwenImageDiTLoader", "Nunchaku Qwen-Image DiT Loader", ("MODEL",)),
    },
    "z_image": {
        "NunchakuZImageDiTLoader": ("NunchakuZImageDiTLoader", "Nunchaku Z-Image DiT Loader", ("MODEL",)),
    },
    "lora": {
        "NunchakuFluxLoraLoader": ("NunchakuFluxLoraLoader", "Nunchaku FLUX LoRA Loader", ("MODEL",)),
        "NunchakuFluxLoraStack": ("NunchakuFluxLoraStack", "Nunchaku FLUX LoRA Stack", ("MODEL",)),
        "NunchakuQwenImageLoraLoader": ("NunchakuQwenImageLoraLoader", "Nunchaku Qwen-Image LoRA Loader", ("MODEL",)),
        "NunchakuQwenImageLoraStack": ("NunchakuQwenImageLoraStack", "Nunchaku Qwen-Image LoRA Stack", ("MODEL",)),
        "SVDQuantFluxLoraLoader": ("SVDQuantFluxLoraLoader", "SVDQuant FLUX LoRA Loader (old name)", ("MODEL",)),
    },
    "text_encoder": {
        "NunchakuTextEncoderLoaderV2": ("NunchakuTextEncoderLoaderV2", "Nunchaku Text Encoder Loader V2", ("CLIP",)),
        "NunchakuTextEncoderLoader": ("NunchakuTextEncoderLoader", "Nunchaku Text Encoder Loader (Deprecated)", ("CLIP",)),
        "SVDQuantTextEncoderLoader": ("SVDQuantTextEncoderLoader", "SVDQuant Text Encoder Loader (old name)", ("CLIP",)),
    },
    "quantize": {
        "TonfaQuantizeFlux": ("TonfaQuantizeFlux", "Tonfa Quantize FLUX", ("MODEL",)),
    },
    "miniature": {
        "TonfaMiniatureLoader": ("TonfaMiniatureLoader", "Tonfa Miniature FLUX", ("MODEL", "VAE")),
        "TonfaMiniatureCaption": ("TonfaMiniatureCaption", "Tonfa Miniature Caption", ("CONDITIONING",)),
    },
    "tools": {
        "NunchakuModelMerger": ("NunchakuModelMerger", "Nunchaku Model Merger", ("STRING",)),
        "MergeNunchakuModelFolderToSafetensor": ("MergeNunchakuModelFolderToSafetensor", "Nunchaku Model Merger (old name)", ("STRING",)),
        "NunchakuWheelInstaller": ("NunchakuWheelInstaller", "Nunchaku Installer", ("STRING",)),
        "NunchakuDepthPreprocessor": ("NunchakuDepthPreprocessor", "FLUX Depth Preprocessor (Deprecated)", ("IMAGE",)),
        "SVDQuantDepthPreprocessor": ("SVDQuantDepthPreprocessor", "SVDQuant Depth Preprocessor (old name)", ("IMAGE",)),
    },
}
MEND = (
    "Update ComfyUI-Tonfa and ComfyUI, restart, and if it stays, run `python custom_nodes/ComfyUI-Tonfa doctor` with ComfyUI's Python: "
    "it names what is missing."
)


def placeholder(title: str, output_types: tuple[str, ...], reason: str) -> type:
    """A node class that opens in graphs under its old key and raises `reason` when it is run."""

    def fail(self: object, **_: object) -> None:
        raise RuntimeError(reason)

    members = {
        "TITLE": title,
        "CATEGORY": "Nunchaku",
        "DESCRIPTION": reason,
        "TONFA": True,  # else other_packs() would take it for another pack's
        "RETURN_TYPES": output_types,
        "FUNCTION": "fail",
        "INPUT_TYPES": classmethod(lambda cls: {"required": {}}),
        "fail": fail,
    }
    return type("UnavailableNode", (), members)


def load_family(module: str, package: str = __name__) -> tuple[dict[str, type], dict[str, str]]:
    """(class map, title map) of one family; placeholders for all its keys if importing it raises anything at all."""
    keys = FAMILIES[module]
    titles = {key: title for key, (_, title, _) in keys.items()}
    try:
        imported = importlib.import_module(f"{package}.{module}")
        return {key: getattr(imported, attribute) for key, (attribute, _, _) in keys.items()}, titles
    except (Exception, SystemExit) as error:
        reason = f"This node of ComfyUI-Tonfa could not be loaded: {type(error).__name__}: {error}. {MEND}"
        return {key: placeholder(title, outputs, reason) for key, (_, title, outputs) in keys.items()}, titles


NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
for _family in FAMILIES:
    _classes, _titles = load_family(_family)
    NODE_CLASS_MAPPINGS.update(_classes)
    NODE_DISPLAY_NAME_MAPPINGS.update(_titles)
