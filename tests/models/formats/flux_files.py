"""Help for the tests of formats: the golden miniatures, other checkpoints made from them, and a reference that shares no code with the
readers (index formulas of the format, element by element, in numpy)."""

import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DATA = Path(__file__).resolve().parents[2] / "data"
MINI = ["mini_flux_int4", "mini_flux_nvfp4", "mini_flux_int4_hd128"]
V2 = {
    "transformer_blocks": {
        "qkv_proj": "attn.to_qkv",
        "qkv_proj_context": "attn.add_qkv_proj",
        "out_proj": "attn.to_out.0",
        "out_proj_context": "attn.to_add_out",
        "mlp_fc1": "ff.net.0.proj",
        "mlp_fc2": "ff.net.2",
        "mlp_context_fc1": "ff_context.net.0.proj",
        "mlp_context_fc2": "ff_context.net.2",
        "norm_q": "attn.norm_q",
        "norm_k": "attn.norm_k",
        "norm_added_q": "attn.norm_added_q",
        "norm_added_k": "attn.norm_added_k",
    },
    "single_transformer_blocks": {"qkv_proj": "attn.to_qkv", "out_proj": "attn.to_out", "norm_q": "attn.norm_q", "norm_k": "attn.norm_k"},
}
V2_SUFFIX = {"lora_down": "proj_down", "lora_up": "proj_up", "smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig"}


def mini(name="mini_flux_int4"):
    """(tensors, metadata) of a golden miniature, free to be changed."""
    path = DATA / f"{name}.safetensors"
    with safe_open(path, "pt") as f:
        return load_file(path), dict(f.metadata())


def save(path, tensors, metadata=None):
    save_file({k: v.contiguous() for k, v in tensors.items()}, str(path), metadata)
    return path


def as_v2(tensors):
    out = {}
    for key, t in tensors.items():
        parts = key.split(".")
        if parts[0] in V2:
            layer, suffix = ".".join(parts[2:-1]), parts[-1]
            key = ".".join([*parts[:2], V2[parts[0]].get(layer, layer), V2_SUFFIX.get(suffix, suffix)])
        out[key] = t
    return out


def deeper(tensors, double, single):
    """The miniature with its blocks repeated."""
    out = {k: v for k, v in tensors.items() if "transformer_blocks" not in k}
    for stack, count in (("transformer_blocks.", double), ("single_transformer_blocks.", single)):
        for key, t in tensors.items():
            if key.startswith(stack):
                out |= {key.replace(f"{stack}0.", f"{stack}{i}.", 1): t.clone() for i in range(count)}
    return out


def raw_header(path):
    """(header JSON text, data bytes)."""
    blob = Path(path).read_bytes()
    n = struct.unpack("<Q", blob[:8])[0]
    return blob[8 : 8 + n].decode(), blob[8 + n :]


def write_raw(path, header, data, length=None):
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


# ---- the reference: section numbers are those of the format ---------------------------------------------------------------------------


