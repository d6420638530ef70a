"""LoRA files of every format that is made for FLUX.1, brought to names that every supported ComfyUI reads.

`read_lora` gives a state dict for comfy.lora.load_lora. A file that ComfyUI 0.3.64 and 0.29.0 both read is handed on as it is. Of others
the names change and the tensors stay, except where those versions would go wrong (lora_state.py) and in files that nunchaku converted
(lora_converted.py).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .identify import identify
from .lora_checks import Parts, Size, check_values, kind_of, likely_hidden, misfit, size_of, wanted_size
from .lora_converted import Base, converted_columns, is_converted
from .lora_family import DOUBLE, SINGLE, beyond, deeper_family, family_of_shapes, foreign, lora_family
from .lora_names import LoraError, Name, Target, is_lora_key, is_text_encoder, parse
from .lora_state import fit_img_in, host_swaps, state_dict

__all__ = ["LoraError", "LoraFile", "lora_family", "read_lora"]
_SAME = {"w_norm": "diff", "b_norm": "diff_b", "raw": "set_weight", "magnitude": "dora_scale"}
_CHOOSE = "Choose a LoRA that was made for FLUX.1."


@dataclass
class LoraFile:
    """A LoRA for FLUX.1.

    format        a short name for people: "diffusers", "kohya", "xlabs", "Nunchaku" ...
    state         tensors in names that comfy.lora.load_lora takes for a FLUX model; those of text encoders unchanged
    ignored       keys that nobody understands, that change nothing, or that are for blocks which the model lacks
    text_encoder  keys for CLIP or T5, left to the host
    host_reads    LoraLoader of every supported ComfyUI would have read the whole file as it was, and rightly
    """

    format: str
    state: dict[str, Tensor]
    ignored: list[str] = field(default_factory=list)
    text_encoder: list[str] = field(default_factory=list)
    host_reads: bool = True


@dataclass
class _Modules:
    """A file taken apart: target -> part -> (key, tensor), the Name of each key that was understood, and all other keys."""

    parts: dict[Target, Parts]
    names: dict[str, Name]
    ignored: list[str]


def read_lora(
    tensors: Mapping[str, Tensor],
    name: str,
    base: Base | None = None,
    *,
    hidden: int | None = None,
    depths: tuple[int, int] | None = None,
    in_width: int | None = None,
) -> LoraFile:
    """The LoRA in `tensors` of the file called `name`. LoraError when it is none for FLUX.1, damaged, or does not fit.

    base      (down [K, R], up [N, R]), plain, of a W4A4 layer of the loaded model by its v1 name; None if the model has no such layer.
              Needed for files that nunchaku converted
    hidden    the model's hidden size, to check shapes against; without it the layers of the file are checked against each other
    depths    the model's number of double and of single blocks: patches of later blocks are left out and named in `ignored`
    in_width  input channels of the model's img_in as it is now: a LoRA for fewer is padded, one for more widens it
    """
    text = [k for k in tensors if is_text_encoder(k)]
    rest = {k: t for k, t in tensors.items() if not is_text_encoder(k)}
    converted = is_converted(rest)
    _reject_foreign(rest, text, name, converted, depths)
    found = _converted(rest, name, base) if converted else _gather(rest, name)
    _drop_idle(found, depths)
    if not any(n.part != "raw" for n in found.names.values()) and not converted:
        raise LoraError(f"{name} has nothing that FLUX.1 could take (keys like {_some(rest)}). {_CHOOSE}")
    kinds = {target: kind_of(name, parts) for target, parts in found.parts.items()}
    sizes = _check(found.parts, kinds, name, hidden)
    fitted = fit_img_in(found.parts, kinds, sizes, name, in_width)
    taken = not (fitted or converted or found.ignored) and _host_takes(found, kinds)
    state = dict(tensors) if taken else state_dict(found.parts, kinds) | {k: tensors[k] for k in text}
    style = "Nunchaku" if converted else _style(found)
    return LoraFile(style, state, found.ignored, text, taken or _host_converts(found, text))


def _some(keys: Mapping[str, object] | list[str], count: int = 2) -> str:
    """The first keys, quoted, for a sentence."""
    keys = list(keys)
    return ", ".join(repr(k[:120]) for k in keys[:count]) + (", ..." if len(keys) > count else "")


def _shape(size: Sequence[int | None]) -> str:
    return " x ".join("any" if s is None else str(s) for s in size)


# -- what is no LoRA for FLUX.1 ------------------------------------------------------------------------------------------------------------


def _reject_foreign(rest: Mapping[str, Tensor], text: list[str], name: str, converted: bool, depths: tuple[int, int] | None) -> None:
    """LoraError for a file that is no LoRA, or one for text encoders only, or one whose names say another family."""
    kind = identify([*rest, *text], {})
    if not any(is_lora_key(k) for k in [*rest, *text]) or kind.quantised:
        raise LoraError(f"{name} is not a LoRA but {kind.what}. {kind.advice}")
    if not rest:
        raise LoraError(f"{name} changes text encoders only (keys like {_some(text)}). Load it with the stock LoraLoader, behind the CLIP.")
    if converted:
        return
    if told := foreign(rest):
        raise LoraError(f"{name} is for {family_of_shapes(rest, told[0])}, not for FLUX.1 (keys like {_some(told[1])}). {_CHOOSE}")
    if (family := family_of_shapes(rest, "FLUX.1")) != "FLUX.1":
        raise LoraError(f"{name} is for {family}, not for FLUX.1, as the shapes of its tensors say (keys like {_some(rest)}). {_CHOOSE}")
    deep = (max(DOUBLE, depths[0]), max(SINGLE, depths[1])) if depths else (DOUBLE, SINGLE)
    if over := beyond(rest, deep):
        raise LoraError(
            f"{name} is not for FLUX.1 but seems to be for {deeper_family(rest)}: it has keys like {_some(over)}, and FLUX.1 has {deep[0]} "
            f"double and {deep[1]} single blocks, numbered from 0. {_CHOOSE}"
        )


def _check(modules: dict[Target, Parts], kinds: dict[Target, str], name: str, hidden: int | None) -> dict[Target, Size]:
    """The sizes of all patches, checked against each other and the model."""
    sizes = {target: size_of(name, target, kinds[target], parts) for target, parts in modules.items()}
    width = hidden or likely_hidden(sizes)
    bad = misfit(sizes, width) if width else None
    if bad:
        target, size = bad
        key = next(iter(modules[target].values()))[0]
        what = "does not fit the model" if hidden else "contradicts itself"
        right = f"right {'for the loaded model' if hidden else 'by the other layers of the file'} (hidden size {width})"
        raise LoraError(
            f"{name} {what}: {key} is for a layer of {_shape(size)} (output x input features); {_shape(wanted_size(target, width))} is "
            f"{right}. {_CHOOSE}"
        )
    for parts in modules.values():
        check_values(name, parts)
    return sizes


# -- taking the file apart ---------------------------------------------------------------------------------------------------------------


def _gather(tensors: Mapping[str, Tensor], name: str) -> _Modules:
    out = _Modules({}, {}, [])
    for key, t in tensors.items():
        parsed = parse(key)
        if parsed is None:
            out.ignored.append(key)
            continue
        out.names[key] = parsed
        _add(out, parsed.target, _SAME.get(parsed.part, parsed.part), key, t, name)
    seen: dict[tuple[str, int, int], str] = {}
    for target, parts in out.parts.items():  # norm_out.linear and final_layer.adaLN_modulation.1 are two targets of one module
        key = next(iter(parts.values()))[0]
        other = seen.setdefault((target.native, target.first, target.rows), key)
        if other != key:
            _twice(name, other, key)
    return out


def _add(out: _Modules, target: Target, part: str, key: str, t: Tensor, name: str) -> None:
    parts = out.parts.setdefault(target, {})
    if part in parts:
        _twice(name, parts[part][0], key)
    parts[part] = (key, t)


def _twice(name: str, key: str, other: str) -> None:
    raise LoraError(
        f"{name}: {key} and {other} are two names of the same thing. Two files were mixed; use the originals, one after the other."
    )


def _converted(tensors: Mapping[str, Tensor], name: str, base: Base | None) -> _Modules:
    """A file that nunchaku converted: the added columns, and the plain tensors beside them, whose names are diffusers' without prefix."""
    pairs, rest = converted_columns(tensors, name, base)
    biases = {k: f"{k[:-5]}.diff_b" for k in rest if k.endswith(".bias")}
    out = _gather({biases.get(k, k): tensors[k] for k in rest}, name)
    original = {new: old for old, new in biases.items()}
    out.ignored = [original.get(k, k) for k in out.ignored]
    for target, (key, down, up) in pairs:
        _add(out, target, "down", key, down, name)
        _add(out, target, "up", key, up, name)
    return out


