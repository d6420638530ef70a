"""The three DiT loaders and the LoRA nodes of Qwen-Image without a host: their inputs, what they ask of it, what they say."""

import logging
import os
import sys
import types
from dataclasses import dataclass

import pytest
import tonfa
from tonfa import nodes
from tonfa.nodes import dit_loader

LOADERS = {"flux": "NunchakuFluxDiTLoader", "qwen-image": "NunchakuQwenImageDiTLoader", "z-image": "NunchakuZImageDiTLoader"}
ENUMS = {
    "compute": ["auto", "exact", "fast", "weight_only"],
    "cpu_offload": ["auto", "enable", "disable"],
    "use_pin_memory": ["enable", "disable"],
    "data_type": ["bfloat16", "float16"],
}
DEFAULTS = {
    "compute": "auto", "cpu_offload": "auto", "use_pin_memory": "disable", "data_type": "bfloat16", "num_blocks_on_gpu": 1, "device_id": 0,
    "cache_threshold": 0.0, "cache_start_percent": 0.0, "cache_end_percent": 1.0, "cache_max_reuses": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Offload:
    mode: str
    resident: int
    pin: bool = True


class Model:
    """A patcher, as far as a loader node touches it."""

    def __init__(self, path: str, where: tuple, compute: str) -> None:
        self.path, self.where, self.compute = path, where, compute
        self.model_options = {"transformer_options": {}}
        self.offload = self.cache = None

    def clone(self) -> "Model":
        return Model(self.path, self.where, self.compute)

    def set_offload(self, offload: Offload) -> None:
        self.offload = offload


@pytest.fixture
def host(monkeypatch, tmp_path):
    """The parts of the host's side that a loader calls, made of nothing; `family` is what every file turns out to be."""
    shown = types.SimpleNamespace(family="qwen-image", loaded=[])
    file = tmp_path / "svdq-int4_r32-some.safetensors"
    file.touch()

    def load_model(path, where, *, compute="auto", title):
        shown.loaded.append((os.path.basename(path), where, compute, title))
        return Model(path, where, compute)

    def use_first_block_cache(model, config):
        model.cache = config

    parts = {
        "caching": {"cache_config": lambda *values, title: (*values, title), "use_first_block_cache": use_first_block_cache},
        "lora_files": {"teach_stock_nodes": lambda: None},
        "offloading": {"Offload": Offload},
        "shell": {"place": lambda *asked: asked, "load_model": load_model, "family_of": lambda _: shown.family},
    }
    for name, members in parts.items():
        monkeypatch.setitem(sys.modules, f"tonfa.nodes.host.{name}", types.SimpleNamespace(**members))
    folder = {"get_filename_list": lambda _: [file.name], "get_full_path": lambda *_: str(file), "get_folder_paths": lambda _: []}
    monkeypatch.setitem(sys.modules, "folder_paths", types.SimpleNamespace(**folder))
    return shown


def inputs_of(key: str) -> dict:
    groups = tonfa.NODE_CLASS_MAPPINGS[key].INPUT_TYPES()
    return {**groups["required"], **groups.get("optional", {})}


# -- inputs -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["NunchakuQwenImageDiTLoader", "NunchakuZImageDiTLoader"])
def test_inputs_have_complete_lists_and_defaults(host, key):
    """Lists are complete whatever the hardware is. Only the file is required, so that a graph that names nothing else runs."""
    groups = tonfa.NODE_CLASS_MAPPINGS[key].INPUT_TYPES()
    assert list(groups["required"]) == ["model_name"]
    assert all(more["tooltip"] for _, more in inputs_of(key).values())
    assert {name: kind for name, (kind, _) in groups["optional"].items() if isinstance(kind, list)} == ENUMS
    assert {name: more["default"] for name, (_, more) in groups["optional"].items()} == DEFAULTS
    assert not any("lazy" in more for _, more in groups["optional"].values())  # the host asks for a lazy input that a graph does not have
    assert groups["optional"]["num_blocks_on_gpu"][1]["max"] == 60


def test_the_first_widgets_are_those_of_the_graphs_that_there_are(host):
    """They are saved by position: (model_name, cpu_offload, num_blocks_on_gpu, use_pin_memory), of which old graphs have one or two."""
    qwen = inputs_of("NunchakuQwenImageDiTLoader")
    assert list(qwen)[:4] == ["model_name", "cpu_offload", "num_blocks_on_gpu", "use_pin_memory"]
    blocks = qwen["num_blocks_on_gpu"][1]
    assert tuple(blocks[name] for name in ("default", "min", "max", "step")) == (1, 1, 60, 1)
    assert next(iter(inputs_of("NunchakuZImageDiTLoader"))) == "model_name"


# -- loading ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LOADERS)
def test_a_graph_that_names_the_file_alone(host, family, caplog):
    node = tonfa.NODE_CLASS_MAPPINGS[LOADERS[family]]()
    host.family = family
    with caplog.at_level(logging.INFO, logger="tonfa"):
        (model,) = node.load_model("svdq-int4_r32-some.safetensors")
    title = node.TITLE
    assert host.loaded == [("svdq-int4_r32-some.safetensors", (0, "bfloat16", title), "auto", title)]
    assert model.model_options["transformer_options"]["tonfa"] == {"compute": "auto", "attention": "nunchaku-fp16"}
    assert model.offload == Offload("auto", 1, family == "flux")  # the FLUX loader has no switch for it
    assert model.cache == (0.0, 0.0, 0.0, 1.0, 0, title) and not caplog.records


@pytest.mark.parametrize("family", ["qwen-image", "z-image"])
def test_every_input_arrives(host, family):
    node = tonfa.NODE_CLASS_MAPPINGS[LOADERS[family]]()
    asked = {
        "model_name": "elsewhere/svdq-fp4_r32-some.safetensors", "compute": "exact", "cpu_offload": "enable", "num_blocks_on_gpu": 20.0,
        "use_pin_memory": "enable", "cache_threshold": 0.1, "cache_start_percent": 0.2, "cache_end_percent": 0.8, "cache_max_reuses": 3,
        "data_type": "float16", "device_id": 1,
    }  # fmt: skip
    assert asked.keys() == inputs_of(LOADERS[family]).keys()
    (model,) = node.load_model(**asked)
    assert model.where == (1, "float16", node.TITLE) and model.offload == Offload("enable", 20, True)
    assert model.model_options["transformer_options"]["tonfa"]["compute"] == "exact"
    assert model.cache == (0.1, 0.0, 0.2, 0.8, 3, node.TITLE)
    node.load_model(**{**asked, "compute": "fast", "cache_threshold": 0, "cpu_offload": "disable", "use_pin_memory": "disable"})
    assert len(host.loaded) == 1
    node.load_model(**{**asked, "data_type": "bfloat16"})
    assert len(host.loaded) == 2


def test_unknown_words_are_the_default_with_a_line_each(host, caplog):
    node = tonfa.NODE_CLASS_MAPPINGS["NunchakuQwenImageDiTLoader"]()
    (model,) = node.load_model("svdq-int4_r32-some.safetensors", cpu_offload="sometimes", use_pin_memory=True, compute="turbo")
    unknown = (("compute", "turbo", "auto"), ("cpu_offload", "sometimes", "auto"), ("use_pin_memory", True, "disable"))
    lines = [f"{node.TITLE}: {name} '{value}' is not known; using {default}." for name, value, default in unknown]
    assert [r.getMessage() for r in caplog.records] == lines
    assert model.offload == Offload("auto", 1, False)


@pytest.mark.parametrize("made_for", LOADERS)
@pytest.mark.parametrize("family", LOADERS)
def test_any_loader_opens_any_family_and_says_so_once(host, made_for, family, caplog):
    node, host.family = tonfa.NODE_CLASS_MAPPINGS[LOADERS[made_for]](), family
    with caplog.at_level(logging.INFO, logger="tonfa"):
        for compute in ("auto", "exact"):
            node.load_model("svdq-int4_r32-some.safetensors", compute=compute)
    title = {"flux": "FLUX.1", "qwen-image": "Qwen-Image", "z-image": "Z-Image"}[family]
    line = f"{node.TITLE}: svdq-int4_r32-some.safetensors is {title}; loaded as that."
    assert [r.getMessage() for r in caplog.records] == ([] if family == made_for else [line])


@pytest.mark.parametrize("family", LOADERS)
def test_a_missing_file_names_the_nodes_own_input(host, family):
    node = tonfa.NODE_CLASS_MAPPINGS[LOADERS[family]]()
    with pytest.raises(FileNotFoundError, match=rf"Choose one in {'model_path' if family == 'flux' else 'model_name'}\."):
        node.load_model("svdq-int4_r32-absent.safetensors")
    assert host.loaded == []


# -- another pack with our keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*LOADERS.values(), "NunchakuQwenImageLoraLoader", "SVDQuantFluxLoraLoader"])
def test_another_pack_with_any_key_of_ours_is_named(monkeypatch, key):
    theirs = types.ModuleType("theirs")
    theirs.__file__ = os.path.join("custom_nodes", "ComfyUI-Other", "__init__.py")
    theirs.NODE_CLASS_MAPPINGS = {"SomethingElse": object, key: type("Other", (), {})}
    monkeypatch.setitem(sys.modules, "custom_nodes/ComfyUI-Other", theirs)
    assert dit_loader.other_packs() == ["ComfyUI-Other"]


def test_our_own_pack_is_no_other_one(monkeypatch):
    """Not under a second name, and not with placeholders where a family could not be imported."""
    assert dit_loader.other_packs() == []
    again = types.ModuleType("again")
    again.__file__ = os.path.join("custom_nodes", "ComfyUI-Tonfa", "__init__.py")
    broken, _ = nodes.load_family("lora", "no_such_package")
    again.NODE_CLASS_MAPPINGS = {**tonfa.NODE_CLASS_MAPPINGS, **broken}
    monkeypatch.setitem(sys.modules, "again", again)
    assert dit_loader.other_packs() == []


# -- LoRA ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def applied(monkeypatch) -> list:
    """The rows that were applied, one list a call."""
    calls = []

    class LoraFiles:
        def apply(self, model, rows):
            calls.append(list(rows))
            return "with LoRA"

    monkeypatch.setitem(sys.modules, "tonfa.nodes.host.lora_files", types.SimpleNamespace(LoraFiles=LoraFiles))
    names = ["a.safetensors", "b.safetensors"]
    monkeypatch.setitem(sys.modules, "folder_paths", types.SimpleNamespace(get_filename_list=lambda _: names))
    return calls


def test_inputs_of_the_qwen_lora_nodes(applied):
    loader, stack = (tonfa.NODE_CLASS_MAPPINGS[f"NunchakuQwenImageLora{what}"].INPUT_TYPES() for what in ("Loader", "Stack"))
    assert list(loader["required"]) == ["model", "lora_name", "lora_strength"]
    assert list(loader["optional"]) == ["cpu_offload", "save_precompiled_lora"]
    assert list(stack["required"]) == ["model", "lora_count"]
    assert list(stack["optional"])[:3] == ["cpu_offload", "apply_awq_mod", "save_precompiled_lora"]
    assert tuple(stack["required"]["lora_count"][1][name] for name in ("default", "min", "max")) == (3, 1, 10)
    for groups in (loader, stack):
        choices, more = groups["optional"]["cpu_offload"]
        assert (choices, more["default"]) == (["auto", "enable", "disable"], "disable")
        idle = [name for name in groups["optional"] if not name.startswith("lora_")]
        assert all("does nothing" in groups["optional"][name][1]["tooltip"] for name in idle)
        assert all(groups["optional"][name] == ("BOOLEAN", {"default": False, "tooltip": groups["optional"][name][1]["tooltip"]})
                   for name in idle if name != "cpu_offload")  # fmt: skip
    assert stack["optional"]["lora_name_10"][0] == ["None", "a.safetensors", "b.safetensors"]
    strength = stack["optional"]["lora_strength_10"][1]
    assert tuple(strength[name] for name in ("default", "min", "max", "step")) == (1.0, -100.0, 100.0, 0.01)


def test_the_qwen_lora_loader(applied):
    node = tonfa.NODE_CLASS_MAPPINGS["NunchakuQwenImageLoraLoader"]()
    more = {"cpu_offload": "enable", "save_precompiled_lora": True}
    for values in ({}, more):
        assert node.load_lora("model", "a.safetensors", "0.5", **values) == ("with LoRA",)
    assert applied == [[("lora_name", "a.safetensors", 0.5)]] * 2
    assert node.load_lora("model", "gone", 1e-6) == ("model",) and len(applied) == 2


def test_the_qwen_lora_stack_takes_the_rows_that_count(applied):
    node = tonfa.NODE_CLASS_MAPPINGS["NunchakuQwenImageLoraStack"]()
    rows = {
        "lora_name_1": "None", "lora_strength_1": 1.0, "lora_name_2": "a.safetensors", "lora_strength_2": -0.5,
        "lora_name_3": "b.safetensors", "lora_strength_3": 0.0, "lora_name_4": "b.safetensors", "lora_name_10": "a.safetensors",
    }  # fmt: skip
    idle = {"cpu_offload": "auto", "apply_awq_mod": True, "save_precompiled_lora": True}
    assert node.load_lora_stack("model", 3, **idle, **rows) == ("with LoRA",)
    assert applied == [[("lora_name_2", "a.safetensors", -0.5)]]
    node.load_lora_stack("model", 10.0, **rows)
    assert applied[1] == [
        ("lora_name_2", "a.safetensors", -0.5),
        ("lora_name_4", "b.safetensors", 1.0),
        ("lora_name_10", "a.safetensors", 1.0),
    ]
    assert node.load_lora_stack("model", 1, **rows) == ("model",) and node.load_lora_stack("model") == ("model",)
    with pytest.raises(ValueError, match="lora_count is 'many'; it must be a number"):
        node.load_lora_stack("model", "many")
    with pytest.raises(ValueError, match="The strength of lora_name_2 is 'much'"):
        node.load_lora_stack("model", 3, lora_name_2="a.safetensors", lora_strength_2="much")
