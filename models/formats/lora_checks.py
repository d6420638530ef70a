"""What is wrong with one module of a LoRA file: parts that are missing, contradict each other, hold no numbers, or do not fit FLUX.1."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from .lora_names import LoraError, Target

Parts = dict[str, tuple[str, Tensor]]  # part name -> (key in the file, tensor)
Size = tuple[int | None, int | None]  # output and input features that a patch is for; None: any

# kind -> (its parts, what must be there: any one group of each line)
_KINDS: dict[str, tuple[set[str], list[list[set[str]]]]] = {
    "lora": ({"down", "up", "mid", "up_bias"}, [[{"down", "up"}]]),
    "loha": (
        {f"hada_{p}" for p in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        [[{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}]],
    ),
    "lokr": (
        {f"lokr_{p}" for p in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
        [[{"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}], [{"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}]],
    ),
    "glora": ({"a1", "a2", "b1", "b2"}, [[{"a1", "a2", "b1", "b2"}]]),
    "oft": ({"oft_blocks", "rescale"}, [[{"oft_blocks"}]]),
    "diff": ({"diff"}, [[{"diff"}]]),
    "set": ({"set_weight"}, [[{"set_weight"}]]),
}
_WORDS = {"down": "lora_down (lora_A)", "up": "lora_up (lora_B)"}
_CONVOLUTION = ("mid", "hada_t1", "hada_t2", "lokr_t2")
_NO_FLOATS = ("alpha", "reshape_weight")


def kind_of(name: str, parts: Parts) -> str:
    """The kind of patch on a module's weight, "" when only its bias is patched. LoraError when there are two, or one in pieces."""
    kinds = [k for k, (members, _) in _KINDS.items() if members & parts.keys()]
    if len(kinds) > 1:
        first, second = (next(parts[p][0] for p in _KINDS[k][0] if p in parts) for k in kinds[:2])
        raise LoraError(f"{name}: {first} and {second} patch the same weight in two ways. The file is damaged, or two files were mixed.")
    if "diff_b" in parts and "set_b" in parts:
        raise LoraError(f"{name}: {parts['diff_b'][0]} and {parts['set_b'][0]} patch the same bias in two ways.")
    if not kinds:
        if "dora_scale" in parts:
            key = parts["dora_scale"][0]
            raise LoraError(f"{name}: {key} is there, but nothing that it scales. The file is damaged or cut off; download it again.")
        return ""
    members, needed = _KINDS[kinds[0]]
    for groups in needed:
        if not any(g <= parts.keys() for g in groups):
            there = sorted(parts[p][0] for p in members if p in parts)
            wanted = " or ".join(" and ".join(_WORDS.get(p, p) for p in sorted(g - parts.keys())) for g in groups)
            raise LoraError(f"{name}: {there[0]} is there, but its {wanted} is not. The file is damaged or cut off; download it again.")
    if kinds[0] == "lokr" and ({"lokr_w1", "lokr_w1_a"} <= parts.keys() or {"lokr_w2", "lokr_w2_a"} <= parts.keys()):
        raise LoraError(f"{name}: {parts[min(p for p in parts if p.startswith('lokr'))][0]} is there whole and in two factors.")
    if bad := next((parts[p][0] for p in _CONVOLUTION if p in parts), None):
        raise LoraError(f"{name}: {bad} is for a convolution, and FLUX.1 has none.")
    return kinds[0]


def check_values(name: str, parts: Parts) -> None:
    """LoraError for NaN, infinity, integers where numbers belong, and an alpha or shape that is not one."""
    for part, (key, t) in parts.items():
        if part == "alpha" and (t.numel() != 1 or t.is_complex()):
            raise LoraError(f"{name}: {key} should be one number, it is {t.dtype} {list(t.shape)}.")
        if part == "reshape_weight" and (t.ndim != 1 or t.is_floating_point() or t.is_complex()):
            raise LoraError(f"{name}: {key} should be the shape of a weight in integers, it is {t.dtype} {list(t.shape)}.")
        if part not in _NO_FLOATS and not t.is_floating_point():
            raise LoraError(f"{name}: {key} is stored as {t.dtype}; a LoRA has floating-point numbers.")
        if not _finite(t):
            raise LoraError(f"{name}: {key} holds NaN or infinity. Its training failed or the file is damaged.")


