"""LoRA files of every format through the host's own loader node and through ours, and what our nodes promise."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
from pathlib import Path

import comfy.lora_convert
import pytest
import tonfa
import torch
from safetensors.torch import load_file, save_file
from tonfa.models.formats.checkpoint import open_checkpoint
from tonfa.models.formats.lora import LoraError
from tonfa.models.linear import PackedLinear
from tonfa.nodes.host import lora_files
from torch import Tensor

import nodes

from .lab import CPU, DATA, conditioning, dense_state, loaded, made, rel, sample, twin

_spec = importlib.util.spec_from_file_location("lora_files_for_tests", Path(__file__).resolve().parent.parent / "lora_files.py")
generated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generated)

NO_LOW_RANK_FORM = ("lokr", "oft", "boft", "dora", "diff", "set")
VARIANTS = {
    "rank 1": ("diffusers", {"rank": 1}),
    "rank 512": ("kohya", {"rank": 512}),
    "alpha": ("kohya", {"rank": 8, "alpha": 2.0}),
    "float8": ("diffusers", {"dtype": torch.float8_e4m3fn}),
    "float16": ("xlabs", {"dtype": torch.float16}),
    "float32": ("comfyui", {"dtype": torch.float32}),
    "q alone": ("diffusers", {"skip": ("to_k", "to_v", "add_k", "add_v")}),
    "no mlp": ("kohya split", {"skip": ("mlp", "ff.", "to_q")}),
}


@functools.cache
def file_and_effect(name: str) -> generated.Made:
    """The tensors of a generated file for the small model, and what they are meant to change."""
    kind, options = VARIANTS.get(name, (name, {}))
    return generated.lora_file(kind, weights=dense_state(made()), **options)


@pytest.fixture(scope="module", autouse=True)
def folder(base) -> Path:
    """The host's folder with a file of every format; the host's nodes have been taught, as by the first model that is loaded."""
    lora_files.teach_stock_nodes()
    folder = Path(base, "models", "loras", "formats")
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def pair():
    """Our model, its dense twin, and what every packed layer gives without a LoRA."""
    ours, theirs = loaded(made()), twin(made())
    return ours, theirs, outputs(ours)


def put(folder: Path, name: str) -> str:
    """The file of a format in the host's folder; its name there."""
    path = folder / f"{name.replace(' ', '_')}.safetensors"
    if not path.exists():
        save_file({k: t.contiguous() for k, t in file_and_effect(name).tensors.items()}, path)
    return os.path.join(folder.name, path.name)


def node(key: str = "NunchakuFluxLoraLoader"):
    return tonfa.NODE_CLASS_MAPPINGS[key]()


def by(loader: str, model, name: str, strength: float = 1.0):
    """The model with a LoRA, by the host's node or by ours."""
    if loader == "stock":
        return nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, strength)[0]
    return node().load_lora(model, name, strength)[0]


def outputs(model) -> dict[str, tuple[Tensor, Tensor]]:
    """Native name of every packed layer -> (its output for a fixed input without its bias, its bias), as the model is loaded by itself."""
    found, g = {}, torch.Generator().manual_seed(5)
    with torch.inference_mode():
        model.patch_model(CPU)
        for name, leaf in model.model.diffusion_model.named_modules():
            if isinstance(leaf, PackedLinear):
                x = torch.randn(1, 7, leaf.in_features, generator=g)
                bias = leaf(torch.zeros_like(x), "weight_only")
                found[name] = x, leaf(x, "weight_only") - bias, bias[0, 0]
        model.unpatch_model(CPU)
    return found


def lines(caplog, level: int = logging.INFO) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("tonfa") and r.levelno >= level]


def patches_of(model) -> dict:
    return {key: list(listed) for key, listed in model.patches.items()}


