"""The command line: `python -m tonfa ...`, or by path without installing: `python custom_nodes/ComfyUI-Tonfa ...`."""

from __future__ import annotations

import sys
from pathlib import Path


def become_package() -> None:
    """Started by path, this file has no package: import the folder it lies in as `tonfa`.

    The folder leaves sys.path, where its `nodes` would hide ComfyUI's module of that name.
    """
    import importlib.util

    root = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != root]
    spec = importlib.util.spec_from_file_location("tonfa", root / "__init__.py", submodule_search_locations=[str(root)])
    package = importlib.util.module_from_spec(spec)
    sys.modules["tonfa"] = package
    spec.loader.exec_module(package)


def main(arguments: list[str] | None = None) -> int:
    if not __package__:
        become_package()
    from tonfa.models.cli import main as command_line

    return command_line(arguments)


if __name__ == "__main__":
    sys.exit(main())
