"""ComfyUI-nunchaku's example graphs in the form that a server takes, and small stand-ins for what they name.

The graphs are third-party data and not in this repository: they lie in ../shared/workflows, or where TONFA_WORKFLOWS points.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import comfy.taesd.taesd
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(os.environ.get("TONFA_WORKFLOWS") or Path(__file__).resolve().parents[3] / "shared" / "workflows")
WHY_NOT = f"ComfyUI-nunchaku's example graphs are not in {FOLDER} (TONFA_WORKFLOWS)"
SIDES = {1024: 128, 1280: 160, 720: 96}
NOTES, MUTED = ("Note", "MarkdownNote"), (2, 4)
AFTER_SEED = ("fixed", "increment", "decrement", "randomize")
# Real text encoders are larger than the small models' conditioning and than a test machine: nodes of the test's own stand in for them.
STANDS_IN = {"DualCLIPLoader": "TestDualCLIPLoader"}
NODES = """
import torch
import comfy.utils

class TestClip:
    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        g = torch.Generator().manual_seed(len(text))
        return [[torch.randn(1, 12, 96, generator=g), {"pooled_output": torch.randn(1, 64, generator=g)}]]

class TestDualCLIPLoader:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP",), "load", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip_name1": ("STRING", {}), "clip_name2": ("STRING", {}), "type": ("STRING", {})},
                "optional": {"device": ("STRING", {})}}

    def load(self, **_):
        return (TestClip(),)

class NunchakuTextEncoderLoader(TestDualCLIPLoader):
    @classmethod
    def INPUT_TYPES(cls):
        names = {name: ("STRING", {}) for name in ("model_type", "text_encoder1", "text_encoder2")}
        return {"required": {**names, "t5_min_length": ("INT", {}), "use_4bit_t5": ("STRING", {}), "int4_model": ("STRING", {})}}

class DepthAnythingPreprocessor:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}, "optional": {"ckpt_name": ("STRING", {}), "resolution": ("INT", {"max": 16384})}}

    def run(self, image, **_):
        return (image.mean(-1, keepdim=True).expand(image.shape).contiguous(),)

class ImageAndMaskResizeNode:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE", "MASK"), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        size = ("INT", {"max": 16384})
        return {"required": {"image": ("IMAGE",), "mask": ("MASK",), "width": size, "height": size, "resize_method": ("STRING", {}),
                             "crop": ("STRING", {}), "mask_blur_radius": ("INT", {})}}

    def run(self, image, mask, width, height, **_):
        resize = lambda x: comfy.utils.common_upscale(x, width, height, "bilinear", "center")
        return resize(image.movedim(-1, 1)).movedim(1, -1), resize(mask.unsqueeze(1)).squeeze(1)

NODE_CLASS_MAPPINGS = {c.__name__: c for c in (TestDualCLIPLoader, DepthAnythingPreprocessor, ImageAndMaskResizeNode)}
import nodes
if "NunchakuTextEncoderLoader" not in nodes.NODE_CLASS_MAPPINGS:
    NODE_CLASS_MAPPINGS["NunchakuTextEncoderLoader"] = NunchakuTextEncoderLoader
"""


def read_graph(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def for_the_server(graph: dict, info: dict) -> dict:
    """The graph that the browser would post of a saved one. info: the server's /object_info."""
    kept = {n["id"]: n for n in graph["nodes"] if n["type"] not in NOTES and n.get("mode", 0) not in MUTED}
    links = {link[0]: link[1:3] for link in graph["links"] if link[1] in kept}
    posted = {}
    for node in kept.values():
        if node["type"] == "PrimitiveNode":
            continue
        inputs = widget_values(node, info[node["type"]])
        for slot in node.get("inputs", []):
            if slot.get("link") in links:
                source, output = links[slot["link"]]
                primitive = kept[source]["type"] == "PrimitiveNode"
                inputs[slot["name"]] = kept[source]["widgets_values"][0] if primitive else [str(source), output]
        posted[str(node["id"])] = {"class_type": STANDS_IN.get(node["type"], node["type"]), "inputs": inputs}
    return posted


def widget_values(node: dict, info: dict) -> dict:
    """Input name -> value of a node's widgets, which a saved graph lists by position."""
    values, found = list(node.get("widgets_values") or []), {}
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            if not values or not (isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")):
                continue
            found[name] = values.pop(0)
            if name in ("seed", "noise_seed") and values and values[0] in AFTER_SEED:
                values.pop(0)
    return found


def smaller(posted: dict) -> dict:
    """The same graph with few steps and small pictures, so that a CPU is done in seconds."""
    for key, node in list(posted.items()):
        for name, value in node["inputs"].items():
            if name in ("width", "height") and value in SIDES:
                node["inputs"][name] = SIDES[value]
            elif name == "steps":
                node["inputs"][name] = 2
        if node["class_type"] == "FluxKontextImageScale":  # it makes every picture a megapixel: whoever takes that one gets a smaller one
            for other in posted.values():
                other["inputs"].update({name: ["small", 0] for name, value in other["inputs"].items() if value == [key, 0]})
            size = {"upscale_method": "area", "width": 128, "height": 96, "crop": "center"}
            posted["small"] = {"class_type": "ImageScale", "inputs": {"image": [key, 0], **size}}
    return posted


def small_vae() -> dict[str, Tensor]:
    """Random weights of the smallest VAE that the host knows, in the place of FLUX's: 16 channels, an eighth of the size, greys."""
    g = torch.Generator().manual_seed(0)
    vae = comfy.taesd.taesd.TAESD(latent_channels=16)
    with torch.no_grad():
        for p in (*vae.taesd_encoder.parameters(), *vae.taesd_decoder.parameters()):
            p.copy_(torch.randn(p.shape, generator=g) * p[0].numel() ** -0.5 if p.ndim > 1 else torch.zeros(()))
        last = vae.taesd_decoder[-1]
        last.weight *= 0.2 / vae.taesd_decoder(torch.randn(1, 16, 8, 8, generator=g)).std()
        last.bias += 0.5
    return vae.state_dict()


def put_stand_ins(base: Path) -> None:
    """The files that the graphs name beside models and LoRAs: a VAE and pictures."""
    (base / "models" / "vae").mkdir(parents=True, exist_ok=True)
    save_file(small_vae(), base / "models" / "vae" / "ae.safetensors")
    for folder, names in {"input": ("robot.png", "logo_example.png", "removal.png"), "output": ("yarn-art-pikachu.png",)}.items():
        for name in names:
            picture = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
            picture.putalpha(Image.radial_gradient("L").resize((96, 64)))  # LoadImage makes the mask of it
            picture.save(base / folder / name)
