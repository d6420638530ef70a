"""The loader node inside the host: its contract, names, what it reloads, what it says."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import types
from pathlib import Path

import comfy.model_management
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tonfa.nodes import dit_loader
from tonfa.nodes.flux import NunchakuFluxDiTLoader
from tonfa.nodes.host import shell

from .lab import CPU, DATA, dense_state, made, sample, snr, twin

INT4, NVFP4 = DATA / "mini_flux_int4.safetensors", DATA / "mini_flux_nvfp4.safetensors"


def legacy_folder(source: Path, folder: Path) -> None:
    """The older two-file form of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(source)
    inside = {k: v for k, v in tensors.items() if k.startswith(("transformer_blocks.", "single_transformer_blocks."))}
    save_file(inside, folder / "transformer_blocks.safetensors")
    save_file({k: v for k, v in tensors.items() if k not in inside}, folder / "unquantized_layers.safetensors")
    with safe_open(source, "pt") as file:
        for key in ("config", "comfy_config"):
            (folder / f"{key}.json").write_text(file.metadata()[key])


@pytest.fixture(scope="module", autouse=True)
def models(base) -> Path:
    """The host's diffusion_models folder, filled."""
    folder = Path(base, "models", "diffusion_models")
    (folder / "nunchaku").mkdir()
    shutil.copy(INT4, folder / "svdq-int4_r32-flux.1-mini.safetensors")
    shutil.copy(NVFP4, folder / "nunchaku" / "svdq-fp4_r32-flux.1-other.safetensors")
    legacy_folder(INT4, folder / "svdq-int4-flux.1-legacy")
    return folder


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The paths that were opened as checkpoints."""
    paths, real = [], shell.open_packed
    monkeypatch.setattr(shell, "open_packed", lambda path: (paths.append(path), real(path))[1])
    return paths


def load(node: NunchakuFluxDiTLoader, name: str = "svdq-int4_r32-flux.1-mini.safetensors", **changes: object):
    values = {"cache_threshold": 0, "attention": "nunchaku-fp16", "cpu_offload": "auto", "device_id": 0, "data_type": "bfloat16"}
    with torch.inference_mode():
        return node.load_model(name, **{**values, **changes})[0]


def lines(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("tonfa") and r.levelno >= logging.WARNING]


# -- names -----------------------------------------------------------------------------------------------------------------------


def test_the_list_shows_files_and_old_folders():
    names = NunchakuFluxDiTLoader.INPUT_TYPES()["required"]["model_path"][0]
    assert "svdq-int4_r32-flux.1-mini.safetensors" in names and "svdq-int4-flux.1-legacy" in names
    assert os.path.join("nunchaku", "svdq-fp4_r32-flux.1-other.safetensors") in names


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ("svdq-int4-flux.1-mini", "svdq-int4_r32-flux.1-mini.safetensors"),
        ("svdq-fp4-flux.1-mini", "svdq-int4_r32-flux.1-mini.safetensors"),
        ("somewhere\\svdq-int4_r32-flux.1-mini.safetensors", "svdq-int4_r32-flux.1-mini.safetensors"),
        ("svdq-fp4_r32-flux.1-other.safetensors", "svdq-fp4_r32-flux.1-other.safetensors"),
        ("svdq-int4_r32-flux.1-legacy.safetensors", "svdq-int4-flux.1-legacy"),
        ("SVDQ-int4_r32-FLUX.1-mini.safetensors", "svdq-int4_r32-flux.1-mini.safetensors"),
    ],
)
def test_saved_names_are_resolved_with_one_line(asked, taken, opened, caplog):
    with caplog.at_level(logging.INFO, logger="tonfa"):
        load(NunchakuFluxDiTLoader(), asked)
    assert [Path(p).name for p in opened] == [taken]
    said = [line for line in lines(caplog) if asked in line]
    assert len(said) == 1 and f"using '{taken}'" in said[0].replace("nunchaku" + os.sep, "")


def test_a_name_that_is_there_says_nothing(caplog):
    load(NunchakuFluxDiTLoader())
    load(NunchakuFluxDiTLoader(), "svdq-int4-flux.1-legacy")
    assert lines(caplog) == []


def test_an_unknown_name_is_an_error_with_candidates():
    with pytest.raises(FileNotFoundError, match=r"svdq-int4-flux.1-absent.*svdq-int4_r32-flux.1-mini.safetensors"):
        load(NunchakuFluxDiTLoader(), "svdq-int4-flux.1-absent")


def test_old_folder_and_single_file_give_the_same_latent():
    wanted = sample(twin(INT4))
    for name in ("svdq-int4_r32-flux.1-mini.safetensors", "svdq-int4-flux.1-legacy"):
        assert snr(sample(load(NunchakuFluxDiTLoader(), name, compute="weight_only")), wanted) > 50


# -- reloading -------------------------------------------------------------------------------------------------------------------


def test_cheap_changes_do_not_open_the_file_again(opened):
    node = NunchakuFluxDiTLoader()
    first = load(node)
    before = sample(first)
    for change in (
        {"compute": "exact"}, {"compute": "weight_only"}, {"cache_threshold": 0.12}, {"attention": "flash-attention2"},
        {"cpu_offload": "enable"}, {"i2f_mode": "always"}, {"compute": "auto"},
    ):  # fmt: skip
        again = load(node, **change)
        assert again is not first and again.is_clone(first)
        wanted = {"compute": change.get("compute", "auto"), "attention": change.get("attention", "nunchaku-fp16")}
        assert again.model_options["transformer_options"]["tonfa"] == wanted
    assert len(opened) == 1
    assert torch.equal(sample(again), before)


def test_compute_is_per_clone():
    node = NunchakuFluxDiTLoader()
    close, far = load(node, compute="weight_only"), load(node, compute="exact")
    wanted = sample(twin(INT4))
    assert snr(sample(close), wanted) > 50 > snr(sample(far), wanted)
    assert snr(sample(close), wanted) > 50


def test_a_changed_file_is_loaded_again_and_another_file_too(opened, models):
    node, copy = NunchakuFluxDiTLoader(), models / "svdq-int4_r32-flux.1-copy.safetensors"
    shutil.copy(INT4, copy)
    load(node, copy.name)
    load(node, copy.name)
    assert len(opened) == 1
    shutil.copy(NVFP4, copy)
    assert load(node, copy.name) is not None
    load(node)
    assert len(opened) == 3
    copy.unlink()


def test_a_failed_load_leaves_nothing_half_done(opened, models):
    node, broken = NunchakuFluxDiTLoader(), models / "broken.safetensors"
    broken.write_bytes(b"nothing")
    for _ in range(2):
        with pytest.raises(ValueError, match="broken.safetensors"):
            load(node, broken.name)
    load(node)
    assert len(opened) == 3
    broken.unlink()


def test_cancel_while_loading(opened):
    node = NunchakuFluxDiTLoader()
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        load(node)
    assert sample(load(node)).isfinite().all()


def test_the_file_is_not_held_open_after_loading(models):
    copy = models / "svdq-int4_r32-flux.1-held.safetensors"
    shutil.copy(INT4, copy)
    model = load(NunchakuFluxDiTLoader(), copy.name)
    if Path("/proc/self/maps").exists():
        assert copy.name not in Path("/proc/self/maps").read_text()
    copy.unlink()
    assert sample(model).isfinite().all()


# -- wrong files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("dense.safetensors", lambda: {k: v.bfloat16() for k, v in dense_state(INT4).items()}, r"Load Diffusion Model"),
        ("text.safetensors", lambda: b"<!doctype html><html></html>", r"safetensors"),
        ("cut.safetensors", lambda: INT4.read_bytes()[:200_000], r"cut.safetensors.*(cut|truncated|incomplete|short|ends|bytes)"),
        ("short.safetensors", lambda: without("transformer_blocks.0.qkv_proj.wscales"), r"transformer_blocks.0.qkv_proj.wscales"),
    ],
)
def test_wrong_files_are_told_apart(name, content, told, models):
    made, path = content(), models / name
    path.write_bytes(made) if isinstance(made, bytes) else save_file(made, path)
    with pytest.raises(ValueError, match=told):
        load(NunchakuFluxDiTLoader(), name)
    path.unlink()


def without(key: str) -> dict[str, torch.Tensor]:
    tensors = load_file(INT4)
    del tensors[key]
    return tensors


# -- device and type -------------------------------------------------------------------------------------------------------------


def test_a_missing_device_and_unknown_words_fall_back_with_a_line_each(caplog):
    model = load(
        NunchakuFluxDiTLoader(), device_id=3, data_type="float8", compute="turbo", i2f_mode="never", attention="x", cpu_offload="y"
    )
    said = lines(caplog)
    assert len(said) == 6
    assert "no device 3" in said[0] and "'float8' is not known" in said[1] and "compute 'turbo' is not known" in said[2]
    assert (
        "attention 'x' is not known" in said[3] and "i2f_mode 'never' is not known" in said[4] and "cpu_offload 'y' is not known" in said[5]
    )
    assert model.load_device == CPU


def test_data_type_on_the_cpu_is_what_the_host_would_take(caplog, models):
    """The line comes with a load, not with a run that keeps the model, and not before a file that is refused."""
    said = "Nunchaku FLUX DiT Loader: cpu does not compute this model in bfloat16 by ComfyUI's rules; it computes in float32."
    node, broken = NunchakuFluxDiTLoader(), models / "broken.safetensors"
    broken.write_bytes(b"nothing")

    def times() -> int:
        return sum(said in r.getMessage() for r in caplog.records if r.name.startswith("tonfa"))

    with caplog.at_level(logging.INFO, logger="tonfa"):
        assert comfy.model_management.unet_manual_cast(torch.bfloat16, CPU) == torch.float32
        with pytest.raises(ValueError, match="broken.safetensors"):
            load(node, broken.name)
        assert times() == 0
        load(node)
        load(node, compute="exact")
        assert times() == 1
    broken.unlink()


@pytest.fixture
def every_type(monkeypatch):
    """A device that has every type, as far as the host's rules go."""
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda dtype, device, supported=(): None)


