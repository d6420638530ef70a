"""Writes the example graphs beside this file, as ComfyUI saves them:  python workflows/make.py

Each graph below is a list of columns; a node's place and size follow from its column. KINDS has every node's inputs and outputs
(stock nodes as in ComfyUI 0.3.64, which newer ones read). tests/nodes/test_workflows.py checks that the files are what this writes.
The pictures beside them are screenshots that tests/host/test_browser.py takes; it says how.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
KINDS = {  # node -> linked inputs | widgets | outputs
    "NunchakuFluxDiTLoader": "| model_path COMBO, cache_threshold FLOAT, attention COMBO, cpu_offload COMBO, device_id INT, "
    "data_type COMBO, i2f_mode COMBO?, compute COMBO? | MODEL MODEL",
    "NunchakuFluxLoraLoader": "model MODEL | lora_name COMBO, lora_strength FLOAT | MODEL MODEL",
    "NunchakuQwenImageDiTLoader": "| model_name COMBO, cpu_offload COMBO?, num_blocks_on_gpu INT?, use_pin_memory COMBO?, compute COMBO? "
    "| MODEL MODEL",
    "NunchakuZImageDiTLoader": "| model_name COMBO, compute COMBO? | MODEL MODEL",
    "NunchakuTextEncoderLoaderV2": "| model_type COMBO, text_encoder1 COMBO, text_encoder2 COMBO, t5_min_length INT | CLIP CLIP",
    "TonfaMiniatureLoader": "| | MODEL MODEL, VAE VAE",
    "TonfaMiniatureCaption": "| caption STRING | CONDITIONING CONDITIONING",
    "TonfaQuantizeFlux": "model MODEL, conditioning CONDITIONING? | filename STRING, precision COMBO, rank INT, mode COMBO, steps INT?, "
    "width INT?, height INT?, calibration_seed INT?, size_gb FLOAT?, gptq BOOLEAN? | MODEL MODEL",
    "Canny": "image IMAGE | low_threshold FLOAT, high_threshold FLOAT | IMAGE IMAGE",
    "CFGNorm": "model MODEL | strength FLOAT | patched_model MODEL",
    "CLIPLoader": "| clip_name COMBO, type COMBO, device COMBO? | CLIP CLIP",
    "CLIPTextEncode": "clip CLIP | text STRING | CONDITIONING CONDITIONING",
    "CLIPVisionEncode": "clip_vision CLIP_VISION, image IMAGE | crop COMBO | CLIP_VISION_OUTPUT CLIP_VISION_OUTPUT",
    "CLIPVisionLoader": "| clip_name COMBO | CLIP_VISION CLIP_VISION",
    "ConditioningZeroOut": "conditioning CONDITIONING | | CONDITIONING CONDITIONING",
    "ControlNetApplyAdvanced": "positive CONDITIONING, negative CONDITIONING, control_net CONTROL_NET, image IMAGE, vae VAE? "
    "| strength FLOAT, start_percent FLOAT, end_percent FLOAT | positive CONDITIONING, negative CONDITIONING",
    "ControlNetLoader": "| control_net_name COMBO | CONTROL_NET CONTROL_NET",
    "DualCLIPLoader": "| clip_name1 COMBO, clip_name2 COMBO, type COMBO, device COMBO? | CLIP CLIP",
    "EmptySD3LatentImage": "| width INT, height INT, batch_size INT | LATENT LATENT",
    "FluxGuidance": "conditioning CONDITIONING | guidance FLOAT | CONDITIONING CONDITIONING",
    "FluxKontextImageScale": "image IMAGE | | IMAGE IMAGE",
    "ImageScale": "image IMAGE | upscale_method COMBO, width INT, height INT, crop COMBO | IMAGE IMAGE",
    "ImageScaleToTotalPixels": "image IMAGE | upscale_method COMBO, megapixels FLOAT | IMAGE IMAGE",
    "InpaintModelConditioning": "positive CONDITIONING, negative CONDITIONING, vae VAE, pixels IMAGE, mask MASK | noise_mask BOOLEAN "
    "| positive CONDITIONING, negative CONDITIONING, latent LATENT",
    "InstructPixToPixConditioning": "positive CONDITIONING, negative CONDITIONING, vae VAE, pixels IMAGE | "
    "| positive CONDITIONING, negative CONDITIONING, latent LATENT",
    "KSampler": "model MODEL, positive CONDITIONING, negative CONDITIONING, latent_image LATENT "
    "| seed INT, steps INT, cfg FLOAT, sampler_name COMBO, scheduler COMBO, denoise FLOAT | LATENT LATENT",
    "LoadImage": "| image COMBO, upload IMAGEUPLOAD | IMAGE IMAGE, MASK MASK",
    "LoraLoaderModelOnly": "model MODEL | lora_name COMBO, strength_model FLOAT | MODEL MODEL",
    "ModelSamplingAuraFlow": "model MODEL | shift FLOAT | MODEL MODEL",
    "PreviewImage": "images IMAGE | |",
    "ReferenceLatent": "conditioning CONDITIONING, latent LATENT? | | CONDITIONING CONDITIONING",
    "SaveImage": "images IMAGE | filename_prefix STRING |",
    "SetUnionControlNetType": "control_net CONTROL_NET | type COMBO | CONTROL_NET CONTROL_NET",
    "StyleModelApply": "conditioning CONDITIONING, style_model STYLE_MODEL, clip_vision_output CLIP_VISION_OUTPUT "
    "| strength FLOAT, strength_type COMBO | CONDITIONING CONDITIONING",
    "StyleModelLoader": "| style_model_name COMBO | STYLE_MODEL STYLE_MODEL",
    "TextEncodeQwenImageEditPlus": "clip CLIP, vae VAE?, image1 IMAGE?, image2 IMAGE?, image3 IMAGE? | prompt STRING "
    "| CONDITIONING CONDITIONING",
    "VAEDecode": "samples LATENT, vae VAE | | IMAGE IMAGE",
    "VAEDecodeTiled": "samples LATENT, vae VAE | tile_size INT, overlap INT, temporal_size INT, temporal_overlap INT | IMAGE IMAGE",
    "VAEEncode": "pixels IMAGE, vae VAE | | LATENT LATENT",
    "VAELoader": "| vae_name COMBO | VAE VAE",
    "MarkdownNote": "| |",
}
WIDTHS = {  # the others: 320
    "MarkdownNote": 480, "SaveImage": 400, "CLIPTextEncode": 380, "TextEncodeQwenImageEditPlus": 380,
    "NunchakuFluxDiTLoader": 400, "NunchakuQwenImageDiTLoader": 400, "NunchakuZImageDiTLoader": 400, "LoraLoaderModelOnly": 380,
}  # fmt: skip
EXTRA = {  # height beyond slots and widgets
    "CLIPTextEncode": 110, "TextEncodeQwenImageEditPlus": 110, "TonfaMiniatureCaption": 190, "SaveImage": 400, "PreviewImage": 240,
    "LoadImage": 260,
}  # fmt: skip
SVDQ = "svdq-int4_r32-flux.1-{}.safetensors"
CLIP_L, T5, T5_4BIT, AE = "clip_l.safetensors", "t5xxl_fp16.safetensors", "awq-int4-flux.1-t5xxl.safetensors", "ae.safetensors"
UNION, REDUX, SIGCLIP = "controlnet-union-pro-2.0.safetensors", "flux1-redux-dev.safetensors", "sigclip_vision_patch14_384.safetensors"
TURBO = "flux.1-turbo-alpha.safetensors"
QWEN, QWEN_EDIT = "svdq-int4_r32-qwen-image.safetensors", "svdq-int4_r32-qwen-image-edit-2509.safetensors"
QWEN_VL, QWEN_VAE = "qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image_vae.safetensors"
LIGHTNING = "Qwen-Image-Lightning-8steps-V1.1.safetensors"
Z_IMAGE, QWEN3 = "svdq-int4_r128-z-image-turbo.safetensors", "qwen_3_4b.safetensors"
SOURCES = {  # file -> folder under models/, repository on Hugging Face, and its name there if that is another
    **{SVDQ.format(kind): ("diffusion_models", f"nunchaku-ai/nunchaku-flux.1-{kind}", "")
       for kind in ("dev", "schnell", "kontext-dev", "fill-dev", "canny-dev", "depth-dev")},
    CLIP_L: ("text_encoders", "comfyanonymous/flux_text_encoders", ""),
    T5: ("text_encoders", "comfyanonymous/flux_text_encoders", ""),
    T5_4BIT: ("text_encoders", "nunchaku-ai/nunchaku-t5", ""),
    AE: ("vae", "black-forest-labs/FLUX.1-schnell", ""),
    UNION: ("controlnet", "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0", "diffusion_pytorch_model.safetensors"),
    REDUX: ("style_models", "black-forest-labs/FLUX.1-Redux-dev", ""),
    SIGCLIP: ("clip_vision", "Comfy-Org/sigclip_vision_384", ""),
    TURBO: ("loras", "alimama-creative/FLUX.1-Turbo-Alpha", "diffusion_pytorch_model.safetensors"),
    QWEN: ("diffusion_models", "nunchaku-ai/nunchaku-qwen-image", ""),
    QWEN_EDIT: ("diffusion_models", "nunchaku-ai/nunchaku-qwen-image-edit-2509", ""),
    QWEN_VL: ("text_encoders", "Comfy-Org/Qwen-Image_ComfyUI", ""),
    QWEN_VAE: ("vae", "Comfy-Org/Qwen-Image_ComfyUI", ""),
    LIGHTNING: ("loras", "lightx2v/Qwen-Image-Lightning", ""),
    Z_IMAGE: ("diffusion_models", "nunchaku-ai/nunchaku-z-image-turbo", ""),
    QWEN3: ("text_encoders", "Comfy-Org/z_image_turbo", ""),
}  # fmt: skip
OF_EVERY_FILE = (
    "INT4 files (`svdq-int4…`) and NVFP4 files (`svdq-fp4…`) both run on any GPU; where only the other one is there, it is taken. "
    "To fetch {}: `python custom_nodes/ComfyUI-Tonfa download {}`, with ComfyUI's Python."
)
SCENE = "A lighthouse on a cliff above a calm sea at dawn, soft light, wide view, film photograph"


def slot(name: str, kind: str, **more: object) -> dict:
    """An input as it is saved; 7 is the shape of an optional one."""
    return {"name": name, "type": kind.rstrip("?"), **more} | ({"shape": 7} if kind.endswith("?") else {})


class Graph:
    """Nodes in columns, left to right. `add` gives a node's output (or its outputs), which later nodes take as linked inputs."""

    def __init__(self) -> None:
        self.nodes, self.links = [], []
        self.x, self.y, self.width = 0, 0, 0

    def column(self) -> None:
        """Closes the column: its nodes get the widest one's width."""
        for node in self.nodes:
            if node["pos"][0] == self.x:
                node["size"][0] = self.width
        self.x, self.y, self.width = self.x + self.width + 60, 0, 0

    def add(self, kind: str, *values: object, title: str = "", height: int = 0, **linked: tuple[int, int]):
        inputs, widgets, outputs = ([entry.split() for entry in part.split(",") if entry.strip()] for part in KINDS[kind].split("|"))
        key = len(self.nodes) + 1
        assert set(linked) <= {name for name, _ in inputs} and len(values) >= len(widgets), (kind, linked, values)
        slots = [slot(*entry, link=self.link(linked.get(entry[0]), key, i, entry[1])) for i, entry in enumerate(inputs)]
        slots += [slot(*entry, link=None, widget={"name": entry[0]}) for entry in widgets]
        size = [WIDTHS.get(kind, 320), height or 10 + 20 * max(len(inputs), len(outputs)) + 24 * len(values) + EXTRA.get(kind, 0)]
        node = {
            "id": key, "type": kind, "pos": [self.x, self.y], "size": size, "flags": {}, "order": key - 1, "mode": 0, "inputs": slots,
            "outputs": [{"name": name, "type": type_, "links": []} for name, type_ in outputs],
            "properties": {"Node name for S&R": kind}, "widgets_values": list(values),
        }  # fmt: skip
        self.nodes.append(node | ({"title": title} if title else {}))
        self.y, self.width = self.y + size[1] + 70, max(self.width, size[0])
        made = tuple((key, i) for i in range(len(outputs)))
        return made[0] if len(made) == 1 else made

    def link(self, source: tuple[int, int] | None, target: int, slot: int, kind: str) -> int | None:
        if source is None:
            return None
        key = len(self.links) + 1
        self.links.append([key, *source, target, slot, kind.rstrip("?")])
        self.nodes[source[0] - 1]["outputs"][source[1]]["links"].append(key)
        return key

    def note(self, heading: str, *files: str, more: str = "") -> None:
        """The first column: which file goes where, and what else there is to know."""
        lines = [f"## {heading}", "Files, each with its folder and where it comes from:"]
        for name in files:
            folder, repository, there = SOURCES[name]
            comes = f"[{repository}](https://huggingface.co/{repository})" + (f", there called `{there}`" if there else "")
            lines.append(f"- `{name}` in `models/{folder}`: {comes}")
        there = "a 4-bit file or a text encoder" if CLIP_L in files else "the 4-bit file"
        lines = [*lines, "", more, "", OF_EVERY_FILE.format(there, files[0])] if files else [lines[0], more]
        self.add("MarkdownNote", "\n".join(lines), title="Files", height=420)

    def saved(self, stem: str) -> dict:
        self.column()
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, stem)), "revision": 0,
            "last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": self.nodes, "links": self.links,
            "groups": [], "config": {}, "extra": {}, "version": 0.4,
        }  # fmt: skip


