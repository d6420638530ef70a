"""The tool nodes that graphs made for ComfyUI-nunchaku may hold. Light to import: everything else comes in when a node is used."""

from __future__ import annotations

import logging
import math
from pathlib import Path

log = logging.getLogger(__name__)

EXTENSIONS = (".safetensors", ".sft")


class NunchakuModelMerger:
    """A checkpoint folder of the old form into one .safetensors file beside it. Inputs and their order are those of ComfyUI-nunchaku."""

    TITLE = "Nunchaku Model Merger"
    CATEGORY = "Nunchaku"
    DESCRIPTION = (
        "Merges a SVDQuant FLUX.1 checkpoint folder of the old form (transformer_blocks and unquantized_layers) into one .safetensors file "
        "beside it. Not needed for loading: the FLUX loader reads such folders as they are."
    )
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("status",)
    FUNCTION = "run"
    TONFA = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802 (the host's name)
        return {
            "required": {
                "model_folder": (folders(), {"tooltip": TOOLTIPS["model_folder"]}),
                "save_name": ("STRING", {"tooltip": TOOLTIPS["save_name"]}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_folder=None, save_name=None) -> bool:  # noqa: N802
        """Naming an input here takes the host's list check off it: saved names are resolved when the node runs."""
        return True

    def run(self, model_folder: str, save_name: str) -> tuple:
        """(status,). FileExistsError when the file is there already; CheckpointError when the folder is no whole checkpoint."""
        from ..models.merge import merge
        from .host.files import LEGACY_FILE, Shelf, model_path, resolve

        there = folders()
        if not there:
            raise FileNotFoundError(f"No folder in ComfyUI's diffusion_models folders holds {LEGACY_FILE}, so there is none to merge.")
        shelf = Shelf("diffusion_models", "checkpoint folder", "a SVDQuant FLUX folder", "model_folder")
        source = Path(model_path(resolve(model_folder, there, shelf).name))
        target = source.with_name(file_name(save_name))
        if target.exists():
            raise FileExistsError(
                f"{target} is there already and is not written over. Choose another save_name, or delete that file first."
            )
        merged = merge(source, target)
        status = (
            f"Merged {source} into {target} ({merged.precision.upper()}, rank {merged.rank}, {target.stat().st_size / 1e9:.2f} GB). "
            "Press R to see it in the loader; the folder is no longer needed."
        )
        log.info("%s", status)
        return (status,)


class MergeNunchakuModelFolderToSafetensor(NunchakuModelMerger):
    """The merger's name in May 2025. Opens old graphs; not offered in the menu."""

    TITLE = "Nunchaku Model Merger (old name)"
    DEPRECATED = True


class NunchakuWheelInstaller:
    """Opens graphs that install the nunchaku wheel, and says that none is needed. Installs nothing, asks nobody."""

    TITLE = "Nunchaku Installer"
    CATEGORY = "Nunchaku"
    DESCRIPTION = "Kept for saved graphs: this pack needs no nunchaku wheel, so the node installs and removes nothing, and says so."
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("status",)
    FUNCTION = "run"
    OUTPUT_NODE = True
    TONFA = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {
            "required": {
                "version": (["none", "latest"], {"default": "none", "tooltip": TOOLTIPS["version"]}),
                "dev_version": (["none"], {"default": "none", "tooltip": TOOLTIPS["dev_version"]}),
                "mode": (["install", "uninstall", "update node"], {"default": "install", "tooltip": TOOLTIPS["mode"]}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, version=None, dev_version=None, mode=None) -> bool:  # noqa: N802
        """Any saved version is taken, since none is installed."""
        return True

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:  # noqa: N802
        """Never equal to itself, so that the host runs the node each time, as it always did."""
        return math.nan

    def run(self, version: str = "none", dev_version: str = "none", mode: str = "install") -> tuple:
        """(status,): the same whatever is asked."""
        return (NOTHING_TO_INSTALL,)


class NunchakuDepthPreprocessor:
    """Opens old graphs; when it is run it says which nodes make depth maps today."""

    TITLE = "FLUX Depth Preprocessor (Deprecated)"
    CATEGORY = "Nunchaku"
    DESCRIPTION = "Kept so that saved graphs open. It makes no depth map: running it says which node to put in its place."
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "depth_preprocess"
    DEPRECATED = True
    TONFA = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": TOOLTIPS["image"]}),
                "model_path": (["none"], {"tooltip": TOOLTIPS["model_path"]}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_path=None) -> bool:  # noqa: N802
        """Any saved name is let through, so that the sentence below is what people see."""
        return True

    def depth_preprocess(self, image: object, model_path: str = "none") -> tuple:
        """Raises RuntimeError, always."""
        raise RuntimeError(f"{self.TITLE}: {DEPTH_INSTEAD}")


class SVDQuantDepthPreprocessor(NunchakuDepthPreprocessor):
    """The node's name in the first releases (March 2025)."""

    TITLE = "SVDQuant Depth Preprocessor (old name)"


NOTHING_TO_INSTALL = (
    "Nothing to install: ComfyUI-Tonfa needs no nunchaku wheel, so nothing was installed, removed or updated. This node can be deleted "
    "from the graph."
)
DEPTH_INSTEAD = (
    "this node makes no depth map. Put 'Depth Anything' (DepthAnythingPreprocessor) of the pack comfyui_controlnet_aux in its place: it "
    "takes the same image and gives the depth map that FLUX.1-Depth and its LoRA expect."
)
TOOLTIPS = {
    "model_folder": "A folder in models/diffusion_models that holds transformer_blocks.safetensors and unquantized_layers.safetensors.",
    "save_name": "Name of the file to write beside the folder; .safetensors is added. A file that is there already is not written over.",
    "version": "Kept for saved graphs; does nothing: no wheel is needed.",
    "dev_version": "Kept for saved graphs; does nothing: no wheel is needed.",
    "mode": "Kept for saved graphs; does nothing: no wheel is needed.",
    "image": "The image that a depth map was made of.",
    "model_path": "Kept for saved graphs; does nothing.",
}


def folders() -> list[str]:
    """The checkpoints of the old form in the host's diffusion_models folders."""
    from .host.files import model_folders

    return model_folders()


def file_name(save_name: object, widget: str = "save_name") -> str:
    """The name of the file to write. Raises ValueError when there is none, or when it would lie in another folder."""
    name = str(save_name or "").strip()
    if not name:
        raise ValueError(f"{widget} is empty; give the name of the file to write, for example svdq-int4_r32-flux.1-dev.safetensors.")
    if name in (".", "..") or any(c in name for c in '/\\:*?"<>|\0'):
        raise ValueError(f"{widget} is '{name}'; it must be a plain file name, without folders.")
    return name if name.lower().endswith(EXTENSIONS) else f"{name}.safetensors"
