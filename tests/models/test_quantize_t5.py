"""quantize-t5: the search against rounding to nearest, every type of file, what is refused, memory, the command."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tonfa.__main__ import main
from tonfa.kernels.t5_layout import T5Linear, pack, read_spec, views
from tonfa.kernels.t5_linear_torch import t5_linear_torch, t5_weight
from tonfa.models.formats import quantize_awq
from tonfa.models.formats.awq import open_awq_t5
from tonfa.models.formats.quantize_awq import quantize_groups
from tonfa.models.formats.t5 import EMBEDDINGS, FINAL_NORM, T5Dims
from tonfa.models.formats.tensorfile import CheckpointError
from tonfa.models.quantize_t5 import quantize_t5

from .formats.t5_files import DIMS, scaled_fp8, tiny_t5

Q = "encoder.block.0.layer.0.SelfAttention.q"
WO = "encoder.block.1.layer.1.DenseReluDense.wo"
SHAPE = (192, 1024)


def drawn(name: str) -> torch.Tensor:
    """fp32 [192, 1024] of a distribution."""
    torch.manual_seed(1)
    normal = torch.randn(SHAPE)
    return (
        0.05
        * {
            "gaussian": lambda: normal,
            "uniform": lambda: torch.rand(SHAPE) - 0.5,
            "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample(SHAPE),
            "t, 3 degrees": lambda: torch.distributions.StudentT(3.0).sample(SHAPE),
            "t, 5 degrees": lambda: torch.distributions.StudentT(5.0).sample(SHAPE),
            "1 % outliers x 8": lambda: normal * torch.where(torch.rand(SHAPE) < 0.01, 8.0, 1.0),
            "0.1 % outliers x 8": lambda: normal * torch.where(torch.rand(SHAPE) < 0.001, 8.0, 1.0),
        }[name]()
    )


HEAVY = ("laplace", "t, 3 degrees", "t, 5 degrees", "1 % outliers x 8", "0.1 % outliers x 8")


def norm_weights(spread: float) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.exp(torch.randn(SHAPE[1]) * spread)


def dense(layer: T5Linear) -> torch.Tensor:
    blob = pack(layer)
    return t5_weight(views(read_spec(blob), blob), 0, layer.n)


def squared_error(layer: T5Linear, weight: torch.Tensor, norm: torch.Tensor) -> float:
    """Mean squared error of the outputs for normalised activations times the norm's weights, against the weight itself."""
    x = torch.randn(256, weight.shape[1], generator=torch.Generator().manual_seed(3)) * norm
    return float((x @ (dense(layer) - weight).t()).square().mean() / (x @ weight.t()).square().mean())


def gain(weight: torch.Tensor, norm: torch.Tensor) -> float:
    """Error of the search over that of rounding to nearest with an integer zero point; root mean square of the outputs."""
    searched, nearest = quantize_groups(weight, norm.square()), quantize_groups(weight, search=False)
    return (squared_error(searched, weight, norm) / squared_error(nearest, weight, norm)) ** 0.5


# -- one linear ---------------------------------------------------------------------------------------------------------------------


def test_rounding_to_nearest_is_the_textbooks():
    """Scale from the range with 0 in it, integer zero point, codes and zero rounded one after the other."""
    weight = drawn("gaussian")
    groups = weight.view(192, -1, 128)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    codes = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    want = ((codes - zero[..., None]) * scale[..., None]).view(SHAPE)
    layer = quantize_groups(weight, search=False)
    assert torch.equal(layer.scales, scale.half())
    error, theirs = (dense(layer) - weight).square().mean(), (want - weight).square().mean()
    assert abs(float(error / theirs) - 1) < 1e-3


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_tails_lose_at_least_ten_percent_of_their_error(name):
    """Behind a layer norm whose weights differ, the error itself (13 to 16 %); with inputs all alike, its square (13 to 19 %)."""
    weight = drawn(name)
    assert gain(weight, norm_weights(0.5)) < 0.9
    assert gain(weight, torch.ones(SHAPE[1])) ** 2 < 0.9


@pytest.mark.parametrize("name", ["gaussian", "uniform", *HEAVY])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_never_worse_than_rounding_to_nearest(name, spread):
    weight, norm = drawn(name), norm_weights(spread)
    assert gain(weight, norm) <= 1

    def errors(layer: T5Linear) -> torch.Tensor:  # of every group, as the search weighs it
        return ((dense(layer) - weight) * norm).square().view(192, -1, 128).sum(2)

    better, nearest = errors(quantize_groups(weight, norm.square())), errors(quantize_groups(weight, search=False))
    assert (better <= nearest * (1 + 1e-4)).all()