def _vec_index(n):  # 3.3
    i = np.arange(n)
    m = i % 128
    return (i // 128) * 128 + 16 * (m // 16) + 4 * ((m % 8) // 2) + 2 * ((m // 8) % 2) + m % 2


def _np(t):
    return t.float().flatten().numpy().astype(np.float64)


def reference_w4a4(tensors, prefix, n, k, precision, unsigned):
    """(weight, bias) float64 of one W4A4 layer: q*s / smooth + up@down, and the bias with the shift compensation taken out."""
    get = lambda s: tensors[f"{prefix}.{s}"]  # noqa: E731
    N, K = np.meshgrid(np.arange(n), np.arange(k), indexing="ij")
    word = (
        (((N // 128 * (k // 64) + K // 64) * 8 + (N // 16) % 8) * 32 + 4 * (N % 8) + (K // 8) % 4) * 4 + 2 * ((N // 8) % 2) + (K // 32) % 2
    )
    q = (get("qweight").contiguous().view(torch.uint8).numpy().view(np.uint32).reshape(-1)[word] >> (4 * (K % 8)).astype(np.uint32)) & 15
    if precision == "int4":
        q = np.where(q > 7, q.astype(np.int64) - 16, q)
        s = _np(get("wscales"))[(N // 128 * (k // 64) + K // 64) * 128 + _vec_index(n)[N] % 128]
        w4 = q * s
    else:
        g = K // 16
        at = (((N // 128 * (k // 64) + g // 4) * 8 + N % 8) * 4 + (N // 8) % 4) * 16 + ((N // 32) % 4) * 4 + g % 4
        e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        w4 = e2m1[q % 8] * np.where(q > 7, -1, 1) * _np(get("wscales"))[at]
        if f"{prefix}.wtscale" in tensors:
            w4 = w4 * _np(get("wtscale"))[0]
        if f"{prefix}.wcscales" in tensors:
            w4 = w4 * _np(get("wcscales"))[_vec_index(n)][:, None]
    smooth = _np(get("smooth"))[_vec_index(k)]
    r = get("lora_down").shape[1]
    A, R = np.meshgrid(np.arange(n), np.arange(r), indexing="ij")
    up = ((A // 16 * (r // 16) + R // 16) * 32 + (A % 8) * 4 + (R % 8) // 2) * 8 + ((A // 8) % 2) * 4 + ((R // 8) % 2) * 2 + R % 2
    R, B = np.meshgrid(np.arange(r), np.arange(k), indexing="ij")
    down = ((B // 16 * (r // 16) + R // 16) * 32 + (R % 8) * 4 + (B % 8) // 2) * 8 + ((R // 8) % 2) * 4 + ((B // 8) % 2) * 2 + B % 2
    bias = _np(get("bias"))[_vec_index(n)]
    if unsigned:
        bias = bias + 0.171875 * (w4 / smooth).sum(1)
    return w4 / smooth + _np(get("lora_up"))[up] @ _np(get("lora_down"))[down], bias


def reference_modulation(tensors, prefix, chunks, d):
    """(weight, bias) float64 of one modulation layer in native row order (section 5)."""
    n, k = chunks * d, d
    stored = np.array([(row % d) * chunks + row // d for row in range(n)])[:, None]
    K = np.arange(k)[None]
    u16 = tensors[f"{prefix}.qweight"].contiguous().view(torch.uint8).numpy().view(np.uint16).reshape(-1)
    code = (
        u16[(stored // 4) * k + (K // 64) * 64 + (stored % 4) * 16 + ((K // 32) % 2) * 8 + K % 8] >> (4 * ((K % 32) // 8)).astype(np.uint16)
    ) & 15
    at = (K // 64) * n + stored
    weight = code * _np(tensors[f"{prefix}.wscales"])[at] + _np(tensors[f"{prefix}.wzeros"])[at]
    bias = _np(tensors[f"{prefix}.bias"])[stored[:, 0]]
    for chunk in {1, chunks - 2}:
        bias[chunk * d : (chunk + 1) * d] -= 1
    return weight, bias


def reference_flux(tensors, precision, h, mlp):
    """native name -> float64 array of the whole dense model of a v1 file (section 8)."""
    out = {}

    def linear(native, prefix, n, k, unsigned=False):
        out[f"{native}.weight"], out[f"{native}.bias"] = reference_w4a4(tensors, prefix, n, k, precision, unsigned and precision == "int4")

    blocks = {k.split(".")[1] for k in tensors if k.startswith("transformer_blocks.")}
    for i in sorted(blocks):
        src, dst = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        for side, ctx, fc, added in (("img", "", "mlp_", ""), ("txt", "_context", "mlp_context_", "added_")):
            mod = reference_modulation(tensors, f"{src}norm1{ctx}.linear", 6, h)
            out[f"{dst}{side}_mod.lin.weight"], out[f"{dst}{side}_mod.lin.bias"] = mod
            linear(f"{dst}{side}_attn.qkv", f"{src}qkv_proj{ctx}", 3 * h, h)
            linear(f"{dst}{side}_attn.proj", f"{src}out_proj{ctx}", h, h)
            linear(f"{dst}{side}_mlp.0", f"{src}{fc}fc1", mlp, h)
            linear(f"{dst}{side}_mlp.2", f"{src}{fc}fc2", h, mlp, unsigned=True)
            for q in ("query", "key"):
                out[f"{dst}{side}_attn.norm.{q}_norm.scale"] = tensors[f"{src}norm_{added}{q[0]}.weight"].double().numpy()
    for i in sorted({k.split(".")[1] for k in tensors if k.startswith("single_transformer_blocks.")}):
        src, dst = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        out[f"{dst}modulation.lin.weight"], out[f"{dst}modulation.lin.bias"] = reference_modulation(tensors, f"{src}norm.linear", 3, h)
        parts = [reference_w4a4(tensors, f"{src}{p}", n, h, precision, False) for p, n in (("qkv_proj", 3 * h), ("mlp_fc1", mlp))]
        out[f"{dst}linear1.weight"], out[f"{dst}linear1.bias"] = (np.concatenate(x) for x in zip(*parts, strict=True))
        a, b = reference_w4a4(tensors, f"{src}out_proj", h, h, precision, False)
        c, d = reference_w4a4(tensors, f"{src}mlp_fc2", h, mlp, precision, precision == "int4")
        out[f"{dst}linear2.weight"], out[f"{dst}linear2.bias"] = np.concatenate([a, c], 1), b + d
        for q in ("query", "key"):
            out[f"{dst}norm.{q}_norm.scale"] = tensors[f"{src}norm_{q[0]}.weight"].double().numpy()
    names = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }
    for native, file in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        names |= {
            f"{native}.in_layer": f"time_text_embed.{file}_embedder.linear_1",
            f"{native}.out_layer": f"time_text_embed.{file}_embedder.linear_2",
        }
    for native, file in names.items():
        for kind in ("weight", "bias"):
            if f"{file}.{kind}" in tensors:
                t = tensors[f"{file}.{kind}"].double().numpy()
                out[f"{native}.{kind}"] = np.concatenate([t[h:], t[:h]]) if file == "norm_out.linear" else t
    return out
