"""The doctor's judgements, on machines that this one is not."""

import importlib.metadata
import json
from types import SimpleNamespace

import pytest
import torch
from tonfa.models import comfyui, doctor, selftest


def fake_torch(version="2.11.0", cuda="12.8", hip=None, available=True, reason="No CUDA GPUs are available"):
    def init():
        raise RuntimeError(f"{reason}.\nmore lines")

    calls = SimpleNamespace(is_available=lambda: available, init=init)
    return SimpleNamespace(__version__=version, version=SimpleNamespace(cuda=cuda, hip=hip), cuda=calls)


@pytest.fixture
def drivers(monkeypatch):
    """Sets which drivers seem to be installed."""

    def seem(nvidia=False, amd=False):
        monkeypatch.setattr(doctor, "nvidia_driver", lambda: nvidia)
        monkeypatch.setattr(doctor, "amd_driver", lambda: amd)

    seem()
    return seem


# -- torch and Triton -------------------------------------------------------------------------------------------------------------


def test_an_old_torch_is_wrong():
    assert doctor.check_torch(fake_torch("2.4.1")).state == "fail"
    assert doctor.check_torch(fake_torch("2.5.0")).state == "ok"
    assert "ROCm 6.4" in doctor.check_torch(fake_torch(cuda=None, hip="6.4")).found


def test_a_cpu_torch_beside_an_nvidia_driver_is_wrong(drivers):
    drivers(nvidia=True)
    check = doctor.check_torch(fake_torch(cuda=None, available=False))
    assert check.state == "fail" and "CUDA build of torch that ComfyUI recommends" in check.mend
    drivers()
    assert doctor.check_torch(fake_torch(cuda=None, available=False)).state == "ok"


def test_a_cuda_torch_that_cannot_use_the_gpu_is_wrong(drivers, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    drivers(nvidia=True)
    check = doctor.check_torch(fake_torch(available=False, reason="The NVIDIA driver on your system is too old (found version 11040)"))
    assert check.state == "fail" and "too old (found version 11040)" in check.found and "more lines" not in check.found
    assert "CUDA_VISIBLE_DEVICES is '7'" in check.found
    assert "Update the NVIDIA driver" in check.mend and "CUDA_VISIBLE_DEVICES" in check.mend
    drivers()
    check = doctor.check_torch(fake_torch(available=False))
    assert check.state == "warn" and "No CUDA GPUs" in check.found


def test_a_rocm_torch_that_cannot_use_the_gpu_is_wrong(drivers):
    rocm = fake_torch(cuda=None, hip="6.4", available=False, reason="No HIP GPUs are available")
    drivers(amd=True)
    check = doctor.check_torch(rocm)
    assert check.state == "fail" and "No HIP GPUs are available" in check.found
    assert "Update the AMD driver" in check.mend and "HIP_VISIBLE_DEVICES" in check.mend and "/dev/kfd" in check.mend
    drivers(nvidia=True)
    check = doctor.check_torch(rocm)
    assert check.state == "fail" and "CUDA build of torch" in check.mend


def test_an_nvidia_driver_is_found_by_its_tool(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    assert doctor.nvidia_driver()


def test_the_real_torch_names_its_reason(drivers):
    if torch.cuda.is_available():
        pytest.skip("torch can use the GPU here")
    assert doctor.gpu_reason(torch) not in ("", "torch names no reason")


@pytest.mark.parametrize(
    ("found", "wanted", "state"),
    [
        (("triton", "3.6.0"), (3, 6), "ok"),
        (("triton", "3.3.1"), (3, 6), "fail"),
        (("triton-windows", "3.7.0.post2"), (3, 6), "fail"),
        (None, (3, 6), "fail"),
        (("triton", "3.4.0"), None, "warn"),
        (("triton", "3.8.0"), None, "ok"),
    ],
)
def test_triton_on_a_gpu(found, wanted, state):
    check = doctor.check_triton("2.11.0", found, wanted, gpu=True, install="mend")
    assert check.state == state
    assert bool(check.mend) == (state != "ok")


@pytest.mark.parametrize(
    ("build", "requirements", "windows", "words"),
    [
        ("CUDA", None, False, '"triton==3.6.*"'),
        ("CUDA", ["triton==3.6.1; platform_system == 'Linux'"], False, '"triton==3.6.1"'),
        ("CUDA", ["triton==3.6.1; platform_system == 'Linux'"], True, '"triton-windows==3.6.*"'),
        ("ROCm", ["pytorch-triton-rocm==3.5.1; x"], False, '"pytorch-triton-rocm==3.5.1", with the --index-url'),
        ("ROCm", ["triton-rocm==3.6.0"], False, '"triton-rocm==3.6.0"'),
        ("ROCm", ["triton==3.5.1+rocm7.2.0.gita272dfa8"], False, '"triton==3.5.1+rocm7.2.0.gita272dfa8"'),
        ("ROCm", ["numpy", "tritonclient==2.0.0"], False, "Reinstall torch from its ROCm index"),
        ("XPU", ["pytorch-triton-xpu==3.6.0"], False, '"pytorch-triton-xpu==3.6.0"'),
        ("XPU", None, True, "Reinstall torch from its XPU index"),
    ],
)
def test_the_mend_names_the_right_package(monkeypatch, build, requirements, windows, words):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    mend = doctor.triton_mend(build, "2.11.0", windows)
    assert words in mend
    if build != "CUDA" and "+rocm" not in words:
        assert '"triton==' not in mend and "triton-windows" not in mend


def test_the_triton_that_torch_requires_goes_first(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["pytorch-triton-rocm==3.5.1"])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"triton": "3.8.0", "pytorch-triton-rocm": "3.5.1"}[name])
    assert doctor.installed_triton() == ("pytorch-triton-rocm", "3.5.1")


