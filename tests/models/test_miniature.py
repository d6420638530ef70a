"""The miniature: trainable twin against models/flux.py, captions and sampling at run time, training, and (once trained) its pictures."""

import json
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tonfa.models.comfyui import PACK
from tonfa.models.dense_flux import dense_flux, open_dense
from tonfa.models.flux import Flux
from tonfa.models.formats.checkpoint import open_checkpoint
from tonfa.models.formats.tensorfile import CheckpointError
from tonfa.models.formats.writer import dims_of, write_flux
from tonfa.models.miniature import FOLDER, load_captions, load_miniature
from tonfa.models.taesd import Autoencoder, load_autoencoder
from torch import nn

sys.path[:0] = [str(PACK / "miniature"), str(PACK / "benchmarks")]
import classifier as classifying  # noqa: E402
import network  # noqa: E402
import quality  # noqa: E402
import scenes  # noqa: E402
import stage as stages  # noqa: E402
import train as training  # noqa: E402

sys.path[:2] = []
TRAINED = [FOLDER / f"{name}.safetensors" for name in ("flux", "autoencoder", "captions", "classifier")]
needs_files = pytest.mark.skipif(
    not TRAINED[0].exists(), reason="miniature/flux.safetensors is not there: train it with miniature/train.py"
)
TEXTS = ("a large red striped circle at the left and a small blue 7 at the top right on white", "green star above purple ring on black")


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch):
    """Whole networks would take minutes in Triton's interpreter, which other tests are there for."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A miniature that nobody trained: random weights, blocks and velocity no longer zero."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("miniature")
    flux, captions = network.Network(), network.Captions()
    for module in flux.modules():
        if isinstance(module, network.Modulation):
            nn.init.normal_(module.lin.weight, std=0.03)
            nn.init.normal_(module.lin.bias, std=0.3)
        elif isinstance(module, network.RMSNorm):
            nn.init.uniform_(module.scale, 0.5, 1.5)
    nn.init.normal_(flux.final_layer.linear.weight, std=0.03)
    nn.init.normal_(flux.final_layer.adaLN_modulation[1].weight, std=0.03)
    flux.to(torch.bfloat16)
    training.write_tensors(out / "flux.safetensors", flux.state_dict(), {"config": json.dumps(network.CONFIG)})
    training.write_tensors(out / "captions.safetensors", captions.state_dict(), {"vocabulary": json.dumps(scenes.VOCABULARY)})
    training.write_autoencoder(out / "autoencoder.safetensors", Autoencoder())
    return out


def twin_of(folder: Path) -> network.Network:
    twin = network.Network()
    twin.load_state_dict({k: v.float() for k, v in load_file(folder / "flux.safetensors").items()})
    return twin.eval()


# -- the twin ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_twin_computes_what_models_flux_computes(folder):
    """Same tensors, same velocity: also at the names and in the arithmetic that ComfyUI has, since models/flux.py is held against it."""
    flux, twin = dense_flux(folder / "flux.safetensors", torch.float32), twin_of(folder)
    g = torch.Generator().manual_seed(3)
    x, t = torch.randn(3, 16, 16, 16, generator=g), torch.tensor([0.05, 0.5, 1.0])
    context, y = torch.randn(3, 16, 128, generator=g), torch.randn(3, 64, generator=g)
    ours, theirs = twin(x, t, context, y), flux(x, t, context, y)
    assert ours.shape == x.shape and theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_the_twin_takes_the_state_of_models_flux(folder):
    flux = dense_flux(folder / "flux.safetensors", torch.float32)
    twin = network.Network()
    assert set(twin.state_dict()) == set(flux.state_dict())
    twin.load_state_dict(flux.state_dict())


def test_at_most_14_million_parameters():
    models = (network.Network(), network.Captions(), Autoencoder(), classifying.Classifier())
    assert sum(p.numel() for m in models for p in m.parameters()) < 14_000_000


def test_training_begins_as_the_identity():
    """Gates and velocity of zero, and gradients that reach every parameter once those have moved."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"flux": network.Network(), "captions": network.Captions()})
    words = torch.randint(1, 40, (2, 16))
    latents, generator = torch.randn(2, 16, 16, 16), torch.Generator().manual_seed(1)
    optimiser = torch.optim.SGD(model.parameters(), 1.0)
    first = training.flow_loss(model, latents, words, generator)
    assert first.item() == pytest.approx(2.0, rel=0.1)  # of noise - latent itself, both of variance 1
    for _ in range(6):  # velocity, gates of the picture, blocks, and in turn what text does to it
        optimiser.zero_grad()
        training.flow_loss(model, latents, words, generator).backward()
        optimiser.step()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


