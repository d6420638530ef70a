"""The command line: `python -m tonfa ...`, or by path without installing: `python custom_nodes/ComfyUI-Tonfa ...`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAM = "tonfa"


def become_package() -> None:
    """Started by path, this file has no package: import the folder it lies in as `tonfa`.

    The folder leaves sys.path, where its `nodes` would hide ComfyUI's module of that name.
    """
    import importlib.util

    root = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
    spec = importlib.util.spec_from_file_location("tonfa", root / "__init__.py", submodule_search_locations=[str(root)])
    package = importlib.util.module_from_spec(spec)
    sys.modules["tonfa"] = package
    spec.loader.exec_module(package)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog=PROGRAM, description="4-bit SVDQuant diffusion models in ComfyUI: look, check, convert.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="checks this machine and says how to mend what is wrong (exit status 1 if anything is)")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    inspect = commands.add_parser("inspect", help="says what a checkpoint is: family, layers, precision, rank, bytes")
    inspect.add_argument("file", type=Path, metavar="FILE", help="a .safetensors file, or a folder in the old two-file form")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    dense = commands.add_parser("dequantize", help="writes the 16-bit checkpoint that ComfyUI's own Load Diffusion Model takes")
    dense.add_argument("input", type=Path, metavar="IN", help="a 4-bit checkpoint")
    dense.add_argument("output", type=Path, metavar="OUT", help="the .safetensors file to write (for FLUX.1 about 24 GB)")
    quantize = commands.add_parser("quantize", help="writes a FLUX.1 as a 4-bit checkpoint (SVDQuant), its report beside it")
    quantize.add_argument(
        "input", type=Path, metavar="IN", help="a dense FLUX.1: .safetensors in 16 or 32 bits or fp8, or a diffusers folder"
    )
    quantize.add_argument("output", type=Path, metavar="OUT", help="the .safetensors file to write (about 7 GB)")
    how = quantize.add_mutually_exclusive_group()
    how.add_argument("--data-free", action="store_true", help="look at the weights only (the default)")
    how.add_argument("--calibrate", type=Path, nargs="?", const=Path(), metavar="FILE",
                     help="sample pictures first, for the prompts in FILE (tensors context and pooled), else for random ones")  # fmt: skip
    how.add_argument("--naive", action="store_true", help="round to nearest, without smoothing and branch: for comparisons")
    quantize.add_argument("--precision", choices=("int4", "nvfp4"), default="int4")
    width = quantize.add_mutually_exclusive_group()
    width.add_argument("--rank", type=int, default=32, metavar="N", help="of the low-rank branch, a multiple of 16 (default: 32)")
    width.add_argument("--size", type=float, metavar="GB", help="choose every layer's rank so that the file has this size")
    quantize.add_argument("--steps", type=int, default=8, metavar="N", help="sampling steps of --calibrate (default: 8)")
    quantize.add_argument("--pixels", type=int, default=1024, metavar="N", help="side of its pictures (default: 1024)")
    quantize.add_argument("--gptq", action="store_true", help="with --calibrate: round with feedback between columns (slower)")
    quantize.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (default: the GPU if torch finds one)")
    compare = commands.add_parser(
        "compare", help="says how far the weights of two 4-bit checkpoints, or of one and its dense model, differ"
    )
    compare.add_argument("file", type=Path, metavar="A", help="a 4-bit checkpoint")
    compare.add_argument("reference", type=Path, metavar="B", help="another of the same model, or the dense file")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (default: the GPU if torch finds one)")
    t5 = commands.add_parser("quantize-t5", help="writes a T5-XXL text encoder as a 4-bit one, with a search for the best clipping")
    t5.add_argument(
        "input", type=Path, metavar="IN", help="a T5-XXL: fp16, bf16, fp32, fp8 or scaled fp8; a .safetensors file or a folder of shards"
    )
    t5.add_argument("output", type=Path, metavar="OUT", help="the .safetensors file to write (about 3 GB)")
    t5.add_argument("--device", choices=("cpu", "cuda"), help="where to search (default: the GPU if torch finds one)")
    t5.add_argument("--precision-of-rest", choices=("keep", "fp16", "bf16"), default="keep", help="type of embedding and norms")
    get = commands.add_parser("download", help="fetches a published checkpoint or text encoder into ComfyUI's folder")
    get.add_argument("name", nargs="?", metavar="NAME", help="flux.1-dev, a file name from a graph, or OWNER/REPO/FILE; see --list")
    get.add_argument("--list", action="store_true", help="print the names that are known, and fetch nothing")
    get.add_argument("--precision", choices=("int4", "fp4"), help="default: what NAME says, else int4, or fp4 on a Blackwell GPU")
    get.add_argument("--rank", type=int, metavar="N", help="32 or 128 where both are published (default: what NAME says, else 32)")
    get.add_argument("--to", type=Path, metavar="FOLDER", help="default: models/diffusion_models or models/text_encoders of ComfyUI")
    demo = commands.add_parser("demo", help="makes a small FLUX-shaped checkpoint and samples it in 16 and in 4 bit, side by side")
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="where demo.png goes (default: out)")
    demo.add_argument("--no-comfyui", action="store_true", help="do not use ComfyUI even if one is found")
    demo.add_argument("--inside-comfyui", type=Path, metavar="JOB", help=argparse.SUPPRESS)  # the demo starts itself with it
    return top


def run(options: argparse.Namespace) -> int:
    if options.command == "doctor":  # before anything that imports torch: a missing or broken torch is what it is there to report
        from tonfa.models import doctor

        return doctor.report(as_json=options.json)
    if options.command == "download":
        return download(options)
    if problem := torch_problem():
        return refuse(problem)
    if options.command == "inspect":
        return inspect(options.file, options.json)
    if options.command == "dequantize":
        return dequantize(options.input, options.output)
    if options.command == "quantize":
        return quantize(options)
    if options.command == "compare":
        return compare(options)
    if options.command == "quantize-t5":
        return quantize_t5(options.input, options.output, options.device, options.precision_of_rest)
    if options.inside_comfyui:
        from tonfa.nodes.host import demo as inside

        inside.work(options.inside_comfyui)
        return 0
    return demo(options.out, use_comfyui=not options.no_comfyui)


def refuse(sentence: object) -> int:
    print(f"{PROGRAM}: {sentence}", file=sys.stderr)
    return 2


def torch_problem() -> str | None:
    """A sentence when torch cannot be imported, else None."""
    try:
        import torch

        torch.__version__  # noqa: B018  (a torch that was half removed imports as an empty package)
    except Exception as error:
        why = next(iter(str(error).strip().splitlines()), "no message")
        return f"torch cannot be imported ({type(error).__name__}: {why}); run this with ComfyUI's Python, or see what `doctor` says."
    return None


def refusals(command: str) -> tuple[type[Exception], ...]:
    """What a command raises when it refuses a file. Read only when something was raised, because importing it imports torch."""
    if command == "doctor":
        return (OSError,)
    if command == "download":
        from tonfa.models.download import DownloadError
        from tonfa.models.published import NotPublished

        return (DownloadError, NotPublished, OSError)
    from tonfa.models.formats.checkpoint import CheckpointError

    return (CheckpointError, OSError)


def download(options: argparse.Namespace) -> int:
    """Fetches one published file. This is the only command, and the only code of the pack, that uses the network."""
    from tonfa.models import published
    from tonfa.models.download import download as fetch
    from tonfa.models.download import preferred_precision, target_folder

    if options.list:
        print(published.table())
        return 0
    if not options.name:
        return refuse("say what to download, for example flux.1-dev; `download --list` prints the known names.")
    known = published.known(options.name)
    prefer, why = published.INT4, ""
    if known and known[0].offered and not (options.precision or known[1]):
        prefer, why = preferred_precision()
        print(f"Taking {prefer}: {why}. --precision chooses.")
    file = published.resolve(options.name, options.precision, options.rank, prefer)
    fetch(file, target_folder(file, options.to))
    return 0


def inspect(file: Path, as_json: bool) -> int:
    """Prints what a file is. Status 2 for one that cannot be read or is damaged; another model's good file is status 0."""
    from tonfa.models.inspect import format_report
    from tonfa.models.inspect import inspect as look

    facts = look(file)
    broken = facts["family"] == "unreadable" or (facts["family"] in ("flux", "qwen-image", "z-image") and not facts["usable"])
    if as_json:
        print(json.dumps(facts, indent=2))
    elif broken:
        refuse(facts["sentence"])
    else:
        print(format_report(facts))
    return 2 if broken else 0