# -- what several graphs share ----------------------------------------------------------------------------------------------------------


def loaders(g: Graph, kind: str, clip4: bool = False, offload: str = "auto", cache: float = 0):
    """A column with the three loaders; MODEL, CLIP, VAE. The DiT loader is last: new versions give it more inputs."""
    g.column()
    if clip4:
        clip = g.add("NunchakuTextEncoderLoaderV2", "flux.1", CLIP_L, T5_4BIT, 512)
    else:
        clip = g.add("DualCLIPLoader", CLIP_L, T5, "flux", "default")
    vae = g.add("VAELoader", AE)
    model = g.add("NunchakuFluxDiTLoader", SVDQ.format(kind), cache, "nunchaku-fp16", offload, 0, "bfloat16", "enabled", "auto")
    return model, clip, vae


def prompt(g: Graph, clip, text: str, guidance: float | None = 3.5):
    """Positive and, since FLUX.1 knows none, an empty negative conditioning."""
    said = g.add("CLIPTextEncode", text, clip=clip, title="Prompt")
    positive = said if guidance is None else g.add("FluxGuidance", guidance, conditioning=said)
    return positive, g.add("ConditioningZeroOut", conditioning=said)


def picture(
    g: Graph, model, positive, negative, latent, vae, stem: str, steps: int = 20, tiled: bool = False, cfg: float = 1.0, sampler="euler"
) -> None:
    """Sampler, VAE, SaveImage: the last two columns."""
    g.column()
    wires = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
    samples = g.add("KSampler", 42, "fixed", steps, cfg, sampler, "simple", 1.0, **wires)
    if tiled:
        images = g.add("VAEDecodeTiled", 512, 64, 64, 8, samples=samples, vae=vae)
    else:
        images = g.add("VAEDecode", samples=samples, vae=vae)
    g.column()
    g.add("SaveImage", stem, images=images)