def test_devices_that_are_there(caplog, monkeypatch):
    manager, title = comfy.model_management, "Some Loader"
    monkeypatch.setattr(manager, "get_torch_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert shell.place(0, "bfloat16", title) == shell.Placement(torch.device("cuda", 0), CPU, torch.bfloat16)
    assert shell.place(1, "float16", title) == shell.Placement(torch.device("cuda", 1), CPU, torch.float16)
    assert lines(caplog) == []
    assert shell.place(2, "float16", title).load == torch.device("cuda", 0)
    assert lines(caplog)[0].startswith("Some Loader: there is no device 2")
    monkeypatch.setattr(manager, "unet_offload_device", lambda: torch.device("cuda", 0))  # --gpu-only
    assert shell.place(1, "bfloat16", title).offload == torch.device("cuda", 1)
    assert NunchakuFluxDiTLoader.INPUT_TYPES()["required"]["device_id"][1]["max"] == 1


def test_float16_is_left_when_the_file_has_larger_values(monkeypatch, caplog, every_type):
    checkpoint, supported = shell.open_packed(INT4), [torch.bfloat16, torch.float16, torch.float32]

    def fitting(dtype: torch.dtype, supported: list = supported) -> torch.dtype:
        return shell.fitting(shell.Placement(CPU, CPU, dtype), supported, checkpoint, "Some Loader")

    assert fitting(torch.float16) == torch.float16 and lines(caplog) == []
    monkeypatch.setattr(checkpoint, "outside_blocks", lambda: {"img_in.weight": torch.tensor([1e5])})
    assert fitting(torch.float16) == torch.bfloat16
    assert "img_in.weight has values beyond float16's range" in lines(caplog)[0]
    assert fitting(torch.bfloat16) == torch.bfloat16 and len(lines(caplog)) == 1
    assert fitting(torch.float16, [torch.bfloat16, torch.float32]) == torch.bfloat16  # of a model that the host keeps off float16


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 45), (torch.float16, 60)])
def test_the_types_that_a_gpu_computes_in(dtype, least, every_type):
    """On the CPU, against the dense twin in the same type: the type's own rounding is the host's too, and larger than the distance."""
    with torch.inference_mode():
        model = shell.load_model(str(made()), shell.Placement(CPU, CPU, dtype))
    model.model_options["transformer_options"]["tonfa"] = {"compute": "weight_only"}
    assert model.model_dtype() == dtype
    assert snr(sample(model), sample(twin(made(), dtype))) > least


