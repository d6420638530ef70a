"""The tool nodes, with folder_paths imitated and real checkpoint folders of the old form made from tests/data."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tonfa
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tonfa.models.dequantize import dense_state_dict
from tonfa.models.formats.checkpoint import CheckpointError, open_checkpoint
from tonfa.nodes import tools

DATA = Path(__file__).resolve().parent.parent / "data"
NAME = "svdq-int4-flux.1-dev"


def legacy(folder: Path, source: str = "mini_flux_int4", comfy_config: bool = True) -> Path:
    """A folder of the old form with the tensors and the config files of a single file."""
    folder.mkdir(parents=True)
    tensors = load_file(DATA / f"{source}.safetensors")
    blocks = {key: t for key, t in tensors.items() if key.startswith(("transformer_blocks.", "single_transformer_blocks."))}
    save_file(blocks, folder / "transformer_blocks.safetensors")
    save_file({key: t for key, t in tensors.items() if key not in blocks}, folder / "unquantized_layers.safetensors")
    for key in ("config", "comfy_config") if comfy_config else ("config",):
        (folder / f"{key}.json").write_text(header(DATA / f"{source}.safetensors")[key], encoding="utf-8")
    return folder


def header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


@pytest.fixture
def root(tmp_path, monkeypatch):
    """ComfyUI's models/diffusion_models, as its folder_paths would show it."""
    root = tmp_path / "diffusion_models"
    root.mkdir()

    def listed(kind):
        return sorted(str(p.relative_to(root)) for p in root.rglob("*.safetensors"))

    def full(kind, name):
        return str(root / name) if (root / name).is_file() else None

    monkeypatch.setitem(sys.modules, "folder_paths", SimpleNamespace(get_filename_list=listed, get_full_path=full))
    return root


def merge(folder: str = NAME, save_name: str = "merged") -> str:
    node = tonfa.NODE_CLASS_MAPPINGS["NunchakuModelMerger"]
    (status,) = getattr(node(), node.FUNCTION)(model_folder=folder, save_name=save_name)
    return status


# -- merger -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["mini_flux_int4", "mini_flux_int4_hd128", "mini_flux_nvfp4"])
def test_the_merged_file_is_the_single_file(root, source):
    legacy(root / NAME, source)
    status = merge()
    merged, single = root / "merged.safetensors", DATA / f"{source}.safetensors"
    assert str(merged) in status and f"rank {open_checkpoint(single).rank}" in status
    ours, theirs = load_file(merged), load_file(single)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key].view(torch.uint8), theirs[key].view(torch.uint8)), key
    told = header(single)
    for key in ("config", "comfy_config", "model_class"):
        assert header(merged)[key] == told[key]
    assert json.loads(header(merged)["quantization_config"]) == json.loads(told["quantization_config"])
    assert sorted(p.name for p in root.iterdir()) == ["merged.safetensors", NAME]


