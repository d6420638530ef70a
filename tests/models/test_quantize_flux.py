"""A dense FLUX becomes a 4-bit file: every tensor of the published table, what the quantiser chose bit for bit, stopped at any moment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tonfa.kernels.layout import dense_bias, dense_weight
from tonfa.models import quantize_flux as qf
from tonfa.models.calibrate import Collector, calibrate, drawn_conditioning
from tonfa.models.dense_flux import dense_flux, open_dense
from tonfa.models.flux import Flux
from tonfa.models.formats.checkpoint import open_checkpoint
from tonfa.models.formats.tensorfile import CheckpointError
from tonfa.models.quantize_flux import Calibration, Options, quantize_file, quantize_flux

from .dense_files import CONFIG, H, M, block_linears, dense_state, in_diffusers_names, write_dense

torch.set_num_threads(1)
NAIVE = Options(mode="naive")
SMALL = Calibration(pixels=64, prompts=12, steps=4, rows=128)
FIELDS = ("codes", "scales", "smooth", "down", "up", "channel_scale", "bias", "zeros")


@pytest.fixture(scope="module", autouse=True)
def torch_path():
    """No kernel is tested here, and Triton's interpreter takes minutes for a network."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, dense) -> dict[str, Path]:
    """One file of each mode and precision."""
    folder, found = tmp_path_factory.mktemp("made"), {}
    for mode in ("naive", "data-free", "calibrated"):
        for precision in ("int4", "nvfp4"):
            found[f"{mode} {precision}"] = path = folder / f"{mode}-{precision}.safetensors"
            quantize_file(dense, path, Options(precision, 32, mode), SMALL)
    return found


# -- what is written ------------------------------------------------------------------------------------------------------------------


