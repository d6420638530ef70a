"""A MODEL that the host loaded, as the quantiser reads it: one dense weight at a time, with its patches (LoRA) on, as fp32.

Weights are taken as they were loaded (16 bits, fp8 with or without scale, the host's quantised tensors, GGUF through its pack's own layers)
and patched in fp32; what the host has merged and rounded for sampling is not read. The MODEL stays as it is.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import comfy.ldm.flux.model
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor, nn

from ...models.formats.flux_names import host_linears, plain_specs
from ...models.formats.tensorfile import CheckpointError
from ...models.formats.writer import dims_of
from .flux_shell import TonfaFlux, norm_parameter

log = logging.getLogger(__name__)

# of the host's FluxParams what describes a FLUX.1; the flags are those of its other models, and off for it
CONFIG = (
    "in_channels", "out_channels", "vec_in_dim", "context_in_dim", "hidden_size", "mlp_ratio", "num_heads", "depth", "depth_single_blocks",
    "axes_dim", "theta", "patch_size", "qkv_bias", "guidance_embed",
)  # fmt: skip
OTHER_MODELS = ("global_modulation", "mlp_silu_act", "yak_mlp", "txt_norm")
PIECES, PIECE = 8, 256  # of a tensor, how many stretches of how many values its fingerprint reads


@dataclass(frozen=True)
class DenseModel:
    """What models/quantize_flux.py takes as its source. path: what the weights came from, as far as the host tells."""

    patcher: comfy.model_patcher.ModelPatcher
    config: dict
    model_class: str
    path: str

    def linear(self, name: str, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor | None]:
        """fp32 (weight [N, K], bias [N] or None) of a linear such as "double_blocks.0.img_attn.qkv"."""
        return self.tensor(f"{name}.weight", device), self._value(f"{name}.bias", torch.device(device))

    def tensor(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """fp32: any tensor by its native name. CheckpointError where it is missing or not finite."""
        value = self._value(name, torch.device(device))
        if value is None:
            raise CheckpointError(f"{name} of this MODEL has no values, so it cannot be quantised.")
        return value

    def fingerprint(self) -> str:
        """Tells this model from others, also in another session: by samples of every weight as it was loaded and of its patches."""
        digest = hashlib.sha256()
        for name in names_of(self.config):
            digest.update(name.encode())
            absorb(digest, self._stored(host_key(name))[0])
            absorb(digest, self.patcher.patches.get(host_key(name)))
        return digest.hexdigest()

    def _stored(self, key: str) -> tuple[object, object]:
        """(tensor as it was loaded or None, what the layer makes real numbers of it with or None)."""
        module, _, parameter = key.rpartition(".")
        if getattr(comfy.utils.get_attr(self.patcher.model, module), parameter, None) is None:
            return None, None
        weight, _, convert = comfy.model_patcher.get_key_weight(self.patcher.model, key)
        backup = self.patcher.backup.get(key)  # there is one where the host has merged patches into what the layer has now
        return (weight if backup is None else backup.weight), convert

    def _value(self, name: str, device: torch.device) -> Tensor | None:
        key = host_key(name)
        stored, convert = self._stored(key)
        if stored is None:
            return None
        layer = comfy.utils.get_attr(self.patcher.model, key.rpartition(".")[0])
        if is_ggml(stored, layer):
            bare = stored.to(device, copy=True)
            bare.patches = []  # those of whichever clone is loaded
            value = layer.get_weight(bare, torch.float32)
        else:
            value = comfy.model_management.cast_to_device(stored, device, torch.float32, copy=True)
            value = value if convert is None else convert(value, inplace=True)
        if key in self.patcher.patches:
            value = comfy.lora.calculate_weight(self.patcher.patches[key], value, key)
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{name} of this MODEL holds NaN or infinite values: its file, or a LoRA on it, is damaged.")
        return value.as_subclass(Tensor)  # GGUF's norms keep their kind


def host_key(name: str) -> str:
    """The host's state-dict key, and key of patches, of a native name."""
    return "diffusion_model." + (name[: -len("scale")] + norm_parameter() if name.endswith("_norm.scale") else name)


def is_ggml(stored: object, layer: nn.Module) -> bool:
    """Whether a tensor is one of ComfyUI-GGUF's, whose layers know how to read it."""
    return hasattr(stored, "tensor_type") and hasattr(layer, "get_weight")


