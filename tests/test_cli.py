"""The command line: what it prints, where it prints it, and its exit status."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tqdm
from safetensors.torch import load_file, save_file
from tonfa.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
MINI = DATA / "mini_flux_int4.safetensors"


def command(*arguments: object, start: tuple = ("-m", "tonfa"), cwd: Path | None = None, path: Path | None = None):
    """Runs the command line in a process of its own; `path` is a folder whose modules go before the installed ones."""
    line = [sys.executable, *map(str, start), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(path), os.environ.get("PYTHONPATH"))))} if path else None
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment, timeout=240)


# -- inspect ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision"), [("mini_flux_int4", "int4"), ("mini_flux_int4_hd128", "int4"), ("mini_flux_nvfp4", "nvfp4")]
)
def test_inspect_says_what_a_checkpoint_is(capsys, name, precision):
    assert main(["inspect", str(DATA / f"{name}.safetensors"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["family"], facts["precision"], facts["usable"]) == ("flux", precision, True)


def test_inspect_for_people(capsys):
    assert main(["inspect", str(MINI)]) == 0
    said = capsys.readouterr().out
    assert "SVDQuant FLUX.1" in said and "rank 16" in said and "NunchakuFluxDiTLoader" in said


def test_inspect_of_another_model_says_what_it_is(capsys, tmp_path):
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    assert main(["inspect", str(tmp_path / "other.safetensors")]) == 0
    assert "not a SVDQuant FLUX.1 checkpoint" in capsys.readouterr().out


def test_inspect_json_of_a_bad_file_is_json(capsys, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    assert main(["inspect", str(tmp_path / "bad.safetensors"), "--json"]) == 2
    facts = json.loads(capsys.readouterr().out)
    assert facts["usable"] is False and "bad.safetensors" in facts["sentence"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", MINI.read_bytes()[:5000]], ids=["empty", "zip", "truncated"])
@pytest.mark.parametrize("verb", ["inspect", "dequantize"])
def test_a_bad_file_is_one_sentence_and_status_2(tmp_path, content, verb):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(content)
    done = command(verb, bad, *([tmp_path / "out.safetensors"] if verb == "dequantize" else []))
    assert done.returncode == 2
    assert "bad.safetensors" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["bad.safetensors"]


def test_a_missing_file_is_one_sentence_and_status_2(capsys, tmp_path):
    assert main(["inspect", str(tmp_path / "nothing.safetensors")]) == 2
    said = capsys.readouterr()
    assert "nothing.safetensors does not exist" in said.err and said.err.count("\n") == 1


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["quantise"])
    assert stopped.value.code == 2
    assert "doctor" in capsys.readouterr().err


# -- dequantize -------------------------------------------------------------------------------------------------------------------


def test_dequantize_writes_a_dense_file(capsys, tmp_path):
    out = tmp_path / "dense.safetensors"
    assert main(["dequantize", str(MINI), str(out)]) == 0
    dense = load_file(out)
    assert "double_blocks.0.img_attn.qkv.weight" in dense and "single_blocks.0.linear1.weight" in dense
    assert {t.dtype for t in dense.values()} == {torch.bfloat16}
    assert list(tmp_path.iterdir()) == [out]
    assert str(out) in capsys.readouterr().out


def test_dequantize_will_not_write_over_its_input(capsys, tmp_path):
    copy = tmp_path / "copy.safetensors"
    shutil.copy(MINI, copy)
    assert main(["dequantize", str(copy), str(copy)]) == 2
    assert copy.read_bytes() == MINI.read_bytes()
    assert "another name" in capsys.readouterr().err


def test_dequantize_counts_bytes(monkeypatch, capsys, tmp_path):
    real = tqdm.tqdm
    monkeypatch.setattr(tqdm, "tqdm", lambda **given: real(**{**given, "delay": 0, "mininterval": 0}))  # shown however quick it is
    assert main(["dequantize", str(MINI), str(tmp_path / "out.safetensors")]) == 0
    said = capsys.readouterr().err
    assert "MB/s" in said and "layer" not in said


def test_dequantize_into_a_folder_that_is_not_there(capsys, tmp_path):
    assert main(["dequantize", str(MINI), str(tmp_path / "no" / "out.safetensors")]) == 2
    said = capsys.readouterr().err
    assert "no/out.safetensors" in said.replace("\\", "/") and "Traceback" not in said


def test_dequantize_does_not_name_its_temporary_file(capsys, monkeypatch, tmp_path):
    def full(source, target):
        raise OSError(28, "No space left on device", source)

    monkeypatch.setattr(os, "replace", full)
    assert main(["dequantize", str(MINI), str(tmp_path / "out.safetensors")]) == 2
    said = capsys.readouterr().err
    assert "out.safetensors cannot be written: No space left on device" in said and ".part" not in said
    assert not list(tmp_path.iterdir())


# -- quantize and compare ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def dense(tmp_path):
    """The dense model of the smallest 4-bit one with heads of 128."""
    path = tmp_path / "dense.safetensors"
    assert main(["dequantize", str(DATA / "mini_flux_int4_hd128.safetensors"), str(path)]) == 0
    return path


@pytest.mark.parametrize("how", [[], ["--naive"], ["--calibrate", "--pixels", "32", "--steps", "1"], ["--size", "0.01"]])
def test_quantize_writes_a_checkpoint_and_its_report(capsys, dense, tmp_path, how):
    out = tmp_path / "out.safetensors"
    assert main(["quantize", str(dense), str(out), "--device", "cpu", "--precision", "nvfp4", *how]) == 0
    said = capsys.readouterr()
    mode = {"--naive": "naive", "--calibrate": "calibrated"}.get(how[0] if how else "", "data-free")
    assert f"nvfp4, {mode}: " in said.out and "worst: " in said.out and f"Wrote {out}" in said.out
    assert json.loads((tmp_path / "out.report.json").read_text())["mode"] == mode
    assert main(["inspect", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["precision"], facts["usable"], facts["warnings"]) == ("nvfp4", True, [])
    assert {p.name for p in tmp_path.iterdir()} == {"dense.safetensors", "out.safetensors", "out.report.json", "out.report.png"}


def test_quantize_says_what_remains(monkeypatch, capsys, dense, tmp_path):
    real = tqdm.tqdm
    monkeypatch.setattr(tqdm, "tqdm", lambda **given: real(**{**given, "delay": 0, "mininterval": 0}))  # shown however quick it is
    assert main(["quantize", str(dense), str(tmp_path / "out.safetensors"), "--calibrate", "--pixels", "32", "--steps", "2"]) == 0
    said = capsys.readouterr().err
    assert "calibrating" in said and "quantising" in said and "layer/s" in said and "15/15" in said and "4/4" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "20"], "the rank is 20, expected a multiple of 16"),
        (["--gptq"], "gptq needs calibration"),
        (["--naive", "--size", "7"], "no low-rank branch"),
        (["--calibrate", "none.safetensors"], "There is no file none.safetensors"),
        (["--calibrate", "--pixels", "100"], "a multiple of 16 pixels"),
        (["--size", "0.0001"], "is too small"),
    ],
)
def test_quantize_refuses_in_a_sentence(capsys, dense, tmp_path, arguments, words):
    capsys.readouterr()
    assert main(["quantize", str(dense), str(tmp_path / "out.safetensors"), "--device", "cpu", *arguments]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and said.out == ""
    assert {p.name for p in tmp_path.iterdir()} == {"dense.safetensors"}


def test_quantize_refuses_what_is_4_bit_already(capsys, tmp_path):
    assert main(["quantize", str(MINI), str(tmp_path / "out.safetensors")]) == 2
    assert "4-bit already" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_quantize_stopped_says_that_it_goes_on(monkeypatch, capsys, dense, tmp_path):
    from tonfa.models import quantize_flux

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(quantize_flux, "svd_quantize", stop)
        assert main(["quantize", str(dense), str(tmp_path / "out.safetensors"), "--naive"]) == 130
    assert "stopped; the same command goes on from here" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors.part").is_dir() and not (tmp_path / "out.safetensors").exists()
    assert main(["quantize", str(dense), str(tmp_path / "out.safetensors"), "--naive"]) == 0
    assert not (tmp_path / "out.safetensors.part").exists()


def test_compare_for_people_and_programs(capsys, dense):
    four = str(DATA / "mini_flux_int4_hd128.safetensors")
    capsys.readouterr()
    assert main(["compare", four, str(dense)]) == 0
    said = capsys.readouterr().out
    assert "(reference)" in said and "double qkv_proj" in said and "worst: " in said
    assert main(["compare", four, str(dense), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["layers"]) == 15 and facts["mean_snr_db"] > 40  # the dense file is its bf16 rounding
    assert main(["compare", str(dense), str(dense)]) == 2
    assert "are both dense" in capsys.readouterr().err


# -- without torch ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torch_file", ["torch.py", "torch/"])
def test_doctor_reports_a_torch_that_cannot_be_imported(tmp_path, torch_file):
    broken_torch(tmp_path, torch_file)
    done = command("doctor", path=tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    assert "[FAIL] torch: cannot be imported" in done.stdout and "[ ok ] python" in done.stdout
    facts = json.loads(command("doctor", "--json", path=tmp_path).stdout)
    assert facts["ok"] is False


@pytest.mark.parametrize(
    "arguments",
    [("inspect", MINI), ("dequantize", MINI, "out.safetensors"), ("quantize", MINI, "out.safetensors"), ("demo", "--no-comfyui")],
)
def test_other_commands_without_torch_are_one_sentence(tmp_path, arguments):
    broken_torch(tmp_path, "torch.py")
    done = command(*arguments, path=tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "torch cannot be imported (RuntimeError: this torch is broken)" in done.stderr and "ComfyUI's Python" in done.stderr


def broken_torch(folder: Path, file: str) -> None:
    """torch.py raises; a torch/ with nothing in it is what a half removed install leaves."""
    if file == "torch.py":
        (folder / file).write_text("raise RuntimeError('this torch is broken')", encoding="utf-8")
    else:
        (folder / "torch").mkdir()
        (folder / "torch" / "__init__.py").touch()


# -- starting ---------------------------------------------------------------------------------------------------------------------


def test_starts_by_path_without_being_installed(tmp_path):
    """As in custom_nodes: the folder has another name, and no `tonfa` can be imported."""
    pack = tmp_path / "custom_nodes" / "ComfyUI-Tonfa"
    pack.mkdir(parents=True)
    for name in ("__init__.py", "__main__.py", "install.py"):
        shutil.copy(ROOT / name, pack / name)
    for room in ("kernels", "models", "nodes"):
        shutil.copytree(ROOT / room, pack / room, ignore=shutil.ignore_patterns("__pycache__"))
    block = "import sys, runpy; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
    block += "sys.path[:] = [p for p in sys.path if p]; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = command(pack, "inspect", MINI, "--json", start=("-c", block), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["family"] == "flux"
    missing = command(
        start=("-c", block.split("sys.argv[:]")[0] + "import importlib.util; print(importlib.util.find_spec('tonfa'))"), cwd=tmp_path
    )
    assert missing.stdout.strip() == "None", "this test means nothing while tonfa can be imported"


def test_by_path_from_inside_the_folder():
    done = command("inspect", MINI, "--json", start=(".",), cwd=ROOT)
    assert done.returncode == 0, done.stderr


# -- doctor and demo --------------------------------------------------------------------------------------------------------------


def test_doctor_json():
    done = command("doctor", "--json")
    facts = json.loads(done.stdout)
    checks = {check["name"]: check for check in facts["checks"]}
    assert {"python", "torch", "triton", "C compiler", "Python headers", "launch", "ComfyUI", "original pack", "INT4 linear"} <= set(checks)
    failed = [check for check in facts["checks"] if check["state"] == "fail"]
    assert facts["ok"] == (not failed) and done.returncode == int(bool(failed))
    assert all(check["mend"] for check in failed)
    assert checks["INT4 linear"]["state"] == "ok", checks["INT4 linear"]


def test_demo_without_pillow_says_so_first(tmp_path):
    (tmp_path / "PIL").mkdir()
    (tmp_path / "PIL" / "__init__.py").write_text("raise ImportError('no Pillow here')", encoding="utf-8")
    done = command("demo", "--no-comfyui", "--out", tmp_path / "out", path=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert (
        done.stderr.count("\n") == 1
        and "cannot import Pillow (ImportError: no Pillow here)" in done.stderr
        and 'pip install ".[demo]"' in done.stderr
    )


def test_an_old_pillow_is_named(monkeypatch):
    import PIL
    from tonfa.models.demo_picture import pillow_problem

    assert pillow_problem() is None
    monkeypatch.setattr(PIL, "__version__", "10.0.1")
    assert "Pillow 10.0.1, which is too old" in pillow_problem() and '".[demo]"' in pillow_problem()


def test_demo_without_comfyui(tmp_path):
    done = command("demo", "--no-comfyui", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    rows = {line[:14].strip(): line for line in done.stdout.splitlines() if line.rstrip().endswith(" ms")}
    assert list(rows) == ["16 bit", "fast", "exact"] and "reference" in rows["16 bit"]
    decibels = {name: float(line.split(" dB")[0].split()[-1]) for name, line in rows.items() if " dB" in line}
    assert decibels["fast"] > 36 and decibels["exact"] > 33
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "demo.png"]