def _finite(t: Tensor) -> bool:
    """Whether no element is NaN or infinite. aminmax passes NaN on and takes a sixtieth of the time of isfinite in bf16."""
    if t.numel() == 0 or not t.is_floating_point():
        return True
    if t.dtype == torch.float8_e4m3fn:
        return int((t.view(torch.uint8) & 0x7F).max()) < 0x7F
    if t.dtype == torch.float8_e5m2:
        return int((t.view(torch.uint8) & 0x7F).max()) < 0x7C
    low, high = (t.float() if t.dtype.itemsize == 1 else t).aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


# -- sizes -------------------------------------------------------------------------------------------------------------------------------


def size_of(name: str, target: Target, kind: str, parts: Parts) -> Size:
    """(output, input) features that the module's tensors are for. LoraError when they contradict each other."""
    if target.is_norm:
        size: Size = (_vector(name, *parts["diff" if kind == "diff" else "set_weight"]), None)
    else:
        size = _weight_size(name, kind, parts)
    n, k = size
    for part in ("diff_b", "set_b", "up_bias"):
        if part in parts:
            n = _agree(name, parts[part][0], _vector(name, *parts[part]), n)
    if "dora_scale" in parts:
        _check_dora(name, *parts["dora_scale"], n, k)
    if "reshape_weight" in parts and parts["reshape_weight"][1].tolist() != [n, k]:
        key, t = parts["reshape_weight"]
        raise LoraError(f"{name}: {key} says {t.tolist()}, the tensors beside it are for {[n, k]}.")
    return n, k


def _weight_size(name: str, kind: str, parts: Parts) -> Size:
    """What the patch of a linear's weight is for."""
    if not kind:
        return None, None
    if kind == "oft":
        return _oft_size(name, *parts["oft_blocks"]), None
    ones = 2 if kind in ("lora", "glora") else 0  # ComfyUI flattens the factors of these two
    m = {p: _matrix(name, *parts[p], ones) for p in parts.keys() & _KINDS[kind][0] if p != "up_bias"}
    if kind == "lora":
        return _product(name, parts, m, "up", "down")
    if kind == "glora":
        return _glora_size(name, parts, m)
    if kind == "loha":
        first, second = (_product(name, parts, m, f"hada_{w}_a", f"hada_{w}_b") for w in ("w1", "w2"))
        _same_size(name, parts["hada_w1_a"][0], first, parts["hada_w2_a"][0], second)
        return first
    if kind == "lokr":
        (a, b), (c, d) = (
            m[f"lokr_{w}"] if f"lokr_{w}" in m else _product(name, parts, m, f"lokr_{w}_a", f"lokr_{w}_b") for w in ("w1", "w2")
        )
        return a * c, b * d
    return m["diff" if kind == "diff" else "set_weight"]


def _matrix(name: str, key: str, t: Tensor, ones: int) -> tuple[int, int]:
    """Rows and columns; up to `ones` trailing ones in the shape, as of a 1x1 convolution, do not count."""
    if t.ndim < 2 or t.ndim > 2 + ones or any(s != 1 for s in t.shape[2:]) or 0 in t.shape:
        raise LoraError(f"{name}: {key} should be a matrix, it is {list(t.shape)}.")
    return t.shape[0], t.shape[1]


def _vector(name: str, key: str, t: Tensor) -> int:
    if t.ndim != 1 or not len(t):
        raise LoraError(f"{name}: {key} should be a vector, it is {list(t.shape)}.")
    return len(t)


def _product(name: str, parts: Parts, m: Mapping[str, tuple[int, int]], left: str, right: str) -> tuple[int, int]:
    if m[left][1] != m[right][0]:
        raise LoraError(
            f"{name}: {parts[left][0]} is {list(m[left])} and {parts[right][0]} is {list(m[right])}: their ranks differ, so they cannot "
            "be multiplied. The file is damaged; download it again."
        )
    return m[left][0], m[right][1]