def text_to_image(g: Graph, stem: str, kind: str = "dev", steps: int = 20, guidance: float | None = 3.5, tiled: bool = False, **options):
    model, clip, vae = loaders(g, kind, **options)
    g.column()
    positive, negative = prompt(g, clip, SCENE, guidance)
    latent = g.add("EmptySD3LatentImage", 1024, 1024, 1)
    picture(g, model, positive, negative, latent, vae, stem, steps, tiled)


def qwen_loaders(g: Graph, name: str):
    """As `loaders`, for Qwen-Image."""
    g.column()
    clip = g.add("CLIPLoader", QWEN_VL, "qwen_image", "default")
    vae = g.add("VAELoader", QWEN_VAE)
    model = g.add("NunchakuQwenImageDiTLoader", name, "auto", 1, "disable", "auto")
    return model, clip, vae


def qwen_picture(g: Graph, stem: str, lora: str = "", steps: int = 20, cfg: float = 2.5) -> None:
    """Qwen-Image from a prompt; with a LoRA between loader and sampler."""
    model, clip, vae = qwen_loaders(g, QWEN)
    g.column()
    if lora:
        model = g.add("LoraLoaderModelOnly", lora, 1.0, model=model)
    model = g.add("ModelSamplingAuraFlow", 3.1, model=model)
    positive = g.add("CLIPTextEncode", SCENE, clip=clip, title="Prompt")
    negative = g.add("CLIPTextEncode", " ", clip=clip, title="Negative prompt")
    latent = g.add("EmptySD3LatentImage", 1328, 1328, 1)
    picture(g, model, positive, negative, latent, vae, stem, steps, cfg=cfg)


