"""The stock ComfyUI transformer with random weights, in the forms that users load FLUX in today. Import after timing.start_host().

    bf16         the host's own linears
    fp8_fast     e4m3 weights, multiplied in e4m3 (the host's --fast path)
    nf4          bitsandbytes NF4, blocks of 64
    gguf_q4_k    ComfyUI-GGUF: Q4_K blocks, dequantised to bf16 at each use

The last two need packages that are not this project's: a folder named by the environment variable PEERS with site/ (bitsandbytes, gguf, and
what they import) and gguf/dequant.py (that one file of a ComfyUI-GGUF checkout).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable

import comfy.ops
import torch
from comfy.ldm.flux.model import Flux
from torch import Tensor, nn
from torch.nn import functional as F

FORMS = ("bf16", "fp8_fast", "nf4", "gguf_q4_k")
STD = 0.02
BF16 = torch.bfloat16


def build(form: str, config: dict, device: str) -> nn.Module:
    """The transformer of `config` (the fields of the host's FluxParams). Raises whatever a form's packages raise where they are missing."""
    dtype, operations = BF16, comfy.ops.disable_weight_init
    if form == "fp8_fast":
        dtype, operations = torch.float8_e4m3fn, comfy.ops.fp8_ops
    elif form == "nf4":
        operations = nf4_operations()
    elif form == "gguf_q4_k":
        operations = q4_k_operations()
    elif form != "bf16":
        raise ValueError(f"form is {form!r}, expected one of {', '.join(FORMS)}")
    model = Flux(image_model="flux", **config, dtype=dtype, device=device, operations=operations).eval().requires_grad_(False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            fill(name, p)
    if form == "fp8_fast":
        check_fp8(model)
    return model


def fill(name: str, p: Tensor) -> None:
    """Weights of 0.02, norms of one, biases of zero."""
    if p.ndim > 1:
        p.copy_(torch.randn(p.shape, dtype=BF16, device=p.device) * STD)
    else:
        p.copy_(torch.full_like(p, 1.0 if "norm" in name else 0.0, dtype=BF16))


def check_fp8(model: nn.Module) -> None:
    """Raises when the host's fp8 product does not run here: its linear would multiply in bf16 instead, without a word."""
    layer = model.single_blocks[0].linear1
    x = torch.randn(1, 16, layer.weight.shape[1], dtype=BF16, device=layer.weight.device)
    with torch.inference_mode():
        if comfy.ops.fp8_linear(layer, x) is None:
            raise RuntimeError("the host's fp8_linear refuses a layer of this model")


def bias_parameter(n: int, device: str) -> nn.Parameter:
    return nn.Parameter(torch.zeros(n, dtype=BF16, device=device), requires_grad=False)


def nf4_operations() -> type:
    import bitsandbytes

    class Linear(nn.Module):
        def __init__(self, k: int, n: int, bias: bool = True, device: str | None = None, dtype: torch.dtype | None = None):
            super().__init__()
            dense = torch.randn(n, k, dtype=BF16, device=device) * STD
            self.codes, self.state = bitsandbytes.functional.quantize_4bit(dense, quant_type="nf4", blocksize=64)
            self.bias = bias_parameter(n, device) if bias else None

        def forward(self, x: Tensor) -> Tensor:
            return bitsandbytes.matmul_4bit(x, self.codes.t(), bias=self.bias, quant_state=self.state)

    return with_linear(Linear)


def q4_k_operations() -> type:
    dequantize, q4_k = gguf_dequantize()

    class Linear(nn.Module):
        def __init__(self, k: int, n: int, bias: bool = True, device: str | None = None, dtype: torch.dtype | None = None):
            super().__init__()
            self.shape = (n, k)
            packed = k % 256 == 0  # GGUF files keep other layers in 16 bit
            self.blocks = q4_k_blocks(n, k, device) if packed else None
            self.dense = None if packed else torch.randn(n, k, dtype=BF16, device=device) * STD
            self.bias = bias_parameter(n, device) if bias else None

        def forward(self, x: Tensor) -> Tensor:
            weight = self.dense if self.blocks is None else dequantize(self.blocks, q4_k, self.shape, dtype=BF16)
            return F.linear(x, weight.to(x.dtype), self.bias)

    return with_linear(Linear)


def q4_k_blocks(n: int, k: int, device: str | None) -> Tensor:
    """Random Q4_K bytes [n, k / 256 * 144] of weights of about 0.02: a block's scale and minimum in fp16, then 6-bit factors and codes."""
    blocks = torch.randint(0, 256, (n * k // 256, 144), dtype=torch.uint8, device=device)
    scale = STD / (31 * 4.6)  # 6-bit factors average 31, codes 0..15 spread by 4.6 around 7.5
    head = torch.tensor([scale, 7.5 * scale], dtype=torch.float16, device=device)
    blocks[:, :4] = head.view(torch.uint8)
    return blocks.view(n, -1)


def gguf_dequantize() -> tuple[Callable[..., Tensor], object]:
    """ComfyUI-GGUF's dequantize and the type number of Q4_K."""
    import gguf

    path = os.path.join(os.environ.get("PEERS", ""), "gguf", "dequant.py")
    if not os.path.isfile(path):
        raise FileNotFoundError("the folder PEERS holds no gguf/dequant.py")
    spec = importlib.util.spec_from_file_location("comfyui_gguf_dequant", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.dequantize, gguf.GGMLQuantizationType.Q4_K


def with_linear(linear: type) -> type:
    """The host's operations with another Linear."""
    return type("Operations", (comfy.ops.disable_weight_init,), {"Linear": linear})
