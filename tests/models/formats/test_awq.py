"""The 4-bit T5 format: the golden layer bit for bit both ways, files recognised, opened, and refused with a sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tonfa.kernels.t5_layout import T5Linear, read_spec, views
from tonfa.kernels.t5_layout import pack as pack_bytes
from tonfa.kernels.t5_linear_torch import t5_weight
from tonfa.models.formats import awq
from tonfa.models.formats.t5 import T5Dims, t5_dims
from tonfa.models.formats.tensorfile import CheckpointError

from .t5_files import DIMS, tiny_t5

GOLDEN = Path(__file__).parents[2] / "data" / "awq_t5_128x512.safetensors"
XXL = T5Dims(blocks=24, model=4096, heads=64, inner=4096, ff=10240, vocab=32128, buckets=32)
WO = "encoder.block.1.layer.1.DenseReluDense.wo"


def random_linear(n: int, k: int) -> T5Linear:
    torch.manual_seed(n + k)
    scales = (torch.rand(n, k // 128) * 0.01 + 0.002).half()
    return T5Linear(torch.randint(0, 16, (n, k), dtype=torch.uint8), scales, (-8 * scales.float()).half())


def packed_tiny(plain: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """A tiny 4-bit file's tensors; `plain`: prefixes of linears that stay 16-bit."""
    tensors = tiny_t5()
    for prefix, (n, k) in DIMS.linears().items():
        if prefix not in plain:
            del tensors[f"{prefix}.weight"]
            tensors |= {f"{prefix}.{suffix}": t for suffix, t in awq.pack_linear(random_linear(n, k)).items()}
    return tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}


