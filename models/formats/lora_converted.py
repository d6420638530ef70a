"""LoRA files that nunchaku converted: the columns that a LoRA adds to the low-rank branch of a 4-bit model, without the model's own.

Such a file holds, for every W4A4 layer and in its packed layout, the model's own low-rank columns followed by those of the LoRA, strength
and alpha already multiplied in; the ranks are padded with zeros to multiples of 16. Modulation layers have plain columns in the order of
the packed rows, and no base. What lies outside the blocks, biases and norms are plain tensors in diffusers names (format, section 9).
"""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .flux_names import to_v1, to_v2
from .lora_names import LoraError, Target, find_module
from .nunchaku import deinterleave_rows, unpack_down, unpack_up

Base = Callable[[str], tuple[Tensor, Tensor] | None]
Pair = tuple[str, Tensor, Tensor]  # (key, down [r, K], up [N, r])

_N = r"(?:0|[1-9]\d{0,3})"  # a block's number
_PACKED = re.compile(
    rf"(transformer_blocks\.{_N}\.(?:qkv_proj|out_proj|mlp_fc1|mlp_fc2|qkv_proj_context|out_proj_context|mlp_context_fc[12])"
    rf"|single_transformer_blocks\.{_N}\.(?:qkv_proj|out_proj|mlp_fc1|mlp_fc2))\.lora_(down|up)",
    re.ASCII,
)
_MODULATION = re.compile(
    rf"(transformer_blocks\.{_N}\.norm1(?:_context)?\.linear|single_transformer_blocks\.{_N}\.norm\.linear)\.lora_(down|up)", re.ASCII
)


def is_converted(keys: Iterable[str]) -> bool:
    """Whether any key is a packed low-rank factor of a W4A4 layer."""
    return any(_PACKED.fullmatch(to_v1(k)) for k in keys)


def converted_columns(tensors: Mapping[str, Tensor], name: str, base: Base | None) -> tuple[list[tuple[Target, Pair]], list[str]]:
    """The pairs that the file adds to the model, and the keys that are not columns inside blocks. LoraError: another base, damage."""
    if base is None:
        raise LoraError(
            f"{name} is a LoRA converted to Nunchaku's layout. It holds the low-rank columns of the 4-bit model it was converted for as "
            "well, which must be left out: load it with NunchakuFluxLoraLoader behind the loader of that model, or take the LoRA file "
            "that it was converted from."
        )
    packed, modulation, rest = _sort(tensors)
    added = _without_base(tensors, packed, name, base)
    out = [_modulation_pair(tensors, layer, keys, name) for layer, keys in modulation.items()]
    for layer, pair in added.items():
        stack, index, part = layer.split(".", 2)
        if stack.startswith("single") and part in ("out_proj", "mlp_fc2"):
            continue
        module = f"{stack}.{index}.proj_mlp" if stack.startswith("single") and part == "mlp_fc1" else to_v2(f"{layer}.x")[:-2]
        out.append((_target(module), pair))
    for block in dict.fromkeys(m[1] for layer in added if (m := re.fullmatch(r"(single_.+)\.(out_proj|mlp_fc2)", layer))):
        joined = _join_columns(added.get(f"{block}.out_proj"), added.get(f"{block}.mlp_fc2"))
        out.append((_target(f"{block}.proj_out"), joined))
    return [(target, cut) for target, pair in out if (cut := _without_zeros(pair)) is not None], rest


def _sort(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]], list[str]]:
    """v1 layer -> {"down": key, "up": key} of the packed layers, likewise of the modulation layers, and all other keys."""
    packed: dict[str, dict[str, str]] = {}
    modulation: dict[str, dict[str, str]] = {}
    rest = []
    for key in tensors:
        for table, pattern in ((packed, _PACKED), (modulation, _MODULATION)):
            if m := pattern.fullmatch(to_v1(key)):
                table.setdefault(m[1], {})[m[2]] = key
                break
        else:
            rest.append(key)
    return packed, modulation, rest


def _target(module: str) -> Target:
    found = find_module(module)
    assert found is not None, module
    return found[0]


def _both(tensors: Mapping[str, Tensor], layer: str, keys: dict[str, str], name: str) -> tuple[Tensor, Tensor]:
    """(lora_down, lora_up) of a layer as stored."""
    if len(keys) < 2:
        there = next(iter(keys.values()))
        raise LoraError(f"{name}: {there} is there, but the other factor of {layer} is not. The file is damaged; convert it again.")
    return tensors[keys["down"]], tensors[keys["up"]]