def names_of(config: dict) -> Iterator[str]:
    """Native names of all tensors of a FLUX.1, biases included."""
    dims = dims_of(config)
    for linear in host_linears(dims):
        yield from (f"{linear.name}.weight", f"{linear.name}.bias")
    yield from (native for native, _, _ in plain_specs(dims))


# -- which models ----------------------------------------------------------------------------------------------------------------------


def open_model(patcher: comfy.model_patcher.ModelPatcher) -> DenseModel:
    """The source of a MODEL. ValueError, a sentence for the node, where it is no dense FLUX.1."""
    network = getattr(patcher.model, "diffusion_model", None)
    if isinstance(network, TonfaFlux):
        raise ValueError("This MODEL is 4-bit already. Connect the model that it was made from: in 16 bits, fp8 or GGUF.")
    if not isinstance(network, comfy.ldm.flux.model.Flux) or any(getattr(network.params, flag, False) for flag in OTHER_MODELS):
        raise ValueError(_other(patcher.model, network))
    config = {key: getattr(network.params, key) for key in CONFIG}
    modules = dict(network.named_modules())
    missing = next((name for name in names_of(config) if name.rpartition(".")[0] not in modules), None)
    if missing is not None:
        raise ValueError(f"{_other(patcher.model, network)} It has no {missing}.")
    schnell = isinstance(patcher.model.model_config, comfy.supported_models.FluxSchnell)
    source = DenseModel(patcher, config, "FluxSchnell" if schnell else "Flux", origin(patcher))
    warn_of_what_is_not_in_weights(patcher)
    width = source.tensor("img_in.weight").shape[1]  # control LoRAs (Canny, Depth) widen it, and the file is of a model with that input
    return replace(source, config=config | {"in_channels": width // config["patch_size"] ** 2})


def _other(model: object, network: object) -> str:
    return (
        f"This MODEL is {type(model).__name__} ({type(network).__name__}), and only FLUX.1 models (dev, schnell, Fill, Canny, Depth, "
        "Kontext, Krea and finetunes) can be quantised here."
    )


def origin(patcher: comfy.model_patcher.ModelPatcher) -> str:
    """The name of the file that a MODEL was loaded from, where the host has kept it; else the model's class."""
    _, arguments, *_ = getattr(patcher, "cached_patcher_init", None) or (None, ())
    first = arguments[0] if arguments else None
    return os.path.basename(first) if isinstance(first, str) else type(patcher.model).__name__


def warn_of_what_is_not_in_weights(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """One log line where something on the MODEL changes what its layers compute without changing their weights."""
    if patcher.weight_wrapper_patches or patcher.injections:
        log.warning(
            "The MODEL to quantise has patches that act while it runs (a bypass LoRA, for instance): they are not in the file. "
            "Use LoraLoaderModelOnly for what is to be in it."
        )


# -- telling models apart --------------------------------------------------------------------------------------------------------------


def absorb(digest: hashlib._Hash, value: object) -> None:
    """Feeds a hash with what tells a value from others: samples of tensors, numbers and words; of other objects what they hold, or are."""
    if isinstance(value, Tensor):
        _absorb_tensor(digest, value)
    elif isinstance(value, tuple | list):
        digest.update(f"({len(value)}".encode())
        for inner in value:
            absorb(digest, inner)
    elif isinstance(value, dict):
        absorb(digest, sorted(value.items(), key=lambda item: str(item[0])))
    elif value is None or isinstance(value, int | float | str | torch.dtype | torch.Size):
        digest.update(f"{value!r};".encode())
    else:  # an adapter of the host has its tensors in `weights`
        digest.update(type(value).__qualname__.encode())
        absorb(digest, getattr(value, "weights", None))


def _absorb_tensor(digest: hashlib._Hash, t: Tensor) -> None:
    digest.update(f"{tuple(t.shape)}{t.dtype};".encode())
    if hasattr(t, "_qdata"):  # the host's quantised tensors: bytes, and scales beside them
        absorb(digest, vars(t._params))
        t = t._qdata
    flat = t.as_subclass(Tensor).detach().reshape(-1)
    if flat.is_meta:
        return
    last = max(flat.numel() - PIECE, 0)
    for i in range(PIECES if last else 1):
        start = i * last // (PIECES - 1)
        digest.update(flat[start : start + PIECE].cpu().contiguous().view(torch.uint8).numpy().tobytes())