def z_picture(g: Graph, stem: str, lora: str = "") -> None:
    """Z-Image Turbo from a prompt; with a LoRA between loader and sampler."""
    g.column()
    clip = g.add("CLIPLoader", QWEN3, "lumina2", "default")
    vae = g.add("VAELoader", AE)
    model = g.add("NunchakuZImageDiTLoader", Z_IMAGE, "auto")
    g.column()
    if lora:
        model = g.add("LoraLoaderModelOnly", lora, 0.8, model=model)
    model = g.add("ModelSamplingAuraFlow", 3.0, model=model)
    positive, negative = prompt(g, clip, SCENE, guidance=None)
    latent = g.add("EmptySD3LatentImage", 1024, 1024, 1)
    picture(g, model, positive, negative, latent, vae, stem, steps=9, sampler="res_multistep")


# -- the graphs -------------------------------------------------------------------------------------------------------------------------


def dev(g: Graph, stem: str) -> None:
    more = "Faster, and a little further from the full picture: `cache_threshold` 0.12."
    g.note("FLUX.1-dev in 4 bit", SVDQ.format("dev"), CLIP_L, T5, AE, more=more)
    text_to_image(g, stem)


def schnell(g: Graph, stem: str) -> None:
    more = "4 steps; schnell has no guidance input."
    g.note("FLUX.1-schnell in 4 bit", SVDQ.format("schnell"), CLIP_L, T5, AE, more=more)
    text_to_image(g, stem, "schnell", steps=4, guidance=None)


