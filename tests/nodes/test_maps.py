"""The node maps and what importing the pack does, each in a process of its own where that matters."""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tonfa
from tonfa import nodes

ROOT = Path(tonfa.__file__).parent
INPUTS = {
    "NunchakuFluxDiTLoader": [
        "model_path", "cache_threshold", "attention", "cpu_offload", "device_id", "data_type", "i2f_mode", "compute",
        "cache_threshold_single", "cache_start_percent", "cache_end_percent", "cache_max_reuses", "num_blocks_on_gpu",
    ],
    "NunchakuQwenImageDiTLoader": [
        "model_name", "cpu_offload", "num_blocks_on_gpu", "use_pin_memory", "compute", "cache_threshold", "cache_start_percent",
        "cache_end_percent", "cache_max_reuses", "data_type", "device_id",
    ],
    "NunchakuZImageDiTLoader": [
        "model_name", "compute", "cache_threshold", "cache_start_percent", "cache_end_percent", "cache_max_reuses", "cpu_offload",
        "num_blocks_on_gpu", "use_pin_memory", "data_type", "device_id",
    ],
    "NunchakuFluxLoraLoader": ["model", "lora_name", "lora_strength"],
    "NunchakuFluxLoraStack": ["model", *(f"lora_{what}_{i}" for i in range(1, 16) for what in ("name", "strength"))],
    "NunchakuQwenImageLoraLoader": ["model", "lora_name", "lora_strength", "cpu_offload", "save_precompiled_lora"],
    "NunchakuQwenImageLoraStack": [
        "model", "lora_count", "cpu_offload", "apply_awq_mod", "save_precompiled_lora",
        *(f"lora_{what}_{i}" for i in range(1, 11) for what in ("name", "strength")),
    ],
    "NunchakuTextEncoderLoaderV2": ["model_type", "text_encoder1", "text_encoder2", "t5_min_length"],
    "NunchakuTextEncoderLoader": ["model_type", "text_encoder1", "text_encoder2", "t5_min_length", "use_4bit_t5", "int4_model"],
    "TonfaQuantizeFlux": [
        "model", "filename", "precision", "rank", "mode", "conditioning", "steps", "width", "height", "calibration_seed", "size_gb", "gptq",
    ],
    "TonfaMiniatureLoader": [],
    "TonfaMiniatureCaption": ["caption"],
    "NunchakuModelMerger": ["model_folder", "save_name"],
    "NunchakuWheelInstaller": ["version", "dev_version", "mode"],
    "NunchakuDepthPreprocessor": ["image", "model_path"],
}  # fmt: skip
ALIASES = {
    "SVDQuantFluxDiTLoader": "NunchakuFluxDiTLoader",
    "SVDQuantFluxLoraLoader": "NunchakuFluxLoraLoader",
    "SVDQuantTextEncoderLoader": "NunchakuTextEncoderLoader",
    "MergeNunchakuModelFolderToSafetensor": "NunchakuModelMerger",
    "SVDQuantDepthPreprocessor": "NunchakuDepthPreprocessor",
}
KINDS = {"TextEncoder": "CLIP", "Depth": "IMAGE", "Merge": "STRING", "Installer": "STRING"}
OUTPUTS = {key: (next((kind for part, kind in KINDS.items() if part in key), "MODEL"),) for key in (*INPUTS, *ALIASES)}
OUTPUTS |= {"TonfaMiniatureLoader": ("MODEL", "VAE"), "TonfaMiniatureCaption": ("CONDITIONING",)}
DEPRECATED = {"NunchakuTextEncoderLoader", "NunchakuDepthPreprocessor", *ALIASES}
STACKS = {"NunchakuFluxLoraStack": ["self", "model", "rows"], "NunchakuQwenImageLoraStack": ["self", "model", "lora_count", "rows"]}
LINKED = ("model", "image", "conditioning")  # inputs without a widget: the host has no list to check them against


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "module",
    [
        "tonfa",
        "tonfa.kernels",
        "tonfa.models",
        "tonfa.nodes.dit_loader",
        "tonfa.nodes.flux",
        "tonfa.nodes.lora",
        "tonfa.nodes.miniature",
        "tonfa.nodes.qwen_image",
        "tonfa.nodes.z_image",
        "tonfa.nodes.quantize",
        "tonfa.nodes.text_encoder",
        "tonfa.nodes.tools",
        "tonfa.nodes.host.files",
    ],
)
def test_importing_brings_neither_torch_nor_the_host(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'triton', 'comfy', 'folder_paths', 'numpy') if m in sys.modules])"
    assert run(code).strip() == "[]"