def _same_size(name: str, key: str, size: Size, other: str, other_size: Size) -> None:
    if size != other_size:
        raise LoraError(f"{name}: {key} is for a weight of {list(size)}, {other} for one of {list(other_size)}. The file is damaged.")


def _glora_size(name: str, parts: Parts, m: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Today's form is W a1 a2 + b1 b2, the old one W a2 a1 + b2 b1. On a square weight both multiply: the lower rank is meant."""
    fits = []
    for a, b, c, d in (("a1", "a2", "b1", "b2"), ("a2", "a1", "b2", "b1")):
        rank = m[a][1]
        if m[b][0] == m[c][1] == m[d][0] == rank and m[a][0] == m[b][1] == m[d][1]:
            fits.append((rank, m[c][0], m[a][0]))
    if not fits:
        shapes = ", ".join(f"{p} {list(m[p])}" for p in ("a1", "a2", "b1", "b2"))
        raise LoraError(f"{name}: the GLoRA factors of {parts['a1'][0]} do not fit together ({shapes}). The file is damaged.")
    return min(fits)[1:]


def _oft_size(name: str, key: str, t: Tensor) -> int:
    if t.ndim not in (3, 4) or t.shape[-1] != t.shape[-2] or 0 in t.shape:
        raise LoraError(f"{name}: {key} should be square blocks, [count, b, b] or (BOFT) [steps, count, b, b]; it is {list(t.shape)}.")
    return t.shape[-3] * t.shape[-1]


def _agree(name: str, key: str, found: int, expected: int | None) -> int:
    if expected is not None and found != expected:
        raise LoraError(f"{name}: {key} has {found} elements, the tensors beside it {expected} output features. The file is damaged.")
    return found


def _check_dora(name: str, key: str, t: Tensor, n: int | None, k: int | None) -> None:
    fits = [[n], [n, 1], [1, k]] if k is not None else [[n], [n, 1]]
    if list(t.shape) not in fits and not (k is None and t.ndim == 2 and t.shape[0] == 1):
        raise LoraError(f"{name}: {key} is {list(t.shape)}, expected {' or '.join(map(str, fits))}. The file is damaged.")


# -- against the model -------------------------------------------------------------------------------------------------------------------

FIXED = {"final_layer.linear": (64, None), "time_in.in_layer": (None, 256), "guidance_in.in_layer": (None, 256)}
FIXED_FULL = {"txt_in": (None, 4096), "vector_in.in_layer": (None, 768)}  # at the hidden size of every published FLUX.1, 3072


def wanted_size(target: Target, hidden: int) -> Size:
    """The output and input features of what a patch is for, in a FLUX.1 of that hidden size; None where they may be any."""
    if target.is_norm:
        return (128 if hidden == 3072 else None), None
    n, k = (times * hidden if times else None for times in (target.rows, target.cols))
    fixed_n, fixed_k = (FIXED | FIXED_FULL if hidden == 3072 else FIXED).get(target.native, (None, None))
    return n or fixed_n, k or fixed_k


def likely_hidden(sizes: Mapping[Target, Size]) -> int | None:
    """The hidden size that most layers of the file speak for; None when none says any."""
    votes: Counter[int] = Counter()
    for target, size in sizes.items():
        for times, features in zip((target.rows, target.cols), size, strict=True):
            if times > 0 and features and features % times == 0:
                votes[features // times] += 1
    return votes.most_common(1)[0][0] if votes else None


def misfit(sizes: Mapping[Target, Size], hidden: int) -> tuple[Target, Size] | None:
    """The first patch that is not for a layer of FLUX.1 of that hidden size."""
    for target, size in sizes.items():
        wanted = wanted_size(target, hidden)
        if any(found is not None and w is not None and found != w for found, w in zip(size, wanted, strict=True)):
            return target, size
    return None