# -- another pack with the same keys ---------------------------------------------------------------------------------------------


def test_the_original_pack_beside_ours_is_named_once(monkeypatch, caplog):
    theirs = types.ModuleType("theirs")
    theirs.__file__ = os.path.join("custom_nodes", "ComfyUI-nunchaku", "__init__.py")
    theirs.NODE_CLASS_MAPPINGS = {"NunchakuFluxDiTLoader": type("Other", (), {})}
    monkeypatch.setitem(sys.modules, "custom_nodes/ComfyUI-nunchaku", theirs)
    monkeypatch.setattr(dit_loader, "_warned", False)
    for _ in range(2):
        NunchakuFluxDiTLoader.INPUT_TYPES()
    said = [line for line in lines(caplog) if "ComfyUI-nunchaku" in line]
    assert len(said) == 1 and "same node names" in said[0]


def test_no_line_when_ours_is_alone(monkeypatch, caplog):
    monkeypatch.setattr(dit_loader, "_warned", False)
    NunchakuFluxDiTLoader.INPUT_TYPES()
    assert lines(caplog) == [] and dit_loader._warned


def test_config_of_the_file_is_what_the_host_is_given(models):
    config = json.loads(safe_open(INT4, "pt").metadata()["comfy_config"])["model_config"]
    model = load(NunchakuFluxDiTLoader())
    params = model.model.diffusion_model.params
    assert (params.depth, params.depth_single_blocks) == (config["depth"], config["depth_single_blocks"])
    assert len(model.model.diffusion_model.double_blocks) == config["depth"]
    assert model.model.diffusion_model.img_in.weight.shape == (config["hidden_size"], 64)