# -- captions ---------------------------------------------------------------------------------------------------------------------


def test_captions_at_run_time_are_those_of_training(folder):
    captions = load_captions(folder / "captions.safetensors")
    trained = network.Captions()
    trained.load_state_dict(load_file(folder / "captions.safetensors"))
    drawn = scenes.draw_facts(20, torch.Generator().manual_seed(1))
    words = scenes.caption_words(drawn, torch.Generator().manual_seed(1))
    context, pooled = captions.encode([scenes.caption_text(row) for row in words])
    wanted = trained(words)
    assert torch.equal(context, wanted[0]) and torch.equal(pooled, wanted[1])


def test_people_may_write_more_words(folder):
    captions = load_captions(folder / "captions.safetensors")
    plain = "large red striped circle left and small blue 7 top right on white"
    assert captions.word_ids(TEXTS[0]) == captions.word_ids(plain)
    assert captions.word_ids("A GREY star, in the center on a gray background.") == captions.word_ids("grey star centre on grey")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red dragon and an elf on blue", r"does not know 'dragon', 'elf'\. Its words are: circle, square"),
        ("", "has 0 words that count, expected 1 to 16"),
        ("the a", "has 0 words"),
        ("red " * 17, "has 17 words"),
    ],
)
def test_what_cannot_be_said_is_an_error(folder, text, message):
    with pytest.raises(ValueError, match=message):
        load_captions(folder / "captions.safetensors").encode([text])


# -- files and sampling -----------------------------------------------------------------------------------------------------------


def test_missing_and_foreign_files_are_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"no flux\.safetensors in .*: clone the pack as a whole"):
        load_miniature(tmp_path)
    with pytest.raises(CheckpointError, match="no captions file of the miniature"):
        load_captions(folder / "autoencoder.safetensors")
    with pytest.raises(CheckpointError, match="no TAESD autoencoder of 16 channels"):
        load_autoencoder(folder / "captions.safetensors")


def test_the_dense_file_is_read_as_the_network_that_was_trained(folder):
    with closing(open_dense(folder / "flux.safetensors")) as source:
        differing = {k: v for k, v in network.CONFIG.items() if source.config.get(k) != v}
        assert differing == {} and source.model_class == "FluxSchnell"  # the class whose schedule is not shifted


@torch.no_grad()
def test_samples_as_training_does(folder):
    miniature, flux, twin = load_miniature(folder), dense_flux(folder / "flux.safetensors", torch.float32), twin_of(folder)
    context, pooled = miniature.captions.encode(TEXTS)
    noise = torch.stack([torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5)])
    x = noise
    for sigma, following in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
        x = x + (following - sigma) * twin(x, torch.full((2,), sigma), context, pooled)
    latents = miniature.latents(flux, TEXTS, (4, 5), steps=3)
    assert (latents - x).abs().max() < 1e-4 and (latents - noise).abs().max() > 0.1
    pictures = miniature.sample(flux, TEXTS, seed=4, steps=3)
    assert pictures.shape == (2, 3, 128, 128) and torch.equal(pictures, miniature.pictures(latents))


def test_a_picture_depends_on_its_own_seed_alone(folder):
    miniature, flux = load_miniature(folder), dense_flux(folder / "flux.safetensors", torch.float32)
    both = miniature.latents(flux, TEXTS, (4, 5), steps=2)
    alone = miniature.latents(flux, TEXTS[1:], (5,), steps=2)
    assert (both[1] - alone[0]).abs().max() < 1e-5
    assert (both[1] - miniature.latents(flux, TEXTS[1:], (6,), steps=2)[0]).abs().max() > 0.1


