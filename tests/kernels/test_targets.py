"""kernels/targets.py: what is known about devices, and which mode follows."""

from __future__ import annotations

import pytest
import torch
from tonfa.kernels import targets
from tonfa.kernels.targets import code_form, cuda_target, hip_target, resolve_compute, target_for, triton_reason

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("target", "has_dot", "e4m3"),
    [
        (cuda_target(61), False, False),
        (cuda_target(75), False, False),
        (cuda_target(80), True, False),
        (cuda_target(86), True, False),
        (cuda_target(89), True, True),
        (cuda_target(90), True, True),
        (cuda_target(120), True, True),
        (hip_target("gfx1030"), False, False),
        (hip_target("gfx942:sramecc+:xnack-"), True, False),
        (hip_target("gfx1100"), True, False),
        (hip_target("gfx1201"), True, False),
    ],
)
def test_matrix_units(target, has_dot, e4m3):
    assert (target.has_dot, target.e4m3_dot) == (has_dot, e4m3)


def test_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("TONFA_COMPUTE", raising=False)
    assert target_for("cpu").name == "cpu" and code_form("cpu") == "int8"
    assert "CPU" in triton_reason(CPU)
    assert resolve_compute("auto", CPU) == "weight_only"
    assert resolve_compute("fast", CPU) == "fast"


def test_the_interpreter_counts_as_triton(interpreter, monkeypatch):
    monkeypatch.delenv("TONFA_COMPUTE", raising=False)
    assert triton_reason(CPU) is None
    assert resolve_compute("auto", CPU) == "fast"


def test_tonfa_compute_replaces_auto_only(monkeypatch):
    monkeypatch.setenv("TONFA_COMPUTE", "exact")
    assert resolve_compute("auto", CPU) == "exact"
    assert resolve_compute("weight_only", CPU) == "weight_only"
    monkeypatch.setenv("TONFA_COMPUTE", "exat")
    with pytest.raises(ValueError, match="TONFA_COMPUTE is 'exat', expected one of auto, exact"):
        resolve_compute("auto", CPU)
    with pytest.raises(ValueError, match="compute is 'quick'"):
        resolve_compute("quick", CPU)


def test_a_device_without_kernels_is_named():
    assert "mps" in triton_reason(torch.device("mps"))


def test_the_probe_is_a_real_launch(interpreter):
    from tonfa.kernels.probe_triton import probe

    assert probe(CPU)


def test_a_failing_launch_becomes_a_sentence(monkeypatch, interpreter):
    import tonfa.kernels.probe_triton as module

    def broken(device):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")

    monkeypatch.setattr(module, "probe", broken)
    targets._launch_reason.cache_clear()
    reason = targets._launch_reason("cuda", 0)
    targets._launch_reason.cache_clear()
    assert reason == "a Triton launch fails here (RuntimeError: Please specify via CC environment variable)"