def table(precision: str, rank: int) -> dict[str, tuple[str, list[int]]]:
    """Every tensor of a file of CONFIG's sizes, as the format's description lists them: name -> (type, shape)."""
    group, scale = (64, "BF16") if precision == "int4" else (16, "F8_E4M3")

    def four(n: int, k: int) -> dict[str, tuple[str, list[int]]]:
        found = {"qweight": ("I8", [n, k // 2]), "wscales": (scale, [k // group, n]), "bias": ("BF16", [n])}
        found |= {"smooth": ("BF16", [k]), "smooth_orig": ("BF16", [k]), "lora_down": ("BF16", [k, rank]), "lora_up": ("BF16", [n, rank])}
        return found | ({"wtscale": ("BF16", [1])} if precision == "nvfp4" else {})

    def modulation(s: int) -> dict[str, tuple[str, list[int]]]:
        rows = -(-H // 64 // 16) * 16  # groups of 64, rounded up as AWQ files do
        found = {"qweight": ("I32", [s * H // 4, H // 2]), "bias": ("BF16", [s * H])}
        return found | {"wscales": ("BF16", [rows, s * H]), "wzeros": ("BF16", [rows, s * H])}

    layers = {}
    for c, mlp in (("", "mlp_"), ("_context", "mlp_context_")):
        p = "transformer_blocks.0."
        layers |= {f"{p}norm1{c}.linear": modulation(6), f"{p}qkv_proj{c}": four(3 * H, H), f"{p}out_proj{c}": four(H, H)}
        layers |= {f"{p}{mlp}fc1": four(M, H), f"{p}{mlp}fc2": four(H, M)}
    for i in range(2):
        p = f"single_transformer_blocks.{i}."
        layers |= {f"{p}norm.linear": modulation(3), f"{p}qkv_proj": four(3 * H, H), f"{p}out_proj": four(H, H)}
        layers |= {f"{p}mlp_fc1": four(M, H), f"{p}mlp_fc2": four(H, M)}
    found = {f"{layer}.{suffix}": value for layer, tensors in layers.items() for suffix, value in tensors.items()}
    norms = [f"transformer_blocks.0.norm_{n}" for n in ("q", "k", "added_q", "added_k")]
    norms += [f"single_transformer_blocks.{i}.norm_{n}" for i in range(2) for n in "qk"]
    found |= {f"{name}.weight": ("BF16", [128]) for name in norms}
    outside = {"x_embedder": (H, 64), "context_embedder": (H, 128), "norm_out.linear": (2 * H, H), "proj_out": (64, H)}
    for name, k in (("timestep", 256), ("guidance", 256), ("text", 64)):
        outside |= {f"time_text_embed.{name}_embedder.linear_1": (H, k), f"time_text_embed.{name}_embedder.linear_2": (H, H)}
    for name, (n, k) in outside.items():
        found |= {f"{name}.weight": ("BF16", [n, k]), f"{name}.bias": ("BF16", [n])}
    return found


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_every_row_of_the_published_table(made, precision):
    with safe_open(made[f"data-free {precision}"], "pt") as f:
        found = {key: (f.get_slice(key).get_dtype(), f.get_slice(key).get_shape()) for key in f.keys()}  # noqa: SIM118
        metadata = f.metadata()
    assert found == table(precision, 32)
    assert set(metadata) == {"config", "comfy_config", "model_class", "quantization_config"}
    told = json.loads(metadata["quantization_config"])
    assert told["rank"] == 32 and told["weight"]["dtype"] == ("int4" if precision == "int4" else "fp4_e2m1_all")


def test_every_file_opens_without_a_warning(made):
    for name, path in made.items():
        c = open_checkpoint(path)
        assert c.warnings == [] and c.config == CONFIG and c.model_class == "Flux" and c.precision == name.split()[1], name
        assert c.ranks == [16 if "naive" in name else 32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_the_file_holds_what_the_quantiser_chose(dense, tmp_path, monkeypatch, precision, dtype):
    chosen = []
    real, real_modulation = qf.svd_quantize, qf.quantize_modulation

    def spy(*arguments, **named):
        chosen.append(real(*arguments, **named))
        return chosen[-1]

    def spy_modulation(*arguments):
        chosen.append((real_modulation(*arguments), None))
        return chosen[-1][0]

    monkeypatch.setattr(qf, "svd_quantize", spy)
    monkeypatch.setattr(qf, "quantize_modulation", spy_modulation)
    report = quantize_file(dense, tmp_path / "out.safetensors", Options(precision, 16, dtype=dtype))
    c = open_checkpoint(tmp_path / "out.safetensors")
    order = [prefix for host in c.host_linears() for prefix, _, _ in host.parts]
    assert len(order) == len(chosen) == len(report.layers) == 20
    for prefix, (layer, error) in zip(order, chosen, strict=True):
        got = c.load_layer(prefix)
        assert got.act_unsigned == layer.act_unsigned == (prefix.endswith("fc2") and precision == "int4")
        for name in FIELDS:
            a, b = getattr(got, name), getattr(layer, name)
            assert (a is None) == (b is None), (prefix, name)
            assert a is None or (a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))
        row = next(x for x in report.layers if x.name == prefix)
        assert (row.n, row.k) == (layer.n, layer.k)
        assert row.weight_snr_db == (error.weight_snr_db if error else pytest.approx(row.weight_snr_db))
    assert [x.name for x in report.layers] == order


def test_what_is_not_quantised_is_the_source(dense, made):
    state = dense_state()
    for name, t in open_checkpoint(made["naive int4"]).plain_tensors():
        assert torch.equal(t, state[name]), name
    assert len(dict(open_checkpoint(made["naive int4"]).plain_tensors())) == 28


@pytest.mark.parametrize("mode", ["naive", "data-free", "calibrated"])
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_weights_and_biases_are_those_of_the_source(made, mode, precision):
    """linear1's layers share a smooth and load as one; linear2's bias lies with its MLP columns, zeros with the others."""
    c, state = open_checkpoint(made[f"{mode} {precision}"]), {name: t.float() for name, t in dense_state().items()}
    least = {"naive": 14.5, "data-free": 20, "calibrated": 16}[mode]  # of the weight alone: calibration looks at the output
    for host in c.host_linears():
        weight, bias = state[f"{host.name}.weight"], state[f"{host.name}.bias"]
        parts = c.load_linear(host)
        assert len(parts) == (2 if host.name.endswith("linear2") else 1), host.name
        got, got_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for layer, row, col in parts:
            got[row : row + layer.n, col : col + layer.k] = dense_weight(layer)
            if layer.bias is not None:
                got_bias[row : row + layer.n] += dense_bias(layer)
        assert qf.snr_db(got, weight) > (18.5 if host.kind == "w4a16" else least), host.name
        shift = 0.171875 * (got - weight)[:, -M:].sum(1).abs().max() if host.name.endswith(("mlp.2", "linear2")) else 0
        assert (got_bias - bias).abs().max() <= 0.04 + shift, host.name  # a bf16 of up to 9
    for i in range(2):
        assert c.load_layer(f"single_transformer_blocks.{i}.out_proj").bias.abs().max() == 0


def output_snr(path: Path, dense: Path) -> float:
    """Signal to noise of a whole network's velocity against the dense one, in fp32: eight prompts that calibration did not see."""
    gen = torch.Generator().manual_seed(3)
    c = drawn_conditioning(CONFIG, 8, seed=9)
    x = torch.randn(8, 16, 8, 8, generator=gen)
    arguments = (x, torch.linspace(0.2, 0.95, 8), c.context, c.pooled, c.guidance, {"tonfa": {"compute": "exact"}})
    with torch.no_grad():
        want, got = dense_flux(dense, torch.float32)(*arguments), Flux(open_checkpoint(path), torch.float32)(*arguments)
    return qf.snr_db(got, want)


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_calibrated_is_better_than_data_free_than_naive(made, dense, precision):
    naive, free, calibrated = (output_snr(made[f"{mode} {precision}"], dense) for mode in ("naive", "data-free", "calibrated"))
    assert naive + 1 < free and free < calibrated, (naive, free, calibrated)


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_a_report_lies_beside_the_file(made, precision):
    path = made[f"calibrated {precision}"]
    facts = json.loads(path.with_name(f"{path.stem}.report.json").read_text())
    assert facts["mode"] == "calibrated" and facts["bytes"] == path.stat().st_size and facts["measured"] == "output"
    four = [x for x in facts["layers"] if x["rank"] is not None]
    assert len(four) == 16 and all(x["output_snr_db"] > x["naive_output_snr_db"] for x in four)
    assert path.with_name(f"{path.stem}.report.png").read_bytes().startswith(b"\x89PNG")


def test_a_size_chooses_the_ranks(dense, tmp_path):
    out, steps = tmp_path / "out.safetensors", []
    report = quantize_file(dense, out, Options(size_budget=4_700_000), progress=lambda *at: steps.append(at[1:]))
    c = open_checkpoint(out)
    assert 4_500_000 < out.stat().st_size <= 4_700_000 and len(c.ranks) > 1 and set(c.ranks) <= {16, 32, 64, 128}
    ranks = {x.name: x.rank for x in report.layers}
    for i in range(2):
        p = f"single_transformer_blocks.{i}."
        assert ranks[f"{p}qkv_proj"] == ranks[f"{p}mlp_fc1"]
    assert steps[0] == (0, 40) and steps[-1] == (40, 40) and steps == sorted(steps)
    with pytest.raises(CheckpointError, match="a file of 3.00 MB is too small: with rank 16 in every layer it has"):
        quantize_file(dense, tmp_path / "small.safetensors", Options(size_budget=3_000_000))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.report.json", "out.report.png", "out.safetensors"]


def test_another_form_of_the_same_model_gives_the_same_file(tmp_path, made):
    path = write_dense(tmp_path, in_diffusers_names(dense_state()))
    quantize_file(path, tmp_path / "out.safetensors", Options(mode="naive"))
    assert (tmp_path / "out.safetensors").read_bytes() == made["naive int4"].read_bytes()


def test_statistics_of_any_network(dense, tmp_path):
    """quantize_flux with statistics that were gathered elsewhere, and with some that are lacking."""
    source = open_dense(dense)
    seen = calibrate(source, drawn_conditioning(CONFIG, 1), 1, pixels=32, dtype=torch.float32, rows=64)
    report = quantize_flux(source, tmp_path / "a.safetensors", Options(mode="calibrated", gptq=True), seen.statistics)
    assert report.measured == "output" and report.source == str(dense)
    with pytest.raises(ValueError, match="no statistics"):
        quantize_flux(source, tmp_path / "b.safetensors", Options(mode="calibrated"))
    with pytest.raises(CheckpointError, match="nothing was seen of the inputs of double_blocks.0.img_attn.qkv"):
        quantize_flux(source, tmp_path / "b.safetensors", Options(mode="calibrated"), Collector(torch.nn.Module()).statistics)
    assert not (tmp_path / "b.safetensors").exists()


# -- interrupted --------------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopping(after: int):
    """A progress call that ends the work at its call number `after`."""
    calls = 0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise Stop

    return progress


@pytest.mark.parametrize("after", [1, 2, 5, 9, 16, 17, 18, 40, 150])
def test_stopped_at_any_call_and_gone_on_with(dense, made, tmp_path, monkeypatch, after):
    out, count = tmp_path / "out.safetensors", 0
    with pytest.raises(Stop):
        quantize_file(dense, out, NAIVE, progress=stopping(after))
    assert not out.exists()
    kept = len(list((tmp_path / "out.safetensors.part").glob("0*.kept")))
    assert kept == min(max(after - 1, 0), 16)
    real = qf.Quantizer.make

    def make(self, host):
        nonlocal count
        count += 1
        return real(self, host)

    monkeypatch.setattr(qf.Quantizer, "make", make)
    quantize_file(dense, out, NAIVE)
    assert count == 16 - kept
    assert out.read_bytes() == made["naive int4"].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.report.json", "out.report.png", "out.safetensors"]


def test_stopped_while_calibrating_and_after_it(dense, made, tmp_path, monkeypatch):
    out, options = tmp_path / "out.safetensors", Options(mode="calibrated")
    with pytest.raises(Stop):
        quantize_file(dense, out, options, SMALL, progress=stopping(3))
    assert [p.name for p in (tmp_path / "out.safetensors.part").iterdir()] == ["job.json"]
    with pytest.raises(Stop):
        quantize_file(dense, out, options, SMALL, progress=stopping(3 * 4 + 4))  # a call a block, and one when it is done
    monkeypatch.setattr(qf, "calibrate", lambda *_, **__: pytest.fail("it calibrated again"))
    quantize_file(dense, out, options, SMALL)
    assert out.read_bytes() == made["calibrated int4"].read_bytes()


def test_a_plan_of_ranks_is_made_once(dense, tmp_path, monkeypatch):
    options, whole, out = Options(size_budget=4_700_000), tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    quantize_file(dense, whole, options)
    with pytest.raises(Stop):
        quantize_file(dense, out, options, progress=stopping(22))
    monkeypatch.setattr(qf, "noise_by_rank", lambda *_, **__: pytest.fail("it planned again"))
    quantize_file(dense, out, options)
    assert out.read_bytes() == whole.read_bytes()


def killed(command: list[str], out: Path, seconds: float) -> int:
    """Starts the command, kills it the hard way so long after its folder came to be; the return code."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while child.poll() is None and not out.with_name(f"{out.name}.part").exists() and not out.exists() and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(seconds)
    if child.poll() is None:
        os.kill(child.pid, signal.SIGKILL)
    return child.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_and_gone_on_with(dense, made, tmp_path):
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "tonfa", "quantize", str(dense), str(out), "--device", "cpu"]
    codes = []
    for seconds in (0.0, 0.3, 0.7):
        if not out.exists():
            codes.append(killed(command, out, seconds))
            assert not out.exists() or open_checkpoint(out).warnings == []
    assert -signal.SIGKILL in codes
    quantize_file(dense, out, Options())
    assert out.read_bytes() == made["data-free int4"].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.report.json", "out.report.png", "out.safetensors"]


@pytest.mark.parametrize("change", ["options", "source", "nothing known"])
def test_another_job_starts_afresh(dense, tmp_path, change):
    out, path = tmp_path / "out.safetensors", tmp_path / "dense.safetensors"
    save_file(load_file(dense), path)
    with pytest.raises(Stop):
        quantize_file(path, out, NAIVE, progress=stopping(5))
    first = {p.name: p.stat().st_ino for p in out.with_name("out.safetensors.part").iterdir()}
    assert len(first) == 5
    options = Options("nvfp4", mode="naive") if change == "options" else NAIVE
    if change == "source":
        save_file(dense_state(seed=1), path)
    if change == "nothing known":
        quantize_flux(open_dense(path), out, options)
    else:
        quantize_file(path, out, options)
    quantize_file(path, tmp_path / "anew.safetensors", options)
    assert out.read_bytes() == (tmp_path / "anew.safetensors").read_bytes()


def test_a_file_that_was_cut_off_is_made_again(dense, made, tmp_path, caplog):
    out = tmp_path / "out.safetensors"
    with pytest.raises(Stop):
        quantize_file(dense, out, NAIVE, progress=stopping(6))
    cut = out.with_name("out.safetensors.part") / "0002.kept"
    cut.write_bytes(cut.read_bytes()[:-100])
    quantize_file(dense, out, NAIVE)
    assert "0002.kept is made again" in caplog.text and out.read_bytes() == made["naive int4"].read_bytes()


# -- refusals -----------------------------------------------------------------------------------------------------------------------


def test_places_that_cannot_be(dense, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    for path, words in (
        (tmp_path, "is a folder"), (dense, "is the file to read"), (tmp_path / "none" / "a.safetensors", "there is no folder"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            quantize_file(dense, path, NAIVE)
    part = out.with_name("out.safetensors.part")
    part.mkdir()
    (part / "holiday.jpg").touch()
    with pytest.raises(CheckpointError, match=r"holiday.jpg is there, which is none: move it away"):
        quantize_file(dense, out, NAIVE)
    assert (part / "holiday.jpg").exists()
    (part / "holiday.jpg").unlink()
    part.rmdir()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100_000}))
    with pytest.raises(CheckpointError, match="make room"):
        quantize_file(dense, out, NAIVE)
    assert list(tmp_path.iterdir()) == []


def test_linears_that_cannot_be(tmp_path):
    state = dense_state()
    state["single_blocks.0.linear2.weight"][3, 3] = float("inf")
    with pytest.raises(CheckpointError, match="single_blocks.0.linear2.weight holds NaN or infinite"):
        quantize_file(write_dense(tmp_path, state), tmp_path / "out.safetensors", NAIVE)
    big = dense_state(torch.float32)
    big["double_blocks.0.img_mlp.0.bias"][0] = 1e6
    with pytest.raises(CheckpointError, match=r"double_blocks.0.img_mlp.0 cannot be quantised: bias .*float16"):
        quantize_file(write_dense(tmp_path, big), tmp_path / "out.safetensors", Options(mode="naive", dtype=torch.float16))
    with pytest.raises(CheckpointError, match="There is no file .*none"):
        quantize_file(write_dense(tmp_path), tmp_path / "out.safetensors", Options(mode="calibrated"), Calibration(tmp_path / "none"))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"precision": "int8"}, "precision is 'int8'"), ({"mode": "best"}, "mode 'best'"), ({"rank": 20}, "rank is 20"),
        ({"gptq": True}, "gptq needs calibration"), ({"mode": "naive", "size_budget": 1}, "no low-rank branch"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(given, words):
    with pytest.raises(ValueError, match=words):
        Options(**given)


def test_every_linear_is_in_a_group_once():
    """The layers that the pipeline walks over are all that the format has."""
    names = {host.name for host in qf.host_linears(qf.dims_of(CONFIG))}
    assert names == set(block_linears())


# -- memory -------------------------------------------------------------------------------------------------------------------------

PEAK = """
import sys, threading, torch
torch.set_num_threads(1)
from tonfa.models.quantize_flux import *

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

quantize_file(sys.argv[1], sys.argv[2], Options(mode="naive"))
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous() - before)

threading.Thread(target=watch).start()
quantize_file(sys.argv[1], sys.argv[2], Options("nvfp4", mode="naive"))
done.set()
print(peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path):
    def peak(singles: int) -> int:
        path = write_dense(tmp_path, dense_state(single=singles), name=f"in{singles}")
        out = tmp_path / "out.safetensors"
        settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back what is freed; its heap would keep holes
        done = subprocess.run([sys.executable, "-c", PEAK, path, out], capture_output=True, text=True, check=True, env=settings)
        return int(done.stdout)

    few, many = peak(2), peak(26)
    assert many < few + 24 * 500_000 / 3, (few, many)  # a single block takes 500 KB in the file
