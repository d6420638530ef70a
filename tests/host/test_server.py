"""A real ComfyUI server, headless, on a free loopback port, with this pack in its custom_nodes: the API that a browser uses."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import folder_paths
import pytest
import tonfa
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tonfa.models.comfyui import find_comfyui

import nodes

from . import encoders, families, graphs
from .lab import DATA, loaded, made, sample, snr, twin
from .test_lora_nodes import SDXL, by, generated

PACK = Path(tonfa.__file__).parent
SHIM = Path(__file__).resolve().parent / "shim"  # its sitecustomize.py lets torchvision be imported beside a CPU torch
MODEL = DATA / "mini_flux_int4.safetensors"
STARTS_WITHIN, RUNS_WITHIN = 150, 60
# The small models' conditioning is narrower than any text encoder's, so a node of the test's own makes it: lab's or families' numbers.
CONDITIONING_NODE = """
import torch

class TestConditioning:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 3})}, "optional": {"width": ("INT", {"default": 96})}}

    def make(self, seed, width=96):
        g = torch.Generator().manual_seed(seed)
        context = torch.randn(1, 12, width, generator=g)
        return ([[context, {"pooled_output": torch.randn(1, 64, generator=g), "guidance": 3.5}]],)

NODE_CLASS_MAPPINGS = {"TestConditioning": TestConditioning}
"""


class Server:
    """main.py in a process of its own; `with Server() as server`."""

    def __enter__(self) -> Server:
        self.base = Path(tempfile.mkdtemp(prefix="tonfa-server-"))
        for folder in ("models/diffusion_models", "custom_nodes", "input", "output", "temp", "user"):
            (self.base / folder).mkdir(parents=True)
        (self.base / "custom_nodes" / "ComfyUI-Tonfa").symlink_to(PACK, target_is_directory=True)
        (self.base / "custom_nodes" / "test_nodes.py").write_text(CONDITIONING_NODE)
        (self.base / "custom_nodes" / "zz_stand_ins.py").write_text(graphs.NODES)
        shutil.copy(MODEL, self.base / "models" / "diffusion_models" / "svdq-int4_r32-flux.1-mini.safetensors")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(self.base),
            "--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:",
        ]  # fmt: skip
        self.log = open(self.base / "server.log", "w+", encoding="utf-8")  # noqa: SIM115 (closed with the server)
        path = os.pathsep.join(filter(None, [str(SHIM), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path}
        self.process = subprocess.Popen(command, cwd=find_comfyui(), env=environment, stdout=self.log, stderr=subprocess.STDOUT)
        self.wait(lambda: self.get("/object_info/NunchakuFluxDiTLoader"), STARTS_WITHIN, "answer")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
        shutil.rmtree(self.base, ignore_errors=True)

    def said(self) -> str:
        return (self.base / "server.log").read_text(encoding="utf-8")

    def wait(self, ask, seconds: float, what: str):
        """ask() until it gives something; a dead or silent server is an error with the end of its log."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if (answer := ask()) not in (None, {}):
                    return answer
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            time.sleep(0.25)
        raise AssertionError(f"The server did not {what} (exit status {self.process.poll()}):\n{self.said()[-4000:]}")

    def request(self, path: str, body: dict | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def get(self, path: str):
        return json.loads(self.request(path))

    def run(self, graph: dict) -> dict:
        """Posts a graph and waits for its end; its history entry."""
        try:
            answer = json.loads(self.request("/prompt", {"prompt": graph}))
        except urllib.error.HTTPError as refused:
            raise AssertionError(f"The graph was refused: {refused.read().decode()}") from refused
        assert not answer.get("node_errors"), answer
        key = answer["prompt_id"]
        return self.wait(lambda: self.get(f"/history/{key}"), RUNS_WITHIN, "finish the graph")[key]


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


FLUX_VALUES = {
    "cache_threshold": 0, "attention": "nunchaku-fp16", "cpu_offload": "auto", "device_id": 0, "data_type": "bfloat16",
    "i2f_mode": "enabled",
}  # fmt: skip


def graph(model_path: str, prefix: str, key: str = "NunchakuFluxDiTLoader", **changes: object) -> dict:
    """Loader, sampler, SaveLatent; the loader's values as an old graph saved them (cache_threshold an integer, no `compute`)."""
    sampler = {"seed": 1, "steps": 8, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    wires = {"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0]}
    return {
        "1": {"class_type": key, "inputs": {"model_path": model_path, **FLUX_VALUES, **changes}},
        "2": {"class_type": "TestConditioning", "inputs": {"seed": 3}},
        "3": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 96, "height": 64, "batch_size": 1}},
        "4": {"class_type": "KSampler", "inputs": {**sampler, **wires}},
        "5": {"class_type": "SaveLatent", "inputs": {"samples": ["4", 0], "filename_prefix": prefix}},
    }


def latent(server: Server, prefix: str, entry: dict):
    assert entry["status"]["status_str"] == "success", entry["status"]
    return load_file(server.base / "output" / f"{prefix}_00001_.latent")["latent_tensor"].float()


def test_object_info_is_the_contract(server):
    info = server.get("/object_info/NunchakuFluxDiTLoader")["NunchakuFluxDiTLoader"]
    required, optional = info["input"]["required"], info["input"]["optional"]
    assert list(required) == ["model_path", "cache_threshold", "attention", "cpu_offload", "device_id", "data_type"]
    cache = ["cache_threshold_single", "cache_start_percent", "cache_end_percent", "cache_max_reuses"]
    assert list(optional) == ["i2f_mode", "compute", *cache, "num_blocks_on_gpu"]
    assert info["input_order"] == {"required": list(required), "optional": list(optional)}
    assert (info["display_name"], info["category"], info["output"]) == ("Nunchaku FLUX DiT Loader", "Nunchaku", ["MODEL"])
    assert not info.get("deprecated") and not info["output_node"]

    def options(kind, entry, *names):
        assert entry[0] == kind and entry[1]["tooltip"]
        return tuple(entry[1].get(name) for name in names)

    options(["svdq-int4_r32-flux.1-mini.safetensors"], required["model_path"])
    assert options("FLOAT", required["cache_threshold"], "default", "min", "max", "step") == (0, 0, 1, 0.001)
    assert options(["nunchaku-fp16", "flash-attention2"], required["attention"], "default") == ("nunchaku-fp16",)
    assert options(["auto", "enable", "disable"], required["cpu_offload"], "default") == ("auto",)
    device = options("INT", required["device_id"], "default", "min", "max", "step", "display", "lazy")
    assert device == (0, 0, 0, 1, "number", True)
    assert options(["bfloat16", "float16"], required["data_type"], "default") == ("bfloat16",)
    assert options(["enabled", "always"], optional["i2f_mode"], "default") == ("enabled",)
    assert options(["auto", "exact", "fast", "weight_only"], optional["compute"], "default") == ("auto",)


def test_the_old_key_is_there_and_not_in_the_menu(server):
    info = server.get("/object_info/SVDQuantFluxDiTLoader")["SVDQuantFluxDiTLoader"]
    assert info["deprecated"] is True
    assert info["input"] == server.get("/object_info/NunchakuFluxDiTLoader")["NunchakuFluxDiTLoader"]["input"]


def test_object_info_of_the_lora_nodes(server):
    def info(key: str) -> dict:
        return server.get(f"/object_info/{key}")[key]

    def strength(entry: list) -> tuple:
        return (entry[0], *(entry[1].get(name) for name in ("default", "min", "max", "step")))

    loader, stack = info("NunchakuFluxLoraLoader"), info("NunchakuFluxLoraStack")
    assert loader["input_order"] == {"required": ["model", "lora_name", "lora_strength"]}
    assert stack["input_order"]["required"] == ["model"]
    assert stack["input_order"]["optional"] == [f"lora_{what}_{i}" for i in range(1, 16) for what in ("name", "strength")]
    assert strength(loader["input"]["required"]["lora_strength"]) == ("FLOAT", 1.0, -100.0, 100.0, 0.01)
    for i in range(1, 16):
        assert strength(stack["input"]["optional"][f"lora_strength_{i}"]) == ("FLOAT", 1.0, -100.0, 100.0, 0.01)
        assert stack["input"]["optional"][f"lora_name_{i}"][0][0] == "None"
    for node, name in ((loader, "Nunchaku FLUX LoRA Loader"), (stack, "Nunchaku FLUX LoRA Stack")):
        assert (node["display_name"], node["category"], node["output"], node["output_name"]) == (name, "Nunchaku", ["MODEL"], ["MODEL"])
        assert not node.get("deprecated") and not node["output_node"]
    old = info("SVDQuantFluxLoraLoader")
    assert old["deprecated"] is True and old["input"] == loader["input"]


def test_object_info_of_the_other_two_loaders(server):
    """What graphs made for ComfyUI-nunchaku hold first, in its order; all but the file optional, since API graphs may lack it."""
    for key, title, first in (
        ("NunchakuQwenImageDiTLoader", "Nunchaku Qwen-Image DiT Loader", ["cpu_offload", "num_blocks_on_gpu", "use_pin_memory"]),
        ("NunchakuZImageDiTLoader", "Nunchaku Z-Image DiT Loader", []),
    ):
        info = server.get(f"/object_info/{key}")[key]
        optional = info["input"]["optional"]
        assert info["input_order"] == {"required": ["model_name"], "optional": list(optional)}
        assert list(optional)[: len(first)] == first and len(optional) == 10
        assert (info["display_name"], info["category"], info["output"]) == (title, "Nunchaku", ["MODEL"])
        assert "svdq-int4_r32-flux.1-mini.safetensors" in info["input"]["required"]["model_name"][0]
        blocks = optional["num_blocks_on_gpu"]
        assert (blocks[0], blocks[1]["default"], blocks[1]["max"], blocks[1]["step"]) == ("INT", 1, 60, 1)
        assert optional["use_pin_memory"][0] == ["enable", "disable"] and optional["use_pin_memory"][1]["default"] == "disable"


def test_object_info_of_the_qwen_lora_nodes(server):
    loader, stack = (server.get(f"/object_info/{key}")[key] for key in ("NunchakuQwenImageLoraLoader", "NunchakuQwenImageLoraStack"))
    assert loader["input_order"]["required"] == ["model", "lora_name", "lora_strength"]
    assert loader["input_order"]["optional"] == ["cpu_offload", "save_precompiled_lora"]
    rows = [f"lora_{what}_{i}" for i in range(1, 11) for what in ("name", "strength")]
    assert stack["input_order"]["required"] == ["model", "lora_count"]
    assert stack["input_order"]["optional"] == ["cpu_offload", "apply_awq_mod", "save_precompiled_lora", *rows]


def test_help_translations_and_example_are_served(server):
    assert b"`compute`" in server.request("/extensions/ComfyUI-Tonfa/docs/NunchakuFluxDiTLoader.md")
    assert server.get("/i18n")["zh"]["nodeDefs"]["NunchakuFluxDiTLoader"]["inputs"]["compute"]["name"]
    assert b"NunchakuFluxDiTLoader" in server.request("/extensions/ComfyUI-Tonfa/docs/SVDQuantFluxDiTLoader.md")
    assert b"stay" in server.request("/extensions/ComfyUI-Tonfa/docs/NunchakuFluxLoraStack.md")
    assert server.get("/i18n")["ko"]["nodeDefs"]["NunchakuFluxLoraStack"]["inputs"]["lora_strength_15"]["name"]
    assert "tonfa-flux.1-dev" in server.get("/workflow_templates")["ComfyUI-Tonfa"]
    assert server.request("/api/workflow_templates/ComfyUI-Tonfa/tonfa-flux.1-dev.jpg").startswith(b"\xff\xd8")


def test_an_old_graph_samples_what_the_dense_model_samples(server):
    """The old folder name, and the other precision of the same model: on the CPU `auto` is weight_only."""
    wanted = sample(twin(MODEL), steps=8)
    for name, prefix in (("svdq-int4-flux.1-mini", "folder"), ("svdq-fp4_r32-flux.1-mini.safetensors", "precision")):
        assert snr(latent(server, prefix, server.run(graph(name, prefix))), wanted) > 50
        lines = [line for line in server.said().splitlines() if f"Model '{name}' is not here" in line]
        assert len(lines) == 1 and "svdq-int4_r32-flux.1-mini.safetensors" in lines[0]


def test_values_outside_the_lists_do_not_block(server):
    odd = {"device_id": 7, "data_type": "float8", "attention": "sage", "cpu_offload": "maybe", "i2f_mode": "no", "cache_threshold": 3.5}
    entry = server.run(graph("svdq-int4-flux.1-mini", "odd", key="SVDQuantFluxDiTLoader", compute="weight_only", **odd))
    assert snr(latent(server, "odd", entry), sample(twin(MODEL), steps=8)) > 50
    assert "no device 7" in server.said()


def test_a_linked_device_id(server):
    """It is marked lazy, as it always was, so the host evaluates the link only because the node asks for it."""
    linked = graph("svdq-int4_r32-flux.1-mini.safetensors", "linked", device_id=["6", 0])
    linked["6"] = {"class_type": "PrimitiveInt", "inputs": {"value": 5}}
    latent(server, "linked", server.run(linked))
    assert "no device 5" in server.said()


def test_exact_on_the_server_is_exact_here(server):
    entry = server.run(graph("svdq-int4_r32-flux.1-mini.safetensors", "exact", compute="exact"))
    assert snr(latent(server, "exact", entry), sample(loaded(MODEL, "exact"), steps=8)) > 60


def test_an_unknown_model_is_an_error_at_the_node(server):
    status = server.run(graph("svdq-int4-flux.1-absent", "absent"))["status"]
    assert status["status_str"] == "error"
    (said,) = [message[1] for message in status["messages"] if message[0] == "execution_error"]
    assert said["node_type"] == "NunchakuFluxDiTLoader"
    assert "svdq-int4-flux.1-absent" in said["exception_message"] and "svdq-int4_r32-flux.1-mini.safetensors" in said["exception_message"]


def test_the_pack_imports_quietly_and_quickly(server):
    log = server.said()
    assert "IMPORT FAILED" not in log
    (line,) = [line for line in log.splitlines() if line.rstrip().endswith(os.path.join("custom_nodes", "ComfyUI-Tonfa"))]
    assert float(line.split("seconds")[0].split()[-1]) < 1.0


# -- Qwen-Image and Z-Image -----------------------------------------------------------------------------------------------------------

QWEN, Z = "svdq-int4_r16-qwen-image.safetensors", "svdq-int4_r16-z-image.safetensors"


@pytest.fixture(scope="module")
def other_families(server):
    """Small files of the two other families."""
    for name, family in ((QWEN, "qwen-image"), (Z, "z-image")):
        shutil.copy(families.made(family), server.base / "models" / "diffusion_models" / name)


def other(key: str, prefix: str, **values: object) -> dict:
    """`graph` with another loader, on conditioning of those models' width."""
    posted = graph("", prefix)
    posted["1"] = {"class_type": key, "inputs": values}
    posted["2"]["inputs"]["width"] = families.TEXT
    posted["4"]["inputs"]["steps"] = 4
    return posted


def test_graphs_that_name_a_file_of_qwen_image_alone(server, other_families):
    """As the first graphs of that node do; with the values of later ones; and with what no list has."""
    wanted = families.sample(families.twin(families.made("qwen-image")), "qwen-image")
    later = {"cpu_offload": "enable", "num_blocks_on_gpu": 1, "use_pin_memory": "disable"}
    odd = {"cpu_offload": "maybe", "use_pin_memory": "yes", "num_blocks_on_gpu": 20.0, "device_id": 3, "data_type": "int8", "compute": "x"}
    for prefix, values in {"one": {}, "four": later, "odd_qwen": odd}.items():
        asked = {"one": QWEN, "four": "nunchaku\\" + QWEN, "odd_qwen": QWEN.replace("int4", "fp4")}[prefix]
        entry = server.run(other("NunchakuQwenImageDiTLoader", prefix, model_name=asked, **values))
        assert snr(latent(server, prefix, entry), wanted) > 50, prefix
    assert "Nunchaku Qwen-Image DiT Loader: there is no device 3" in server.said()


def test_a_file_of_another_family_loads_all_the_same(server, other_families):
    entry = server.run(other("NunchakuFluxDiTLoader", "as_flux", model_path=QWEN, **FLUX_VALUES))
    assert snr(latent(server, "as_flux", entry), families.sample(families.twin(families.made("qwen-image")), "qwen-image")) > 50
    flux = "svdq-int4_r32-flux.1-mini.safetensors"
    posted = graph("", "as_qwen") | {"1": {"class_type": "NunchakuQwenImageDiTLoader", "inputs": {"model_name": flux}}}
    assert snr(latent(server, "as_qwen", server.run(posted)), sample(twin(MODEL), steps=8)) > 50
    log = server.said()
    assert log.count(f"Nunchaku FLUX DiT Loader: {QWEN} is Qwen-Image; loaded as that.") == 1
    assert log.count(f"Nunchaku Qwen-Image DiT Loader: {flux} is FLUX.1; loaded as that.") == 1


def test_z_image_or_the_sentence_that_says_what_it_needs(server, other_families):
    entry = server.run(other("NunchakuZImageDiTLoader", "z", model_name=Z))
    if families.HAS_Z_IMAGE:
        assert snr(latent(server, "z", entry), families.sample(families.twin(families.made("z-image")), "z-image")) > 50
        return
    kind, said = entry["status"]["messages"][-1]
    assert kind == "execution_error" and said["node_type"] == "NunchakuZImageDiTLoader"
    assert "is Z-Image, which this ComfyUI does not have" in said["exception_message"]


def test_every_lora_node_on_qwen_image(server, base, other_families):
    """The stack's row beyond lora_count does not count."""
    tensors, g = {}, torch.Generator().manual_seed(5)
    for layer in ("attn.to_q", "attn.add_v_proj", "attn.to_out.0", "img_mlp.net.2", "txt_mod.1"):
        n, k = {"img_mlp.net.2": (1, 4), "txt_mod.1": (6, 1)}.get(layer, (1, 1))
        hidden = families.packed_files.HIDDEN
        tensors[f"transformer.transformer_blocks.1.{layer}.lora_A.weight"] = torch.randn(4, k * hidden, generator=g) * (k * hidden) ** -0.5
        tensors[f"transformer.transformer_blocks.1.{layer}.lora_B.weight"] = torch.randn(n * hidden, 4, generator=g) * 0.5
    for root in (server.base, Path(base)):
        (root / "models" / "loras").mkdir(exist_ok=True)
        save_file(tensors, root / "models" / "loras" / "qwen.safetensors")
    rows = {"lora_name_1": "qwen.safetensors", "lora_strength_1": 0.25, "lora_name_2": "qwen.safetensors", "lora_strength_2": 9.0}
    idle = {"cpu_offload": "disable", "apply_awq_mod": True, "save_precompiled_lora": False}
    chain = {
        "a": ("NunchakuQwenImageLoraLoader", {"lora_name": "old\\qwen.safetensors", "lora_strength": 0.5}),
        "b": ("NunchakuQwenImageLoraStack", {"lora_count": 1, **idle, **rows}),
        "c": ("LoraLoaderModelOnly", {"lora_name": "qwen.safetensors", "strength_model": 0.25}),
    }
    posted, last = other("NunchakuQwenImageDiTLoader", "qwen_lora", model_name=QWEN), "1"
    for key, (kind, inputs) in chain.items():
        posted[key] = {"class_type": kind, "inputs": {**inputs, "model": [last, 0]}}
        last = key
    posted["4"]["inputs"]["model"] = [last, 0]
    got = latent(server, "qwen_lora", server.run(posted))
    dense = families.twin(families.made("qwen-image"))
    with torch.inference_mode():
        with_lora = nodes.LoraLoaderModelOnly().load_lora_model_only(dense, "qwen.safetensors", 1.0)[0]
    assert snr(got, families.sample(with_lora, "qwen-image")) > 50
    assert snr(got, families.sample(dense, "qwen-image")) < 30


# -- LoRA ---------------------------------------------------------------------------------------------------------------------------


def with_loras(prefix: str, *nodes: dict) -> dict:
    """`graph` with LoRA nodes between the loader and the sampler."""
    posted = graph("svdq-int4_r32-flux.1-mini.safetensors", prefix)
    last = ["1", 0]
    for i, node in enumerate(nodes):
        posted[f"lora{i}"] = {**node, "inputs": {**node["inputs"], "model": last}}
        last = [f"lora{i}", 0]
    posted["4"]["inputs"]["model"] = last
    return posted


def test_every_lora_node_on_a_format_that_comfyui_does_not_read(server, base):
    """Our loader, under a name of another machine and with text for a strength; our stack; ComfyUI's own node, taught by the loader."""
    tensors = generated.lora_file("xlabs", generated.Flux(depth=1, depth_single=1)).tensors
    for root in (server.base, Path(base)):
        (root / "models" / "loras").mkdir(exist_ok=True)
        save_file(tensors, root / "models" / "loras" / "served.safetensors")
    posted = with_loras(
        "loras",
        {"class_type": "SVDQuantFluxLoraLoader", "inputs": {"lora_name": "old\\Served.safetensors", "lora_strength": "0.5"}},
        {"class_type": "NunchakuFluxLoraStack", "inputs": {"lora_name_1": "None", "lora_name_3": "served.pt", "lora_strength_3": 0.3}},
        {"class_type": "NunchakuFluxLoraStack", "inputs": {"lora_name_1": "gone", "lora_strength_1": 1e-6}},
        {"class_type": "LoraLoaderModelOnly", "inputs": {"lora_name": "served.safetensors", "strength_model": -0.1}},
    )
    got = latent(server, "loras", server.run(posted))
    assert snr(got, sample(by("ours", twin(MODEL), "served.safetensors", 0.7), steps=8)) > 50
    assert snr(got, sample(twin(MODEL), steps=8)) < 30
    log = server.said()
    assert "lora key not loaded" not in log and log.count("LoRA served.safetensors (xlabs): 4 patches.") == 2


def test_a_foreign_lora_is_an_error_at_the_node(server):
    (server.base / "models" / "loras").mkdir(exist_ok=True)
    save_file(SDXL, server.base / "models" / "loras" / "foreign.safetensors")
    node = {"class_type": "NunchakuFluxLoraLoader", "inputs": {"lora_name": "foreign.safetensors", "lora_strength": 1.0}}
    kind, said = server.run(with_loras("foreign", node))["status"]["messages"][-1]
    assert kind == "execution_error" and said["node_type"] == "NunchakuFluxLoraLoader"
    assert "foreign.safetensors is for SDXL, not for FLUX.1" in said["exception_message"]


# -- text encoders --------------------------------------------------------------------------------------------------------------------

TEXT_MODEL = "svdq-int4_r32-flux.1-text.safetensors"  # a small model as wide as the small encoders' outputs
PROMPT = "a red fox, (very:1.3) small"
FP16, AWQ = "t5xxl_fp16.safetensors", "awq-int4-flux.1-t5xxl.safetensors"


def text_model() -> Path:
    return made(context_in_dim=encoders.DIMS.model, vec_in_dim=768)


@pytest.fixture(scope="module")
def text_files(server, base):
    """The small encoders under their published names and in a folder, here and on the server."""
    folder_paths.add_model_folder_path("text_encoders", str(encoders.folder()))
    there = server.base / "models" / "text_encoders"
    (there / "awq-int4-t5").mkdir(parents=True, exist_ok=True)
    for name, source in {"clip_l.safetensors": encoders.clip_l(), FP16: encoders.t5("fp16"), AWQ: encoders.t5("4bit")}.items():
        (there / name).symlink_to(source)
    (there / "awq-int4-t5" / "model.safetensors").symlink_to(encoders.t5("4bit"))
    shutil.copy(text_model(), server.base / "models" / "diffusion_models" / TEXT_MODEL)


def with_text(prefix: str, key: str, model_type: str, first: str, second: str, length: object, **more: object) -> dict:
    """`graph` with a text-encoder loader and CLIPTextEncode."""
    inputs = {"model_type": model_type, "text_encoder1": first, "text_encoder2": second, "t5_min_length": length, **more}
    posted = graph(TEXT_MODEL, prefix)
    posted["2"] = {"class_type": "CLIPTextEncode", "inputs": {"text": PROMPT, "clip": ["text", 0]}}
    return posted | {"text": {"class_type": key, "inputs": inputs}}


def sampled_with(t5: Path, length: int):
    """The latent of the dense model with the prompt through our node in this process."""
    kind = tonfa.NODE_CLASS_MAPPINGS["NunchakuTextEncoderLoaderV2"]()
    with torch.inference_mode():
        clip = kind.load_text_encoder("flux.1", "clip_l.safetensors", t5.name, length)[0]
        positive = nodes.CLIPTextEncode().encode(clip, PROMPT)[0]
    return sample(twin(text_model()), positive=positive, steps=8)


def test_graphs_with_each_text_encoder_loader(server, text_files):
    """V2; the deprecated one with the files reversed, as in ComfyUI-nunchaku's own graphs, and with its folder; the oldest name."""
    clip, off = "clip_l.safetensors", {"use_4bit_t5": "disable", "int4_model": "none"}
    on = {"use_4bit_t5": "enable", "int4_model": "awq-int4-t5"}
    four_bit, sixteen = sampled_with(encoders.t5("4bit"), 512), sampled_with(encoders.t5("fp16"), 512)
    posted = {
        "v2": (four_bit, with_text("v2", "NunchakuTextEncoderLoaderV2", "flux.1", clip, AWQ, 512)),
        "reversed": (sixteen, with_text("reversed", "NunchakuTextEncoderLoader", "flux", FP16, clip, 512, **off)),
        "t5_folder": (four_bit, with_text("t5_folder", "NunchakuTextEncoderLoader", "flux", FP16, clip, 512, **on)),
        "alias": (sixteen, with_text("alias", "SVDQuantTextEncoderLoader", "flux", "old\\" + FP16, clip, 512, **off)),
    }
    for prefix, (wanted, one) in posted.items():
        assert snr(latent(server, prefix, server.run(one)), wanted) > 50, prefix
    assert snr(four_bit, sixteen) < 45


def test_a_linked_length_of_the_t5(server, text_files):
    posted = with_text("linked_length", "NunchakuTextEncoderLoaderV2", "flux.1", "clip_l.safetensors", AWQ, ["6", 0])
    posted["6"] = {"class_type": "PrimitiveInt", "inputs": {"value": 384}}
    assert snr(latent(server, "linked_length", server.run(posted)), sampled_with(encoders.t5("4bit"), 384)) > 50


def test_object_info_of_the_text_encoder_loaders(server, text_files):
    def info(key: str) -> dict:
        return server.get(f"/object_info/{key}")[key]

    new, old, oldest = (info(key) for key in ("NunchakuTextEncoderLoaderV2", "NunchakuTextEncoderLoader", "SVDQuantTextEncoderLoader"))
    both = ["model_type", "text_encoder1", "text_encoder2", "t5_min_length"]
    assert new["input_order"] == {"required": both} and old["input_order"] == {"required": [*both, "use_4bit_t5", "int4_model"]}
    assert not new.get("deprecated") and old["deprecated"] is True and oldest["deprecated"] is True
    assert new["input"]["required"]["model_type"][0] == ["flux.1"] and old["input"]["required"]["model_type"][0] == ["flux"]
    assert oldest["input"] == old["input"] and old["input"]["required"]["int4_model"][0] == ["none", "awq-int4-t5"]
    assert {"clip_l.safetensors", AWQ, FP16} <= set(new["input"]["required"]["text_encoder2"][0])
    for node, name in ((new, "Nunchaku Text Encoder Loader V2"), (old, "Nunchaku Text Encoder Loader (Deprecated)")):
        assert (node["display_name"], node["category"], node["output"]) == (name, "Nunchaku", ["CLIP"]) and not node["output_node"]


def test_a_wrong_text_encoder_is_an_error_at_the_node(server, text_files):
    clip = "clip_l.safetensors"
    for first, second, word in ((clip, clip, "text_encoder2: clip_l.safetensors is a CLIP-L"), ("gone.gguf", AWQ, "DualCLIPLoader (GGUF)")):
        status = server.run(with_text("wrong", "NunchakuTextEncoderLoaderV2", "flux.1", first, second, 512))["status"]
        kind, said = status["messages"][-1]
        assert kind == "execution_error" and said["node_type"] == "NunchakuTextEncoderLoaderV2" and word in said["exception_message"]


# -- ComfyUI-nunchaku's example graphs with LoRA ------------------------------------------------------------------------------------

LORA_GRAPHS = {  # graph -> the LoRA files that it names, and the format of what stands in for each
    "canny-lora": {"canny.safetensors": "control"},
    "depth-lora": {"depth.safetensors": "control"},
    "dev": {"flux1-turbo.safetensors": "diffusers", "diffusers-ghibsky.safetensors": "diffusers"},
    "kontext-dev-turbo_lora": {"flux.1-turbo-alpha.safetensors": "kohya"},
    "fill-removalV2": {"removalV2.safetensors": "kohya"},
}


@pytest.fixture(scope="module")
def stand_ins(server, text_files):
    """Small files under the names of the graphs' models, LoRAs, VAE and pictures; the text encoders' are there."""
    models = server.base / "models"
    for name in ("dev", "kontext-dev"):
        shutil.copy(MODEL, models / "diffusion_models" / f"svdq-int4_r32-flux.1-{name}.safetensors")
    shutil.copy(made("nvfp4", in_channels=96), models / "diffusion_models" / "svdq-fp4_r32-flux.1-fill-dev.safetensors")
    (models / "loras").mkdir(exist_ok=True)
    for seed, (name, kind) in enumerate(pair for files in LORA_GRAPHS.values() for pair in files.items()):
        sizes = {"context": encoders.DIMS.model, "vec": 768} if name in LORA_GRAPHS["dev"] else {}
        flux = generated.Flux(depth=1, depth_single=1, head_dim=16, **sizes)
        save_file(generated.lora_file(kind, flux, seed=seed).tensors, models / "loras" / name)
    graphs.put_stand_ins(server.base)


def example(server: Server, name: str) -> dict:
    """An example graph as the browser would post it, made small. Our text encoders' outputs are wider than the stand-ins' are."""
    posted = graphs.smaller(graphs.for_the_server(graphs.read_graph(f"nunchaku-flux.1-{name}"), server.get("/object_info")))
    if any(node["class_type"].startswith("NunchakuTextEncoderLoader") for node in posted.values()):
        for node in posted.values():
            node["inputs"].update({"model_path": TEXT_MODEL} if node["class_type"] == "NunchakuFluxDiTLoader" else {})
    return posted


def picture(server: Server, posted: dict) -> bytes:
    """The picture that a graph saves."""
    entry = server.run(posted)
    kind, said = entry["status"]["messages"][-1]
    assert kind == "execution_success", said.get("exception_message")
    (saved,) = [key for key, node in posted.items() if node["class_type"] == "SaveImage"]
    (image,) = entry["outputs"][saved]["images"]
    with Image.open(server.base / "output" / image["subfolder"] / image["filename"]) as shown:  # beside the graph, which the file holds too
        return shown.tobytes()


@pytest.mark.parametrize("name", LORA_GRAPHS)
@pytest.mark.skipif(not graphs.FOLDER.is_dir(), reason=graphs.WHY_NOT)
def test_example_graphs_with_lora(server, stand_ins, name):
    """Each as the browser would post it, on stand-ins; and every LoRA in it changes the picture."""
    posted = example(server, name)
    loaders = [node["inputs"] for node in posted.values() if node["class_type"] == "NunchakuFluxLoraLoader"]
    assert {inputs["lora_name"] for inputs in loaders} == set(LORA_GRAPHS[name])
    wanted = picture(server, posted)
    for inputs in loaders:
        strength, inputs["lora_strength"] = inputs["lora_strength"], 0.0
        assert picture(server, posted) != wanted
        inputs["lora_strength"] = strength


@pytest.mark.skipif(not graphs.FOLDER.is_dir(), reason=graphs.WHY_NOT)
def test_example_graphs_with_text_encoders(server, stand_ins):
    """V2 with a 4-bit T5, and the deprecated node with the files reversed; the prompt counts."""
    for name, key in (("dev-qencoder", "NunchakuTextEncoderLoaderV2"), ("schnell", "NunchakuTextEncoderLoader")):
        posted = example(server, name)
        assert [node["inputs"]["t5_min_length"] for node in posted.values() if node["class_type"] == key] == [512]
        wanted = picture(server, posted)
        for node in posted.values():
            node["inputs"].update({"text": "something else"} if node["class_type"] == "CLIPTextEncode" else {})
        assert picture(server, posted) != wanted