def test_import_from_a_folder_as_the_host_does_it():
    """By path, under a name that is no package name, with the installed `tonfa` out of reach."""
    code = f"""
import importlib.util, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
name = "/x/custom_nodes/ComfyUI-Tonfa"
spec = importlib.util.spec_from_file_location(name, {str(ROOT / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
print(sorted(module.NODE_CLASS_MAPPINGS), module.WEB_DIRECTORY, "tonfa" in sys.modules)
"""
    assert run(code).strip() == f"{sorted([*INPUTS, *ALIASES])} ./web False"


def test_nothing_in_the_pack_imports_itself_by_its_installed_name():
    for file in ROOT.rglob("*.py"):
        if file.relative_to(ROOT).parts[0] in ("nodes", "models", "kernels"):
            text = file.read_text(encoding="utf-8")
            assert "import tonfa" not in text and "from tonfa" not in text, file


def test_bare_import_as_a_tool_does_it():
    spec = importlib.util.spec_from_file_location("__init__", ROOT / "__init__.py", submodule_search_locations=None)
    module = importlib.util.module_from_spec(spec)
    module.__package__ = ""
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS == {}


def test_keys_titles_and_aliases():
    classes, titles = tonfa.NODE_CLASS_MAPPINGS, tonfa.NODE_DISPLAY_NAME_MAPPINGS
    assert classes.keys() == titles.keys() == {key for family in nodes.FAMILIES.values() for key in family}
    assert titles["NunchakuFluxDiTLoader"] == classes["NunchakuFluxDiTLoader"].TITLE == "Nunchaku FLUX DiT Loader"
    assert titles["NunchakuFluxLoraLoader"] == "Nunchaku FLUX LoRA Loader" and titles["NunchakuFluxLoraStack"] == "Nunchaku FLUX LoRA Stack"
    assert titles["NunchakuQwenImageDiTLoader"] == "Nunchaku Qwen-Image DiT Loader"
    assert titles["NunchakuZImageDiTLoader"] == "Nunchaku Z-Image DiT Loader"
    assert classes.keys() == {*INPUTS, *ALIASES}
    for old, new in ALIASES.items():
        assert issubclass(classes[old], classes[new])
    assert all(titles[key] == c.TITLE and hasattr(c, c.FUNCTION) and c.CATEGORY == "Nunchaku" for key, c in classes.items())
    assert {key: c.RETURN_TYPES for key, c in classes.items()} == OUTPUTS
    assert {key for key, c in classes.items() if getattr(c, "DEPRECATED", False)} == DEPRECATED
    assert all(outputs == OUTPUTS[key] for family in nodes.FAMILIES.values() for key, (_, _, outputs) in family.items())


@pytest.mark.parametrize("error", ["ImportError('no module named x')", "ValueError('what')", "SystemExit('gone')", "SyntaxError('bad')"])
def test_a_family_that_cannot_be_imported_keeps_its_keys_and_says_why(error, tmp_path, monkeypatch):
    package = tmp_path / "brokenpack"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "flux.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    classes, titles = nodes.load_family("flux", "brokenpack")
    for name in [m for m in sys.modules if m.startswith("brokenpack")]:
        del sys.modules[name]
    assert classes.keys() == titles.keys() == nodes.FAMILIES["flux"].keys()
    node = classes["NunchakuFluxDiTLoader"]
    assert node.INPUT_TYPES() == {"required": {}} and node.RETURN_TYPES == ("MODEL",)
    with pytest.raises(RuntimeError, match=r"could not be loaded: \w+: .*Update ComfyUI-Tonfa.*doctor"):
        getattr(node(), node.FUNCTION)(model_path="x")