def _drop_idle(found: _Modules, depths: tuple[int, int] | None) -> None:
    """Move modules that the model lacks, and those of which only an alpha is there, to the ignored keys."""
    for target, parts in list(found.parts.items()):
        if parts.keys() <= {"alpha", "reshape_weight"} or (depths and beyond([target.native], depths)):
            for key, _ in found.parts.pop(target).values():
                found.ignored.append(key)
                found.names.pop(key, None)


# -- what the host makes of the file -------------------------------------------------------------------------------------------------------


def _host_takes(found: _Modules, kinds: dict[Target, str]) -> bool:
    """Whether comfy.lora.load_lora finds every key as it is, and applies it as it is meant."""
    for target, parts in found.parts.items():
        names = {part: found.names[key] for part, (key, _) in parts.items()}
        if not all(n.plain for n in names.values()) or ("up" in names and names["up"].form != names["down"].form):
            return False
        if names.get("diff_b") and names["diff_b"].part == "b_norm" and "diff" not in parts:  # taken along with w_norm only
            return False
        if "dora_scale" in parts and parts["dora_scale"][1].ndim < 2:
            return False
        if kinds[target] == "oft" and parts["oft_blocks"][1].ndim == 4 and "alpha" not in parts:  # compares None with 0
            return False
        if target.swapped and not host_swaps(target, kinds[target], parts):
            return False
    return True


def _host_converts(found: _Modules, text: list[str]) -> bool:
    """Whether comfy.lora_convert.convert_lora, which LoraLoader asks first, knows the file: BFL's control LoRA, and USO in xlabs names."""
    names = found.names
    if found.ignored or text:
        return False
    parts = {n.part for n in names.values()}
    if {"img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale"} <= names.keys():
        return all(n.style == "BFL" for n in names.values()) and parts <= {"down", "up", "up_bias", "raw"}
    uso = {"single_blocks.37.processor.qkv_lora.up.weight", "double_blocks.18.processor.qkv_lora2.up.weight"}
    return (
        uso <= names.keys()
        and all(n.style == "xlabs" and k.startswith(("double_", "single_")) for k, n in names.items())
        and parts <= {"down", "up", "alpha"}
    )


def _style(found: _Modules) -> str:
    """The format that most keys are in."""
    style = Counter(n.style for n in found.names.values()).most_common(1)[0][0]
    return "BFL control" if any(n.part in ("up_bias", "raw") for n in found.names.values()) else style