# -- every format ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", ["stock", "ours"])
@pytest.mark.parametrize("name", [*generated.FILES, *VARIANTS])
def test_each_layer_gets_what_the_file_is_meant_to_add(pair, folder, name, loader):
    """Same input, fp32 output, against the delta that the file's maker wrote down."""
    ours, _, plain = pair
    effect, limit = file_and_effect(name), 1e-2 if name.startswith(NO_LOW_RANK_FORM) else 1e-3
    found = outputs(by(loader, ours, put(folder, name)))
    for layer, (x, before, bias) in plain.items():
        _, after, bias_after = found[layer]
        delta = effect.deltas.get(layer)
        if delta is None or not delta.any():  # only what comes of taking another bias away again
            assert torch.equal(after, before) if layer not in effect.biases else rel(after, before) < 1e-5, layer
        else:
            assert rel(after - before, x @ delta.t()) < limit, layer
        if layer in effect.biases:
            assert rel(bias_after - bias, effect.biases[layer]) < 5e-3, layer  # biases keep the file's 16 bit
        else:
            assert torch.equal(bias_after, bias), layer


@pytest.mark.parametrize("loader", ["stock", "ours"])
@pytest.mark.parametrize("name", [*generated.FILES, *VARIANTS])
def test_the_model_equals_the_dense_one_with_the_hosts_merge(pair, folder, name, loader):
    ours, theirs, _ = pair
    file = put(folder, name)
    got, wanted = sample(by(loader, ours, file, 0.7), steps=2), sample(by(loader, theirs, file, 0.7), steps=2)
    assert rel(got, wanted) < 1e-3
    assert rel(wanted, sample(theirs, steps=2)) > 1e-2


def test_a_hidden_size_of_two_heads_of_128(folder):
    """The other shape of mini model, whose layers are cut into segments differently."""
    path = DATA / "mini_flux_int4_hd128.safetensors"
    flux = generated.Flux(hidden=256, depth=1, depth_single=1, head_dim=128)
    save_file(generated.lora_file("diffusers", flux).tensors, folder / "wide.safetensors")
    wanted = sample(by("ours", twin(path), "formats/wide.safetensors", 0.7), steps=2)
    assert rel(sample(by("ours", loaded(path), "formats/wide.safetensors", 0.7), steps=2), wanted) < 1e-3


# -- files converted for Nunchaku -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(folder) -> tuple[str, str]:
    """A LoRA in diffusers names, and what the original program made of it for the mini INT4 model."""
    tensors, names = load_file(DATA / "lora_mini_flux_int4.safetensors"), []
    for part, name in (("input.", "original"), ("output.", "converted")):
        save_file({k.removeprefix(part): t for k, t in tensors.items() if k.startswith(part)}, folder / f"{name}.safetensors")
        names.append(os.path.join(folder.name, f"{name}.safetensors"))
    return tuple(names)


def test_a_converted_file_is_the_one_that_it_was_made_from(golden, caplog):
    """Its columns without the model's own; the original program has rounded alpha into one factor, which is what is left between them."""
    path = DATA / "mini_flux_int4.safetensors"
    ours, (original, converted) = loaded(path), golden
    with caplog.at_level(logging.INFO, logger="tonfa"):
        got = sample(by("ours", ours, converted))
    assert [line for line in lines(caplog) if "Nunchaku" in line and "converted" in line]
    wanted = sample(by("stock", twin(path), original))
    assert rel(got, wanted) < 5e-3 and rel(got, sample(ours)) > 2e-2
    plain, found, expected = outputs(ours), outputs(by("ours", ours, converted)), outputs(by("ours", ours, original))
    for layer, (_, before, _) in plain.items():
        change = expected[layer][1] - before
        assert rel(found[layer][1] - before, change) < 5e-3 if change.any() else torch.equal(found[layer][1], before), layer


def test_converted_columns_of_every_layer(pair, folder):
    """A file made for our small model's own columns, in every W4A4 and modulation layer, of two blocks of each kind."""
    ours, _, plain = pair
    checkpoint = open_checkpoint(made())
    layers = {v1: checkpoint.load_layer(v1) for v1 in generated.base_pairs(generated.Flux())}
    base = {v1: (layer.down.t(), layer.up) for v1, layer in layers.items()}
    effect = generated.converted_file(base)
    save_file({k: t.contiguous() for k, t in effect.tensors.items()}, folder / "columns.safetensors")
    found = outputs(by("ours", ours, "formats/columns.safetensors"))
    for layer, (x, before, _) in plain.items():
        assert rel(found[layer][1] - before, x @ effect.deltas[layer].t()) < 1e-3, layer