@pytest.mark.parametrize("found", [None, ("triton", "3.0.0")])
def test_nothing_about_triton_is_wrong_without_a_gpu(found):
    assert doctor.check_triton("2.11.0", found, (3, 6), gpu=False, install="mend").state == "ok"


@pytest.mark.parametrize(
    ("requirements", "torch_version", "wanted"),
    [
        (['triton==3.7.1; platform_system == "Linux"'], "2.13.0", (3, 7)),
        (["numpy", "pytorch-triton-rocm==3.5.1"], "2.9.1", (3, 5)),
        (["triton (==3.6.0)"], "2.11.0", (3, 6)),
        (["numpy"], "2.10.0+cu130", (3, 6)),
        (None, "2.15.0", (3, 9)),
        (["numpy"], "9.9.9", None),
    ],
)
def test_torch_itself_says_which_triton_it_wants(monkeypatch, requirements, torch_version, wanted):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    assert doctor.triton_of(torch_version) == wanted


# -- compiler, headers, launch ----------------------------------------------------------------------------------------------------


def test_a_missing_compiler_is_wrong_only_with_a_gpu(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.check_compiler(gpu=True, windows=False).state == "fail"
    assert "gcc" in doctor.check_compiler(gpu=True, windows=False).mend
    assert doctor.check_compiler(gpu=False, windows=False).state == "ok"
    assert doctor.check_compiler(gpu=True, windows=True).state == "ok"


def test_a_cc_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    check = doctor.check_compiler(gpu=True, windows=False)
    assert check.state == "fail" and "no-such-compiler" in check.found


def test_missing_headers_are_wrong_only_with_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert doctor.check_headers(gpu=True, windows=False).state == "fail"
    assert "-dev" in doctor.check_headers(gpu=True, windows=False).mend
    windows = doctor.check_headers(gpu=True, windows=True).mend
    assert "`include` and `libs` folders of the same Python version" in windows and "into python_embeded" in windows
    assert doctor.check_headers(gpu=False, windows=False).state == "ok"
    (tmp_path / "Python.h").touch()
    assert doctor.check_headers(gpu=True, windows=False).state == "ok"


def test_a_failing_launch_is_wrong_where_there_are_matrix_units(monkeypatch):
    from tonfa.kernels import targets

    monkeypatch.setattr(targets, "triton_reason", lambda device: "a Triton launch fails here (CalledProcessError)")
    monkeypatch.setattr(doctor, "has_matrix_units", lambda device: True)
    check = doctor.check_launch(torch.device("cuda", 0))
    assert check.state == "fail" and "CalledProcessError" in check.found and check.mend
    monkeypatch.setattr(doctor, "has_matrix_units", lambda device: False)
    assert doctor.check_launch(torch.device("cuda", 0)).state == "ok"


# -- what runs where --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("with_dot", "without", "words"),
    [
        (None, None, "Triton kernels, compute fast"),
        ("too old", None, "torch path, Triton kernels for the modulation layers only, compute weight_only"),
        ("broken", "broken", "torch path, compute weight_only"),
    ],
)
@pytest.mark.parametrize("form", ["int8", "e4m3"])
def test_a_gpu_is_described_with_what_runs_on_it(monkeypatch, with_dot, without, words, form):
    from tonfa.kernels import targets

    monkeypatch.delenv("TONFA_COMPUTE", raising=False)
    monkeypatch.setattr(targets, "triton_reason", lambda device, needs_dot=True: with_dot if needs_dot else without)
    monkeypatch.setattr(targets, "code_form", lambda device: form)
    found = doctor.describe_device(torch, torch.device("cpu")).found
    assert words in found and f"{form} operands" in found


