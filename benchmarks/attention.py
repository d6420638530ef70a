"""Attention back ends at FLUX's sizes: our fp16 kernel, torch's, and what the loader's `attention` takes.

    python benchmarks/attention.py [--tokens 4608,16384] [--rounds 20] [--json FILE] [--cpu]

24 heads of 128, bf16, as a block has them: windows on one [B, L, 3 * H * D], and the result wanted as [B, L, H * D].
Limits: what nunchaku-fp16 runs is at least as fast as torch's fastest in the same run (2 % of noise allowed), and
our kernel with fp16 output is within 1e-3 of fp32 attention on inputs that overflow plain fp16. Exits 1 when one is missed.
"""

from __future__ import annotations

import argparse
import sys

import torch
from timing import Report, Work, heading, need_gpu, on_gpu, round_robin_us
from tonfa.kernels.attention_fp16 import attention_fp16
from tonfa.models.attention import attend, heads_last
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, DIM = 24, 128
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


def operands(tokens: int, device: str) -> list[torch.Tensor]:
    g = torch.Generator(device).manual_seed(tokens)
    qkv = torch.randn(1, tokens, 3, HEADS, DIM, generator=g, device=device, dtype=torch.bfloat16)
    return list(qkv.permute(2, 0, 3, 1, 4))


def by_torch(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Work:
    def work() -> torch.Tensor:
        with sdpa_kernel(backend):
            return heads_last(F.scaled_dot_product_attention(q, k, v))

    return work


def contenders(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Work]:
    """Torch's back ends that take these operands, our kernel, and what `attend` chooses."""
    found: dict[str, Work] = {"nunchaku-fp16": lambda: attend(q, k, v, HEADS), "our kernel": lambda: attention_fp16(q, k, v)}
    for name, backend in BACKENDS.items():
        work = by_torch(backend, q, k, v)
        try:
            work()
        except RuntimeError:
            continue
        found[name] = work
    return found


def error_with_outliers(device: str, tokens: int = 1024) -> float:
    """Of fp16 output against fp32 attention, with scores beyond fp16's range."""
    g = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, 4, tokens, DIM, generator=g, device=device) for _ in range(3))
    q[..., 3] *= 1200
    k[..., 3] *= 900
    v[:, 0] *= 3000
    q, k, v = q.half(), k.half(), v.half()
    if torch.isfinite(q @ k.transpose(2, 3)).all():
        raise SystemExit("these inputs were meant to overflow fp16")
    scores = q.float() @ k.float().transpose(2, 3) / DIM**0.5
    want = (scores.softmax(3) @ v.float()).transpose(1, 2).flatten(2).double()
    return float((attention_fp16(q, k, v).double() - want).norm() / want.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="4608,16384")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", help="also write rows and limits to this file")
    parser.add_argument("--cpu", action="store_true", help="try this script out without a GPU")
    o = parser.parse_args()
    device = need_gpu(o.cpu)
    report = Report(heading(), o.json)
    torch.backends.cuda.matmul.allow_tf32 = False
    for tokens in map(int, o.tokens.split(",")):
        works = contenders(*operands(tokens, device))
        times = round_robin_us(works, o.rounds)
        flops = 4 * HEADS * tokens * tokens * DIM
        for name, us in sorted(times.items(), key=lambda item: item[1]):
            print(f"{tokens:6} tokens  {name:16}{us:10.1f} us {flops / us / 1e6:8.1f} TFLOP/s", flush=True)
        best = min(us for name, us in times.items() if name in BACKENDS) if on_gpu() else times["our kernel"]
        report.rows.append({"tokens": tokens, **times})
        report.check(f"{tokens} tokens: nunchaku-fp16 over torch's fastest", times["nunchaku-fp16"] / best, 1.02)
    report.check("our kernel, fp16 out, with outliers: error", error_with_outliers(device), 1e-3)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