def test_a_converted_file_on_another_model_is_refused(golden, pair):
    """Another checkpoint of the same shape, one of another precision, a dense one, and ComfyUI's own node."""
    _, converted = golden
    others = [loaded(DATA / "mini_flux_nvfp4.safetensors"), twin(DATA / "mini_flux_int4.safetensors"), *pair[:2]]
    for model in others:
        before = patches_of(model)
        with pytest.raises(LoraError, match=r"converted.*was converted"):
            by("ours", model, converted)
        assert patches_of(model) == before
        with pytest.raises(LoraError, match="NunchakuFluxLoraLoader"):
            by("stock", model, converted)
        assert patches_of(model) == before


# -- LoRAs that widen img_in ----------------------------------------------------------------------------------------------------------


def test_control_loras_see_their_picture_and_go_with_others(pair, folder):
    """The concatenated latent counts; an ordinary LoRA for img_in goes before or behind; without the LoRA all is as before."""
    ours, theirs, _ = pair
    control, second, other = (put(folder, name) for name in ("control", "control diffusers", "comfyui"))
    g = torch.Generator().manual_seed(2)
    pictures = [conditioning(concat_latent_image=torch.randn(1, 16, 8, 12, generator=g)) for _ in range(2)]
    plain = sample(ours, steps=2)
    for order in ((control,), (control, other), (other, control), (control, second)):
        models = [functools.reduce(lambda m, file: by("ours", m, file, 0.6), order, model) for model in (ours, theirs)]
        found = [sample(models[0], picture, steps=2) for picture in pictures]
        assert rel(found[0], sample(models[1], pictures[0], steps=2)) < 1e-3
        assert rel(found[0], found[1]) > 1e-2
        assert torch.equal(sample(ours, steps=2), plain)


# -- our nodes ------------------------------------------------------------------------------------------------------------------------


def stack(model, *rows: tuple[str, object], start: int = 1):
    named = {}
    for i, (name, strength) in enumerate(rows, start):
        named |= {f"lora_name_{i}": name, f"lora_strength_{i}": strength}
    return node("NunchakuFluxLoraStack").load_lora_stack(model, **named)[0]


@pytest.mark.parametrize("key", ["NunchakuFluxLoraLoader", "SVDQuantFluxLoraLoader"])
def test_inputs_of_the_loader(key, folder):
    file = put(folder, "kohya")
    cls = tonfa.NODE_CLASS_MAPPINGS[key]
    inputs = cls.INPUT_TYPES()
    assert list(inputs) == ["required"] and list(inputs["required"]) == ["model", "lora_name", "lora_strength"]
    assert inputs["required"]["model"][0] == "MODEL" and inputs["required"]["lora_name"][0] == lora_files.names_in(lora_files.LORAS)
    assert file in lora_files.names_in(lora_files.LORAS)
    check_strength(inputs["required"]["lora_strength"])
    assert (cls.FUNCTION, cls.RETURN_TYPES, cls.CATEGORY) == ("load_lora", ("MODEL",), "Nunchaku")


def check_strength(entry: tuple) -> None:
    kind, options = entry
    assert kind == "FLOAT" and options["tooltip"]
    assert (options["default"], options["min"], options["max"], options["step"]) == (1.0, -100.0, 100.0, 0.01)


def test_inputs_of_the_stack():
    inputs = tonfa.NODE_CLASS_MAPPINGS["NunchakuFluxLoraStack"].INPUT_TYPES()
    assert list(inputs["required"]) == ["model"]
    assert list(inputs["optional"]) == [f"lora_{what}_{i}" for i in range(1, 16) for what in ("name", "strength")]
    for i in range(1, 16):
        names, options = inputs["optional"][f"lora_name_{i}"]
        assert names == ["None", *lora_files.names_in(lora_files.LORAS)] and options["tooltip"]
        check_strength(inputs["optional"][f"lora_strength_{i}"])


@pytest.mark.parametrize("strength", [0, 0.0, 9e-6, -9e-6, "0"])
def test_next_to_no_strength_gives_back_the_very_model(pair, folder, strength):
    """Also where the file is not there."""
    for model in pair[:2]:
        assert node().load_lora(model, put(folder, "kohya"), strength)[0] is model
        assert node().load_lora(model, "gone.safetensors", strength)[0] is model
        assert stack(model, (put(folder, "kohya"), strength)) is model


