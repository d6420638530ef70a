"""The command line: `python -m tonfa ...`, or by path without installing: `python custom_nodes/ComfyUI-Tonfa ...`."""

from __future__ import annotations

import argparse
import json
import sys
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
    demo = commands.add_parser("demo", help="makes a small FLUX-shaped checkpoint and samples it in 16 and in 4 bit, side by side")
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="where demo.png goes (default: out)")
    demo.add_argument("--no-comfyui", action="store_true", help="do not use ComfyUI even if one is found")
    demo.add_argument("--inside-comfyui", type=Path, metavar="JOB", help=argparse.SUPPRESS)  # the demo starts itself with it
    return top


def run(options: argparse.Namespace) -> int:
    if options.command == "doctor":
        from tonfa.models import doctor

        return doctor.report(as_json=options.json)
    if options.command == "inspect":
        return inspect(options.file, options.json)
    if options.command == "dequantize":
        return dequantize(options.input, options.output)
    if options.inside_comfyui:
        from tonfa.nodes.host import demo as inside

        inside.work(options.inside_comfyui)
        return 0
    from tonfa.models import demo

    demo.run(options.out, use_comfyui=not options.no_comfyui)
    return 0


def inspect(file: Path, as_json: bool) -> int:
    """Prints what a file is. Status 2 for one that cannot be read or is damaged; another model's good file is status 0."""
    from tonfa.models.inspect import format_report
    from tonfa.models.inspect import inspect as look

    facts = look(file)
    broken = facts["family"] == "unreadable" or (facts["family"] == "flux" and not facts["usable"])
    if as_json:
        print(json.dumps(facts, indent=2))
    elif broken:
        print(f"{PROGRAM}: {facts['sentence']}", file=sys.stderr)
    else:
        print(format_report(facts))
    return 2 if broken else 0


def dequantize(source: Path, target: Path) -> int:
    from tonfa.models.dequantize import dequantize as convert
    from tqdm import tqdm

    with tqdm(unit="layer", desc="dequantize", delay=1) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        convert(source, target, progress=progress)
    print(f"Wrote {target} ({target.stat().st_size / 1e9:.2f} GB)")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status. A file that cannot be used is one sentence on stderr and exit status 2."""
    if not __package__:
        become_package()
    options = parser().parse_args(arguments)
    from tonfa.models.formats.checkpoint import CheckpointError

    try:
        return run(options)
    except BrokenPipeError:  # the reader of our output, `| head` for one, has had enough
        sys.stdout = None
        return 0
    except (CheckpointError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