def test_a_wrong_tonfa_compute_is_one_failed_check(monkeypatch):
    monkeypatch.setenv("TONFA_COMPUTE", "quick")
    check = doctor.check_compute()
    assert check.state == "fail" and "'quick'" in check.found and check.mend == "Unset it or set exact, fast or weight_only."
    assert doctor.describe_device(torch, torch.device("cpu")).state == "ok"
    for fine in ("", "exact", " Fast", "weight_only", "auto"):
        monkeypatch.setenv("TONFA_COMPUTE", fine)
        assert doctor.check_compute().state == "ok"


def test_every_device_is_tested_and_announced_first(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(doctor, "devices", lambda torch: [torch.device("cuda", 0), torch.device("cuda", 1)])
    monkeypatch.setattr(doctor, "has_matrix_units", lambda device: False)
    monkeypatch.setattr(doctor, "describe_device", lambda torch, device: doctor.Check(f"GPU {device.index}", "ok", "fine"))
    monkeypatch.setattr(doctor, "check_launch", lambda device: doctor.Check("launch", "ok", "fine"))
    monkeypatch.setattr(selftest, "TESTS", {"INT4 linear": lambda device: seen.append(device) or []})
    doctor.report()
    lines = capsys.readouterr().out.splitlines()
    assert seen == [torch.device("cuda", 0), torch.device("cuda", 1)]
    for i in range(2):
        announced = next(n for n, line in enumerate(lines) if f"testing kernels on cuda:{i} ..." in line)
        assert lines[announced + 1].startswith(f"[ ok ] GPU {i}") and f"INT4 linear on cuda:{i}" in lines[announced + 3]
    doctor.report(as_json=True)
    json.loads(capsys.readouterr().out)


# -- self-test --------------------------------------------------------------------------------------------------------------------


def test_self_tests_pass_here():
    checks = list(doctor.self_tests(torch.device("cpu")))
    assert [check.name for check in checks] == list(selftest.TESTS)
    assert all(check.state == "ok" for check in checks), checks


def test_a_wrong_result_is_found(monkeypatch):
    right = selftest.w4_matmul
    monkeypatch.setattr(selftest, "w4_matmul", lambda *a, **k: right(*a, **k).mul_(1.3))
    check = next(check for check in doctor.self_tests(torch.device("cpu")) if check.name == "INT4 linear")
    assert check.state == "fail" and check.mend


def test_a_result_that_is_not_a_number_is_found():
    nan = torch.full((3,), float("nan"))
    assert doctor.self_test_result("x", [selftest.Deviation("x", selftest.relative(nan, torch.ones(3)), 0.1)]).state == "fail"


def test_a_kernel_that_raises_is_a_failed_check(monkeypatch):
    def raises(*_):
        raise RuntimeError("PTX was rejected\nmore lines")

    monkeypatch.setattr(selftest, "w4a16_linear", raises)
    check = next(check for check in doctor.self_tests(torch.device("cpu")) if check.name == "modulation linear")
    assert check.state == "fail" and "PTX was rejected" in check.found and "more lines" not in check.found


# -- host -------------------------------------------------------------------------------------------------------------------------


def fake_host(folder, version="0.3.64"):
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfy" / "sd.py").touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


def add_pack(host, name, text='NODE_CLASS_MAPPINGS["NunchakuFluxDiTLoader"] = X'):
    (host / "custom_nodes" / name).mkdir(parents=True)
    (host / "custom_nodes" / name / "__init__.py").write_text(text)


def test_comfyui_is_looked_for_in_order(monkeypatch, tmp_path):
    asked, around, home = (fake_host(tmp_path / name) for name in ("asked", "around", "home/comfy/ComfyUI"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    pack = around / "custom_nodes" / "ComfyUI-Tonfa"
    monkeypatch.setenv("COMFYUI_PATH", str(asked))
    assert comfyui.find_comfyui(pack) == asked.resolve()
    monkeypatch.delenv("COMFYUI_PATH")
    assert comfyui.find_comfyui(pack) == around.resolve()
    assert comfyui.find_comfyui(tmp_path / "elsewhere" / "ComfyUI-Tonfa") == home.resolve()
    (home / "main.py").unlink()
    assert comfyui.find_comfyui(tmp_path / "elsewhere" / "ComfyUI-Tonfa") is None


def test_a_wrong_comfyui_path_is_not_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="COMFYUI_PATH"):
        comfyui.find_comfyui()
    assert doctor.check_comfyui().state == "fail"


@pytest.mark.parametrize(("version", "state"), [("0.3.64", "ok"), ("0.29.0", "ok"), ("1.0.0", "ok"), ("0.3.63", "fail"), ("0.2.7", "fail")])
def test_an_old_comfyui_is_wrong(monkeypatch, tmp_path, version, state):
    monkeypatch.setenv("COMFYUI_PATH", str(fake_host(tmp_path / "host", version)))
    assert doctor.check_comfyui().state == state


def test_the_original_pack_beside_ours_is_found(monkeypatch, tmp_path):
    host = fake_host(tmp_path / "host")
    monkeypatch.setenv("COMFYUI_PATH", str(host))
    add_pack(host, "ComfyUI-GGUF", "NODE_CLASS_MAPPINGS = {}")
    add_pack(host, "ComfyUI-nunchaku.disabled")
    add_pack(host, "ComfyUI-Tonfa")
    (host / "custom_nodes" / "ComfyUI-Tonfa" / "pyproject.toml").write_text('[project]\nname = "comfyui-tonfa"\n')
    assert doctor.check_original().state == "ok"
    add_pack(host, "ComfyUI-nunchaku")
    check = doctor.check_original()
    assert check.state == "fail" and check.found.startswith("ComfyUI-nunchaku ") and "Disable" in check.mend


def test_the_report_fails_when_a_check_does(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "checks", lambda announce: iter([doctor.Check("a", "ok", "fine"), doctor.Check("b", "fail", "broken", "mend it")])
    )
    assert doctor.report() == 1
    said = capsys.readouterr().out
    assert "[FAIL] b: broken" in said and "-> mend it" in said and "1 of 2 checks failed" in said
    monkeypatch.setattr(doctor, "checks", lambda announce: iter([doctor.Check("a", "warn", "odd", "look at it")]))
    assert doctor.report() == 0
