"""`download` against a hub imitated on loopback: nothing here reaches the network."""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.file_download
import pytest
from tonfa import nodes
from tonfa.__main__ import main
from tonfa.models import download, published
from tonfa.nodes.host.files import TEXT_ENCODERS, resolve

NAME = "svdq-int4_r32-flux.1-dev.safetensors"
REPO = "nunchaku-ai/nunchaku-flux.1-dev"
CONTENT = bytes(range(256)) * 400  # 100 KiB


class Hub(ThreadingHTTPServer):
    """A hub with files in it. Switches make it misbehave; `asked` has (method, path, Range) of every request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {f"/{REPO}/resolve/main/{NAME}": CONTENT}
        self.asked = []
        self.cut_at = []  # one entry a GET: how many bytes it gets before the connection is lost
        self.status = None  # (status, X-Error-Code) of every answer
        self.announced = {}  # headers of HEAD that are not the truth; None leaves one out
        self.elsewhere = False  # GET and HEAD lead to another host, as the real hub does for large files
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def ranges(self):
        return [asked[2] for asked in self.asked if asked[0] == "GET"]


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()

    def found(self):
        """The content asked for, or None when the request has been answered already."""
        hub, path = self.server, self.path.removeprefix("/cdn")
        hub.asked.append((self.command, self.path, self.headers.get("Range")))
        if hub.status or path not in hub.files:
            status, code = hub.status or (404, "EntryNotFound")
            self.send(status, {"X-Error-Code": code, "Content-Length": 0})
        elif hub.elsewhere and path == self.path:
            facts = {"Location": f"http://localhost:{hub.server_port}/cdn{path}", "Content-Length": 0}
            self.send(302, facts | self.facts(hub.files[path]))
        else:
            return hub.files[path]

    def facts(self, content):
        sha = hashlib.sha256(content).hexdigest()
        facts = {"X-Repo-Commit": "a" * 40, "X-Linked-Etag": f'"{sha}"', "X-Linked-Size": len(content), "ETag": '"other"'}
        return facts | self.server.announced

    def do_HEAD(self):  # noqa: N802
        if (content := self.found()) is not None:
            self.send(200, self.facts(content) | {"Content-Length": len(content)})

    def do_GET(self):  # noqa: N802
        if (content := self.found()) is None:
            return
        total, first, status, headers = len(content), 0, 200, {}
        if asked := self.headers.get("Range"):
            first = int(asked.removeprefix("bytes=").rstrip("-"))
            if first >= total:
                return self.send(416, {"Content-Range": f"bytes */{total}", "Content-Length": 0})
            status, headers = 206, {"Content-Range": f"bytes {first}-{total - 1}/{total}"}
        self.send(status, headers | {"Content-Length": total - first, "ETag": '"x"'})
        if self.server.cut_at:
            self.wfile.write(content[first : first + self.server.cut_at.pop(0)])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
        else:
            self.wfile.write(content[first:])


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    for module in ("constants", "file_download"):  # 10 MB otherwise, and what is cut within one is lost; older ones import it by name
        monkeypatch.setattr(f"huggingface_hub.{module}.DOWNLOAD_CHUNK_SIZE", 1024, raising=False)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between its attempts
    monkeypatch.setattr(download, "preferred_precision", lambda: ("int4", "no Blackwell GPU here"))
    yield server
    server.shutdown()
    server.server_close()


def run(capsys, *arguments):
    """(exit status, stdout, stderr without progress bars) of the command."""
    status = main(["download", *map(str, arguments)])
    said = capsys.readouterr()
    errors = [line for line in said.err.replace("\r", "\n").splitlines() if line.startswith("tonfa:")]
    assert "Traceback" not in said.err
    return status, said.out, "\n".join(errors)


def kept(folder):
    return [path for path in folder.iterdir() if path.name.endswith(".part")]


# -- fetching ---------------------------------------------------------------------------------------------------------------------


def test_a_fresh_download(hub, capsys, tmp_path):
    status, said, errors = run(capsys, "flux.1-dev", "--to", tmp_path / "new" / "folder")
    assert (status, errors) == (0, "")
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == [NAME]
    assert (tmp_path / "new" / "folder" / NAME).read_bytes() == CONTENT
    assert "Taking int4: no Blackwell GPU here" in said and said.count("\n") == 3
    assert {path for _, path, _ in hub.asked} == {f"/{REPO}/resolve/main/{NAME}"}


def test_a_large_file_lies_on_another_host(hub, capsys, tmp_path):
    hub.elsewhere = True
    assert run(capsys, NAME, "--to", tmp_path)[0] == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert ("GET", f"/cdn/{REPO}/resolve/main/{NAME}", None) in hub.asked


def test_it_goes_into_the_comfyui_that_is_found(hub, capsys, tmp_path, monkeypatch):
    host = tmp_path / "ComfyUI"
    (host / "comfy").mkdir(parents=True)
    for name in ("main.py", "comfy/sd.py"):
        (host / name).touch()
    monkeypatch.setenv("COMFYUI_PATH", str(host))
    hub.files["/nunchaku-ai/nunchaku-t5/resolve/main/awq-int4-flux.1-t5xxl.safetensors"] = b"t5" * 50
    assert run(capsys, NAME)[0] == 0 and run(capsys, "t5")[0] == 0
    assert (host / "models" / "diffusion_models" / NAME).read_bytes() == CONTENT
    assert (host / "models" / "text_encoders" / "awq-int4-flux.1-t5xxl.safetensors").read_bytes() == b"t5" * 50


def test_a_lost_connection_is_taken_up_again(hub, capsys, tmp_path):
    hub.cut_at = [40_000, 30_000]
    assert run(capsys, NAME, "--to", tmp_path)[0] == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT and not kept(tmp_path)
    first, second, third = hub.ranges()
    assert first is None and second.startswith("bytes=") and int(third[6:-1]) > int(second[6:-1]) > 30_000


def test_a_later_run_goes_on_where_the_first_was_cut(hub, capsys, tmp_path):
    hub.cut_at = [40_000] + [0] * 20
    status, _, error = run(capsys, NAME, "--to", tmp_path)
    (part,) = kept(tmp_path)
    assert status == 2 and "the same command goes on from there" in error and "MB are kept" in error
    assert not (tmp_path / NAME).exists() and CONTENT.startswith(part.read_bytes())
    have = part.stat().st_size
    assert have > 30_000
    hub.cut_at, hub.asked = [], []
    status, said, _ = run(capsys, NAME, "--to", tmp_path)
    assert status == 0 and "of it from before" in said and hub.ranges() == [f"bytes={have}-"]
    assert (tmp_path / NAME).read_bytes() == CONTENT and not kept(tmp_path)


def test_control_c_keeps_what_came(hub, capsys, tmp_path, monkeypatch):
    def interrupted(url, f, **_):
        f.write(CONTENT[:5000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.file_download, "http_get", interrupted)
        status, _, error = run(capsys, NAME, "--to", tmp_path)
    assert status == 130 and "the same command goes on" in error and kept(tmp_path)[0].stat().st_size == 5000
    assert run(capsys, NAME, "--to", tmp_path)[0] == 0 and hub.ranges() == ["bytes=5000-"]
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_a_whole_part_is_not_fetched_again(hub, capsys, tmp_path):
    hub.cut_at = [10_000] + [0] * 20
    run(capsys, NAME, "--to", tmp_path)
    kept(tmp_path)[0].write_bytes(CONTENT)
    hub.asked = []
    assert run(capsys, NAME, "--to", tmp_path)[0] == 0 and hub.ranges() == []
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_already_there(hub, capsys, tmp_path):
    (tmp_path / NAME).write_bytes(CONTENT)
    status, said, _ = run(capsys, NAME, "--to", tmp_path)
    assert status == 0 and "is there already and whole" in said and "is ready" not in said
    assert hub.ranges() == [] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("other", [CONTENT[:-1], CONTENT[:-1] + b"x"], ids=["size", "content"])
def test_another_file_of_that_name_is_left_alone(hub, capsys, tmp_path, other):
    (tmp_path / NAME).write_bytes(other)
    status, _, error = run(capsys, NAME, "--to", tmp_path)
    assert status == 2 and "is not the published file" in error and "delete it" in error
    assert (tmp_path / NAME).read_bytes() == other and hub.ranges() == []


# -- what came is wrong -----------------------------------------------------------------------------------------------------------


def test_a_wrong_hash_is_refused(hub, capsys, tmp_path):
    hub.announced = {"X-Linked-Etag": f'"{"0" * 64}"'}
    status, _, error = run(capsys, NAME, "--to", tmp_path)
    assert status == 2 and "SHA-256" in error and "was deleted" in error
    assert list(tmp_path.iterdir()) == []


def test_more_bytes_than_announced_are_refused(hub, capsys, tmp_path):
    hub.announced = {"X-Linked-Size": len(CONTENT) - 10}
    status, _, error = run(capsys, NAME, "--to", tmp_path)
    assert status == 2 and "damaged" in error and str(len(CONTENT)) in error
    assert list(tmp_path.iterdir()) == []


def test_fewer_bytes_than_announced_are_refused(hub, capsys, tmp_path):
    hub.announced = {"X-Linked-Size": len(CONTENT) + 10}
    status, _, error = run(capsys, NAME, "--to", tmp_path)
    assert status == 2 and "damaged" in error and list(tmp_path.iterdir()) == []


def test_a_mirror_without_hashes(hub, capsys, tmp_path):
    hub.announced = {"X-Linked-Etag": '"abc"'}
    status, said, _ = run(capsys, NAME, "--to", tmp_path)
    assert status == 0 and "only the size was checked" in said


def test_an_answer_that_is_no_hub(hub, capsys, tmp_path):
    hub.announced = {"X-Repo-Commit": None}
    status, _, error = run(capsys, NAME, "--to", tmp_path)
    assert status == 2 and "not by a Hugging Face hub" in error and "HF_ENDPOINT" in error


# -- refusals ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "RepoNotFound", ["401", "hf auth login", REPO]),
        (401, "GatedRepo", ["gated", "accept its terms on http://127.0.0.1", "hf auth login"]),
        (403, "GatedRepo", ["gated"]),
        (404, "EntryNotFound", [f"has no {NAME} (404)", "--list"]),
        (404, "RepoNotFound", ["404"]),
        (500, "", ["500", "later"]),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, capsys, tmp_path, status, code, words):
    hub.status = (status, code)
    exit_status, _, error = run(capsys, NAME, "--to", tmp_path)
    assert exit_status == 2 and all(word in error for word in words) and error.count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_nobody_answers(hub, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    status, _, error = run(capsys, NAME, "--to", tmp_path)
    assert status == 2 and "connection to http://127.0.0.1:9/" in error and "mirror" in error


def test_no_room(hub, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    status, _, error = run(capsys, NAME, "--to", tmp_path)
    assert status == 2 and "GB free" in error and "--to FOLDER" in error
    assert hub.ranges() == [] and list(tmp_path.iterdir()) == []


def test_the_disk_fills_up_on_the_way(hub, capsys, tmp_path, monkeypatch):
    def full(url, f, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    status, _, error = run(capsys, NAME, "--to", tmp_path)
    assert status == 2 and "No space left on device" in error and "connection" not in error


def test_a_target_that_is_no_folder(hub, capsys, tmp_path):
    (tmp_path / "file").touch()
    status, _, error = run(capsys, NAME, "--to", tmp_path / "file")
    assert status == 2 and "cannot be used as a folder" in error and hub.asked == []


def test_no_comfyui(hub, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "find_comfyui", lambda: None)
    status, _, error = run(capsys, NAME)
    assert status == 2 and "--to FOLDER" in error and "COMFYUI_PATH" in error and hub.asked == []


def test_without_huggingface_hub(hub, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    status, _, error = run(capsys, NAME, "--to", tmp_path)
    assert status == 2 and "pip install huggingface_hub" in error


# -- as people start it -----------------------------------------------------------------------------------------------------------


def in_a_process(hub, *arguments, **environment):
    line = [sys.executable, "-m", "tonfa", "download", *map(str, arguments)]
    variables = {**os.environ, "HF_ENDPOINT": hub.url, **environment}
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=variables)


def test_the_command_itself(hub, tmp_path):
    done = in_a_process(hub, "flux.1-dev", "--precision", "int4", "--to", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / NAME).read_bytes() == CONTENT and "is ready" in done.stdout


def test_offline_is_said(hub, tmp_path):
    done = in_a_process(hub, NAME, "--to", tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "HF_HUB_OFFLINE is set" in done.stderr and "Traceback" not in done.stderr
    assert hub.asked == []


def test_it_needs_no_torch(hub, tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('this torch is broken')", encoding="utf-8")
    done = in_a_process(hub, "flux.1-dev", "--to", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Taking int4" in done.stdout


# -- names ------------------------------------------------------------------------------------------------------------------------


def test_the_list(capsys):
    status, said, _ = run(capsys, "--list")
    assert status == 0 and all(model.name in said and model.repo in said for model in published.MODELS)
    status, _, error = run(capsys)
    assert status == 2 and "--list" in error


@pytest.mark.parametrize(
    ("name", "precision", "rank", "file"),
    [
        ("flux.1-dev", None, None, NAME),
        ("FLUX.1-dev", "fp4", None, "svdq-fp4_r32-flux.1-dev.safetensors"),
        (NAME, None, None, NAME),
        (NAME, "fp4", None, "svdq-fp4_r32-flux.1-dev.safetensors"),
        ("svdq-int4-flux.1-dev", None, None, NAME),
        ("svdq-nvfp4-flux.1-dev", None, None, "svdq-fp4_r32-flux.1-dev.safetensors"),
        ("nunchaku\\svdq-fp4-flux.1-fill-dev", None, None, "svdq-fp4_r32-flux.1-fill-dev.safetensors"),
        ("my/own/folders/svdq-int4-flux.1-schnell", None, None, "svdq-int4_r32-flux.1-schnell.safetensors"),
        ("svdq-fp4_r128-z-image-turbo.safetensors", None, None, "svdq-fp4_r128-z-image-turbo.safetensors"),
        ("z-image-turbo", "int4", 256, "svdq-int4_r256-z-image-turbo.safetensors"),
        ("qwen-image", None, 128, "svdq-int4_r128-qwen-image.safetensors"),
        ("t5", None, None, "awq-int4-flux.1-t5xxl.safetensors"),
        ("awq-int4-flux.1-t5xxl", None, None, "awq-int4-flux.1-t5xxl.safetensors"),
        ("clip_l.safetensors", None, None, "clip_l.safetensors"),
    ],
)
def test_what_a_name_means(name, precision, rank, file):
    assert published.resolve(name, precision, rank).name == file


def test_a_preferred_precision_gives_way_to_what_was_said():
    assert published.resolve("flux.1-dev", prefer="fp4").name == "svdq-fp4_r32-flux.1-dev.safetensors"
    assert published.resolve(NAME, prefer="fp4").name == NAME
    assert published.resolve("flux.1-dev", "int4", prefer="fp4").name == NAME
    assert published.resolve("clip_l", prefer="fp4").name == "clip_l.safetensors"


def test_a_name_of_the_hub():
    file = published.resolve("mit-han-lab/nunchaku-flux.1-dev/" + NAME)
    assert (file.repo, file.path, file.folder) == ("mit-han-lab/nunchaku-flux.1-dev", NAME, "diffusion_models")
    file = published.resolve("somebody/models/sub/t5xxl-q.safetensors")
    assert (file.repo, file.path, file.folder) == ("somebody/models", "sub/t5xxl-q.safetensors", "text_encoders")


@pytest.mark.parametrize(
    ("name", "precision", "rank", "words"),
    [
        ("flux", None, None, "nearest names: flux.1-"),
        ("xyzzy", None, None, "download --list"),
        ("flux.1-dev", None, 128, "There is: int4 of rank 32, fp4 of rank 32"),
        ("svdq-int4_r64-flux.1-dev", None, None, "not published in int4 of rank 64"),
        ("z-image-turbo", "fp4", 256, "not published in fp4 of rank 256"),
        ("t5", "int4", None, "is one file"),
        ("a/b/model.ckpt", None, None, "is no .safetensors file"),
        ("a/b/../../model.safetensors", None, None, "is no OWNER/REPO/FILE"),
        ("a/b/model.safetensors", "fp4", None, "is one file"),
    ],
)
def test_names_that_mean_nothing(capsys, name, precision, rank, words):
    with pytest.raises(published.NotPublished, match=words.replace("..", r"\.\.").replace("(", r"\(")):
        published.resolve(name, precision, rank)
    options = [*(["--precision", precision] if precision else []), *(["--rank", rank] if rank else [])]
    status, _, error = run(capsys, name, *options)
    assert status == 2 and words in error


def test_the_table():
    files = list(published.files())
    assert len({file.name for file in files}) == len(files) and len({model.name for model in published.MODELS}) == len(published.MODELS)
    for file in files:
        assert published.resolve(file.name) == file and file.folder in ("diffusion_models", "text_encoders")
    loaders = {
        "flux.1": "NunchakuFluxDiTLoader", "qwen-image": "NunchakuQwenImageDiTLoader", "z-image": "NunchakuZImageDiTLoader",
        "text encoder": "NunchakuTextEncoderLoaderV2",
    }  # fmt: skip
    assert {model.family for model in published.MODELS} == set(loaders)
    assert set(loaders.values()) <= {key for family in nodes.FAMILIES.values() for key in family}


def test_every_model_file_of_the_shared_graphs_is_known():
    """The names that 25 graphs made for ComfyUI-nunchaku store (some of them old folder names)."""
    stored = [
        "svdq-int4-flux.1-dev", "svdq-fp4-flux.1-dev", "svdq-int4-flux.1-canny-dev", "svdq-int4-flux.1-depth-dev",
        "svdq-int4-flux.1-fill-dev", "svdq-fp4-flux.1-fill-dev", "svdq-int4-flux.1-schnell", "svdq-int4_r32-flux.1-kontext-dev.safetensors",
        "svdq-int4_r128-qwen-image-edit-2509-lightningv2.0-4steps.safetensors", "svdq-int4_r128-qwen-image-edit.safetensors",
        "nunchaku/svdq-fp4_r128-z-image-turbo.safetensors", "awq-int4-flux.1-t5xxl.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors",
    ]  # fmt: skip
    assert all(published.known(name) for name in stored)


def test_blackwell_gets_fp4(monkeypatch):
    def gpu(capability, cuda="12.8"):
        calls = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda: capability)
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=calls))
        return download.preferred_precision()[0]

    assert [gpu((9, 0)), gpu((10, 0)), gpu((12, 0))] == ["int4", "fp4", "fp4"]
    assert gpu((12, 0), cuda=None) == "int4"  # an AMD GPU
    monkeypatch.setitem(sys.modules, "torch", None)
    assert download.preferred_precision()[0] == "int4"


# -- the loaders' error -----------------------------------------------------------------------------------------------------------


def test_the_error_of_a_missing_published_file_gives_the_command(monkeypatch):
    monkeypatch.setattr("tonfa.nodes.host.files.PACK", Path("/x/custom_nodes/ComfyUI-Tonfa"))
    for asked, name in (
        ("svdq-int4-flux.1-dev", NAME),
        ("nunchaku\\" + NAME, NAME),
        ("svdq-int4_r128-qwen-image.safetensors", "svdq-int4_r128-qwen-image.safetensors"),
        ("nunchaku/svdq-fp4_r128-z-image-turbo.safetensors", "svdq-fp4_r128-z-image-turbo.safetensors"),
    ):
        with pytest.raises(FileNotFoundError, match=f"run `python custom_nodes/ComfyUI-Tonfa download {name}` in ComfyUI's folder"):
            resolve(asked, [])
    with pytest.raises(FileNotFoundError, match="download awq-int4-flux.1-t5xxl.safetensors`"):
        resolve("awq-int4-flux.1-t5xxl.safetensors", ["clip_l.safetensors"], TEXT_ENCODERS)
    monkeypatch.setattr("tonfa.nodes.host.files.PACK", Path("/x/custom_nodes/My Tonfa"))
    with pytest.raises(FileNotFoundError, match=r'`python "custom_nodes/My Tonfa" download clip_l.safetensors`'):
        resolve("clip_l.safetensors", [], TEXT_ENCODERS)


@pytest.mark.parametrize("asked", ["my-finetune.safetensors", "svdq-int4_r64-flux.1-dev.safetensors", "clip_l.safetensors"])
def test_no_command_for_what_is_not_published_or_not_for_this_node(asked):
    with pytest.raises(FileNotFoundError) as error:
        resolve(asked, [])
    assert "download" not in str(error.value)


def test_the_command_in_the_error_runs(hub, capsys, tmp_path):
    """As it is pasted: ComfyUI's folder, the pack in custom_nodes, nothing installed."""
    root = Path(download.__file__).resolve().parent.parent
    pack = tmp_path / "custom_nodes" / "ComfyUI-Tonfa"
    shutil.copytree(root / "models", pack / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(root / name, pack / name)
    (pack / "nodes").mkdir()
    (pack / "nodes" / "__init__.py").write_text("NODE_CLASS_MAPPINGS = NODE_DISPLAY_NAME_MAPPINGS = {}\n", encoding="utf-8")
    (tmp_path / "comfy").mkdir()
    for name in ("main.py", "comfy/sd.py"):
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError) as error:
        resolve("svdq-int4-flux.1-dev", [])
    arguments = str(error.value).split("`")[1].split()[2:]
    variables = {k: v for k, v in os.environ.items() if k != "COMFYUI_PATH"} | {"HF_ENDPOINT": hub.url}
    done = subprocess.run(
        [sys.executable, "custom_nodes/ComfyUI-Tonfa", *arguments], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "models" / "diffusion_models" / NAME).read_bytes() == CONTENT