@pytest.fixture(scope="module")
def four_bit(folder, tmp_path_factory) -> Flux:
    path = tmp_path_factory.mktemp("four") / "4bit.safetensors"
    write_flux(path, load_file(folder / "flux.safetensors"), network.CONFIG)
    with closing(open_checkpoint(path)) as checkpoint:
        return Flux(checkpoint, torch.float32).eval()


@pytest.mark.parametrize("compute", ["exact", "fast", "weight_only"])
def test_samples_a_4_bit_checkpoint_of_it(folder, four_bit, compute):
    miniature, dense = load_miniature(folder), dense_flux(folder / "flux.safetensors", torch.float32)
    wanted = miniature.latents(dense, TEXTS[:1], (4,), steps=1, size=64)
    found = miniature.latents(four_bit, TEXTS[:1], (4,), steps=1, compute=compute, size=64)
    error = float((found - wanted).norm() / wanted.norm())
    assert 1e-4 < error < 0.2


def test_the_autoencoder_has_taesd_names(folder):
    """Key names and shapes by TAESD's layout, written down here anew."""

    def block(at: str) -> dict:
        return {f"{at}.conv.{i}.{p}": (64, 64, 3, 3) if p == "weight" else (64,) for i in (0, 2, 4) for p in ("weight", "bias")}

    wanted = {"vae_scale": (), "vae_shift": ()}
    for i in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        wanted |= block(f"taesd_encoder.{i}")
    for i in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        wanted |= block(f"taesd_decoder.{i}")
    wanted |= {f"taesd_encoder.{i}.weight": (64, 64, 3, 3) for i in (2, 6, 10)}
    wanted |= {f"taesd_decoder.{i}.weight": (64, 64, 3, 3) for i in (7, 12, 17)}
    for at, n, k in (("encoder.0", 64, 3), ("encoder.14", 16, 64), ("decoder.1", 64, 16), ("decoder.19", 3, 64)):
        wanted |= {f"taesd_{at}.weight": (n, k, 3, 3), f"taesd_{at}.bias": (n,)}
    tensors = load_file(folder / "autoencoder.safetensors")
    assert {k: tuple(v.shape) for k, v in tensors.items()} == wanted
    assert (float(tensors["vae_scale"]), float(tensors["vae_shift"])) == (pytest.approx(0.3611), pytest.approx(0.1159))


# -- training ---------------------------------------------------------------------------------------------------------------------


def test_normalising_leaves_the_pictures_and_makes_unit_latents(tmp_path):
    torch.manual_seed(0)
    run = stages.Run(torch.device("cpu"), tmp_path, tmp_path, time.perf_counter() + 60)
    stage = stages.Stage(run, "autoencoder", Autoencoder(), 1e-3, 1.0)
    training.normalise(stage, training.TINY)
    model = stage.average
    pictures = torch.cat([scenes.scenes(2, run.generator(training.CHECK_SEED + 1)).pictures])
    with torch.no_grad():
        latents = model.encode(pictures)
    assert 0.2 < latents.std() < 3 and latents.mean().abs() < 1.5
    assert not any(p.requires_grad for p in stage.model.taesd_encoder.parameters())
    assert all(p.requires_grad for p in stage.model.taesd_decoder.parameters())


def test_training_stops_in_time_and_goes_on(tmp_path, monkeypatch):
    """The command itself in its tiny form: a call that runs out of time, refusal to begin anew, and one that goes on to the end."""
    out = tmp_path / "out"
    common = ["train.py", "--cpu", "--out", str(out), "--seconds", "2", "1", "1"]
    monkeypatch.setattr(sys, "argv", [*common, "--minutes", "0.03"])
    assert training.main() == 3
    assert (out / "state" / "autoencoder.pt").exists() and not (out / "flux.safetensors").exists()
    assert training.main() == 2
    steps = torch.load(out / "state" / "autoencoder.pt", weights_only=True)["step"]
    monkeypatch.setattr(sys, "argv", [*common, "--minutes", "5", "--resume"])
    assert training.main() == 0
    assert torch.load(out / "state" / "autoencoder.pt", weights_only=True)["step"] > steps
    log = json.loads((out / "log.json").read_text())
    assert {"scenes_shape", "sampled_position"} <= set(log[-1])
    miniature = load_miniature(out)
    pictures = miniature.sample(dense_flux(miniature.flux, torch.float32), TEXTS[:1], steps=1)
    assert pictures.isfinite().all() and (out / "samples.png").stat().st_size > 1000
    classifying.load_classifier(out / "classifier.safetensors")


