"""Reads the imports of every module of the pack: they go down only (nodes -> models -> kernels), and only nodes/host knows ComfyUI."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"kernels": {"kernels"}, "models": {"models", "kernels"}, "nodes": {"nodes", "models", "kernels"}}
HOST_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
    "nodes",
    "execution",
    "server",
    "node_helpers",
    "latent_preview",
}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted name, whether inside the pack) of every import, those in functions too. `package` resolves relative ones."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module, False
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.lineno, ".".join((*base, name)), True) for name in names)


def faults(source: str, relative: Path) -> list[str]:
    """The imports in `source`, a module at `relative` in the pack, that break a rule."""
    room, found = relative.parts[0], []
    for line, name, ours in imports(source, relative.parent.parts):
        top = name.split(".")[0]
        if ours and top not in ROOMS[room]:
            found.append(f"{relative}:{line} imports {name}, which lies above {room}/")
        if not ours and top == "tonfa":
            found.append(f"{relative}:{line} imports {name} by an absolute name: ComfyUI loads the pack under another one")
        if not ours and top in HOST_MODULES and relative.parts[:2] != ("nodes", "host"):
            found.append(f"{relative}:{line} imports {name}: only nodes/host may know ComfyUI")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    assert faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT)) == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from ..models import linear", "kernels/layout.py"),
        ("from .. import models", "kernels/layout.py"),
        ("from ...nodes.host import files", "models/formats/writer.py"),
        ("from ..install import TRITON_OF_TORCH", "models/doctor.py"),
        ("def f():\n    import comfy.model_management", "models/linear.py"),
        ("import folder_paths", "kernels/targets.py"),
        ("from nodes import KSampler", "nodes/flux.py"),
        ("from tonfa.kernels import layout", "models/linear.py"),
    ],
)
def test_the_reader_sees_a_fault(source, module):
    assert len(faults(source, Path(module))) == 1


def test_the_reader_lets_good_imports_pass():
    assert faults("from ..kernels import layout\nfrom ..kernels.targets import code_form\nimport torch", Path("models/linear.py")) == []
    assert faults("import comfy.sd\nfrom ...models import flux", Path("nodes/host/shell.py")) == []
