"""Starts ComfyUI's modules in this process, on the CPU, with an empty base directory. Without a ComfyUI: one skipped item that says so."""

from __future__ import annotations

import os
import sys
import tempfile

import pytest
from tonfa.models.comfyui import find_comfyui

HOST = find_comfyui()  # raises when COMFYUI_PATH is set to something that is no ComfyUI
HOW = (
    "host tests skipped: no ComfyUI found (set COMFYUI_PATH to a ComfyUI folder, or git clone https://github.com/comfyanonymous/ComfyUI "
    "~/comfy/ComfyUI, then run: make test-host)"
)


def start_host() -> str:
    """Imports the host as `main.py --cpu --base-directory TMP` would set it up; returns TMP."""
    base = tempfile.mkdtemp(prefix="tonfa-host-")
    for folder in ("models/diffusion_models", "models/loras", "custom_nodes", "input", "output"):
        os.makedirs(os.path.join(base, folder))
    sys.path.insert(0, str(HOST))  # before the tests' folders: the host's top-level module is called `nodes` too
    argv, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", base]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401

        import nodes  # noqa: F401  the host's
    finally:
        sys.argv = argv
    return base


if HOST is None:
    collect_ignore_glob = ["test_*.py"]

    class NoHost(pytest.Item):
        def runtest(self) -> None:
            pytest.skip(HOW)

        def reportinfo(self) -> tuple:
            return self.path, None, HOW

    def pytest_collection_modifyitems(session: pytest.Session, items: list) -> None:
        items.append(NoHost.from_parent(session, name="tests/host"))

    def pytest_terminal_summary(terminalreporter: object) -> None:
        terminalreporter.write_line(HOW)

else:
    BASE = start_host()

    def pytest_report_header() -> str:
        from comfyui_version import __version__

        return f"ComfyUI {__version__} in {HOST}"

    def pytest_sessionfinish() -> None:
        import shutil

        shutil.rmtree(BASE, ignore_errors=True)

    @pytest.fixture(scope="session")
    def base() -> str:
        """The host's base directory for this run."""
        return BASE

    @pytest.fixture(autouse=True)
    def unloaded():
        """Every test starts and ends with no model in the host's hands."""
        import comfy.model_management

        comfy.model_management.unload_all_models()
        yield
        comfy.model_management.unload_all_models()
