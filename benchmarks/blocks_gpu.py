"""One double and one single block at FLUX.1-dev size on a GPU: fused against plain path, recorded against ordinary runs, time.

    python benchmarks/blocks_gpu.py CHECKPOINT.safetensors [--json FILE]     (make_checkpoint.py flux FILE --depth 1 --single-depth 1)

4096 image and 512 text tokens. Exits 1 when fused and plain differ by more than 1e-2 (exact) or 3e-3 (fast), or a
replayed CUDA graph differs from the ordinary run in a bit, or a recording that fails on purpose leaves memory behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys

import torch
from tonfa.kernels.targets import target_for
from tonfa.models.flux import Flux, rope_table
from tonfa.models.formats.checkpoint import open_checkpoint
from tonfa.models.graphs import Graphs

LIMIT = {"exact": 1e-2, "fast": 3e-3}
PLAIN = {"optimized_attention_override": object()}


def inputs(batch: int, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    g = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, device=device).to(dtype)  # noqa: E731
    at = torch.arange(4096, device=device)
    ids = torch.zeros(1, 4608, 3, device=device)
    ids[0, 512:, 1], ids[0, 512:, 2] = at // 64, at % 64
    return {
        "img": draw(batch, 4096, 3072), "txt": draw(batch, 512, 3072), "vec": draw(batch, 3072), "pe": rope_table(ids, [16, 56, 56], 1e4)
    }  # fmt: skip


def milliseconds(run, repeats: int = 20) -> float:
    """Median of CUDA-event timings."""
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def check(path: str, dtype: torch.dtype, batch: int, rows: list[dict]) -> None:
    model = Flux(open_checkpoint(path), dtype, "cuda").eval()
    graphs = Graphs()
    for block in (*model.double_blocks, *model.single_blocks):
        block.runtime = dataclasses.replace(block.runtime, graphs=graphs)
    a = inputs(batch, dtype, "cuda")
    x = torch.cat((a["txt"], a["img"]), 1)

    def run(options: dict) -> tuple[torch.Tensor, ...]:
        return *model.double_blocks[0](**a, transformer_options=options), model.single_blocks[0](
            x, vec=a["vec"], pe=a["pe"], transformer_options=options
        )

    for mode, limit in LIMIT.items():
        options = {"tonfa": {"compute": mode}}
        graphs.release()
        fused, again = run(options), [run(options) for _ in range(3)][-1]  # the second run is recorded, the others replayed
        recorded, plain = len(graphs._recorded), run({**options, **PLAIN})
        for name, f, b, p in zip(("double img", "double txt", "single"), fused, again, plain, strict=True):
            row = {"file": path, "dtype": str(dtype), "batch": batch, "mode": mode, "output": name, "fused_vs_plain": relative(f, p)}
            row |= {"same_bits": torch.equal(f, b), "finite": bool(torch.isfinite(f).all()), "ms": None}
            row["recorded"] = recorded == 2 or not target_for("cuda").copy_engine
            row["ok"] = row["fused_vs_plain"] <= limit and row["same_bits"] and row["finite"] and row["recorded"]
            rows.append(row)
        rows[-3]["ms"] = milliseconds(lambda o=options: model.double_blocks[0](**a, transformer_options=o))
        rows[-1]["ms"] = milliseconds(lambda o=options: model.single_blocks[0](x, vec=a["vec"], pe=a["pe"], transformer_options=o))


def check_failure(path: str, rows: list[dict]) -> None:
    """A recording that fails while its streams are apart: the bits are right all the same, its memory comes back, the next one works."""
    model, graphs, fails = Flux(open_checkpoint(path), torch.bfloat16, "cuda").eval(), Graphs(), [False]
    block, a, options = model.double_blocks[0], inputs(1, torch.bfloat16, "cuda"), {"tonfa": {"compute": "fast"}}
    attend = block.runtime.attend

    def attend_or_fail(*args: object) -> torch.Tensor:
        if fails[0] and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("on purpose")
        return attend(*args)

    block.runtime = dataclasses.replace(block.runtime, graphs=graphs, attend=attend_or_fail)

    def run(times: int) -> tuple[torch.Tensor, ...]:
        return [block(**a, transformer_options=options) for _ in range(times)][-1]

    def reserved() -> int:
        graphs.release()
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    want = run(1)
    before, fails[0] = reserved(), True
    same, refused = all(torch.equal(x, y) for x, y in zip(run(3), want, strict=True)), graphs.off
    after, fails[0], graphs.off = reserved(), False, False
    again = run(3)
    same = same and all(torch.equal(x, y) for x, y in zip(again, want, strict=True))
    row = {"file": path, "dtype": "torch.bfloat16", "batch": 1, "mode": "fast", "output": "failed recording", "fused_vs_plain": 0.0}
    row |= {"same_bits": same, "left_bytes": after - before, "ms": None}
    row["ok"] = same and refused and after - before <= 4 << 20 and len(graphs._recorded) == 1
    rows.append(row)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", nargs="+")
    p.add_argument("--json")
    o = p.parse_args()
    rows: list[dict] = []
    with torch.inference_mode():
        for path in o.checkpoint:
            for dtype, batch in ((torch.bfloat16, 1), (torch.bfloat16, 2), (torch.float16, 1)):
                check(path, dtype, batch, rows)
            if target_for("cuda").copy_engine:
                check_failure(path, rows)
    for r in rows:
        time = "" if r["ms"] is None else f"{r['ms']:.3f} ms"
        print(
            f"{'ok  ' if r['ok'] else 'MISS'} {r['file']} {r['dtype']} batch {r['batch']} {r['mode']:5} {r['output']:10} "
            f"fused/plain {r['fused_vs_plain']:.2e} same bits {r['same_bits']} {time}"
        )
    if o.json:
        with open(o.json, "w") as f:
            json.dump(rows, f, indent=1)
    sys.exit(0 if all(r["ok"] for r in rows) else 1)


if __name__ == "__main__":
    main()
