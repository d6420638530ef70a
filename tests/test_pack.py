"""The pack as ComfyUI and pip see it: importing it does nothing, its metadata is complete, install.py never fails an install."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tonfa.models import doctor

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=120)


def toml(section: str) -> str:
    """The text of one [section] of pyproject.toml (Python 3.10 has no TOML reader)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return text.split(f"[{section}]\n", 1)[1].split("\n[", 1)[0]


# -- import -----------------------------------------------------------------------------------------------------------------------

IMPORT = """
import builtins, importlib.util, logging, sys
opened, real = [], builtins.open
builtins.open = lambda *a, **k: (opened.append(a), real(*a, **k))[1]
handlers, level = list(logging.root.handlers), logging.root.level
spec = importlib.util.spec_from_file_location("custom_nodes_tonfa", r"{init}", submodule_search_locations=[r"{root}"])
module = importlib.util.module_from_spec(spec); sys.modules[spec.name] = module; spec.loader.exec_module(module)
assert logging.root.handlers == handlers and logging.root.level == level, "logging was set up"
assert not opened, opened
assert "triton" not in sys.modules, "Triton was imported"
torch = sys.modules.get("torch")
assert torch is None or not torch.cuda.is_initialized(), "CUDA was initialised"
print(sorted(module.NODE_CLASS_MAPPINGS))
"""