def test_a_stack_without_a_row_in_use_gives_back_the_very_model(pair):
    for rows in ([], [("None", 1.0)] * 15, [(None, 1.0), ("", 1.0), ("None", 0.3)]):
        assert stack(pair[0], *rows) is pair[0]


def test_a_stack_is_a_chain_on_top_of_what_is_there(pair, folder):
    """The original's stack drops the LoRAs that the model had."""
    ours, theirs, _ = pair
    one, two, three = (put(folder, name) for name in ("kohya", "xlabs", "diffusers"))
    chain = by("ours", by("ours", by("stock", ours, one, 0.5), two, -0.4), three, 0.3)
    stacked = node("NunchakuFluxLoraStack").load_lora_stack(
        by("stock", ours, one, 0.5), lora_name_2=two, lora_strength_2=-0.4, lora_name_5="None", lora_name_15=three, lora_strength_15="0.3",
    )[0]  # fmt: skip
    strengths = [[[p[0] for p in listed] for listed in model.patches.values()] for model in (chain, stacked)]
    assert strengths[0] == strengths[1]
    wanted = sample(by("ours", by("ours", by("stock", theirs, one, 0.5), two, -0.4), three, 0.3), steps=2)
    assert rel(sample(stacked, steps=2), wanted) < 1e-3
    assert torch.equal(sample(stacked, steps=2), sample(chain, steps=2))


def test_text_is_a_strength_and_nonsense_is_not(pair, folder):
    file = put(folder, "kohya")
    assert {p[0] for listed in node().load_lora(pair[0], file, "0.7")[0].patches.values() for p in listed} == {0.7}
    for nonsense in ("much", None, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"The strength of lora_name is .*must be a number"):
            node().load_lora(pair[0], file, nonsense)


def test_another_strength_reads_nothing_and_adds_the_same_tensors(pair, folder, monkeypatch):
    ours, theirs, _ = pair
    read, real = [], lora_files.read
    monkeypatch.setattr(lora_files, "read", lambda path: (read.append(path), real(path))[1])
    loader, file = node(), put(folder, "peft bfl")
    first, second = (loader.load_lora(ours, file, s)[0] for s in (0.7, -0.2))
    assert len(read) == 1
    for key, listed in first.patches.items():
        assert [p[1] is q[1] for p, q in zip(listed, second.patches[key], strict=True)] == [True]
    on_top = loader.load_lora(by("stock", ours, put(folder, "kohya")), file, 0.7)[0]
    assert all(listed[-1][1] is first.patches[key][0][1] for key, listed in on_top.patches.items())
    loader.load_lora(theirs, file, 0.7)
    assert len(read) == 1  # another model: made anew from the same tensors
    os.utime(folder / Path(file).name, ns=(1, 1))
    loader.load_lora(ours, file, 0.7)
    assert len(read) == 2
    loader.load_lora(ours, put(folder, "kohya"), 0.7)
    loader.load_lora(ours, file, 0.7)
    assert len(read) == 4  # one file is kept, as by the host's node


def test_a_stack_keeps_all_its_files(pair, folder, monkeypatch):
    read, real = [], lora_files.read
    monkeypatch.setattr(lora_files, "read", lambda path: (read.append(path), real(path))[1])
    rows, keeper = (
        {f"lora_name_{i}": put(folder, name) for i, name in enumerate(("kohya", "xlabs", "kohya"), 1)},
        node("NunchakuFluxLoraStack"),
    )
    for strength in (0.5, 0.6):
        keeper.load_lora_stack(pair[0], **rows, lora_strength_1=strength)
    assert len(read) == 2


def test_saved_names_are_resolved_with_one_line(pair, folder, caplog):
    put(folder, "kohya")
    for asked in ("kohya.safetensors", "other\\KOHYA.safetensors", "kohya"):
        caplog.clear()
        node().load_lora(pair[0], asked, 0.5)
        (line,) = lines(caplog, logging.WARNING)
        assert f"LoRA '{asked}' is not here; using 'formats" in line
    with pytest.raises(FileNotFoundError, match=r"LoRA 'absent.safetensors' is not in ComfyUI's loras folders.*lora_name_4"):
        stack(pair[0], ("absent.safetensors", 1.0), start=4)


# -- what is said ---------------------------------------------------------------------------------------------------------------------


