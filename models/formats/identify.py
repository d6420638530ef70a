"""What a model file is, told from its tensor names: so that a wrong pick gets one sentence and the right loader."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .lora_family import lora_family


@dataclass(frozen=True)
class Kind:
    """what: continues "... is ". advice: a sentence of its own. family: a short word for programs ("flux", "qwen-image", "lora", ...)."""

    family: str
    what: str
    advice: str
    quantised: bool = False


_FLUX2 = re.compile(r"(double|single)_stream_modulation|single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj\.")
_NF4 = re.compile(r"\.(absmax|quant_map|quant_state\.bitsandbytes__\w+)$")
_SVDQ = [  # (family, pattern, what, advice); first match wins, tested on names that end in .qweight
    (
        "qwen-image",
        r"transformer_blocks\.\d+\.(img_mod|txt_mod|img_mlp|txt_mlp)\.",
        "a Qwen-Image SVDQuant file",
        "Load it with NunchakuQwenImageDiTLoader (Nunchaku Qwen-Image DiT Loader).",
    ),
    (
        "z-image",
        r"(layers|noise_refiner|context_refiner)\.\d+\.(attention|feed_forward)\.",
        "a Z-Image SVDQuant file",
        "Load it with NunchakuZImageDiTLoader (Nunchaku Z-Image DiT Loader).",
    ),
    (
        "t5",
        r"encoder\.block\.\d+\.",
        "a 4-bit (AWQ) T5 text encoder",
        "It belongs into models/text_encoders. Load it with NunchakuTextEncoderLoaderV2 (Nunchaku Text Encoder Loader V2).",
    ),
    (
        "sana",
        r"transformer_blocks\.\d+\.(attn\.qkv_proj|cross_attn\.|ff\.(inverted|point)_conv)",
        "a SANA SVDQuant file",
        "This pack has no loader for SANA.",
    ),
    ("sdxl", r"(down_blocks|mid_block|up_blocks)\.", "an SDXL SVDQuant file", "This pack has no loader for SDXL."),
    (
        "flux",
        r"(single_)?transformer_blocks\.\d+\.",
        "a FLUX.1 SVDQuant file",
        "Load it with NunchakuFluxDiTLoader (Nunchaku FLUX DiT Loader).",
    ),
]
_UNET_LOADER = "load it with the stock 'Load Diffusion Model' node (UNETLoader)"
_STOCK = f"It is not quantised by SVDQuant; {_UNET_LOADER}."
_WHOLE = "It is not quantised by SVDQuant; load it with the stock 'Load Checkpoint' node (CheckpointLoaderSimple)."
_TEXT = "Load it with the stock node DualCLIPLoader."
_T5 = (
    "It belongs into models/text_encoders. Load it with the stock node DualCLIPLoader or with NunchakuTextEncoderLoaderV2 (Nunchaku Text "
    "Encoder Loader V2)."
)
_LORA_ADVICE = (
    "Load it behind the model loader, with the stock node LoraLoaderModelOnly or with NunchakuFluxLoraLoader (Nunchaku FLUX LoRA Loader)."
)
_LORA_QWEN = (
    "Load it behind the model loader, with the stock node LoraLoaderModelOnly or with NunchakuQwenImageLoraLoader (Nunchaku Qwen-Image "
    "LoRA Loader)."
)
_LORA_FOREIGN = "Load it with the stock node LoraLoaderModelOnly, behind the loader of a model of that family."
_LORA_CONVERTED = (
    "Load it behind the model loader, with NunchakuFluxLoraLoader (Nunchaku FLUX LoRA Loader), on the 4-bit model that it was converted "
    "for: no stock node reads that form."
)
_PLAIN = [  # the same for files without .qweight, a prefix like "model.diffusion_model." taken off
    (
        "controlnet",
        r"controlnet_(blocks|x_embedder|single_blocks)|control_model\.",
        "a ControlNet",
        "Load it with the stock 'Load ControlNet Model' node.",
    ),
    (
        "flux2-plain",
        _FLUX2.pattern,
        "an ordinary (16- or 8-bit) FLUX.2 model",
        f"It is not quantised by SVDQuant; {_UNET_LOADER} of a ComfyUI that knows FLUX.2.",
    ),
    ("flux-plain", r"double_blocks\.\d+\.img_attn\.qkv\.weight$", "an ordinary (16- or 8-bit) FLUX model", _STOCK),
    ("qwen-image-plain", r"transformer_blocks\.\d+\.img_mod\.1\.weight$", "an ordinary (16- or 8-bit) Qwen-Image model", _STOCK),
    (
        "flux-diffusers",
        r"single_transformer_blocks\.\d+\.(proj_mlp|attn\.to_q)\.weight$",
        "an ordinary (16- or 8-bit) FLUX model in diffusers names",
        _STOCK,
    ),
    ("z-image-plain", r"layers\.\d+\.(attention|adaLN_modulation)\.", "an ordinary (16- or 8-bit) Z-Image or Lumina model", _STOCK),
    ("t5", r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.q\.weight$", "an ordinary T5 text encoder", _T5),
    ("clip", r"text_model\.encoder\.layers\.", "a CLIP text encoder", _TEXT),
    ("vae", r"(decoder|encoder)\.(conv_in|mid|up|down)", "a VAE", "Load it with the stock 'Load VAE' node."),
    ("unet", r"(input_blocks|down_blocks)\.\d+\.", "an ordinary Stable Diffusion UNet", _STOCK),
]
_PREFIX = re.compile(r"^(model\.diffusion_model\.|diffusion_model\.|transformer\.)")
_LORA = re.compile(
    r"[._]lora(_[AB]|_down|_up|_linear_layer|[12]?\.(down|up))(\.|$)"
    r"|\.(lokr_|hada_|oft_blocks|dora_scale|lora_magnitude_vector|diff(_b)?$|alpha$)"
)
_CONVERTED = re.compile(r"transformer_blocks\.\d+\.(qkv_proj|out_proj|mlp_fc[12]|mlp_context_fc[12])(_context)?\.lora_(down|up)$")


def identify(names: Mapping[str, object] | list[str], metadata: Mapping[str, str]) -> Kind:
    """Kind of the file with these tensor names. Never raises; family "unknown" when nothing fits."""
    names = list(names)
    if not names:
        return Kind("unknown", "an empty safetensors file (no tensors)", "Download it again.")
    quantised = [n for n in names if n.endswith(".qweight")]
    if quantised:
        if any(_FLUX2.match(_PREFIX.sub("", n)) for n in names):
            return Kind("flux2", "a FLUX.2 SVDQuant file", "This pack has no loader for FLUX.2.", quantised=True)
        for family, pattern, what, advice in _SVDQ:
            if any(re.match(pattern, n) for n in quantised):
                return Kind(family, what, advice, quantised=True)
        return Kind(
            "unknown", "a quantised model of a kind this pack does not know", f"Its first quantised layer is {quantised[0][:-8]!r}."
        )
    if sum(bool(_LORA.search(n)) for n in names) * 2 >= len(names):
        if any(_CONVERTED.search(n) for n in names):
            return Kind("lora", "a LoRA converted to Nunchaku's layer names", _LORA_CONVERTED)
        made_for = lora_family(names)
        if made_for in ("FLUX.1", "unknown"):
            return Kind("lora", "a LoRA", _LORA_ADVICE)
        return Kind("lora", f"a LoRA for {made_for}", _LORA_QWEN if made_for in ("Qwen-Image", "Z-Image or Lumina") else _LORA_FOREIGN)
    if any(_NF4.search(n) for n in names):
        advice = (
            "It is not quantised by SVDQuant, and neither this pack nor ComfyUI itself reads that form; the custom nodes "
            "ComfyUI_bitsandbytes_NF4 do."
        )
        return Kind("nf4", "a model that bitsandbytes quantised (NF4 or FP4)", advice)
    bare = [_PREFIX.sub("", n) for n in names]
    for family, pattern, what, advice in _PLAIN:
        if any(re.match(pattern, n) for n in bare):
            whole = any(n.startswith(("first_stage_model.", "vae.", "conditioner.", "cond_stage_model.", "text_encoders.")) for n in names)
            return Kind(family, what, _WHOLE if whole and advice == _STOCK else advice)
    if all(n.startswith(("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")) for n in names):
        advice = "The other half, transformer_blocks.safetensors, belongs into the same folder; choose the folder."
        return Kind("flux-half", "the unquantised half of a FLUX SVDQuant folder", advice)
    told = metadata.get("model_class")
    hint = f" Its metadata calls it {told[:80]!r}." if told else ""
    return Kind(
        "unknown",
        "a safetensors file without any model this pack knows",
        f"It has {len(names)} tensors, the first is {names[0][:120]!r}.{hint}",
    )
