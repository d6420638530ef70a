"""From "nothing compiled" to the end of the first step, and the same after a restart. Every measurement is a process of its own.

    COMFYUI_PATH=... python benchmarks/load.py --checkpoint FILE [--compute auto] [--pixels 1024] [--json FILE]

FILE is a FLUX.1 that make_checkpoint.py writes. Two processes use one Triton cache: an empty temporary folder for the first, what that left
behind for the second. Each loads the file from page cache through the loader node and makes four steps; a warm step is the fastest of the
last three. Compiled kernels are counted by the .cubin or .hsaco files in the cache. Exits 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from timing import Report, heading, into_page_cache, load_ours, need_gpu, start_host, step_inputs, sync


def child(checkpoint: str, compute: str, pixels: int, result: str, cpu: bool) -> None:
    """One process's measurement; writes a JSON object of seconds to `result`."""
    device, begun = need_gpu(cpu), time.perf_counter()
    start_host()
    import comfy.model_management as mm

    if device == "cuda":
        torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")  # the context and cuBLAS are not what is measured
    sync()
    seconds = {"imports": time.perf_counter() - begun}
    into_page_cache(checkpoint)
    start = time.perf_counter()
    patcher = load_ours(checkpoint, compute)
    sync()
    seconds["load"] = time.perf_counter() - start
    with torch.inference_mode():
        mm.load_models_gpu([patcher])
        sync()
        seconds["load and move"] = time.perf_counter() - start
        network = patcher.model.diffusion_model
        inputs = step_inputs(network.params, pixels, 1, device, network.dtype)
        steps = []
        for _ in range(4):
            sync()
            at = time.perf_counter()
            network(**inputs, transformer_options=dict(patcher.model_options["transformer_options"]))
            sync()
            steps.append(time.perf_counter() - at)
    seconds |= {"first step": steps[0], "second step": steps[1], "warm step": min(steps[1:])}
    Path(result).write_text(json.dumps(seconds), encoding="utf-8")


def compiled_kernels(cache: str) -> int:
    """Different compiled kernels in a Triton cache: one folder each."""
    return len({path.parent for ending in ("cubin", "hsaco") for path in Path(cache).rglob(f"*.{ending}")})


def measure(o: argparse.Namespace, cache: str) -> dict[str, float]:
    """Runs the child process on `cache`; its seconds, and the kernels that the cache holds afterwards."""
    with tempfile.TemporaryDirectory(prefix="tonfa-load-") as folder:
        result = os.path.join(folder, "result.json")
        command = [sys.executable, os.path.abspath(__file__), "--checkpoint", o.checkpoint, "--compute", o.compute]
        command += ["--pixels", str(o.pixels), "--child", result, *(["--cpu"] if o.cpu else [])]
        done = subprocess.run(command, env={**os.environ, "TRITON_CACHE_DIR": cache}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the measured process failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(Path(result).read_text(encoding="utf-8")) | {"kernels": compiled_kernels(cache)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--compute", default="auto")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--json", help="also write rows and limits to this file")
    parser.add_argument("--cpu", action="store_true", help="try this script out without a GPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    o = parser.parse_args()
    o.checkpoint = os.path.abspath(o.checkpoint)
    if o.child:
        child(o.checkpoint, o.compute, o.pixels, o.child, o.cpu)
        return 0
    need_gpu(o.cpu)
    report = Report(heading(start_host()), o.json)
    with tempfile.TemporaryDirectory(prefix="tonfa-triton-") as cache:
        for name in ("empty cache", "after a restart"):
            row = measure(o, cache)
            report.rows.append({"what": name, **row})
            print(f"{name}: " + ", ".join(f"{key} {value:.2f} s" for key, value in row.items() if key != "kernels"), flush=True)
            print(f"{name}: {row['kernels']} kernels compiled so far", flush=True)
    cold, warm = report.rows
    report.check("empty cache: first step over a warm one", cold["first step"] - cold["warm step"], 30, "s")
    report.check("empty cache: kernels compiled", cold["kernels"], 24)
    report.check("after a restart: first step over a warm one", warm["first step"] - warm["warm step"], 2, "s")
    report.check("after a restart: kernels compiled anew", warm["kernels"] - cold["kernels"], 0)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