def test_groups_that_need_no_codes():
    weight = torch.zeros(8, 512)
    weight[:, 128:256] = 0.25
    weight[:, 256:384] = torch.tensor([-1.0, 2.0]).repeat(64)
    weight[:, 384:] = 3e-8 * torch.randn(128)
    layer = quantize_groups(weight, torch.cat((torch.zeros(128), torch.ones(384))))
    assert torch.isfinite(layer.scales).all() and torch.isfinite(layer.zeros).all()
    torch.testing.assert_close(dense(layer)[:, :384], weight[:, :384], rtol=1e-3, atol=0)
    assert (dense(layer)[:, 384:] - weight[:, 384:]).abs().max() < 2e-7


def test_chunks_do_not_show(quick, monkeypatch):
    weight, norm = drawn("laplace"), norm_weights(0.5)
    whole = quantize_groups(weight, norm)
    monkeypatch.setattr(quantize_awq, "_CHUNK", {"cpu": 5 * 1024})
    parts = quantize_groups(weight, norm)
    assert all(torch.equal(getattr(whole, name), getattr(parts, name)) for name in ("codes", "scales", "zeros"))


def test_weights_that_cannot_be():
    with pytest.raises(ValueError, match="not finite or beyond 65504"):
        quantize_groups(torch.full((8, 128), 1e5))
    with pytest.raises(ValueError, match="not finite"):
        quantize_groups(torch.full((8, 128), float("nan")))
    with pytest.raises(ValueError, match="multiples of 128"):
        quantize_groups(torch.zeros(8, 64))


# -- files --------------------------------------------------------------------------------------------------------------------------

KINDS = {
    "fp16": lambda: tiny_t5(),
    "bf16": lambda: tiny_t5(torch.bfloat16),
    "fp32": lambda: tiny_t5(torch.float32),
    "fp8": lambda: tiny_t5(torch.float8_e4m3fn),
    "scaled fp8": lambda: scaled_fp8(tiny_t5()),
    "scaled fp8, 2026": lambda: scaled_fp8(tiny_t5(), "weight_scale"),
}


@pytest.fixture
def quick(monkeypatch):
    """A search of four steps, where its quality is not looked at."""
    monkeypatch.setattr(quantize_awq, "SHRINK", (1.0, 0.8))
    monkeypatch.setattr(quantize_awq, "POLISH", 0)


def write(tmp_path: Path, tensors: dict[str, torch.Tensor], name: str = "in") -> Path:
    path = tmp_path / f"{name}.safetensors"
    save_file(tensors, path)
    return path


def truth(tensors: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """fp32 weight of a linear of a file, its scale applied."""
    scale = next((tensors[key] for s in ("scale_weight", "weight_scale") if (key := f"{prefix}.{s}") in tensors), torch.ones(()))
    return tensors[f"{prefix}.weight"].float() * scale


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_file(tmp_path, quick, kind):
    tensors = KINDS[kind]()
    out, steps = tmp_path / "out.safetensors", []
    quantize_t5(write(tmp_path, tensors), out, progress=lambda done, total: steps.append((done, total)))
    t5 = open_awq_t5(out)
    assert t5.dims == DIMS and set(t5.quantised) == set(DIMS.linears())
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1] and len(steps) == len(t5.entries)
    x = torch.randn(32, DIMS.ff)
    for prefix, (n, k) in DIMS.linears().items():
        blob = pack(t5.linear(prefix))
        got = t5_linear_torch(x[:, :k], views(read_spec(blob), blob))
        want = x[:, :k] @ truth(tensors, prefix).t()
        assert got.shape == (32, n) and (got - want).norm() / want.norm() < 0.17, prefix
    for name in t5.plain_names():
        assert torch.equal(t5.plain(name).float(), tensors["shared.weight" if name in EMBEDDINGS else name].float()), name
        assert t5.plain(name).dtype == tensors["shared.weight" if name in EMBEDDINGS else name].dtype
    assert set(EMBEDDINGS) < set(t5.plain_names()) and list(tmp_path.glob("*.part")) == []