def test_the_classifier_learns(tmp_path):
    """A few steps on one batch: the loss counts presence, shape and colour, and the answer becomes the truth."""
    torch.manual_seed(0)
    made = scenes.scenes(12, torch.Generator().manual_seed(2))
    model = classifying.Classifier()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        optimiser.zero_grad()
        classifying.loss(model(made.pictures), made.facts).backward()
        optimiser.step()
    right = classifying.right(model.train(), made.pictures, made.facts)
    assert {name: bool(ok.all()) for name, ok in right.items()} == {"shape": True, "colour": True, "position": True}
    wrong = scenes.scenes(12, torch.Generator().manual_seed(3)).facts
    assert float(classifying.right(model, made.pictures, wrong)["shape"].float().mean()) < 0.5


# -- the trained files ------------------------------------------------------------------------------------------------------------


@needs_files
def test_the_files_are_whole_and_small():
    assert [path.name for path in TRAINED if not path.exists()] == []
    assert sum(path.stat().st_size for path in TRAINED) < 40e6
    counted = 0
    for path in TRAINED[:3]:
        with safe_open(path, "pt") as file:
            counted += sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert counted < 14_000_000
    with closing(open_dense(TRAINED[0])) as source:
        assert dims_of(source.config) == dims_of(network.CONFIG)


@needs_files
def test_the_classifier_reads_real_scenes():
    made = scenes.scenes(400, torch.Generator().manual_seed(123))
    right = classifying.right(classifying.load_classifier(TRAINED[3]), made.pictures, made.facts)
    assert min(float(ok.float().mean()) for ok in right.values()) >= 0.99


@needs_files
@torch.no_grad()
def test_the_autoencoder_gives_scenes_back_from_unit_latents():
    pictures = scenes.scenes(16, torch.Generator().manual_seed(124)).pictures
    model = load_autoencoder(TRAINED[1])
    latents = model.encode(pictures)
    assert 0.7 < latents.std() < 1.4
    psnr = -10 * torch.log10((model.decode(latents).clamp(0, 1) - pictures).square().mean((1, 2, 3)))
    assert psnr.mean() > 28


@needs_files
def test_pictures_show_their_captions():
    facts = scenes.draw_facts(16, torch.Generator().manual_seed(125))
    words = scenes.caption_words(facts, torch.Generator().manual_seed(126))
    miniature = load_miniature()
    flux = dense_flux(miniature.flux, torch.float32)
    pictures = miniature.sample(flux, [scenes.caption_text(row) for row in words], steps=12)
    right = classifying.right(classifying.load_classifier(TRAINED[3]), pictures, facts)
    assert min(int(ok.sum()) for ok in right.values()) >= 14


# -- the benchmark's measures -----------------------------------------------------------------------------------------------------


def test_psnr_and_ssim():
    picture = scenes.scenes(2, torch.Generator().manual_seed(8)).pictures
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(9))
    assert quality.psnr(picture + 0.1, picture).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    assert quality.psnr(picture, picture).tolist() == [100, 100]
    assert quality.ssim(picture, picture).tolist() == pytest.approx([1.0, 1.0])
    flat = torch.full((1, 3, 32, 32), 0.5)  # without structure only the means count: (2ab + c) / (a^2 + b^2 + c)
    assert quality.ssim(flat, flat - 0.2).item() == pytest.approx((2 * 0.5 * 0.3 + 1e-4) / (0.5**2 + 0.3**2 + 1e-4), rel=1e-3)
    assert (quality.ssim(picture + 0.02 * noise, picture) > quality.ssim(picture + 0.05 * noise, picture)).all()


def test_the_permutation_test():
    a = torch.arange(1, 11).float()
    assert quality.p_greater(a, torch.zeros(10)) == pytest.approx(2**-10, rel=0.4)  # one of 1024 signs reaches the sum
    assert quality.p_greater(torch.zeros(10), a) > 0.99
    assert 0.4 < quality.p_greater(a - 5.5, torch.zeros(10)) < 0.6
