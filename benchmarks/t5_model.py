"""A T5-XXL of random weights through the quantiser and the real text-encoder node in the real host, on a GPU.

    COMFYUI_PATH=... python benchmarks/t5_model.py FOLDER [--json FILE] [--tiny --cpu]

Writes to FOLDER (13 GB free): a T5-XXL in fp16 with T5's own initialisation and heavy tails, a CLIP-L, and the T5 as quantize-t5 makes it.
Limits: quantising under 60 s on the GPU; with the file in the page cache a load under 6 s that adds at most 3.3 GiB of anonymous memory;
at most 2.8 GiB of weights on the GPU with CLIP-L beside; encoding 256 and 512 tokens at most 1.3x of the fp16 encoder on the GPU; error
against that no larger than of the same codes dequantised in fp32; a linear compiled, or under autocast, keeps its bits. Exits 1 when one
is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

import torch
from full_model import PeakRss
from safetensors.torch import save_file
from timing import GIB, MIB, Report, Timer, gpu_sleep, heading, into_page_cache, need_gpu, on_gpu, start_host, sync
from tonfa.models.formats.t5 import T5Dims
from tonfa.models.quantize_t5 import quantize_t5
from torch import Tensor

XXL = T5Dims(blocks=24, model=4096, heads=64, inner=4096, ff=10240, vocab=32128, buckets=32)
TINY = T5Dims(blocks=2, model=256, heads=4, inner=256, ff=512, vocab=32128, buckets=32)
PROMPT = "a photograph of a lighthouse at dusk, waves on the rocks, a small boat with a red sail " * 3
CLIP, PLAIN, FOUR = "clip_l.safetensors", "t5xxl_fp16.safetensors", "awq-int4-flux.1-t5xxl.safetensors"


def t5_tensors(dims: T5Dims, device: str) -> dict[str, Tensor]:
    """fp16, on the CPU: T5's initialisation with a Student's t of 5 degrees of freedom."""
    g = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        chi = sum(torch.randn(shape, generator=g, device=device).square_() for _ in range(5)) / 5
        return torch.randn(shape, generator=g, device=device) / chi.sqrt_().clamp_(min=0.2) * 0.77

    found = {}
    for prefix, (n, k) in dims.linears().items():
        gain = k**-0.5 * ((dims.inner // dims.heads) ** -0.5 if prefix.endswith(".q") else 1)
        found[f"{prefix}.weight"] = (draw(n, k) * gain).half().cpu()
    for name, shape in dims.plain().items():
        made = torch.randn(shape, generator=g, device=device)
        found[name] = ((made * 0.3).exp_() * 0.3 if "layer_norm" in name else made).half().cpu()
    return found


def clip_tensors() -> dict[str, Tensor]:
    import comfy.clip_model

    with open(os.path.join(os.path.dirname(comfy.clip_model.__file__), "sd1_clip_config.json")) as f:
        config = json.load(f)
    with torch.device("meta"):
        shapes = comfy.clip_model.CLIPTextModel(config, torch.float16, "meta", torch.nn).state_dict()
    g = torch.Generator().manual_seed(1)
    return {
        name: (torch.randn(t.shape, generator=g) * 0.02 + ("norm" in name and name.endswith("weight"))).half()
        for name, t in shapes.items()
        if t.is_floating_point()
    }


class Bench:
    def __init__(self, folder: str, report: Report, device: str):
        self.folder, self.report, self.device = folder, report, device

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def files(self, dims: T5Dims) -> None:
        start = time.perf_counter()
        save_file(t5_tensors(dims, self.device), self.path(PLAIN))
        save_file(clip_tensors(), self.path(CLIP))
        print(f"files written in {time.perf_counter() - start:.1f} s", flush=True)
        sync()
        start = time.perf_counter()
        quantize_t5(self.path(PLAIN), self.path(FOUR), self.device)
        self.report.check("quantising", time.perf_counter() - start, 60, "s")
        print(f"{FOUR}: {os.path.getsize(self.path(FOUR)) / 1e9:.2f} GB", flush=True)

    def load(self, t5: str) -> object:
        from tonfa.nodes.text_encoder import NunchakuTextEncoderLoaderV2

        return NunchakuTextEncoderLoaderV2().load_text_encoder("flux.1", CLIP, t5, 256)[0]

    def four_bit(self) -> object:
        """The 4-bit encoder on the GPU, with its limits of time and memory."""
        for name in (CLIP, FOUR):
            into_page_cache(self.path(name))
        torch.ones(8, 8, device=self.device) @ torch.ones(8, 8, device=self.device)  # a CUDA context and cuBLAS
        sync()
        watch, start = PeakRss(), time.perf_counter()
        clip = self.load(FOUR)
        sync()
        self.report.check("load from page cache", time.perf_counter() - start, 6, "s")
        self.report.check("anonymous memory added while loading", watch.stop() / GIB, 3.3, "GiB")
        if on_gpu():
            torch.cuda.empty_cache()
            before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            start = time.perf_counter()
            clip.load_model()
            sync()
            took, reserved = time.perf_counter() - start, torch.cuda.memory_reserved() - reserved
            print(f"to the GPU in {took:.2f} s, memory asked of the driver {reserved / GIB:.3f} GiB", flush=True)
            self.report.check("weights on the GPU with CLIP-L", (torch.cuda.memory_allocated() - before) / GIB, 2.8, "GiB")
            torch.cuda.reset_peak_memory_stats()
            self.encode(clip, 512)
            print(f"peak while encoding 512 tokens {(torch.cuda.max_memory_allocated() - before) / GIB:.2f} GiB", flush=True)
            grown = torch.cuda.memory_allocated() - before
            print(f"host counts {clip.patcher.loaded_size() / MIB:.0f} MiB, the allocator {grown / MIB:.0f}", flush=True)
        return clip

    def encode(self, clip: object, length: int) -> Tensor:
        tokens = clip.tokenize(PROMPT, tokenizer_options={"t5xxl_min_length": length})
        return clip.encode_from_tokens(tokens)

    def t5_ms(self, clip: object, length: int, repeats: int = 12) -> float:
        """The T5 alone, as the encoder runs it."""
        tokens = [[(t, 1.0) for t, *_ in row] for row in clip.tokenize(PROMPT, tokenizer_options={"t5xxl_min_length": length})["t5xxl"]]
        encoder, timers = clip.load_model().model.t5xxl, []
        for i in range(repeats + 3):
            gpu_sleep(1_000_000)
            with Timer() as timer:
                encoder.encode_token_weights(tokens)
            timers += [timer] if i >= 3 else []
        sync()
        return statistics.median(t.ms() for t in timers)


def dequantised(clip: object, four: object) -> None:
    """Puts the 4-bit encoder's weights, in fp32, into the ordinary one."""
    from tonfa.models.t5 import PackedT5Linear

    target = clip.cond_stage_model.t5xxl.transformer
    for name, leaf in four.cond_stage_model.t5xxl.transformer.named_modules():
        if isinstance(leaf, PackedT5Linear):
            linear = target.get_submodule(name)
            weight = leaf.convert_weight(leaf.weight.to(linear.weight.device))
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)


