"""The tool nodes in a real server: the shared graphs that hold them, and the command that a missing published file is answered with."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file, save_file

from . import graphs
from .lab import DATA
from .test_server import Server, graph

shared = pytest.mark.skipif(not graphs.FOLDER.is_dir(), reason=graphs.WHY_NOT)


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        folder = running.base / "models" / "diffusion_models" / "svdq-fp4-flux.1-dev"
        folder.mkdir()
        tensors = load_file(DATA / "mini_flux_nvfp4.safetensors")
        blocks = {key: t for key, t in tensors.items() if "transformer_blocks." in key}
        save_file(blocks, folder / "transformer_blocks.safetensors")
        save_file({key: t for key, t in tensors.items() if key not in blocks}, folder / "unquantized_layers.safetensors")
        yield running


def shown(entry: dict) -> str:
    assert entry["status"]["status_str"] == "success", entry["status"]
    (text,) = (output["text"][0] for output in entry["outputs"].values() if "text" in output)
    return text


@shared
def test_the_shared_merger_graph_writes_a_file_that_loads(server):
    posted = graphs.for_the_server(graphs.read_graph("merge_safetensors"), server.get("/object_info"))
    status = shown(server.run(posted))
    merged = server.base / "models" / "diffusion_models" / "svdq-fp4_r32-flux.1-dev.safetensors"
    assert str(merged) in status and "NVFP4" in status
    assert load_file(merged).keys() == load_file(DATA / "mini_flux_nvfp4.safetensors").keys()
    assert merged.name in server.get("/object_info/NunchakuFluxDiTLoader")["NunchakuFluxDiTLoader"]["input"]["required"]["model_path"][0]
    assert server.run(graph(merged.name, "merged"))["status"]["status_str"] == "success"


@shared
def test_the_shared_installer_graph_says_that_nothing_is_needed(server):
    posted = graphs.for_the_server(graphs.read_graph("install_wheel"), server.get("/object_info"))
    assert "Nothing to install" in shown(server.run(posted))


def test_old_names_and_menus(server):
    info = server.get("/object_info")
    assert info["MergeNunchakuModelFolderToSafetensor"]["deprecated"] and not info["NunchakuModelMerger"].get("deprecated")
    assert info["SVDQuantDepthPreprocessor"]["deprecated"] and info["NunchakuDepthPreprocessor"]["deprecated"]
    assert info["NunchakuWheelInstaller"]["output_node"] and info["NunchakuModelMerger"]["output_name"] == ["status"]


def test_the_depth_node_says_what_to_use(server):
    image = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}
    depth = {"class_type": "NunchakuDepthPreprocessor", "inputs": {"image": ["1", 0], "model_path": "depth-anything-large-hf"}}
    show = {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}}
    entry = server.run({"1": image, "2": depth, "3": show})
    assert entry["status"]["status_str"] == "error" and "comfyui_controlnet_aux" in str(entry["status"]["messages"])


def test_a_missing_published_file_is_answered_with_the_command(server):
    entry = server.run(graph("svdq-int4-flux.1-kontext-dev", "missing"))
    assert entry["status"]["status_str"] == "error"
    command = "python custom_nodes/ComfyUI-Tonfa download svdq-int4_r32-flux.1-kontext-dev.safetensors"
    assert f"`{command}`" in str(entry["status"]["messages"])