def dequantize(source: Path, target: Path) -> int:
    from tonfa.models.dequantize import dequantize as convert

    with_bar("dequantize", target, lambda progress: convert(source, target, progress=progress))
    return 0


def quantize(options: argparse.Namespace) -> int:
    """Writes a 4-bit FLUX.1. Interrupted, the same command goes on from there."""
    import torch
    from tonfa.models.quantize_flux import Calibration, Options, quantize_file

    device = chosen_device(options.device)
    if device is None:
        return refuse(NO_GPU)
    mode = "naive" if options.naive else "data-free" if options.calibrate is None else "calibrated"
    try:
        budget = None if options.size is None else int(options.size * 1e9)
        how = Options(options.precision, options.rank, mode, gptq=options.gptq, size_budget=budget)
        sampling = Calibration(None if options.calibrate == Path() else options.calibrate, options.steps, options.pixels)
    except ValueError as error:
        return refuse(f"{error}.")
    try:
        with bars({"calibrating": "block", "quantising": "layer"}) as progress:
            report = quantize_file(options.input, options.output, how, sampling, device, progress)
    except torch.OutOfMemoryError as error:
        return refuse(f"the GPU has too little memory free ({str(error).splitlines()[0]}); close what uses it, or say --device cpu.")
    print("\n".join(report.lines()))
    print(f"Wrote {options.output}, and {options.output.stem}.report.json beside it")
    return 0