def test_every_input_is_taken_off_the_hosts_list_check_and_has_a_default():
    """Naming an input in VALIDATE_INPUTS is what keeps the host from refusing saved values that are not in today's list."""
    for key, inputs in INPUTS.items():
        node = tonfa.NODE_CLASS_MAPPINGS[key]
        assert node.VALIDATE_INPUTS() is True
        checked, taken = inspect.signature(node.VALIDATE_INPUTS), inspect.signature(getattr(node, node.FUNCTION))
        if key in STACKS:  # their rows are taken by whatever name they have
            assert [p.kind.name for p in checked.parameters.values()] == ["VAR_KEYWORD"]
            assert list(taken.parameters) == STACKS[key] and taken.parameters["rows"].kind.name == "VAR_KEYWORD"
            continue
        assert list(checked.parameters) == [name for name in inputs if name not in LINKED]
        assert list(taken.parameters)[1:] == inputs


@pytest.mark.parametrize("language", ["en", "zh", "ko"])
def test_translations_name_every_input(language):
    names = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert names.keys() == {*INPUTS, *ALIASES}
    for key in names:
        assert names[key]["display_name"] and names[key]["description"]
        assert list(names[key]["inputs"]) == INPUTS[ALIASES.get(key, key)]
        assert all(entry["name"] and entry.get("tooltip") != "" for entry in names[key]["inputs"].values())
        outputs = getattr(tonfa.NODE_CLASS_MAPPINGS[key], "RETURN_NAMES", OUTPUTS[key])
        assert {slot: entry["name"] for slot, entry in names[key]["outputs"].items()} == {str(i): name for i, name in enumerate(outputs)}
        if "TextEncoder" in key:
            assert all(entry["tooltip"] for entry in names[key]["inputs"].values())


def test_the_english_text_is_the_nodes_own():
    names = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert names.keys() == tonfa.NODE_CLASS_MAPPINGS.keys()
    for key, node in tonfa.NODE_CLASS_MAPPINGS.items():
        assert names[key]["description"] == node.DESCRIPTION and names[key]["display_name"] == node.TITLE
        own = sys.modules[node.__module__].TOOLTIPS.values()
        assert all(entry["tooltip"] in own for entry in names[key]["inputs"].values() if "tooltip" in entry)


def test_every_node_has_a_help_page():
    for key in tonfa.NODE_CLASS_MAPPINGS:
        page = (ROOT / "web" / "docs" / f"{key}.md").read_text(encoding="utf-8")
        rows = re.compile(r"_(1\d|[2-9])$")  # of a stack's fifteen, the first stands for all
        assert all(f"`{name}`" in page for name in INPUTS[ALIASES.get(key, key)] if not rows.search(name))


def test_every_example_has_the_picture_that_the_template_browser_asks_for():
    graphs = list((ROOT / "workflows").glob("*.json"))
    assert graphs
    for graph in graphs:
        picture = graph.with_suffix(".jpg").read_bytes()  # a pack's templates are shown with NAME.jpg and no other ending
        assert picture.startswith(b"\xff\xd8") and len(picture) < 200_000


def test_example_graph_fits_the_loader():
    graph = json.loads((ROOT / "workflows" / "tonfa-flux.1-dev.json").read_text(encoding="utf-8"))
    (loader,) = [n for n in graph["nodes"] if n["type"] == "NunchakuFluxDiTLoader"]
    saved = INPUTS["NunchakuFluxDiTLoader"][: len(loader["widgets_values"])]  # widgets are saved by position: new inputs go behind
    assert [i["name"] for i in loader["inputs"]] == saved and "compute" in saved
    by_id = {n["id"]: n for n in graph["nodes"]}
    for link, source, out, target, slot, kind in graph["links"]:
        assert link in by_id[source]["outputs"][out]["links"] and by_id[source]["outputs"][out]["type"] == kind
        assert by_id[target]["inputs"][slot]["link"] == link
