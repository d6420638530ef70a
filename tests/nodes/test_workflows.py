"""The example graphs: they are what workflows/make.py writes, hold together, fit our nodes' inputs, and name their files' sources."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import tonfa
from tonfa.models import published

FOLDER = Path(tonfa.__file__).parent / "workflows"
GRAPHS = sorted(FOLDER.glob("*.json"))
WIDGETS = {"INT": int, "FLOAT": (int, float), "BOOLEAN": bool, "STRING": str}


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("tonfa_make_workflows", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_files(monkeypatch):
    """ComfyUI's folder_paths, with empty folders."""
    empty = {"get_filename_list": lambda _: [], "get_folder_paths": lambda _: [], "get_full_path": lambda *_: None}
    monkeypatch.setitem(sys.modules, "folder_paths", types.SimpleNamespace(**empty))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def our_nodes(path: Path) -> list[dict]:
    return [node for node in read(path)["nodes"] if node["type"] in tonfa.NODE_CLASS_MAPPINGS]


def files(graph: dict) -> set[str]:
    return {v for n in graph["nodes"] for v in n["widgets_values"] if n["type"] != "MarkdownNote" and str(v).endswith(".safetensors")}


def test_the_files_are_what_the_script_writes(make):
    assert {path.stem for path in GRAPHS} == set(make.GRAPHS)
    for path in GRAPHS:
        assert path.read_text(encoding="utf-8") == make.text(path.stem), f"run: python workflows/make.py ({path.name})"


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_a_graph_holds_together(path):
    graph = read(path)
    by_id = {node["id"]: node for node in graph["nodes"]}
    assert graph["version"] == 0.4 and graph["last_node_id"] == max(by_id) and graph["last_link_id"] == len(graph["links"])
    for link, source, out, target, slot, kind in graph["links"]:
        assert link in by_id[source]["outputs"][out]["links"] and by_id[source]["outputs"][out]["type"] == kind
        assert by_id[target]["inputs"][slot]["link"] == link and by_id[target]["inputs"][slot]["type"] == kind
    for node in graph["nodes"]:
        needed = [slot for slot in node["inputs"] if "widget" not in slot and "shape" not in slot]
        assert all(slot["link"] for slot in needed), node["type"]
    boxes = [(*node["pos"], *(p + s for p, s in zip(node["pos"], node["size"], strict=True))) for node in graph["nodes"]]
    for i, a in enumerate(boxes):
        assert not [b for b in boxes[:i] if a[0] < b[2] and b[0] < a[2] and a[1] - 30 < b[3] and b[1] - 30 < a[3]], "nodes overlap"


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_our_nodes_values_fit_their_inputs(path, no_files):
    """They are saved by position; what a node got since then goes behind them."""
    nodes = our_nodes(path)
    ends = {"NunchakuFluxDiTLoader", "NunchakuQwenImageDiTLoader", "NunchakuZImageDiTLoader", "TonfaQuantizeFlux"}
    assert len(ends & {node["type"] for node in nodes}) == 1
    for node in nodes:
        groups = tonfa.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()
        inputs = {**groups["required"], **groups.get("optional", {})}
        widgets = {name: spec for name, spec in inputs.items() if isinstance(spec[0], list) or spec[0] in WIDGETS}
        saved = [slot["name"] for slot in node["inputs"] if "widget" in slot]
        assert saved == list(widgets)[: len(saved)] and len(node["widgets_values"]) == len(saved)
        assert len(saved) >= sum(name in groups["required"] for name in widgets)
        assert {slot["name"] for slot in node["inputs"]} - set(saved) == set(inputs) - set(widgets)
        for value, (kind, more) in zip(node["widgets_values"], widgets.values(), strict=False):
            if isinstance(kind, list):
                assert value in kind or str(value).endswith(".safetensors")
            else:
                assert isinstance(value, WIDGETS[kind]) and more.get("min", value) <= value <= more.get("max", value)


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_the_note_says_where_every_file_goes(path, make):
    graph = read(path)
    (note,) = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    for name in files(graph) - {"my-style.safetensors"}:
        folder, repository, _ = make.SOURCES[name]
        assert f"- `{name}` in `models/{folder}`: [{repository}](https://huggingface.co/{repository})" in note["widgets_values"][0]


def test_the_notes_sources_are_those_of_the_download_command(make):
    for name, (folder, repository, _) in make.SOURCES.items():
        if published.known(name):
            file = published.resolve(name)
            assert (file.name, file.folder, file.repo) == (name, folder, repository)
