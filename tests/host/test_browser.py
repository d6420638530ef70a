"""A real ComfyUI and its front end in a real browser: our graphs and ComfyUI-nunchaku's open, and what the browser posts is valid.

make test-host ARGS="-k test_browser"                              needs chromium (CHROMIUM=...) and playwright, else it is skipped
OUT=out make test-host ARGS="-k test_browser"                      keeps the screenshots, in out/browser
cp out/browser/tonfa-*.jpg workflows/                              ... and makes them the pictures of our graphs
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
import tonfa
from PIL import Image, ImageDraw, ImageOps

from . import graphs
from .test_server import Server

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LACKING = [
    what
    for what, there in {
        "chromium (Debian: apt-get install chromium; or CHROMIUM=its path)": CHROMIUM,
        "playwright (pip install playwright into .venv-host-*; it needs no browser of its own)": importlib.util.find_spec("playwright"),
        "ComfyUI's front end (pip install -r its requirements.txt)": importlib.util.find_spec("comfyui_frontend_package"),
    }.items()
    if not there
]
if LACKING:
    pytest.skip(f"the browser test needs {' and '.join(LACKING)}", allow_module_level=True)

OWN = sorted((Path(tonfa.__file__).parent / "workflows").glob("*.json"))
LATER = ("Pulid", "PuLID", "IPAdapter")  # what a node's name holds that has no place in this version
NEEDED = {  # every node of ComfyUI-nunchaku that the other graphs hold
    "NunchakuFluxDiTLoader", "NunchakuFluxLoraLoader", "NunchakuTextEncoderLoader", "NunchakuTextEncoderLoaderV2",
    "NunchakuQwenImageDiTLoader", "NunchakuZImageDiTLoader", "NunchakuModelMerger", "NunchakuWheelInstaller",
}  # fmt: skip
FOLDERS = {  # node -> where the files lie that its widgets name
    "NunchakuFluxDiTLoader": "models/diffusion_models",
    "NunchakuQwenImageDiTLoader": "models/diffusion_models",
    "NunchakuZImageDiTLoader": "models/diffusion_models",
    "NunchakuFluxLoraLoader": "models/loras",
    "NunchakuTextEncoderLoader": "models/text_encoders",
    "NunchakuTextEncoderLoaderV2": "models/text_encoders",
    "CLIPLoader": "models/text_encoders",
    "CLIPVisionLoader": "models/clip_vision",
    "ControlNetLoader": "models/controlnet",
    "DualCLIPLoader": "models/text_encoders",
    "LoadImage": "input",
    "LoadImageOutput": "output",
    "LoraLoaderModelOnly": "models/loras",
    "ModelPatchLoader": "models/model_patches",
    "StyleModelLoader": "models/style_models",
    "VAELoader": "models/vae",
}
FILE = re.compile(r"(.+\.(?:safetensors|png|jpg|webp))( \[(input|output)\])?")
SETTINGS = {  # of the front end: no tutorial over the graph, and names on small nodes
    "Comfy.TutorialCompleted": True,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0.1,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
WINDOWS = (
    "tonfa-flux.1-dev",
    "tonfa-flux.1-dev-controlnet-union",
    "tonfa-qwen-image-edit-2509",
    "nunchaku-flux.1-dev-qencoder",
    "nunchaku-z-image-turbo-controlnet",
)  # for a person to look at
OPEN = """async ([graph, name]) => {
    await app.loadGraphData(graph, true, true, name)
    const {output} = await app.graphToPrompt()
    return {output, missing: app.graph.nodes.map(n => n.type).filter(type => !(type in LiteGraph.registered_node_types))}
}"""
BOUNDS = """() => {
    const nodes = app.graph.nodes, min = Math.min, max = Math.max
    const left = min(...nodes.map(n => n.pos[0])), top = min(...nodes.map(n => n.pos[1] - 30))
    return [left, top, max(...nodes.map(n => n.pos[0] + n.size[0])) - left, max(...nodes.map(n => n.pos[1] + n.size[1])) - top]
}"""
FIT = """([left, top, width, height]) => {
    const area = app.canvas.canvas.getBoundingClientRect()
    const scale = Math.min(area.width / width, area.height / height)
    app.canvas.ds.scale = scale
    app.canvas.ds.offset = [area.width / scale / 2 - left - width / 2, area.height / scale / 2 - top - height / 2]
    app.canvas.setDirty(true, true)
}"""


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def types(path: Path) -> set[str]:
    return {node["type"] for node in read(path)["nodes"]}


def nunchaku(kind: str) -> bool:
    return "Nunchaku" in kind or kind.startswith("SVDQuant")


OTHERS = [p for p in sorted(graphs.FOLDER.glob("*.json")) if not any(nunchaku(t) and any(w in t for w in LATER) for t in types(p))]


def put_files(base: Path, graph: dict) -> None:
    """An empty file for every model that the graph names, and a picture for every picture."""
    for node in graph["nodes"]:
        for value in node.get("widgets_values") or [] if node["type"] in FOLDERS else []:
            if named := FILE.fullmatch(str(value)):
                file = base / (named[3] or FOLDERS[node["type"]]) / named[1]
                file.parent.mkdir(parents=True, exist_ok=True)
                if file.suffix == ".safetensors":
                    file.touch()
                else:
                    landscape().save(file)


def landscape() -> Image.Image:
    """A sun over the sea."""
    picture = ImageOps.colorize(Image.linear_gradient("L"), "#203a66", "#f6b26b")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((150, 130, 200, 180), fill="#fff2cc")
    pen.rectangle((0, 170, 256, 256), fill="#28536b")
    pen.polygon([(0, 256), (0, 100), (50, 110), (90, 190), (120, 256)], fill="#1b1f24")
    return picture


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        for path in (*OWN, *OTHERS):
            put_files(running.base, read(path))
        running.request("/settings", SETTINGS)
        yield running


@pytest.fixture(scope="module")
def page(server):
    """The front end, ready, with nothing but this server in reach."""
    from playwright.sync_api import sync_playwright

    address = f"http://127.0.0.1:{server.port}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1600, "height": 900})
        opened.set_default_timeout(120_000)
        opened.route(lambda url: not url.startswith(address), lambda route: route.abort())
        opened.goto(address)
        opened.wait_for_function("() => window.app?.graph && window.LiteGraph?.registered_node_types.NunchakuFluxDiTLoader")
        opened.wait_for_timeout(1000)  # the first, empty graph
        yield opened
        browser.close()


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Where the screenshots go."""
    folder = Path(os.environ["OUT"]).resolve() / "browser" if os.environ.get("OUT") else tmp_path_factory.mktemp("browser")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def reported(page) -> str:
    """All that the front end says. What is missing stands in a dialog, in newer versions in a panel behind a button."""
    page.wait_for_timeout(500)
    details = page.get_by_text("View details")
    if details.count():
        details.first.click()
        page.wait_for_timeout(500)
    return page.locator("body").inner_text()


