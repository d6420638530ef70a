"""Which kernels a FLUX model would have compiled on an H200, counted without one: every launch is noted down in place of being made.

Prints one JSON object: kernels by name, after what warm-up runs and after pictures of several sizes. A process of its own, because kernel
tests define the same kernels for the interpreter.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace

import torch
from tonfa.kernels import smooth_quantize_triton, targets, tiles
from tonfa.kernels.tiles import ALL_TILES
from tonfa.models.flux import build_blocks
from tonfa.models.formats.checkpoint import open_checkpoint
from tonfa.models.runtime import Runtime
from tonfa.models.warmup import TOKENS
from triton.runtime.jit import JITFunction

COMPILED: set[tuple] = set()


def feature(parameter, value) -> tuple:
    """What of an argument decides which compiled kernel is launched: Triton's rules."""
    if parameter.is_constexpr or value is None or isinstance(value, bool):
        return ("constant", str(value))
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.data_ptr() % 16 == 0)
    if isinstance(value, int):
        return ("int",) if parameter.do_not_specialize else ("int", value == 1, value % 16 == 0)
    if isinstance(value, float):
        return ("float",)
    return ("descriptor", str(value.base.dtype), tuple(value.block_shape))


def note(self, *arguments, grid, warmup, **named) -> None:
    """JITFunction.run that launches nothing."""
    values = dict(zip(self.arg_names, arguments, strict=False)) | {k: v for k, v in named.items() if k in self.arg_names}
    options = {k: v for k, v in named.items() if k not in self.arg_names}
    features = tuple(feature(p, values[p.name]) for p in self.params)
    COMPILED.add((self.fn.__name__, features, tuple(sorted(options.items()))))


def counted() -> dict[str, int]:
    return dict(Counter(name for name, *_ in COMPILED))


def main(checkpoint: str) -> None:
    JITFunction.run = note
    targets._key = lambda device: ("cuda", 0)
    targets._target_of = lambda kind, index: replace(targets.cuda_target(90), multiprocessors=132)
    targets._launch_reason = lambda kind, index: None
    smooth_quantize_triton.DESCRIPTOR_COLUMNS = tiles.LONG_K = 512  # as if the miniature's MLP were as wide as FLUX's
    opened = open_checkpoint(checkpoint)
    nothing = Runtime(attend=lambda q, *rest: q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3]))
    double, single = build_blocks(opened, runtime=nothing)
    width, half = opened.config["hidden_size"], opened.config["hidden_size"] // opened.config["num_heads"] // 2

    def step(image: int, text: int, batch: int, compute: str) -> None:
        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(batch, *shape, dtype=torch.bfloat16)

        options, pe = {"tonfa": {"compute": compute}}, torch.empty(1, 1, image + text, half, 2, 2)
        double[0](empty(image, width), empty(text, width), empty(width), pe, transformer_options=options)
        single[0](empty(image + text, width), empty(width), pe, transformer_options=options)

    result = {}
    with torch.inference_mode():
        for compute in ("fast", "exact"):
            COMPILED.clear()
            ALL_TILES.set(True)
            step(TOKENS, TOKENS, 1, compute)
            ALL_TILES.set(False)
            warm = counted()
            for pixels in (512, 768, 1008, 1024, 1536, 2048):
                step((pixels // 16) ** 2, 512, 1, compute)
            step(63 * 65, 333, 1, compute)
            result[compute] = {"warm-up": warm, "all sizes": counted()}
            step(4096, 512, 4, compute)
            result[compute]["batch of 4"] = counted()
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
