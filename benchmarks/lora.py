"""LoRA on a full-size model through the real nodes in the real host, on a GPU: how long it takes to apply, what a step and memory cost.

    COMFYUI_PATH=... python benchmarks/lora.py --checkpoint FILE [--rank 32] [--pixels 1024] [--compute fast] [--json FILE]

FILE is a FLUX.1 that make_checkpoint.py writes. LoRAs of random numbers on every layer of both kinds of blocks are written to a temporary
folder: in diffusers names with separate q, k, v and mlp ("split"), and in kohya's names with one pair a layer ("fused"). Limits:
under 1 s from a file in the page cache to a model that is ready, 0.3 s for another strength, a step at most 3 % longer with one LoRA and
10 % with four (fused), memory that grows by the columns' bytes and returns. Exits 1 when one is missed.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time

import torch
from safetensors.torch import save_file
from timing import GIB, MIB, Report, Timer, gpu_sleep, heading, into_page_cache, load_ours, need_gpu, on_gpu, start_host, step_inputs, sync

WARMUPS, TURNS = 3, 5


def lora_tensors(network: object, rank: int, split: bool, seed: int) -> dict[str, torch.Tensor]:
    """bf16 pairs for every linear of the blocks."""
    g = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}

    def pair(name: str, n: int, k: int) -> None:
        names = ("lora_B.weight", "lora_A.weight") if split else ("lora_up.weight", "lora_down.weight")
        for suffix, shape in zip(names, ((n, rank), (rank, k)), strict=True):
            found[f"{name}.{suffix}"] = (torch.rand(shape, generator=g) - 0.5).mul_(0.02).bfloat16()

    hidden = network.params.hidden_size
    for name, module in network.named_modules():
        if hasattr(module, "out_features") and name.startswith(("double_blocks.", "single_blocks.")):
            n, k = module.out_features, module.in_features
            if split:
                for part, rows in diffusers_parts(name, n, hidden):
                    pair(f"transformer.{part}", rows, k)
            else:
                pair("lora_unet_" + name.replace(".", "_"), n, k)
    return found


def diffusers_parts(name: str, n: int, hidden: int) -> list[tuple[str, int]]:
    """The diffusers modules (name, rows) that one linear of a block is made of."""
    kind, number, leaf = name.split(".", 2)
    block = ("transformer_blocks." if kind == "double_blocks" else "single_transformer_blocks.") + number
    text = leaf.startswith("txt")
    double = {
        "mod.lin": ["norm1_context.linear" if text else "norm1.linear"],
        "attn.qkv": [f"attn.{p}" for p in (("add_q_proj", "add_k_proj", "add_v_proj") if text else ("to_q", "to_k", "to_v"))],
        "attn.proj": ["attn.to_add_out" if text else "attn.to_out.0"],
        "mlp.0": ["ff_context.net.0.proj" if text else "ff.net.0.proj"],
        "mlp.2": ["ff_context.net.2" if text else "ff.net.2"],
    }
    single = {"linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"], "linear2": ["proj_out"], "modulation.lin": ["norm.linear"]}
    names = (double if kind == "double_blocks" else single)[leaf.removeprefix("txt_").removeprefix("img_")]
    rows = [n] if len(names) == 1 else [hidden] * 3 + [n - 3 * hidden] * (len(names) - 3)
    return [(f"{block}.{part}", r) for part, r in zip(names, rows, strict=True)]


class Bench:
    def __init__(self, o: argparse.Namespace, report: Report, device: str):
        self.o, self.report, self.device = o, report, device
        into_page_cache(os.path.abspath(o.checkpoint))
        self.base = load_ours(os.path.abspath(o.checkpoint), o.compute)
        self.network = self.base.model.diffusion_model
        self.inputs = step_inputs(self.network.params, o.pixels, 1, device, self.network.dtype)

    def node(self) -> object:
        from tonfa.nodes.lora import NunchakuFluxLoraLoader

        return NunchakuFluxLoraLoader()

    def ready(self, model: object) -> None:
        """The model as the host brings it to the GPU before a sampling."""
        import comfy.model_management

        comfy.model_management.load_models_gpu([model])
        sync()

    def step_ms(self, model: object) -> float:
        options = model.model_options["transformer_options"]
        for _ in range(WARMUPS):
            self.network(**self.inputs, transformer_options=dict(options))
        sync()
        gpu_sleep(4_000_000)
        timers = []
        for _ in range(self.o.repeats):
            with Timer() as timer:
                self.network(**self.inputs, transformer_options=dict(options))
            timers.append(timer)
        sync()
        return statistics.median(t.ms() for t in timers)

    def longer_by(self, model: object) -> tuple[float, float]:
        """(a step's ms, percent that it takes longer than one without), in turns with the model alone: clocks drift as the board warms."""
        found = []
        for _ in range(TURNS):
            self.ready(self.base)
            alone = self.step_ms(self.base)
            self.ready(model)
            took = self.step_ms(model)
            found.append((took, 100 * (took / alone - 1)))
        return tuple(statistics.median(column) for column in zip(*found, strict=True))

    def seconds(self, work: object) -> tuple[float, object]:
        sync()
        start = time.perf_counter()
        model = work()
        self.ready(model)
        return time.perf_counter() - start, model

    def books(self, label: str, *models: object) -> None:
        """The host's three sizes are consistent and none is negative."""
        from comfy.model_management import LoadedModel

        for i, model in enumerate(models):
            sizes = model.model_size(), model.loaded_size(), LoadedModel(model).model_offloaded_memory()
            wrong = min(sizes) < 0 or sizes[1] > sizes[0] + 1 or (i == 0 and sizes[2] != 0)
            self.report.check(
                f"{label}: sizes (total, loaded, offloaded) {[round(s / MIB, 1) for s in sizes]} MiB are wrong", int(wrong), 0
            )


def held() -> int:
    """Bytes of all tensors on the GPU, without what the allocator adds (up to 1 MiB for each that it puts into a hole it already has)."""
    gc.collect()
    return torch.cuda.memory_stats()["requested_bytes.all.current"] if on_gpu() else 0


def reserved() -> int:
    """What torch holds of the driver's memory, after everything unused was given back."""
    if not on_gpu():
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def run(o: argparse.Namespace, folder: str, report: Report, device: str) -> None:
    import folder_paths

    bench = Bench(o, report, device)
    folder_paths.add_model_folder_path("loras", folder, is_default=True)
    for split in (False, True):
        for i in range(4):
            save_file(
                lora_tensors(bench.network, o.rank, split, i), os.path.join(folder, f"{'split' if split else 'fused'}{i}.safetensors")
            )
    bench.ready(bench.base)
    alone, before = bench.step_ms(bench.base), held()
    print(f"step without: {alone:.2f} ms", flush=True)
    for form in ("fused", "split"):
        measure_form(bench, form, folder, alone, before)
    again = bench.step_ms(bench.base)
    report.check("a step after all were removed, over one before", again / alone - 1, 0.01)


def measure_form(bench: Bench, form: str, folder: str, alone: float, before: int) -> None:
    report, nodes = bench.report, [bench.node() for _ in range(4)]
    into_page_cache(os.path.join(folder, f"{form}0.safetensors"))
    driver = reserved()
    took, model = bench.seconds(lambda: nodes[0].load_lora(bench.base, f"{form}0.safetensors", 1.0)[0])
    report.check(f"{form}: from file in page cache to ready", took, 1.0, "s")
    asked = reserved() - driver
    grown, planned = held() - before, model.model_size() - bench.base.model_size()
    report.check(f"{form}: torch asked the driver for {asked / MIB:.1f} MiB more, over the columns' bytes", asked / planned, 1.03)
    report.check(
        f"{form}: memory grew by {grown / MIB:.1f} MiB, off the columns' {planned / MIB:.1f} MiB by", abs(grown / planned - 1), 0.03
    )
    bench.books(f"{form}, one LoRA", model, bench.base)
    for strength in (0.5, 0.8):
        took, model = bench.seconds(lambda s=strength: nodes[0].load_lora(bench.base, f"{form}0.safetensors", s)[0])
    report.check(f"{form}: another strength", took, 0.3, "s")
    row = {"form": form, "alone_ms": alone, "columns_mib": planned / MIB}
    start = time.perf_counter()
    bench.network(**bench.inputs, transformer_options=dict(model.model_options["transformer_options"]))
    sync()
    row["first_step_s"] = time.perf_counter() - start  # kernels that were never compiled are compiled here
    row["one_ms"], row["one_percent"] = bench.longer_by(model)
    print(f"{form}: first step with a LoRA {row['first_step_s']:.2f} s, then {row['one_ms']:.2f} ms", flush=True)
    report.check(f"{form}: a step with one LoRA, longer by", row["one_percent"], 3, "%")

    def four() -> object:
        stacked = bench.base
        for i, node in enumerate(nodes):
            stacked = node.load_lora(stacked, f"{form}{i}.safetensors", 0.7)[0]
        return stacked

    row["four_s"], model = bench.seconds(four)
    row["four_ms"], row["four_percent"] = bench.longer_by(model)
    print(f"{form}: four LoRAs ready in {row['four_s']:.2f} s, {row['four_ms']:.2f} ms", flush=True)
    report.check(f"{form}: a step with four LoRAs, longer by", row["four_percent"], 10, "%")
    bench.books(f"{form}, four LoRAs", model, bench.base)
    report.rows.append(row)
    del model
    bench.ready(bench.base)
    bench.step_ms(bench.base)
    report.check(f"{form}: memory after removal, beyond what it was", (held() - before) / MIB, 8, "MiB")
    bench.books(f"{form}, none", bench.base)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--compute", default="fast")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--json", help="also write rows and limits to this file")
    parser.add_argument("--cpu", action="store_true", help="try this script out without a GPU")
    o = parser.parse_args()
    device = need_gpu(o.cpu)
    report = Report(heading(start_host()), o.json)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        run(o, folder, report, device)
    print(f"peak {torch.cuda.max_memory_allocated() / GIB:.2f} GiB" if on_gpu() else "")
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