def refused(server: Server, prompt: dict) -> dict[str, list]:
    """Node class -> the validation errors of it when the server is given the graph; what it starts to run is stopped."""
    try:
        answer = json.loads(server.request("/prompt", {"prompt": prompt}))
    except urllib.error.HTTPError as no:
        answer = json.loads(no.read())
    server.request("/queue", {"clear": True})
    server.request("/interrupt", {})
    found = {node["class_type"]: node["errors"] for node in (answer.get("node_errors") or {}).values()}
    if answer.get("error") and not found:
        found["the graph"] = [answer["error"]]
    return found


def fit(page, margin: int) -> float:
    """Brings the whole graph into view; its height / width."""
    left, top, width, height = page.evaluate(BOUNDS)
    width, height = width + 2 * margin, height + 2 * margin
    page.evaluate(FIT, [left - margin, top - margin, width, height])
    page.wait_for_timeout(500)
    return height / width


def photograph(page, file: Path) -> None:
    """The picture beside one of our graphs: nothing but the graph."""
    window, focus = page.viewport_size, "() => app.extensionManager.command.execute('Workspace.ToggleFocusMode')"
    page.evaluate(focus)
    page.set_viewport_size({"width": 1600, "height": round(1600 * fit(page, margin=30))})
    page.wait_for_timeout(300)
    fit(page, margin=30)
    page.screenshot(path=file, type="jpeg", quality=72, style=".comfy-menu-hamburger { display: none !important }")
    page.set_viewport_size(window)
    page.evaluate(focus)


@pytest.mark.skipif(not graphs.FOLDER.is_dir(), reason=graphs.WHY_NOT)
def test_which_graphs_this_version_opens():
    assert (len(list(graphs.FOLDER.glob("*.json"))), len(OTHERS)) == (25, 23)
    assert {kind for path in OTHERS for kind in types(path) if nunchaku(kind)} == NEEDED


def test_the_nodes_of_those_graphs_are_registered(server):
    assert set(server.get("/object_info")) >= NEEDED | {
        "NunchakuFluxLoraStack",
        "NunchakuQwenImageLoraLoader",
        "NunchakuQwenImageLoraStack",
    }


def test_pictures(page, out):
    """Before any graph is posted: the node that runs has a green frame."""
    for path in (*OWN, *OTHERS):
        if path in OWN or path.stem in WINDOWS:
            page.evaluate(OPEN, [read(path), path.stem])
            page.wait_for_timeout(500)
        if path.stem in WINDOWS:
            fit(page, margin=120)
            page.screenshot(path=out / f"window-{path.stem}.png")
        if path in OWN:
            photograph(page, out / f"{path.stem}.jpg")
            assert 20_000 < (out / f"{path.stem}.jpg").stat().st_size < 150_000
    print(f"Screenshots in {out}")


@pytest.mark.parametrize("path", [*OWN, *OTHERS], ids=lambda path: path.stem)
def test_a_graph_opens_and_is_valid(server, page, path):
    graph = read(path)
    opened = page.evaluate(OPEN, [graph, path.stem])
    assert opened["missing"] == []
    said = reported(page)
    assert "Nodes Are Missing" not in said and "Missing Node" not in said
    for node in graph["nodes"]:
        if nunchaku(node["type"]):
            values = [v for v in opened["output"][str(node["id"])]["inputs"].values() if not isinstance(v, list)]
            assert values[: len(node["widgets_values"])] == node["widgets_values"]
    assert path not in OWN or "Missing Models" not in said
    assert refused(server, opened["output"]) == {}


def test_a_missing_node_and_a_refused_value_would_be_seen(server, page):
    """The checks above can fail."""
    graph = read(OWN[0])
    posted = page.evaluate(OPEN, [graph, "refused"])["output"]
    del posted[next(key for key, node in posted.items() if node["class_type"] == "NunchakuFluxDiTLoader")]["inputs"]["model_path"]
    assert list(refused(server, posted)) == ["NunchakuFluxDiTLoader"]
    graph["nodes"][0]["type"] = "NunchakuNobodyHasThis"
    assert page.evaluate(OPEN, [graph, "missing"])["missing"] == ["NunchakuNobodyHasThis"]
    said = reported(page)
    assert "Nodes Are Missing" in said or "Missing Node" in said