def test_norm_weights_are_the_importance(tmp_path, quick):
    """Nothing but the layer norm in front changes between the two files: q, k, v and the gates are searched otherwise, o and wo are not."""
    tensors = tiny_t5()
    level = tensors | {name: torch.ones_like(t) for name, t in tensors.items() if "layer_norm" in name}
    found = []
    for i, content in enumerate((tensors, level)):
        quantize_t5(write(tmp_path, content, f"in{i}"), tmp_path / f"out{i}.safetensors")
        found.append(load_file(tmp_path / f"out{i}.safetensors"))
    differ = {prefix.rsplit(".", 1)[1] for prefix in DIMS.linears() if not torch.equal(*(t[f"{prefix}.qweight"] for t in found))}
    assert differ == {"q", "k", "v", "wi_0", "wi_1"}


def test_other_embedding_and_a_decoder_beside(tmp_path, quick):
    tensors = tiny_t5()
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    tensors |= {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(128, 128), "lm_head.weight": torch.zeros(64, 128)}
    quantize_t5(write(tmp_path, tensors), tmp_path / "out.safetensors")
    t5 = open_awq_t5(tmp_path / "out.safetensors")
    assert torch.equal(t5.plain("shared.weight"), tensors["encoder.embed_tokens.weight"])
    assert not any("decoder" in name or "lm_head" in name for name in t5.entries)