def _unpacked(tensors: Mapping[str, Tensor], layer: str, keys: dict[str, str], name: str) -> tuple[Tensor, Tensor]:
    """(down [R, K], up [N, R]) of a packed layer, base columns included."""
    down, up = _both(tensors, layer, keys, name)
    if down.ndim != 2 or up.ndim != 2 or down.shape[1] != up.shape[1] or down.shape[1] % 16:
        raise LoraError(
            f"{name}: {keys['down']} is {list(down.shape)} and {keys['up']} is {list(up.shape)}; two matrices with the same number of "
            "columns, a multiple of 16, belong there. The file is damaged; convert it again."
        )
    try:
        return unpack_down(down, down.shape[0], down.shape[1]), unpack_up(up, up.shape[0], up.shape[1])
    except (ValueError, RuntimeError) as e:
        raise LoraError(f"{name}: {layer} cannot be unpacked ({e}). The file is damaged; convert it again.") from e


def _without_base(tensors: Mapping[str, Tensor], packed: dict[str, dict[str, str]], name: str, base: Base) -> dict[str, Pair]:
    """v1 layer -> the columns behind the base's, which are compared value for value first."""
    out = {}
    fewest = min((tensors[k["down"]].shape[-1] for k in packed.values() if "down" in k and tensors[k["down"]].ndim), default=0)
    for layer, keys in packed.items():
        down, up = _unpacked(tensors, layer, keys, name)
        own = base(layer)
        if own is None:
            raise LoraError(f"{name} was converted for another model: it has a layer {layer}, which the loaded model has not.")
        own_down, own_up = own[0].t(), own[1]
        rank = own_down.shape[0]
        if (own_down.shape[1], own_up.shape[0]) != (down.shape[1], up.shape[0]):
            raise LoraError(
                f"{name} was converted for another model: {layer} is {up.shape[0]} x {down.shape[1]} there and {own_up.shape[0]} x "
                f"{own_down.shape[1]} in the loaded model."
            )
        if down.shape[0] < rank or not (_same(down[:rank], own_down) and _same(up[:, :rank], own_up)):
            ranks = ""
            if fewest < rank:
                ranks = f" (its rank is {fewest} at most, the loaded model's {rank})"
            elif fewest >= 2 * rank:
                ranks = f" (its rank seems to be {fewest} or more, the loaded model's {rank})"
            raise LoraError(
                f"{name} was converted for another 4-bit model{ranks}: its columns of {layer} do not begin with the loaded model's own. "
                "Load the model that it was converted for, or take the LoRA file that it was converted from."
            )
        out[layer] = (keys["down"], down[rank:], up[:, rank:])
    return out


def _same(a: Tensor, b: Tensor) -> bool:
    b = b.to(a.device)
    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.float(), b.float())


def _modulation_pair(tensors: Mapping[str, Tensor], layer: str, keys: dict[str, str], name: str) -> tuple[Target, Pair]:
    """Columns of a modulation layer, rows of `up` back in native order."""
    down, up = _both(tensors, layer, keys, name)
    chunks = 3 if layer.startswith("single") else 6
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or up.shape[0] % chunks:
        raise LoraError(
            f"{name}: {keys['down']} is {list(down.shape)} and {keys['up']} is {list(up.shape)}; [r, K] and [N, r] with N a multiple of "
            f"{chunks} belong there. The file is damaged; convert it again."
        )
    return _target(layer), (keys["down"], down, deinterleave_rows(up.contiguous(), chunks))


def _join_columns(attention: Pair | None, mlp: Pair | None) -> Pair:
    """One pair for linear2 from those of its attention columns [r, H] and its MLP columns [r, 4H]; a shared `up` is kept once."""
    key, down, up = attention or mlp
    h = up.shape[0]
    first = attention[1] if attention else down.new_zeros(0, h)
    second = mlp[1] if mlp else down.new_zeros(0, 4 * h)
    if attention and mlp and torch.equal(attention[2], mlp[2]):
        return key, torch.cat([first, second], 1), up
    joined = down.new_zeros(len(first) + len(second), first.shape[1] + second.shape[1])
    joined[: len(first), : first.shape[1]] = first
    joined[len(first) :, first.shape[1] :] = second
    return key, joined, torch.cat([p[2] for p in (attention, mlp) if p], 1)


def _without_zeros(pair: Pair) -> Pair | None:
    """A copy of the pair without the ranks that add nothing (and so without the memory of the base's columns); None if none is left."""
    key, down, up = pair
    keep = (down != 0).any(1) & (up != 0).any(0)
    return (key, down[keep], up[:, keep]) if keep.any() else None