def lora(g: Graph, stem: str) -> None:
    more = "The second LoRA is any FLUX.1 LoRA of yours, in `models/loras`. *Nunchaku FLUX LoRA Loader*, *Stack* and ComfyUI's own "
    more += "LoRA nodes work in any number and order. With the Turbo LoRA, 8 steps are enough."
    g.note("FLUX.1-dev in 4 bit with two LoRAs", SVDQ.format("dev"), TURBO, CLIP_L, T5, AE, more=more)
    model, clip, vae = loaders(g, "dev")
    g.column()
    model = g.add("NunchakuFluxLoraLoader", TURBO, 1.0, model=model)
    model = g.add("LoraLoaderModelOnly", "my-style.safetensors", 0.8, model=model)
    positive, negative = prompt(g, clip, SCENE)
    latent = g.add("EmptySD3LatentImage", 1024, 1024, 1)
    picture(g, model, positive, negative, latent, vae, stem, steps=8)


def kontext(g: Graph, stem: str) -> None:
    more = "The picture to edit is chosen in *Load Image*; the prompt says what shall change."
    g.note("FLUX.1-Kontext-dev in 4 bit", SVDQ.format("kontext-dev"), CLIP_L, T5, AE, more=more)
    model, clip, vae = loaders(g, "kontext-dev")
    g.column()
    image, _ = g.add("LoadImage", "example.png", "image", title="Picture to edit")
    scaled = g.add("FluxKontextImageScale", image=image)
    latent = g.add("VAEEncode", pixels=scaled, vae=vae)
    g.column()
    said = g.add("CLIPTextEncode", "Make it a winter scene with snow, keep everything else as it is", clip=clip, title="Prompt")
    positive = g.add("ReferenceLatent", conditioning=said, latent=latent)
    positive = g.add("FluxGuidance", 2.5, conditioning=positive)
    negative = g.add("ConditioningZeroOut", conditioning=said)
    picture(g, model, positive, negative, latent, vae, stem)