def test_one_line_a_file(pair, folder, caplog):
    """Text encoders' keys are no fault; keys that nothing takes are named, a handful at most."""
    tensors = dict(file_and_effect("kohya").tensors)
    tensors |= {f"lora_te1_text_model_encoder_layers_{i}_mlp_fc1.lora_down.weight": torch.ones(2, 2) for i in range(5)}
    save_file(tensors, folder / "text.safetensors")
    save_file(tensors | {f"some.thing.{i}": torch.ones(2) for i in range(20)}, folder / "odd.safetensors")
    with caplog.at_level(logging.INFO, logger="tonfa"):
        for loader in (node(), node()):
            loader.load_lora(pair[0], "formats/text.safetensors", 0.5)
            loader.load_lora(pair[0], "formats/text.safetensors", 0.6)
        assert len(lines(caplog)) == 2 and lines(caplog, logging.WARNING) == []
        assert (
            "LoRA formats/text.safetensors (kohya): " in lines(caplog)[0]
            and "; 5 tensors for text encoders are left out" in lines(caplog)[0]
        )
        caplog.clear()
        node().load_lora(pair[0], "formats/odd.safetensors", 0.5)
    (line,) = lines(caplog)
    assert "not applied: some.thing.0, " in line and line.count("some.thing") == lora_files.MOST_NAMED and "and 14 more" in line


SDXL = {
    f"lora_unet_down_blocks_1_attentions_{i}_transformer_blocks_1_attn1_to_q.lora_{x}.weight": torch.ones(4, 4)
    for i in range(3)
    for x in ("down", "up")
}
QWEN = {
    f"transformer.transformer_blocks.{i}.{module}.lora_{x}.weight": torch.ones(4, 4)
    for i in range(3)
    for module in ("attn.to_q", "img_mlp.net.2")
    for x in "AB"
}
WIDER = generated.lora_file("diffusers", generated.Flux(hidden=192)).tensors
CUT = {k: t for k, t in generated.lora_file("kohya").tensors.items() if not k.endswith("img_attn_qkv.lora_down.weight")}
HEADS = generated.lora_file("control", generated.Flux(head_dim=32)).tensors
NAN = {k: t * (float("nan") if "linear1" in k else 1.0) for k, t in generated.lora_file("kohya").tensors.items()}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("sdxl", SDXL, r"SDXL.*lora_unet_down_blocks_1"),
        ("qwen", QWEN, r"Qwen-Image.*img_mlp"),
        ("wider", WIDER, r"hidden size|192"),
        ("cut", CUT, r"img_attn_qkv"),
        ("norms", HEADS, r"made for another model: .*norm.*is \[64\], the LoRA's \[32\]"),
        ("nan", NAN, r"linear1.*NaN"),
        ("model", {"double_blocks.0.img_attn.qkv.weight": torch.ones(4, 4)}, r"not a LoRA.*FLUX"),
        ("page", b"<!doctype html><html></html>", r"web page"),
        ("short", b"\x10\x27\0\0\0\0\0\0{}", r"cut off"),
        ("empty", b"", r"empty"),
    ],
)
def test_a_damaged_or_foreign_file_is_named_and_changes_nothing(pair, folder, name, content, told):
    path = folder / f"{name}.safetensors"
    save_file(content, path) if isinstance(content, dict) else path.write_bytes(content)
    for model in pair[:2]:
        before, state = patches_of(model), model.patches_uuid
        with pytest.raises(ValueError, match=told) as error:
            node().load_lora(model, f"formats/{name}.safetensors", 1.0)
        assert f"{name}.safetensors" in str(error.value)
        with pytest.raises(ValueError, match=told):
            stack(model, (put(folder, "kohya"), 1.0), (f"formats/{name}.safetensors", 1.0))
        assert patches_of(model) == before and model.patches_uuid == state


def test_a_pickle_is_read_safely_or_not_at_all(pair, folder):
    torch.save(dict(file_and_effect("kohya").tensors), folder / "old.pt")
    (folder / "bad.pt").write_bytes(b"nothing")
    assert node().load_lora(pair[0], "formats/old.pt", 1.0)[0].patches.keys() == by("ours", pair[0], put(folder, "kohya")).patches.keys()
    with pytest.raises(ValueError, match=r"bad.pt cannot be read .*Download it again"):
        node().load_lora(pair[0], "formats/bad.pt", 1.0)


