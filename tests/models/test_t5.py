"""PackedT5Linear against the dense linear that it stands for, and put_linears in a network that is no ComfyUI's."""

import contextlib
import copy

import pytest
import torch
from safetensors.torch import save_file
from tonfa.kernels.t5_layout import T5Linear, pack
from tonfa.models.formats.awq import AwqT5, open_awq_t5, pack_linear
from tonfa.models.formats.t5 import T5Dims
from tonfa.models.formats.tensorfile import CheckpointError
from tonfa.models.lora import Term, make_side
from tonfa.models.runtime import Runtime
from tonfa.models.t5 import PackedT5Linear, put_linears
from torch import nn

from .formats.t5_files import DIMS, tiny_t5

CPU = torch.device("cpu")
Q = "encoder.block.0.layer.0.SelfAttention.q"
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random_linear(n: int, k: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> tuple[T5Linear, torch.Tensor]:
    """A linear, and its weight by the format's formula."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
    scales = (torch.rand(n, k // 128, generator=g) * 0.02 + 0.01).to(dtype)
    zeros = (-7.5 * scales.float() + 0.01 * torch.randn(n, k // 128, generator=g)).to(dtype)
    weight = codes.float() * scales.float().repeat_interleave(128, 1) + zeros.float().repeat_interleave(128, 1)
    return T5Linear(codes, scales, zeros), weight


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


# -- the layer --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 9), (1,), (), (2, 0)])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("n", "k", "scales"), [(192, 256, torch.float16), (36, 640, torch.bfloat16)])
def test_is_the_dense_linear(n, k, scales, dtype, shape):
    layer, weight = random_linear(n, k, scales)
    module = PackedT5Linear(pack(layer), Runtime())
    x = torch.randn(*shape, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = module(x)
    assert y.dtype == dtype and y.shape == (*shape, n)
    if y.numel():
        assert relative(y, x.float() @ weight.t()) < ROUNDING[dtype]


def test_a_view_of_any_strides():
    layer, weight = random_linear(64, 256)
    x = torch.randn(5, 512)[:, ::2].unflatten(0, (5, 1)).transpose(0, 1)
    assert relative(PackedT5Linear(pack(layer), Runtime())(x), x @ weight.t()) < 1e-6


def test_what_a_host_sees():
    """One byte tensor as `weight`, no bias, sizes, and a dense weight for whoever asks; also from bytes cast to fp32."""
    layer, weight = random_linear(64, 256)
    module = PackedT5Linear(pack(layer), Runtime())
    assert [(name, p.dtype) for name, p in module.named_parameters()] == [("weight", torch.uint8)] and module.bias is None
    assert (module.out_features, module.in_features) == (64, 256) and not module.weight.requires_grad
    assert not module.comfy_cast_weights and module.weight_function == module.bias_function == []
    for stored in (module.weight, module.weight.float()):
        assert torch.equal(module.convert_weight(stored), weight)
    with pytest.raises(RuntimeError, match="cannot be overwritten"):
        module.set_weight(weight)
    with pytest.raises(ValueError, match="no packed T5 linear"):
        PackedT5Linear(torch.zeros(4096, dtype=torch.uint8), Runtime())
    with pytest.raises(ValueError, match=r"expected \[M, 256\]"):
        module(torch.zeros(2, 128))


def test_views_are_made_once_and_never_of_a_weight_that_is_gone():
    (first, _), (second, weight) = random_linear(64, 256, seed=1), random_linear(64, 256, seed=2)
    module, x = PackedT5Linear(pack(first), Runtime()), torch.randn(2, 256)
    module(x)
    kept = module._views
    assert module(x) is not None and module._views is kept
    module.weight = nn.Parameter(pack(second), requires_grad=False)
    assert relative(module(x), x @ weight.t()) < 1e-6
    module.to("meta")
    assert module._views is None


@pytest.mark.parametrize("beside", [False, True])
def test_compiles_to_one_operator_with_the_same_bits(beside):
    """Before and after its views are kept. What a GPU is asked about kernels cannot be traced, so nothing of it may be in the graph."""
    module, x, seen = PackedT5Linear(pack(random_linear(64, 256)[0]), Runtime()), torch.randn(2, 3, 256), []
    if beside:
        module.set_side(make_side(module.spec, [Term(torch.randn(64, 4), torch.randn(4, 256), 0.7)], None, CPU, torch.float32))

    def backend(graph, example):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    for _ in range(2):
        torch._dynamo.reset()
        got = torch.compile(module, backend=backend, fullgraph=True)(x)
        assert torch.equal(got, module(x))
    assert sum("t5_linear" in name for name in seen) == 2, seen
    assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), got)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_changes_nothing(dtype, kind):
    """Alone and with low-rank products and a dense difference beside it."""
    module, x = PackedT5Linear(pack(random_linear(64, 256)[0]), Runtime()), torch.randn(12, 256).to(dtype)
    for side in (None, make_side(module.spec, [Term(torch.randn(64, 4), torch.randn(4, 256), 0.7)], torch.randn(64, 256), CPU, dtype)):
        module.set_side(side)
        want = module(x)
        with torch.autocast("cpu", kind):
            y = module(x)
        assert y.dtype == dtype and torch.equal(y, want)


def test_a_copy_has_a_weight_of_its_own():
    layer, weight = random_linear(64, 256)
    module, x = PackedT5Linear(pack(layer), Runtime()), torch.randn(2, 256)
    module(x)
    twin = copy.deepcopy(module)
    module.weight.zero_()
    assert relative(twin(x), x @ weight.t()) < 1e-6


def test_a_weight_that_is_brought_from_elsewhere():
    """The layer computes with what the runtime gives it, not with what lies in the module."""
    layer, weight = random_linear(64, 256)
    blob, asked = pack(layer), []

    @contextlib.contextmanager
    def acquire(of, device):
        asked.append((of, device))
        yield blob, None

    module = PackedT5Linear(blob.clone(), Runtime(acquire=acquire))
    module.weight.zero_()
    x = torch.randn(2, 3, 256)
    assert relative(module(x), x @ weight.t()) < 1e-6 and asked == [(module, CPU)]


@pytest.mark.parametrize("dtype", ROUNDING)
def test_lora_beside_it(dtype):
    """Two low-rank products and a dense difference; without them the old bits are back."""
    layer, weight = random_linear(128, 256)
    module, g = PackedT5Linear(pack(layer), Runtime()), torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(*shape, generator=g) * 0.1

    terms, delta = [Term(draw(128, 4), draw(4, 256), 0.7), Term(draw(64, 3), draw(3, 256), -0.5, row=32)], draw(128, 256)
    x, total = draw(2, 5, 256).to(dtype) * 10, delta.clone()
    for t in terms:
        total[t.row : t.row + t.up.shape[0]] += t.scale * t.up @ t.down
    before = module(x)
    module.set_side(make_side(module.spec, terms, delta, CPU, torch.float32))
    after = module(x)
    assert module.has_side and after.dtype == dtype
    assert relative(after, x.float() @ (weight + total).t()) < 2 * ROUNDING[dtype]
    if dtype == torch.float32:
        assert relative(after - before, x @ total.t()) < 1e-5
    module.set_side(None)
    assert not module.has_side and torch.equal(module(x), before)


# -- in a network -----------------------------------------------------------------------------------------------------------------------


def four_bit(tmp_path, dims: T5Dims = DIMS) -> AwqT5:
    tensors = tiny_t5(dims=dims)
    for i, (prefix, (n, k)) in enumerate(dims.linears().items()):
        del tensors[f"{prefix}.weight"]
        tensors |= {f"{prefix}.{suffix}": t for suffix, t in pack_linear(random_linear(n, k, seed=i)[0]).items()}
    save_file(tensors, tmp_path / "t5.safetensors")
    return open_awq_t5(tmp_path / "t5.safetensors")


def network(dims: T5Dims = DIMS, skip: str = "") -> nn.Module:
    """Linears under the T5's names, one of them left out."""
    root = nn.Module()
    for prefix, (n, k) in dims.linears().items():
        *parents, name = prefix.split(".")
        at = root
        for parent in parents:
            if not hasattr(at, parent):
                at.add_module(parent, nn.Module())
            at = getattr(at, parent)
        if prefix != skip:
            at.add_module(name, nn.Linear(k, n, bias=False, device="meta"))
    return root


def test_every_linear_is_put_in_its_place(tmp_path):
    awq, net, steps = four_bit(tmp_path), network(), []
    put_linears(net, awq, runtime := Runtime(), CPU, CPU, lambda done, total: steps.append((done, total)))
    assert steps == [(i, 14) for i in range(1, 15)]
    for i, (prefix, (n, k)) in enumerate(DIMS.linears().items()):
        module, x = net.get_submodule(prefix), torch.randn(2, k)
        assert type(module) is PackedT5Linear and module.runtime is runtime
        assert relative(module(x), x @ random_linear(n, k, seed=i)[1].t()) < 1e-6, prefix


def test_a_network_without_the_place_or_with_another_size(tmp_path):
    awq = four_bit(tmp_path)
    with pytest.raises(CheckpointError, match=rf"t5.safetensors has a layer {Q} that this ComfyUI's T5 has no place for"):
        put_linears(network(skip=Q), awq, Runtime(), CPU, CPU)
    shallow = T5Dims(**{**vars(DIMS), "blocks": 1})
    with pytest.raises(CheckpointError, match=r"has a layer encoder.block.1.layer.0.SelfAttention"):
        put_linears(network(shallow), awq, Runtime(), CPU, CPU)
    wide = T5Dims(**{**vars(DIMS), "ff": 512})
    with pytest.raises(CheckpointError, match=r"DenseReluDense.wi_0 is 256 x 128, expected 512 x 128"):
        put_linears(network(wide), awq, Runtime(), CPU, CPU)