def fill(g: Graph, stem: str) -> None:
    more = "Paint the mask on *Load Image* (right click, *Open in MaskEditor*). The masked part is made anew from the prompt."
    g.note("FLUX.1-Fill-dev in 4 bit: inpainting", SVDQ.format("fill-dev"), CLIP_L, T5, AE, more=more)
    model, clip, vae = loaders(g, "fill-dev")
    g.column()
    image, mask = g.add("LoadImage", "example.png", "image", title="Picture and mask")
    positive, negative = prompt(g, clip, "A wooden rowing boat on the shore", 30.0)
    g.column()
    wires = {"positive": positive, "negative": negative, "vae": vae, "pixels": image, "mask": mask}
    positive, negative, latent = g.add("InpaintModelConditioning", False, **wires)
    picture(g, model, positive, negative, latent, vae, stem)


def canny(g: Graph, stem: str) -> None:
    more = "The picture's edges guide the new one. Sizes are multiples of 16."
    g.note("FLUX.1-Canny-dev in 4 bit", SVDQ.format("canny-dev"), CLIP_L, T5, AE, more=more)
    model, clip, vae = loaders(g, "canny-dev")
    guided(g, stem, model, clip, vae, "Picture", edges=True)


def depth(g: Graph, stem: str) -> None:
    more = "*Load Image* takes a depth map (near is white), made by any depth node or program; the pack comfyui_controlnet_aux has "
    more += "such nodes."
    g.note("FLUX.1-Depth-dev in 4 bit", SVDQ.format("depth-dev"), CLIP_L, T5, AE, more=more)
    model, clip, vae = loaders(g, "depth-dev")
    guided(g, stem, model, clip, vae, "Depth map", edges=False)


def guided(g: Graph, stem: str, model, clip, vae, title: str, edges: bool) -> None:
    """The part that Canny and Depth share: a picture of the wanted size beside the latent."""
    g.column()
    image, _ = g.add("LoadImage", "example.png", "image", title=title)
    image = g.add("ImageScale", "lanczos", 1024, 1024, "center", image=image)
    if edges:
        image = g.add("Canny", 0.2, 0.4, image=image)
    g.column()
    positive, negative = prompt(g, clip, SCENE, 30.0)
    wires = {"positive": positive, "negative": negative, "vae": vae, "pixels": image}
    positive, negative, latent = g.add("InstructPixToPixConditioning", **wires)
    picture(g, model, positive, negative, latent, vae, stem)


def redux(g: Graph, stem: str) -> None:
    more = "The picture's style and content join the prompt; a lower `strength` lets the prompt say more."
    g.note("FLUX.1-dev in 4 bit with Redux", SVDQ.format("dev"), REDUX, SIGCLIP, CLIP_L, T5, AE, more=more)
    model, clip, vae = loaders(g, "dev")
    g.column()
    image, _ = g.add("LoadImage", "example.png", "image", title="Picture to vary")
    vision = g.add("CLIPVisionLoader", SIGCLIP)
    seen = g.add("CLIPVisionEncode", "center", clip_vision=vision, image=image)
    style = g.add("StyleModelLoader", REDUX)
    g.column()
    positive, negative = prompt(g, clip, SCENE)
    positive = g.add("StyleModelApply", 1.0, "multiply", conditioning=positive, style_model=style, clip_vision_output=seen)
    latent = g.add("EmptySD3LatentImage", 1024, 1024, 1)
    picture(g, model, positive, negative, latent, vae, stem)


def controlnet(g: Graph, stem: str) -> None:
    more = "Union Pro 2.0 knows by itself what it is shown (edges, depth, pose, grey); with the first Union files choose the kind in "
    more += "*SetUnionControlNetType*."
    g.note("FLUX.1-dev in 4 bit with ControlNet Union", SVDQ.format("dev"), UNION, CLIP_L, T5, AE, more=more)
    model, clip, vae = loaders(g, "dev")
    g.column()
    image, _ = g.add("LoadImage", "example.png", "image")
    image = g.add("ImageScale", "lanczos", 1024, 1024, "center", image=image)
    image = g.add("Canny", 0.2, 0.4, image=image)
    net = g.add("ControlNetLoader", UNION)
    net = g.add("SetUnionControlNetType", "auto", control_net=net)
    g.column()
    positive, negative = prompt(g, clip, SCENE)
    wires = {"positive": positive, "negative": negative, "control_net": net, "image": image, "vae": vae}
    positive, negative = g.add("ControlNetApplyAdvanced", 0.7, 0.0, 0.8, **wires)
    latent = g.add("EmptySD3LatentImage", 1024, 1024, 1)
    picture(g, model, positive, negative, latent, vae, stem)