# -- ComfyUI's own nodes --------------------------------------------------------------------------------------------------------------


def test_the_host_is_taught_once(monkeypatch):
    ours = comfy.lora_convert.convert_lora
    lora_files.teach_stock_nodes()
    assert comfy.lora_convert.convert_lora is ours
    monkeypatch.setattr(comfy.lora_convert, "convert_lora", comfy.lora_convert.tonfa_wraps)
    monkeypatch.delattr(comfy.lora_convert, "tonfa_wraps")
    for _ in range(2):
        lora_files.teach_stock_nodes()
    wrapped = comfy.lora_convert.convert_lora
    assert wrapped is not comfy.lora_convert.tonfa_wraps and comfy.lora_convert.tonfa_wraps.__module__ == "comfy.lora_convert"
    twice = wrapped(wrapped(dict(file_and_effect("xlabs").tensors)))
    assert twice.keys() == wrapped(dict(file_and_effect("xlabs").tensors)).keys()


def test_importing_teaches_nothing(monkeypatch):
    monkeypatch.setattr(comfy.lora_convert, "convert_lora", comfy.lora_convert.tonfa_wraps)
    monkeypatch.delattr(comfy.lora_convert, "tonfa_wraps")
    again = importlib.util.spec_from_file_location("tonfa.nodes.host.lora_files_again", lora_files.__file__)
    monkeypatch.setitem(sys.modules, again.name, module := importlib.util.module_from_spec(again))
    again.loader.exec_module(module)
    assert not hasattr(comfy.lora_convert, "tonfa_wraps") and comfy.lora_convert.convert_lora.__module__ == "comfy.lora_convert"


@pytest.mark.parametrize("name", [name for name, (_, host_reads, _) in generated.FILES.items() if host_reads])
def test_what_the_host_reads_goes_through_untouched(name):
    tensors = file_and_effect(name).tensors
    assert lora_files.for_the_host(tensors) is tensors


@pytest.mark.parametrize(
    "tensors", [SDXL, QWEN, CUT, NAN, WIDER, {}, {"some.weight": torch.ones(2)}], ids=lambda t: next(iter(t), "nothing")[:30]
)
def test_other_families_and_damaged_files_are_the_hosts_business(tensors, caplog):
    assert lora_files.for_the_host(tensors) is tensors
    assert len(lines(caplog)) == (tensors is CUT or tensors is NAN)


def test_on_another_family_our_node_does_what_the_hosts_does(pair, folder, monkeypatch, caplog):
    """That family has to be played by the FLUX twin here."""
    monkeypatch.setattr(lora_files, "is_flux", lambda patcher: False)
    file = put(folder, "kohya")
    ours, theirs = (patches_of(by(loader, pair[1], file, 0.7)) for loader in ("ours", "stock"))
    assert ours.keys() == theirs.keys()
    save_file(CUT, folder / "half.safetensors")
    with pytest.raises(LoraError, match=r"half.safetensors lacks the tensor .*img_attn_qkv"):
        by("ours", pair[1], "formats/half.safetensors")
    save_file(SDXL, folder / "none.safetensors")
    with pytest.raises(LoraError, match=r"none.safetensors .* has nothing for this model: lora_unet_down_blocks_1"):
        by("ours", pair[1], "formats/none.safetensors")


def test_whatever_goes_wrong_in_ours_the_host_goes_on(pair, folder, monkeypatch, caplog):
    monkeypatch.setattr(lora_files, "read_lora", lambda *a, **k: 1 / 0)
    assert by("stock", pair[1], put(folder, "diffusers")).patches
    assert "could not be looked at (ZeroDivisionError: division by zero). ComfyUI reads" in lines(caplog, logging.WARNING)[0]


def test_text_encoders_stay_with_the_host_and_what_nobody_takes_is_named(caplog):
    tensors = file_and_effect("xlabs").tensors | {"lora_te1_x.alpha": torch.tensor(1.0), "some.thing": torch.ones(2)}
    state = lora_files.for_the_host(tensors)
    assert state["lora_te1_x.alpha"] is tensors["lora_te1_x.alpha"] and "some.thing" not in state
    assert lines(caplog, logging.WARNING) == ["This LoRA (xlabs): not applied: some.thing."]