@pytest.mark.parametrize("damaged", [None, "{"], ids=["absent", "damaged"])
def test_config_files_that_are_no_use_are_told_from_the_tensors(root, damaged):
    folder = legacy(root / NAME, comfy_config=False)
    if damaged is not None:
        (folder / "config.json").write_text(damaged, encoding="utf-8")
        (folder / "comfy_config.json").write_text(damaged, encoding="utf-8")
    merge()
    comfy = json.loads(header(root / "merged.safetensors")["comfy_config"])
    assert comfy["model_class"] == "Flux" and comfy["model_config"]["hidden_size"] == 128
    before, after = open_checkpoint(folder), open_checkpoint(root / "merged.safetensors")
    assert (before.config, before.precision, before.rank) == (after.config, after.precision, after.rank) and not after.warnings
    a, b = dict(dense_state_dict(before)), dict(dense_state_dict(after))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_file_that_is_there_is_not_written_over(root):
    legacy(root / NAME)
    (root / "merged.safetensors").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="is not written over. Choose another save_name"):
        merge()
    assert (root / "merged.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("save_name", ["../out", "sub/out", "sub\\out", "/tmp/out", "C:out", "..", "a?"])
def test_the_file_lies_beside_the_folder(root, save_name):
    legacy(root / NAME)
    with pytest.raises(ValueError, match="must be a plain file name"):
        merge(save_name=save_name)
    assert [p.name for p in root.iterdir()] == [NAME]


@pytest.mark.parametrize(("save_name", "name"), [(" a.b ", "a.b.safetensors"), ("x.safetensors", "x.safetensors"), ("x.SFT", "x.SFT")])
def test_the_ending_is_added(root, save_name, name):
    legacy(root / "nunchaku" / NAME)
    merge(f"nunchaku\\{NAME}", save_name)
    assert (root / "nunchaku" / name).is_file()


def test_a_saved_folder_name_is_matched_and_the_precision_never_changed(root):
    legacy(root / "old" / NAME)
    assert str(root / "old" / "merged.safetensors") in merge(NAME.upper())
    with pytest.raises(FileNotFoundError, match=f"old/{NAME}. Choose one in model_folder"):
        merge("svdq-fp4-flux.1-dev")
    with pytest.raises(ValueError, match="save_name is empty"):
        merge(save_name="  ")


def test_nothing_to_merge(root):
    with pytest.raises(FileNotFoundError, match="No folder .* holds transformer_blocks.safetensors"):
        merge()


def test_a_folder_that_is_not_whole_is_refused_before_anything_is_written(root):
    folder = legacy(root / NAME)
    (folder / "unquantized_layers.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"without unquantized_layers\.safetensors"):
        merge()
    shutil.rmtree(folder)
    tensors = load_file(legacy(root / NAME) / "transformer_blocks.safetensors")
    tensors.pop("transformer_blocks.0.qkv_proj.lora_up")
    save_file(tensors, folder / "transformer_blocks.safetensors")
    with pytest.raises(CheckpointError, match="lora_up is missing"):
        merge()
    assert [p.name for p in root.iterdir()] == [NAME]


def test_no_half_file_stays_behind(root, monkeypatch):
    legacy(root / NAME)

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CheckpointError, match="merged.safetensors cannot be written: No space left"):
        merge()
    assert [p.name for p in root.iterdir()] == [NAME]


def test_the_list_shows_the_folders_of_the_old_form(root):
    legacy(root / NAME)
    (root / "single.safetensors").touch()
    for key in ("NunchakuModelMerger", "MergeNunchakuModelFolderToSafetensor"):
        inputs = tonfa.NODE_CLASS_MAPPINGS[key].INPUT_TYPES()["required"]
        assert list(inputs) == ["model_folder", "save_name"] and inputs["model_folder"][0] == [NAME] and inputs["save_name"][0] == "STRING"


# -- installer --------------------------------------------------------------------------------------------------------------------


def test_the_installer_installs_nothing(monkeypatch):
    def used(*_, **__):
        raise AssertionError("a process or a connection was started")

    for what in ("subprocess.Popen", "subprocess.run", "socket.socket", "os.system"):
        monkeypatch.setattr(what, used)
    node = tonfa.NODE_CLASS_MAPPINGS["NunchakuWheelInstaller"]
    assert node.OUTPUT_NODE and node.RETURN_NAMES == ("status",) and node.IS_CHANGED(version="1") != node.IS_CHANGED(version="1")
    for values in (("latest", "none", "install"), ("v1.2.1", "x", "uninstall"), ("none", "none", "update node")):
        assert node.VALIDATE_INPUTS(*values) is True
        (status,) = node().run(*values)
        assert "Nothing to install" in status and "no nunchaku wheel" in status
    inputs = node.INPUT_TYPES()["required"]
    assert list(inputs) == ["version", "dev_version", "mode"] and inputs["mode"][0] == ["install", "uninstall", "update node"]
    assert inputs["dev_version"][1]["default"] == "none" and "latest" in inputs["version"][0]


# -- depth ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["NunchakuDepthPreprocessor", "SVDQuantDepthPreprocessor"])
def test_the_depth_node_says_what_to_use(key):
    node = tonfa.NODE_CLASS_MAPPINGS[key]
    assert list(node.INPUT_TYPES()["required"]) == ["image", "model_path"] and node.VALIDATE_INPUTS("depth-anything-large-hf") is True
    with pytest.raises(RuntimeError, match="DepthAnythingPreprocessor.*comfyui_controlnet_aux") as error:
        getattr(node(), node.FUNCTION)(image=None, model_path="depth-anything-large-hf")
    assert str(error.value).startswith(node.TITLE)


# -- the shared graphs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "values"),
    [("NunchakuWheelInstaller", ["latest", "none", "install"]), ("NunchakuModelMerger", [NAME, "svdq-int4_r32-flux.1-dev"])],
)
def test_values_as_graphs_store_them(root, key, values):
    legacy(root / NAME)
    node = tonfa.NODE_CLASS_MAPPINGS[key]
    inputs = dict(zip(node.INPUT_TYPES()["required"], values, strict=True))
    assert node.VALIDATE_INPUTS(**inputs) is True and isinstance(getattr(node(), node.FUNCTION)(**inputs)[0], str)
    assert set(tools.TOOLTIPS) >= set(inputs)
