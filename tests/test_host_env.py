"""The scripts that build the environments: what they would install, and that a failure is a failure."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"tonfa_tests_{name}", TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def host_env(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    return load("host_env")


def test_the_hosts_requirements_lose_only_the_torch_family(host_env, tmp_path):
    lines = [
        "comfyui-frontend-package==1.27.10",
        "torch",
        "torchsde",
        "torchvision>=0.20",
        "torchaudio",
        "",
        "#non essential dependencies:",
    ]
    lines += ["kornia>=0.7.1 # comment", "pydantic~=2.0", "Torch==2.8"]
    (tmp_path / "requirements.txt").write_text("\n".join(lines))
    kept = host_env.host_requirements(tmp_path)
    assert kept == ["comfyui-frontend-package==1.27.10", "torchsde", "kornia>=0.7.1", "pydantic~=2.0", "requests"]


@pytest.mark.parametrize(
    ("torch", "vision", "audio"), [("2.13.0+cpu", "0.28", "2.11"), ("2.11.0+cu128", "0.26", "2.11"), ("2.9.1", "0.24", "2.9")]
)
def test_companions_of_torch(host_env, torch, vision, audio):
    assert host_env.companions(torch) == [f"torchvision=={vision}.*", f"torchaudio=={audio}.*"]


def test_without_comfyui_one_line_says_how_to_get_the_tests(tmp_path):
    home = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    environment = {key: value for key, value in os.environ.items() if key != "COMFYUI_PATH"} | home
    done = subprocess.run([sys.executable, TESTS / "host_env.py", "test"], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Host tests SKIPPED") and "COMFYUI_PATH" in done.stdout and done.stdout.count("\n") == 1


def test_a_wrong_comfyui_path_is_an_error(tmp_path):
    environment = {**os.environ, "COMFYUI_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, TESTS / "host_env.py", "test"], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode != 0 and str(tmp_path) in done.stderr


def test_a_failed_install_is_an_error_and_not_a_skip(host_env):
    pip = host_env.pip
    with pytest.raises(SystemExit, match="Failed with exit status"):
        pip(Path(sys.executable), "--no-index", "--find-links", str(TESTS), "tonfa-has-no-such-requirement")


def test_torch_is_taken_from_the_interpreter_only_when_it_is_recent(monkeypatch):
    env = load("env")
    for version, wanted in (("2.13.0+cpu", True), ("2.5.1", True), ("2.4.1", False), ("1.13.1", False), (None, False)):
        monkeypatch.setattr(env, "version_in", lambda python, name, v=version: v)
        assert bool(env.recent_torch("python")) == wanted