def four_bit_t5(g: Graph, stem: str) -> None:
    more = "The 4-bit T5 takes 2.5 GiB in place of 8.9. To make one of a T5-XXL that you have: "
    more += "`python custom_nodes/ComfyUI-Tonfa quantize-t5 IN OUT`."
    g.note("FLUX.1-dev and its T5 in 4 bit", SVDQ.format("dev"), CLIP_L, T5_4BIT, AE, more=more)
    text_to_image(g, stem, clip4=True)


def eight_gb(g: Graph, stem: str) -> None:
    more = "For 8 GB of VRAM: the T5 in 4 bit; `cpu_offload` *enable* streams the model's blocks from memory while it computes (*auto* "
    more += "leaves that to ComfyUI, which is right where about 7.5 GB are free); the VAE decodes in tiles. Needs no `--lowvram`. "
    more += "Faster at a small loss: `cache_threshold` 0.12."
    g.note("FLUX.1-dev on an 8 GB card", SVDQ.format("dev"), CLIP_L, T5_4BIT, AE, more=more)
    text_to_image(g, stem, clip4=True, offload="enable", tiled=True)


def qwen_image(g: Graph, stem: str) -> None:
    more = "20 steps at CFG 2.5; 50 at 4 are the model's own. More shift in *ModelSamplingAuraFlow* where pictures are blurred or dark, "
    more += "less for finer detail. Rank 128 (`svdq-int4_r128…`) is closer to the 16-bit model, larger and a little slower."
    g.note("Qwen-Image in 4 bit", QWEN, QWEN_VL, QWEN_VAE, more=more)
    qwen_picture(g, stem)


def qwen_lightning(g: Graph, stem: str) -> None:
    more = "With the Lightning LoRA 8 steps at CFG 1 are enough, and at CFG 1 the negative prompt does nothing. There is one for 4 steps, "
    more += "too. *Nunchaku Qwen-Image LoRA Loader* and *Stack* do the same as ComfyUI's own LoRA nodes, in any number and order."
    g.note("Qwen-Image in 4 bit with a Lightning LoRA", QWEN, LIGHTNING, QWEN_VL, QWEN_VAE, more=more)
    qwen_picture(g, stem, LIGHTNING, steps=8, cfg=1.0)


def qwen_edit(g: Graph, stem: str) -> None:
    more = "The picture to edit is chosen in *Load Image*; the prompt says what shall change. `image2` and `image3` of both prompt nodes "
    more += "take further pictures, which the prompt calls image 2 and image 3. The result has the size of the first one, brought to a "
    more += "megapixel. 20 steps at CFG 2.5 are quicker."
    g.note("Qwen-Image-Edit-2509 in 4 bit", QWEN_EDIT, QWEN_VL, QWEN_VAE, more=more)
    model, clip, vae = qwen_loaders(g, QWEN_EDIT)
    g.column()
    image, _ = g.add("LoadImage", "example.png", "image", title="Picture to edit")
    image = g.add("ImageScaleToTotalPixels", "lanczos", 1.0, image=image)
    latent = g.add("VAEEncode", pixels=image, vae=vae)
    g.column()
    model = g.add("ModelSamplingAuraFlow", 3.0, model=model)
    model = g.add("CFGNorm", 1.0, model=model)
    wires = {"clip": clip, "vae": vae, "image1": image}
    said = "Make it a winter scene with snow, keep everything else as it is"
    positive = g.add("TextEncodeQwenImageEditPlus", said, title="Prompt", **wires)
    negative = g.add("TextEncodeQwenImageEditPlus", "", title="Negative prompt", **wires)
    picture(g, model, positive, negative, latent, vae, stem, steps=40, cfg=4.0)


def z_image(g: Graph, stem: str) -> None:
    more = "Needs a ComfyUI that has Z-Image. 9 steps at CFG 1; the negative conditioning is empty. `ae.safetensors` is FLUX.1's."
    g.note("Z-Image Turbo in 4 bit", Z_IMAGE, QWEN3, AE, more=more)
    z_picture(g, stem)