def test_import_as_comfyui_does_it_does_no_work(tmp_path):
    done = python(IMPORT.format(init=ROOT / "__init__.py", root=ROOT), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "NunchakuFluxDiTLoader" in done.stdout


def test_import_survives_a_missing_comfyui_and_a_broken_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('this torch is broken')", encoding="utf-8")
    code = f"import sys; sys.path.insert(0, r'{tmp_path}')\n" + IMPORT.format(init=ROOT / "__init__.py", root=ROOT)
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# -- metadata ---------------------------------------------------------------------------------------------------------------------


def requirement_names(lines: list[str]) -> set[str]:
    return {re.split(r"[\s\[<>=!~;]", line.strip())[0].lower() for line in lines if line.strip() and not line.startswith("#")}


def test_requirements_hold_nothing_that_the_host_decides():
    named = requirement_names((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    assert named == {"safetensors", "numpy", "huggingface_hub", "tqdm"}


def test_requirements_and_pyproject_agree():
    declared = re.search(r"^dependencies = \[(.*)\]$", toml("project"), re.M)[1]
    lines = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert re.findall(r'"([^"]+)"', declared) == lines


def test_nothing_is_pinned_for_the_user():
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        assert "==" not in line and "<" not in line


def test_comfy_registry_fields():
    fields = toml("tool.comfy")
    for line in ('PublisherId = "tonfa"', 'DisplayName = "ComfyUI-Tonfa"', 'Icon = ""', 'requires-comfyui = ">=0.3.64"'):
        assert line in fields


def test_links_and_extras():
    assert 'Repository = "https://github.com/tonfa/ComfyUI-Tonfa"' in toml("project.urls")
    assert 'demo = ["pillow>=10.1"]' in toml("project.optional-dependencies")  # older ones draw no text of a chosen size


def test_installed_metadata():
    data = importlib.metadata.metadata("comfyui-tonfa")
    assert data["License-Expression"] == "Apache-2.0"
    assert data["Requires-Python"] == ">=3.10"
    assert {"dev", "demo"} <= set(data.get_all("Provides-Extra"))
    scripts = importlib.metadata.entry_points(group="console_scripts")
    assert next(s for s in scripts if s.name == "tonfa").value == "tonfa.__main__:main"


def test_every_package_is_in_the_wheel():
    declared = set(re.findall(r'"([^"]+)"', re.search(r"^packages = \[(.*)\]$", toml("tool.setuptools"), re.M)[1]))
    found = {"tonfa"}
    for room in ("kernels", "models", "nodes"):
        found |= {".".join(("tonfa", *path.parent.relative_to(ROOT).parts)) for path in (ROOT / room).rglob("*.py")}
    assert declared == found


def test_version_and_changelog_agree():
    version = re.search(r'^version = "([^"]+)"', toml("project"), re.M)[1]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_licence_is_whole():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


# -- install.py -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def install():
    spec = importlib.util.spec_from_file_location("tonfa_install", ROOT / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_torch(version: str, cuda: str | None = "12.8") -> SimpleNamespace:
    calls = SimpleNamespace(is_available=lambda: cuda is not None, device_count=lambda: 1, get_device_name=lambda i: "NVIDIA Example")
    return SimpleNamespace(__version__=version, version=SimpleNamespace(cuda=cuda, hip=None), cuda=calls)


def on_windows(install, monkeypatch, torch, triton=None, pip_fails=False) -> list[list[str]]:
    """Makes this look like Windows with that torch and Triton; returns the list into which pip commands will fall."""
    commands = []

    def run(command, **_):
        commands.append(command)
        failed = pip_fails and "install" in command
        return SimpleNamespace(returncode=int(failed), stdout="", stderr="line one\nNo matching distribution found" if failed else "")

    monkeypatch.setattr(install.platform, "system", lambda: "Windows")
    monkeypatch.setattr(install, "installed_triton", lambda: triton)
    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setitem(sys.modules, "torch", torch)
    return commands


def test_install_as_a_script_prints_one_line_and_succeeds(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "install.py"], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "torch" in done.stdout


def test_install_imports_nothing_heavy():
    done = python(
        "import sys, runpy; runpy.run_path('install.py', run_name='x'); print('torch' in sys.modules, 'triton' in sys.modules)", cwd=ROOT
    )
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize(
    ("torch", "wanted"),
    [
        ("2.9.1+cu128", "triton-windows>=3.5,<3.6"),
        ("2.10.0+cu130", "triton-windows>=3.6,<3.7"),
        ("2.11.0+cu128", "triton-windows>=3.6,<3.7"),
        ("2.12.0+cu130", "triton-windows>=3.7,<3.8"),
        ("2.13.0+cu130", "triton-windows>=3.7,<3.8"),
        ("2.14.0+cu130", "triton-windows>=3.8,<3.9"),
        ("2.15.1+cu130", "triton-windows>=3.9,<3.10"),
    ],
)
def test_install_on_windows_takes_the_triton_of_this_torch(install, monkeypatch, capsys, torch, wanted):
    commands = on_windows(install, monkeypatch, fake_torch(torch))
    assert install.main() == 0
    assert commands[-1] == [sys.executable, "-m", "pip", "install", wanted]
    assert f"installed {wanted}" in capsys.readouterr().out


def test_install_on_windows_keeps_a_triton_that_belongs(install, monkeypatch, capsys):
    commands = on_windows(install, monkeypatch, fake_torch("2.11.0+cu128"), ("triton-windows", "3.6.0.post25"))
    assert install.main() == 0 and commands == []
    assert "belongs to this torch" in capsys.readouterr().out


def test_install_on_windows_replaces_a_triton_of_another_torch(install, monkeypatch, capsys):
    commands = on_windows(install, monkeypatch, fake_torch("2.11.0+cu128"), ("triton-windows", "3.3.1"))
    assert install.main() == 0 and commands[-1][-1] == "triton-windows>=3.6,<3.7"
    assert "in place of triton-windows 3.3.1" in capsys.readouterr().out


def test_install_on_windows_leaves_cpu_builds_and_unknown_torches_alone(install, monkeypatch, capsys):
    for torch in (fake_torch("2.11.0+cpu", cuda=None), fake_torch("2.7.1+cu128"), fake_torch("3.0.0+cu140")):
        commands = on_windows(install, monkeypatch, torch)
        assert install.main() == 0 and commands == []
        assert capsys.readouterr().out.count("\n") == 1


def test_install_survives_pip_failing(install, monkeypatch, capsys):
    on_windows(install, monkeypatch, fake_torch("2.11.0+cu128"), pip_fails=True)
    assert install.main() == 0
    said = capsys.readouterr().out
    assert "could not install" in said and "No matching distribution found" in said and said.count("\n") == 1


def test_install_survives_anything(install, monkeypatch, capsys):
    monkeypatch.setattr(install, "describe_gpu", lambda torch: 1 / 0)
    assert install.main() == 0
    assert "ZeroDivisionError" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises ImportError
    assert install.main() == 0
    assert "torch could not be imported" in capsys.readouterr().out


def test_install_on_linux_installs_nothing(install, monkeypatch, capsys):
    commands = on_windows(install, monkeypatch, fake_torch("2.11.0+cu128"))
    monkeypatch.setattr(install.platform, "system", lambda: "Linux")
    assert install.main() == 0 and commands == []
    assert "no Triton" in capsys.readouterr().out


def test_install_and_doctor_hold_the_same_tables(install):
    assert install.TRITON_OF_TORCH == doctor.TRITON_OF_TORCH
    assert install.TRITON_DISTRIBUTIONS == doctor.TRITON_DISTRIBUTIONS