def saved(tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = tmp_path / "t5.safetensors"
    save_file(tensors, path, metadata)
    return path


# -- tensors ------------------------------------------------------------------------------------------------------------------------


def test_golden_both_ways_bit_for_bit():
    t = load_file(GOLDEN)
    packed = {suffix: t[f"packed.{suffix}"] for suffix in awq.SUFFIXES}
    layer = awq.unpack_linear(packed)
    assert torch.equal(layer.codes, t["logical.codes"]) and torch.equal(layer.scales, t["logical.scale"])
    made = awq.pack_linear(layer)
    assert all(made[s].dtype == packed[s].dtype and torch.equal(made[s], packed[s]) for s in awq.SUFFIXES)
    theirs = -(t["logical.zero"] * t["logical.scale"].float()).half()
    assert torch.equal(layer.zeros, theirs)
    written = awq.pack_linear(T5Linear(t["logical.codes"], t["logical.scale"], theirs))
    assert all(torch.equal(written[s], packed[s]) for s in awq.SUFFIXES)


def test_golden_weight_through_our_own_bytes():
    t = load_file(GOLDEN)
    blob = pack_bytes(awq.unpack_linear({suffix: t[f"packed.{suffix}"] for suffix in awq.SUFFIXES}))
    weight = t5_weight(views(read_spec(blob), blob), 0, 128)
    torch.testing.assert_close(weight, t["expected.w_dequant"], rtol=2e-3, atol=2e-4)  # theirs has unrounded zeros


@pytest.mark.parametrize(("n", "k"), [(4, 128), (36, 1152), (128, 640)])
def test_linears_and_back(n, k):
    layer = random_linear(n, k)
    packed = awq.pack_linear(layer)
    assert {s: (t.dtype, tuple(t.shape)) for s, t in packed.items()} == awq.packed_slots(n, k, torch.float16)
    back = awq.unpack_linear(packed)
    assert all(torch.equal(getattr(back, name), getattr(layer, name)) for name in ("codes", "scales", "zeros"))


def test_t5_xxl_has_the_published_size():
    sizes = [
        2 * torch.Size(shape).numel() for n, k in XXL.linears().values() for _, shape in awq.packed_slots(n, k, torch.float16).values()
    ]
    plain = sum(2 * torch.Size(shape).numel() for shape in XXL.plain().values()) + 2 * 32128 * 4096  # the embedding twice
    assert round((sum(sizes) + plain) / 1e9, 2) == 2.99
    assert len(XXL.linears()) == 168 and len(XXL.plain()) == 51


# -- files --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [(), (WO, "encoder.block.0.layer.0.SelfAttention.q")])
def test_a_file_is_read(tmp_path, plain):
    tensors = packed_tiny(plain)
    t5 = awq.open_awq_t5(saved(tmp_path, tensors, DIMS.metadata()))
    assert t5.dims == DIMS and set(t5.quantised) == set(DIMS.linears()) - set(plain)
    assert all(f"{prefix}.weight" in t5.plain_names() for prefix in plain)
    prefix = "encoder.block.0.layer.1.DenseReluDense.wi_1"
    want = random_linear(DIMS.ff, DIMS.model)
    assert torch.equal(t5.linear(prefix).codes, want.codes) and torch.equal(t5.linear(prefix).zeros, want.zeros)
    assert all(torch.equal(t5.plain(name), tensors[name]) for name in t5.plain_names())
    assert json.loads(t5.metadata["config"])["d_kv"] == 64
    t5.close()


def test_a_folder_is_read_and_one_embedding_is_enough(tmp_path):
    tensors = packed_tiny()
    del tensors["encoder.embed_tokens.weight"]
    path = saved(tmp_path, tensors)
    assert awq.open_awq_t5(path.parent).dims == DIMS
    save_file({"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(4, 4)}, path.parent / "clip_l.safetensors")
    save_file(tiny_t5(), path.parent / "t5xxl_fp16.safetensors")
    assert [file.path for file in awq.open_awq_t5(path.parent).files] == [path]
    with pytest.raises(CheckpointError, match="without .safetensors files. A 4-bit T5"):
        awq.open_awq_t5((tmp_path / "empty").mkdir() or tmp_path / "empty")


def test_4_bit_tensors_elsewhere(tmp_path):
    """Of a head they are left alone; in a block of the encoder they have to be a linear's."""
    prefix, tensors = "encoder.block.0.layer.0.SelfAttention.q", packed_tiny()
    parts = {suffix: tensors[f"{prefix}.{suffix}"] for suffix in awq.SUFFIXES}
    t5 = awq.open_awq_t5(saved(tmp_path, tensors | {f"lm_head.{suffix}": t.clone() for suffix, t in parts.items()}))
    assert set(t5.quantised) == set(DIMS.linears())
    strange = tensors | {f"encoder.block.0.layer.1.EncDecAttention.q.{suffix}": t.clone() for suffix, t in parts.items()}
    with pytest.raises(CheckpointError, match="EncDecAttention.q is no linear of a T5 encoder"):
        awq.open_awq_t5(saved(tmp_path, strange))


def test_recognition():
    assert awq.is_awq_t5(packed_tiny(), {})
    assert awq.is_awq_t5([], {"model_class": "NunchakuT5EncoderModel"})
    assert not awq.is_awq_t5(tiny_t5(), {"format": "pt"})
    assert not awq.is_awq_t5(["transformer_blocks.0.mlp_fc1.qweight"], {})


def without(key: str):
    return lambda t: t.pop(key)


def replaced(key: str, change):
    return lambda t: t.update({key: change(t[key])})


BAD = {
    "scales missing": (without(f"{WO}.scales"), f"{WO}.scales is missing beside its qweight"),
    "linear missing": (lambda t: [t.pop(f"{WO}.{s}") for s in awq.SUFFIXES], f"{WO} is missing"),
    "norm missing": (without("encoder.final_layer_norm.weight"), "final_layer_norm.weight is missing"),
    "no embedding": (lambda t: [t.pop(k) for k in ("shared.weight", "encoder.embed_tokens.weight")], "shared.weight is missing"),
    "another group": (replaced(f"{WO}.scales", lambda s: s.repeat(2, 1)), "groups of 128"),
    "codes of another type": (replaced(f"{WO}.qweight", lambda q: q.view(torch.int32)), "expected I16"),
    "scales fp32": (replaced(f"{WO}.scales", lambda s: s.float()), "expected F16 or BF16"),
    "another width": (
        lambda t: t.update({f"{WO}.{s}": x for s, x in awq.pack_linear(random_linear(128, 384)).items()}),
        r"expected \[128, 256\]",
    ),
    "two embeddings": (replaced("shared.weight", lambda w: w[:32].clone()), "two copies of the embedding"),
    "a block of number 10^9": (lambda t: t.update({"encoder.block.999999999.x": torch.zeros(1)}), "is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_refused(tmp_path, name):
    change, said = BAD[name]
    tensors = packed_tiny()
    change(tensors)
    with pytest.raises(CheckpointError, match=said) as raised:
        awq.open_awq_t5(saved(tmp_path, tensors))
    assert "t5.safetensors" in str(raised.value) and "\n" not in str(raised.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="There is no file"):
        awq.open_awq_t5(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="ordinary T5 text encoder"):
        awq.open_awq_t5(saved(tmp_path, tiny_t5()))
    with pytest.raises(CheckpointError, match="no T5 text encoder"):
        awq.open_awq_t5(saved(tmp_path, {"vae.decoder.conv_in.weight": torch.zeros(4)}))
    path = saved(tmp_path, packed_tiny())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="is cut off"):
        awq.open_awq_t5(path)


def test_numbers_that_are_none(tmp_path):
    tensors = packed_tiny()
    tensors[f"{WO}.scaled_zeros"][0, 0] = float("nan")
    t5 = awq.open_awq_t5(saved(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=f"scales of {WO} are not all finite"):
        t5.linear(WO)


def test_sizes_come_from_shapes():
    assert t5_dims({name: tuple(t.shape) for name, t in tiny_t5().items()}, "x") == DIMS
    assert T5Dims(24, 4096, 64, 4096, 10240, 32128, 32).config()["d_kv"] == 64
    with pytest.raises(CheckpointError, match="not shared out by 3 heads"):
        wrong = {name: tuple(t.shape) for name, t in tiny_t5().items()}
        t5_dims(wrong | {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 3)}, "x")