def z_image_lora(g: Graph, stem: str) -> None:
    more = "Needs a ComfyUI that has Z-Image. The LoRA is any Z-Image LoRA of yours, in `models/loras`. ComfyUI's own LoRA nodes and "
    more += "*Nunchaku Qwen-Image LoRA Loader* and *Stack* work in any number and order."
    g.note("Z-Image Turbo in 4 bit with a LoRA", Z_IMAGE, QWEN3, AE, more=more)
    z_picture(g, stem, "my-style.safetensors")


def miniature(g: Graph, stem: str) -> None:
    more = "Nothing to download: the miniature comes with the pack. *Tonfa Quantize FLUX* samples the captions on the left, writes "
    more += "`models/diffusion_models/tonfa-miniature-int4.safetensors` and a report of every layer beside it; then both models draw the "
    more += "same scene from the same noise. For a model of your own: any FLUX.1 MODEL in place of the miniature, your prompts through "
    more += "*CLIP Text Encode* and *Conditioning (Combine)*, 1024 x 1024."
    g.note("Quantise a FLUX, and see what 4 bits do", more=more)
    g.column()
    model, vae = g.add("TonfaMiniatureLoader")
    seen = g.add("TonfaMiniatureCaption", "\n".join(CALIBRATING), title="Captions to calibrate with")
    said = g.add("TonfaMiniatureCaption", "large red striped circle left of medium blue star on green", title="Caption")
    g.column()
    settings = ("tonfa-miniature-int4", "int4", 32, "calibrated", 8, 128, 128, 0, 0.0, False)
    four = g.add("TonfaQuantizeFlux", *settings, model=model, conditioning=seen)
    latent = g.add("EmptySD3LatentImage", 128, 128, 1)
    g.column()
    both = {"16-bit": model, "4-bit": four}
    for name, which in both.items():
        wires = {"model": which, "positive": said, "negative": said, "latent_image": latent}
        both[name] = g.add("KSampler", 7, "fixed", 20, 1.0, "euler", "simple", 1.0, title=f"Sampler, {name}", **wires)
    both = {name: g.add("VAEDecode", samples=samples, vae=vae) for name, samples in both.items()}
    g.column()
    for name, images in both.items():
        g.add("SaveImage", f"{stem}-{name}", title=name, height=300, images=images)


CALIBRATING = (
    "large green dotted circle on red",
    "medium yellow striped star top left on purple",
    "small blue 5 right of large green plain ring on orange",
    "large pink shaded triangle below red cross on blue",
    "purple 8 left and large cyan dotted square right on black",
    "large orange plain cross bottom on white",
    "medium red striped ring above small green star on yellow",
    "large blue 2 centre on pink",
    "yellow triangle left of large purple striped circle on green",
    "small cyan shaded square bottom right on orange",
    "large purple 6 above medium red dotted cross on cyan",
    "medium orange star right on black",
)
GRAPHS = {
    "tonfa-miniature": miniature,
    "tonfa-flux.1-dev": dev,
    "tonfa-flux.1-schnell": schnell,
    "tonfa-flux.1-dev-lora": lora,
    "tonfa-flux.1-kontext-dev": kontext,
    "tonfa-flux.1-fill-dev": fill,
    "tonfa-flux.1-canny-dev": canny,
    "tonfa-flux.1-depth-dev": depth,
    "tonfa-flux.1-redux-dev": redux,
    "tonfa-flux.1-dev-controlnet-union": controlnet,
    "tonfa-flux.1-dev-4bit-t5": four_bit_t5,
    "tonfa-flux.1-dev-8gb": eight_gb,
    "tonfa-qwen-image": qwen_image,
    "tonfa-qwen-image-lightning-lora": qwen_lightning,
    "tonfa-qwen-image-edit-2509": qwen_edit,
    "tonfa-z-image-turbo": z_image,
    "tonfa-z-image-turbo-lora": z_image_lora,
}


def text(stem: str) -> str:
    """The file of one graph."""
    graph = Graph()
    GRAPHS[stem](graph, stem)
    return json.dumps(graph.saved(stem), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for stem in GRAPHS:
        (FOLDER / f"{stem}.json").write_text(text(stem), encoding="utf-8")
        print(f"{stem}.json")