def keeps_its_bits(clip: object, report: Report, device: str) -> None:
    """A 4-bit linear with a LoRA beside it, compiled and under autocast."""
    from tonfa.models.lora import Term, make_side
    from tonfa.models.t5 import PackedT5Linear

    leaf = next(m for m in clip.cond_stage_model.modules() if isinstance(m, PackedT5Linear))
    term = Term(torch.randn(leaf.out_features, 16, device=device), torch.randn(16, leaf.in_features, device=device), 0.01)
    leaf.set_side(make_side(leaf.spec, [term], None, torch.device(device), torch.float32))
    compiled = torch.compile(leaf, backend="aot_eager", fullgraph=True)
    for rows in (4, 256):
        x = torch.randn(rows, leaf.in_features, device=device)
        want = leaf(x)
        with torch.autocast(device, torch.bfloat16):
            same = [torch.equal(leaf(x), want)]
        same.append(torch.equal(compiled(x), want))
        report.check(f"{rows} tokens, under autocast and compiled: other bits than before", same.count(False), 0)
    leaf.set_side(None)


def run(o: argparse.Namespace, report: Report, device: str) -> None:
    import comfy.model_management
    import comfy.sd  # noqa: F401  long there when a node is run
    import folder_paths

    os.makedirs(o.folder, exist_ok=True)
    folder_paths.add_model_folder_path("text_encoders", o.folder)
    bench = Bench(o.folder, report, device)
    bench.files(TINY if o.tiny else XXL)
    four = bench.four_bit()
    times = {length: bench.t5_ms(four, length) for length in (256, 512)}
    keeps_its_bits(four, report, device)
    got = bench.encode(four, 512).double()
    plain = bench.load(PLAIN)
    comfy.model_management.load_models_gpu([four.patcher, plain.patcher])
    for length, ms in times.items():
        theirs = bench.t5_ms(plain, length)
        print(f"{length} tokens: {ms:.1f} ms in 4 bit, {theirs:.1f} ms in fp16", flush=True)
        report.check(f"{length} tokens, over the fp16 encoder's time", ms / theirs, 1.3)
    want = bench.encode(plain, 512).double()
    dequantised(plain, four)
    exact = bench.encode(plain, 512).double()
    ours, theirs = ((x - want).norm() / want.norm() for x in (got, exact))
    print(
        f"error against fp16 {ours:.5f}, of the same codes in fp32 {theirs:.5f}, between the two {(got - exact).norm() / exact.norm():.2e}"
    )
    report.check("error against fp16, over that of the same codes in fp32", float(ours / theirs), 1.005)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--json", help="also write rows and limits to this file")
    parser.add_argument("--tiny", action="store_true", help="a T5 of two small blocks")
    parser.add_argument("--cpu", action="store_true", help="try this script out without a GPU")
    o = parser.parse_args()
    o.folder = os.path.abspath(o.folder)
    device = need_gpu(o.cpu)
    report = Report(heading(start_host()), o.json)
    with torch.inference_mode():
        run(o, report, device)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
