"""Calibration: what is gathered is what went in, the sample is uniform, streamed blocks give what resident ones do."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import save_file
from tonfa.models import calibrate as cal
from tonfa.models.calibrate import Collector, Conditioning, StatisticsFile, StreamedBlock, calibrate, save_statistics
from tonfa.models.dense_flux import assemble, load_block, open_dense
from tonfa.models.formats.tensorfile import CheckpointError
from torch import nn

from .dense_files import CONFIG, block_linears, dense_state, write_dense

WATCHED = {name for name in block_linears() if not name.endswith((".lin", "_mod.lin"))}


class Toy(nn.Module):
    """Linears where a host has them, one that is none of them, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.img_in = nn.Linear(8, 8)
        self.single_blocks = nn.ModuleList([nn.Module(), nn.Module()])
        for block in self.single_blocks:
            block.linear1 = nn.Linear(8, 4)
        self.double_blocks = nn.ModuleList([nn.Module()])
        self.double_blocks[0].img_attn = nn.Module()
        self.double_blocks[0].img_attn.qkv = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.single_blocks[0].linear1(self.img_in(x)) + self.double_blocks[0].img_attn.qkv(x)


@pytest.fixture(scope="module", autouse=True)
def torch_path():
    """No kernel is tested here, and Triton's interpreter takes minutes for a network."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.fixture
def source(tmp_path):
    opened = open_dense(write_dense(tmp_path, dense_state(torch.float32)))
    yield opened
    opened.close()


def conditioning(prompts: int = 2) -> Conditioning:
    return cal.drawn_conditioning(CONFIG, prompts)


# -- the collector ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inference", [False, True])
def test_what_is_gathered_is_what_went_in(dtype, inference):
    toy = Toy().to(dtype)
    xs = [torch.randn(2, 5, 8).to(dtype), 3 * torch.randn(7, 8).to(dtype), torch.randn(0, 8).to(dtype)]
    with torch.inference_mode(inference), Collector(toy, rows=100) as seen:
        for x in xs:
            toy(x)
    toy(torch.full((1, 8), 1e3).to(dtype))  # outside the context: not seen
    assert seen.names == ["single_blocks.0.linear1", "double_blocks.0.img_attn.qkv"]
    rows = torch.cat([x.reshape(-1, 8) for x in xs])
    s = seen.statistics("double_blocks.0.img_attn.qkv")
    assert s.count == 17 and s.sample.shape == (17, 8) and s.sample.dtype == dtype and not s.sample.is_inference()
    assert torch.equal(s.amax, rows.float().abs().amax(0)) and s.amax.dtype == torch.float32
    torch.testing.assert_close(s.square, rows.float().square().mean(0), rtol=1e-5, atol=0)
    assert sorted(s.sample.float().tolist()) == sorted(rows.float().tolist())
    with pytest.raises(KeyError):
        seen.statistics("single_blocks.1.linear1")


def test_the_sample_is_uniform_over_calls_of_different_lengths():
    """Rows carry their number. 40 of 400 rows in calls of 1 to 200: over 300 seeds every tenth part of them comes 1200 times."""
    rows = torch.arange(400, dtype=torch.float32)[:, None].expand(-1, 8).contiguous()
    counts = torch.zeros(400)
    toy = Toy()
    for seed in range(300):
        with Collector(toy, rows=40, seed=seed) as seen:
            for part in rows.split([200, 1, 99, 3, 97]):
                toy(part)
        kept = seen.statistics("double_blocks.0.img_attn.qkv").sample[:, 0]
        assert len(kept.unique()) == 40
        counts[kept.long()] += 1
    tenths = counts.view(10, 40).sum(1)
    assert (tenths - 1200).abs().max() < 5 * (1200 * 0.9) ** 0.5, tenths


def test_the_same_seed_gives_the_same_sample():
    toy, x = Toy(), torch.randn(300, 8)

    def sample(seed: int) -> torch.Tensor:
        with Collector(toy, rows=20, seed=seed) as seen:
            toy(x)
        return seen.statistics("double_blocks.0.img_attn.qkv").sample

    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))


def test_no_rows_and_numbers_that_are_none():
    toy = Toy()
    with Collector(toy, rows=0) as seen:
        toy(torch.randn(4, 8))
    assert seen.statistics("double_blocks.0.img_attn.qkv").sample.shape == (0, 8)
    with Collector(toy) as seen:
        toy(torch.full((1, 8), float("inf")))
    with pytest.raises(ValueError, match="inputs of double_blocks.0.img_attn.qkv are not finite"):
        seen.statistics("double_blocks.0.img_attn.qkv")


# -- a whole network ----------------------------------------------------------------------------------------------------------------


def test_streamed_blocks_see_what_resident_ones_do(source):
    """Prompts through a block one by one, or through the network one by one: the same statistics, and all linears are watched."""
    c = conditioning(3)
    streamed = calibrate(source, c, 2, pixels=64, dtype=torch.float32, rows=4096)
    assert set(streamed.names) == WATCHED
    network = assemble(source, torch.float32, "cpu", lambda name: load_block(source, name, torch.float32, "cpu"))
    with torch.no_grad(), Collector(network, rows=4096) as resident:
        cal._sample(network, c, 2, "cpu", 64, True, 0)
    for name in WATCHED:
        a, b = streamed.statistics(name), resident.statistics(name)
        tokens = (16 if ".img_" in name else cal.TOKENS if ".txt_" in name else cal.TOKENS + 16) * 3 * 2
        assert a.count == b.count == tokens and len(a.sample) == tokens
        torch.testing.assert_close(a.amax, b.amax, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.square, b.square, rtol=1e-4, atol=1e-6)
    gelu = streamed.statistics("single_blocks.0.linear2").sample[:, 256:]
    assert gelu.min() > -0.1701 and gelu.max() > 0.5  # the MLP's columns come out of the GELU, in the order of the host's linear2


def test_one_block_at_a_time(source, monkeypatch):
    alive, most = weakref.WeakSet(), 0
    real = cal.load_block

    def load(*arguments):
        nonlocal most
        block = real(*arguments)
        alive.add(block)
        most = max(most, len(alive))
        return block

    monkeypatch.setattr(cal, "load_block", load)
    steps = []
    gc.disable()  # nothing may wait for it: that would be gigabytes on the GPU
    try:
        calibrate(source, conditioning(), 2, pixels=32, dtype=torch.float32, rows=8, progress=lambda *at: steps.append(at))
    finally:
        gc.enable()
    assert most == 1 and steps == [(i, 6) for i in range(7)]


def test_progress_can_stop_it(source):
    def progress(done: int, total: int) -> None:
        if done == 4:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError):
        calibrate(source, conditioning(), 2, pixels=32, dtype=torch.float32, progress=progress)


def test_a_streamed_block_lets_go_of_hooks():
    inner = nn.Linear(4, 4)
    block = StreamedBlock(lambda: inner)
    network = nn.Module()
    network.single_blocks = nn.ModuleList([block])
    with Collector(network):
        assert block.loaded is not None
    assert block.loaded is None


@pytest.mark.parametrize(("steps", "pixels"), [(0, 64), (1, 0), (1, 72)])
def test_steps_and_pixels_that_cannot_be(source, steps, pixels):
    with pytest.raises(ValueError, match="at least one step, and a multiple of 16 pixels"):
        calibrate(source, conditioning(), steps, pixels=pixels)


def test_schedule():
    assert cal.sigmas(4, 4096, False) == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = cal.sigmas(4, 4096, True)
    assert shifted[0] == 1.0 and shifted[-1] == 0.0 and shifted[2] == pytest.approx(0.7595, abs=1e-4)  # e^1.15 / (e^1.15 + 1)


# -- files --------------------------------------------------------------------------------------------------------------------------


def test_statistics_come_back_from_their_file(source, tmp_path):
    seen = calibrate(source, conditioning(), 1, pixels=32, dtype=torch.bfloat16, rows=16)
    save_statistics(tmp_path / "seen.safetensors", seen)
    file = StatisticsFile(tmp_path / "seen.safetensors")
    for name in WATCHED:
        a, b = seen.statistics(name), file(name)
        assert a.count == b.count and a.sample.dtype == b.sample.dtype == torch.bfloat16
        assert all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("amax", "square", "sample"))
    with pytest.raises(KeyError):
        file("single_blocks.9.linear1")
    file.close()


def write(tmp_path, **tensors: torch.Tensor):
    save_file(tensors, tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def test_reading_a_calibration_file(tmp_path):
    context, pooled = torch.randn(3, 9, 128).half(), torch.randn(3, 64)
    c = cal.read_conditioning(write(tmp_path, context=context, pooled=pooled), CONFIG)
    assert (
        torch.equal(c.context, context.float()) and torch.equal(c.pooled, pooled) and c.guidance.tolist() == [3.5] * 3 and c.beside is None
    )
    c = cal.read_conditioning(write(tmp_path, context=context, pooled=pooled, guidance=torch.tensor([1.0, 2.0, 4.0])), CONFIG)
    assert c.guidance.tolist() == [1.0, 2.0, 4.0]


P = torch.zeros(2, 64)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"pooled": P}, "has no tensor context"),
        ({"context": torch.zeros(2, 3, 128)}, "has no tensor pooled"),
        ({"context": torch.zeros(2, 3, 127), "pooled": P}, r"context is \[2, 3, 127\], expected \[prompts, tokens, 128\]"),
        ({"context": torch.zeros(3, 3, 128), "pooled": P}, r"pooled is \[2, 64\]"),
        ({"context": torch.zeros(2, 3, 128), "pooled": P, "guidance": torch.zeros(1)}, r"guidance \[1\]"),
        ({"context": torch.full((2, 3, 128), float("nan")), "pooled": P}, "NaN"),
    ],
)
def test_calibration_files_that_do_not_fit(tmp_path, tensors, words):
    with pytest.raises(CheckpointError, match=words):
        cal.read_conditioning(write(tmp_path, **tensors), CONFIG)


def test_a_model_that_takes_an_image_beside(tmp_path):
    fill = CONFIG | {"in_channels": 40}
    with pytest.raises(CheckpointError, match="cannot be drawn at random"):
        cal.drawn_conditioning(fill)
    fits = {"context": torch.randn(2, 3, 128), "pooled": torch.randn(2, 64)}
    with pytest.raises(CheckpointError, match=r"needs a tensor beside \[2, 24, height / 8, width / 8\]"):
        cal.read_conditioning(write(tmp_path, **fits), fill)
    state = dense_state()
    state["img_in.weight"] = torch.randn(256, 160).bfloat16() * 0.1
    opened = open_dense(write_dense(tmp_path, state))
    assert opened.config["in_channels"] == 40
    c = cal.read_conditioning(write(tmp_path, **fits, beside=torch.randn(2, 24, 4, 8)), opened.config)
    seen = calibrate(opened, c, 1, dtype=torch.float32)
    assert seen.statistics("double_blocks.0.img_attn.qkv").count == 2 * 8