def test_shards(tmp_path, quick):
    """The folder of a diffusers model: the same bytes as from one file; one shard alone says that there are more."""
    tensors, folder = scaled_fp8(tiny_t5()), tmp_path / "model" / "text_encoder_2"
    folder.mkdir(parents=True)
    names = sorted(tensors, key=lambda name: name[::-1])  # linears and their scales apart
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{i + 1}-of-00002.safetensors")
    quantize_t5(write(tmp_path, tensors), tmp_path / "one.safetensors")
    for i, path in enumerate((folder, folder.parent)):
        quantize_t5(path, tmp_path / f"{i}.safetensors")
        assert (tmp_path / f"{i}.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    shard = folder / "model-00001-of-00002.safetensors"
    with pytest.raises(CheckpointError, match="is missing. It is one of several files: take .* the folder with all of them"):
        quantize_t5(shard, tmp_path / "out.safetensors")
    save_file(tensors, folder / "again.safetensors")
    with pytest.raises(CheckpointError, match="is in both again.safetensors and model-00001"):
        quantize_t5(folder, tmp_path / "out.safetensors")


@pytest.mark.parametrize(("rest", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_type_of_the_rest(tmp_path, quick, rest, dtype):
    quantize_t5(write(tmp_path, tiny_t5(torch.float32)), tmp_path / "out.safetensors", rest=rest)
    t5 = open_awq_t5(tmp_path / "out.safetensors")
    assert {t5.plain(name).dtype for name in t5.plain_names()} == {dtype} and t5.linear(Q).scales.dtype == torch.float16


# -- refusals -----------------------------------------------------------------------------------------------------------------------


def clip(layers: int, width: int) -> dict[str, torch.Tensor]:
    return {f"text_model.encoder.layers.{i}.mlp.fc1.weight": torch.zeros(1, width) for i in range(layers)}


def umt5() -> dict[str, torch.Tensor]:
    bias = torch.zeros(32, 2)
    return tiny_t5() | {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": bias}


def old_t5() -> dict[str, torch.Tensor]:
    return {name.replace("wi_0", "wi"): t for name, t in tiny_t5().items() if "wi_1" not in name}


def lacking(*keys: str) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tiny_t5().items() if name not in keys}


OTHERS = {
    "CLIP-L": (lambda: clip(12, 768), ["CLIP-L text encoder (12 layers of 768 channels)", "A T5-XXL file"]),
    "CLIP-G": (lambda: clip(32, 1280), ["CLIP-G text encoder", "A T5-XXL file"]),
    "UMT5": (umt5, ["UMT5", "FLUX takes T5 v1.1"]),
    "T5 1.0": (old_t5, ["first version", "wi", "FLUX takes T5 v1.1"]),
    "VAE": (lambda: {"decoder.conv_in.weight": torch.zeros(4)}, ["a VAE, no T5 text encoder"]),
    "nothing known": (lambda: {"a": torch.zeros(4)}, ["no T5 text encoder"]),
    "a linear missing": (lambda: lacking(f"{WO}.weight"), [f"{WO} is missing", "no whole T5 encoder"]),
    "a norm missing": (lambda: lacking(FINAL_NORM), [f"{FINAL_NORM} is missing"]),
    "several missing": (lambda: lacking(f"{WO}.weight", FINAL_NORM), ["(and 1 more)"]),
    "narrow": (lambda: tiny_t5(dims=T5Dims(1, 64, 1, 64, 128, 32, 32)), ["64 x 64, expected multiples of 4 and of 128"]),
    "nvfp4": (lambda: tiny_t5() | {f"{Q}.weight_scale_2": torch.zeros(1)}, [f"{Q}.weight_scale_2 is nothing"]),
    "8-bit integers": (lambda: tiny_t5() | {f"{Q}.weight": torch.zeros(128, 128, dtype=torch.int8)}, [f"{Q}.weight is I8"]),
    "not finite": (lambda: tiny_t5() | {f"{Q}.weight": torch.full((128, 128), float("inf"))}, [f"{Q} cannot be 4-bit", "not finite"]),
    "beyond fp16": (lambda: tiny_t5() | {f"{Q}.weight": torch.full((128, 128), 1e6)}, [f"{Q} cannot be 4-bit", "beyond 65504"]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_refused(tmp_path, quick, name):
    make, words = OTHERS[name]
    path, out = write(tmp_path, make()), tmp_path / "out.safetensors"
    with pytest.raises(CheckpointError) as raised:
        quantize_t5(path, out)
    said = str(raised.value)
    assert all(word in said for word in (str(path), *words)) and "\n" not in said, said
    assert list(tmp_path.iterdir()) == [path]


def test_four_bit_missing_and_truncated(tmp_path, quick):
    path, out = write(tmp_path, tiny_t5()), tmp_path / "out.safetensors"
    quantize_t5(path, out)
    with pytest.raises(CheckpointError, match="4-bit already"):
        quantize_t5(out, tmp_path / "again.safetensors")
    with pytest.raises(CheckpointError, match="There is no file"):
        quantize_t5(tmp_path / "none.safetensors", out)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="is cut off"):
        quantize_t5(path, tmp_path / "again.safetensors")


def test_places_that_cannot_be(tmp_path, monkeypatch):
    path = write(tmp_path, tiny_t5())
    with pytest.raises(CheckpointError, match="is a folder"):
        quantize_t5(path, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is a folder without .safetensors files. A T5-XXL file"):
        quantize_t5(tmp_path / "empty", tmp_path / "out.safetensors")
    (tmp_path / "empty").rmdir()
    with pytest.raises(CheckpointError, match="is the file to read"):
        quantize_t5(path, path)
    with pytest.raises(CheckpointError, match="there is no folder"):
        quantize_t5(path, tmp_path / "none" / "out.safetensors")
    with pytest.raises(ValueError, match="expected one of keep, fp16, bf16"):
        quantize_t5(path, tmp_path / "out.safetensors", rest="int8")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match="make room"):
        quantize_t5(path, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == [path]


# -- memory and the command ---------------------------------------------------------------------------------------------------------

PEAK = """
import sys, threading
from tonfa.models import quantize_t5 as q
from tonfa.models.formats import quantize_awq
quantize_awq.SHRINK, quantize_awq.POLISH = (1.0,), 0

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous() - before)

threading.Thread(target=watch).start()
q.quantize_t5(sys.argv[1], sys.argv[2])
done.set()
print(peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_that_of_one_linear(tmp_path):
    """A file of 88 MB whose largest tensor has 16 MB, and 16 MB more as fp32: less than half of the file is added at any time."""
    path = write(tmp_path, tiny_t5(dims=T5Dims(blocks=2, model=1024, heads=16, inner=1024, ff=4096, vocab=8192, buckets=32)))
    assert path.stat().st_size > 80e6
    done = subprocess.run([sys.executable, "-c", PEAK, path, tmp_path / "out.safetensors"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < path.stat().st_size / 2, done.stdout


def test_command(tmp_path, quick, capsys):
    path, out = write(tmp_path, tiny_t5()), tmp_path / "out.safetensors"
    assert main(["quantize-t5", str(path), str(out), "--device", "cpu", "--precision-of-rest", "keep"]) == 0
    assert f"Wrote {out}" in capsys.readouterr().out and open_awq_t5(out).dims == DIMS
    assert main(["quantize-t5", str(tmp_path / "none.safetensors"), str(out)]) == 2
    assert "There is no file" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["quantize-t5", str(path), str(out), "--device", "cuda"]) == 2
        assert "finds no GPU" in capsys.readouterr().err
