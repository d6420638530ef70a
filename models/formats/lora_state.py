"""The state dict that is handed to comfy.lora.load_lora: one name per module that ComfyUI 0.3.64 and 0.29.0 both take, and what they would
get wrong put right.

 - The bias patch of a slice of a fused layer (to_q, proj_mlp ...) or of norm_out.linear is aimed at a tensor named "().bias" and lost.
   Here it becomes one patch of the fused bias.
 - lora_B.bias and PEFT's lora_magnitude_vector are not known: they become diff_b and dora_scale. (ComfyUI divides by the norms of the
   weight's rows before the pair is added, PEFT by those after; that difference stays.)
 - norm_out.linear has its rows as (scale, shift), the host's layer as (shift, scale). The host swaps what is added, but not what is set
   or what depends on the weight's rows: here all of it is swapped.
 - BOFT without alpha raises when it is merged; it gets alpha 0, which is what absence means.
 - img_in of another width than the model's: see fit_img_in.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .lora_checks import Parts, Size
from .lora_names import HOST_SUFFIX, LoraError, Target

PLAIN_WIDTH = 64  # input channels of img_in, patched, in FLUX.1 dev, schnell and Kontext
# part -> dimension that runs over output features, for parts whose halves can be swapped to swap the halves of the patch
_ROWS = {
    "up": 0, "diff": 0, "set_weight": 0, "hada_w1_a": 0, "hada_w2_a": 0, "lokr_w1": 0, "lokr_w1_a": 0, "dora_scale": 0, "oft_blocks": -3,
}  # fmt: skip


def state_dict(modules: dict[Target, Parts], kinds: dict[Target, str]) -> dict[str, Tensor]:
    """Names that the host takes -> tensors, of all modules."""
    out: dict[str, Tensor] = {}
    biases: dict[str, list[tuple[Target, Tensor]]] = {}
    for target, parts in modules.items():
        tensors = {part: t for part, (_, t) in parts.items()}
        if (bias := _bias(tensors)) is not None:
            biases.setdefault(target.native, []).append((target, bias))
        host, tensors = _native_order(target, kinds[target], tensors)
        if "set_b" in tensors:
            out[f"diffusion_model.{target.native}.bias.set_weight"] = tensors.pop("set_b")
        if "dora_scale" in tensors and tensors["dora_scale"].ndim == 1:
            tensors["dora_scale"] = tensors["dora_scale"].unsqueeze(1)
        if "oft_blocks" in tensors and tensors["oft_blocks"].ndim == 4:
            tensors.setdefault("alpha", torch.tensor(0.0))
        out |= {host + HOST_SUFFIX[part]: t for part, t in tensors.items()}
    return out | {f"diffusion_model.{native}.diff_b": _fused(patches) for native, patches in biases.items()}


def _bias(tensors: dict[str, Tensor]) -> Tensor | None:
    """The bias patch of a module, taken out of `tensors`: diff_b and lora_B.bias, which is scaled as the pair beside it is."""
    bias, added = tensors.pop("diff_b", None), tensors.pop("up_bias", None)
    if added is not None and "alpha" in tensors:
        added = added.float() * (float(tensors["alpha"]) / tensors["down"].shape[0])
    if bias is None or added is None:
        return added if bias is None else bias
    return bias.float() + added.float()


def _fused(patches: list[tuple[Target, Tensor]]) -> Tensor:
    """One bias patch from those of slices (and the whole) of one layer."""
    target, bias = patches[0]
    if len(patches) == 1 and not target.is_slice:
        return _swapped(bias, 0) if target.swapped else bias
    dtype = bias.dtype if len({b.dtype for _, b in patches}) == 1 else torch.float32
    if any(not t.is_slice for t, _ in patches):  # overlaps, so there is something to add
        dtype = torch.float32
    hidden = len(bias) // target.rows
    out = torch.zeros(target.whole * hidden, dtype=torch.float32, device=bias.device)
    for t, b in patches:
        first = t.first * hidden if t.is_slice else 0
        out[first : first + len(b)] += b.float()
    return out.to(dtype)


def _swapped(t: Tensor, dim: int) -> Tensor:
    return torch.cat(t.chunk(2, dim)[::-1], dim)


def host_swaps(target: Target, kind: str, parts: Iterable[str]) -> bool:
    """Whether the host itself brings the rows of this patch into its own order: it swaps what is added to a weight, when that is all."""
    return target.swapped and kind not in ("set", "oft", "glora") and "dora_scale" not in parts


def _native_order(target: Target, kind: str, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """(host's name, tensors), rows in the order of the host's weight where the file has another and the host does not see to it.

    Where the halves cannot be told apart in the tensors (BOFT, an odd number of blocks) the host is left to do it in its way."""
    if not target.swapped or host_swaps(target, kind, tensors):
        return target.host, tensors
    rows = dict(_ROWS)
    if kind == "glora":  # the old form has b2 on the left
        rows["b1" if tensors["b1"].shape[0] > tensors["b1"].shape[1] else "b2"] = 0
    dims = {p: rows[p] for p in tensors.keys() & rows.keys() if not (p == "dora_scale" and tensors[p].shape[0] == 1)}
    if any(tensors[p].shape[d] % 2 for p, d in dims.items()) or (kind == "oft" and tensors["oft_blocks"].ndim == 4):
        return target.host, tensors
    return f"diffusion_model.{target.native}", {p: _swapped(t, dims[p]) if p in dims else t for p, t in tensors.items()}


def fit_img_in(modules: dict[Target, Parts], kinds: dict[Target, str], sizes: dict[Target, Size], name: str, in_width: int | None) -> bool:
    """Adjust the patch of img_in to the model's input channels, in place; True when something was changed.

    A LoRA of FLUX-tools (Canny, Depth: 128 channels) on a plain model (64) widens the weight with zeros: `reshape_weight` says so to the
    host. A plain LoRA on a wider model is padded with zero columns, as the first channels are the same. in_width None: only the first.
    """
    target = next((t for t in modules if t.native == "img_in"), None)
    if target is None or kinds[target] == "" or sizes[target][1] is None:
        return False
    parts, kind, (n, k) = modules[target], kinds[target], sizes[target]
    width = in_width or PLAIN_WIDTH
    if k == width or (in_width is None and k < width):
        return parts.pop("reshape_weight", None) is not None
    if k > width:
        if kind != "lora":
            if in_width is None:
                return False
            raise LoraError(
                f"{name}: {next(iter(parts.values()))[0]} is for a model with {k} input channels, the loaded one has {width}, and only "
                "a plain LoRA can widen it. Load the model that it was made for (Canny, Depth, Fill)."
            )
        if "reshape_weight" in parts:
            return False
        parts["reshape_weight"] = (target.host, torch.tensor([n, k]))
        return True
    widened = {"lora": ("down",), "diff": ("diff",), "loha": ("hada_w1_b", "hada_w2_b")}.get(kind, ())
    if not widened or "dora_scale" in parts:
        raise LoraError(
            f"{name}: {next(iter(parts.values()))[0]} is for a model with {k} input channels, the loaded one has {width}, and a patch of "
            "this kind cannot be widened. Load the model that it was made for."
        )
    for part in widened:
        key, t = parts[part]
        wider = torch.zeros(t.shape[0], width, dtype=t.dtype, device=t.device)
        wider[:, :k] = t.flatten(1)
        parts[part] = (key, wider)
    parts.pop("reshape_weight", None)
    return True