def compare(options: argparse.Namespace) -> int:
    from tonfa.models.compare import compare as held_against

    device = chosen_device(options.device)
    if device is None:
        return refuse(NO_GPU)
    with bars({"comparing": "layer"}) as progress:
        found = held_against(options.file, options.reference, device, lambda done, total: progress("comparing", done, total))
    print(json.dumps(found.as_json(), indent=2) if options.json else "\n".join(found.lines()))
    return 0


NO_GPU = "torch finds no GPU here; leave --device out, or say --device cpu."


def chosen_device(wanted: str | None) -> str | None:
    """Where to compute: as wanted, else the GPU where torch finds one. None for a GPU that is not there."""
    import torch

    there = torch.cuda.is_available()
    return None if wanted == "cuda" and not there else wanted or ("cuda" if there else "cpu")


def quantize_t5(source: Path, target: Path, device: str | None, rest: str) -> int:
    from tonfa.models.quantize_t5 import quantize_t5 as convert

    device = chosen_device(device)
    if device is None:
        return refuse(NO_GPU)
    with_bar("quantize-t5", target, lambda progress: convert(source, target, device, rest, progress))
    return 0


@contextmanager
def bars(units: dict[str, str]) -> Iterator[Callable[[str, int, int], None]]:
    """progress(stage, done, total) with a bar for each stage, shown from its first call on, with the time that remains."""
    from tqdm import tqdm

    with ExitStack() as open_bars:
        shown: dict[str, tqdm] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in shown:
                shown[stage] = open_bars.enter_context(tqdm(desc=stage, unit=units[stage], total=total, delay=1))
            shown[stage].update(done - shown[stage].n)

        yield progress


def with_bar(name: str, target: Path, write: Callable[[Callable[[int, int], None]], None]) -> None:
    """Runs write(progress) with a bar that counts bytes, and says what was written."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc=name, delay=1) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        write(progress)
    print(f"Wrote {target} ({target.stat().st_size / 1e9:.2f} GB)")


def demo(out: Path, use_comfyui: bool) -> int:
    from tonfa.models.demo_picture import pillow_problem

    if problem := pillow_problem():
        return refuse(problem)
    from tonfa.models import demo as small

    small.run(out, use_comfyui=use_comfyui)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status. A file that cannot be used is one sentence on stderr and exit status 2."""
    if not __package__:
        become_package()
    options = parser().parse_args(arguments)
    try:
        return run(options)
    except BrokenPipeError:  # the reader of our output, `| head` for one, has had enough
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        goes_on = options.command in ("download", "quantize")
        print(f"{PROGRAM}: stopped" + ("; the same command goes on from here" if goes_on else ""), file=sys.stderr)
        return 130
    except refusals(options.command) as error:
        return refuse(error)


if __name__ == "__main__":
    sys.exit(main())
