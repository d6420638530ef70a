"""What the host's patches on one packed weight become, against the host's own merge into the dense weight."""

from __future__ import annotations

import logging

import comfy.lora
import comfy.weight_adapter as adapters
import pytest
import torch
from tonfa.models.lora import Side
from tonfa.nodes.host.branches import make_branch, merged_weight, plan_branch
from tonfa.nodes.host.low_rank import low_rank_form
from tonfa.nodes.host.patches import completed, fingerprint

from .lab import CPU, loaded, made, rel
from .loras import Random

KEY = "diffusion_model.double_blocks.0.img_mlp.0.weight"
N, K = 512, 128
SPLIT = "diffusion_model.single_blocks.0.linear2.weight"  # two parts along K
r = Random(40)


@pytest.fixture(scope="module")
def packed() -> dict:
    return loaded(made()).packed


def lora(rank: int = 4, n: int = N, k: int = K, alpha: float | None = 2.0, dora: torch.Tensor | None = None) -> adapters.LoRAAdapter:
    return adapters.LoRAAdapter(set(), (r(n, rank), r(rank, k), alpha, None, dora, None))


def loha(rank: int) -> adapters.LoHaAdapter:
    return adapters.LoHaAdapter(set(), (r(N, rank), r(rank, K), 2.0, r(N, rank), r(rank, K), None, None, None))


def lokr(*, first: bool, second: bool, alpha: float | None = 2.0) -> adapters.LoKrAdapter:
    """first, second: whether that factor is one of two factors itself."""
    w1 = (None, r(16, 2), r(2, 4)) if first else (r(16, 4), None, None)
    w2 = (None, r(32, 3), r(3, 32)) if second else (r(32, 32), None, None)
    return adapters.LoKrAdapter(set(), (w1[0], w2[0], alpha, *w1[1:], *w2[1:], None, None))


def glora(rank: int = 3) -> adapters.GLoRAAdapter:
    return adapters.GLoRAAdapter(set(), (r(K, rank), r(rank, K), r(N, rank), r(rank, K), 1.5, None))


def old_glora(rank: int = 3) -> adapters.GLoRAAdapter:
    return adapters.GLoRAAdapter(set(), (r(rank, K), r(K, rank), r(rank, K), r(N, rank), None, None))


def oft(alpha: float | None = None) -> adapters.OFTAdapter:
    return adapters.OFTAdapter(set(), (r(N // 8, 8, 8) * 0.3, None, alpha, None))


def boft(alpha: float | None) -> adapters.BOFTAdapter:
    return completed(adapters.BOFTAdapter(set(), (r(3, N // 8, 8, 8) * 0.3, 1 + r(N, 1), alpha, None)))


def plus(value: object, strength: float = 0.7, kept: float = 1.0, offset: tuple | None = None, function: object = None) -> tuple:
    return strength, value, kept, offset, function


def host_delta(module, key: str, patches: list) -> torch.Tensor:
    weight = module.dense()[0]
    return comfy.lora.calculate_weight(patches, weight.clone(), key) - weight


def make(module, key: str, patches: list) -> tuple[Side | None, list[str]]:
    """The side in fp32, which takes at most the planned bytes."""
    plan = plan_branch(module, key, patches, 4)
    side, refused = make_branch(module, key, plan, CPU, torch.float32)
    assert (0 if side is None else side.nbytes()) <= plan.nbytes
    return side, refused


def ranks(side: Side) -> int:
    return max(c.up.shape[1] for c in side.columns if c is not None)


EXACT = {
    "lora": lambda: [plus(lora())],
    "without alpha": lambda: [plus(lora(alpha=None), -1.3)],
    "rank 1": lambda: [plus(lora(1))],
    "rows": lambda: [plus(lora(n=64), offset=(0, 32, 64)), plus(lora(n=128), offset=(0, 384, 128))],
    "columns": lambda: [plus(lora(k=40), offset=(1, 8, 40))],
    "loha": lambda: [plus(loha(3))],
    "lokr": lambda: [plus(lokr(first=True, second=True))],
    "lokr, w1 whole": lambda: [plus(lokr(first=False, second=True))],
    "lokr, w2 whole": lambda: [plus(lokr(first=True, second=False))],
    "glora": lambda: [plus(glora())],
    "glora after a lora": lambda: [plus(lora()), plus(glora())],
    "old glora": lambda: [plus(lora()), plus(old_glora(), -0.4)],
    "glora of rows": lambda: [
        plus(lora()),
        plus(adapters.GLoRAAdapter(set(), (r(K, 2), r(2, K), r(64, 2), r(2, K), None, None)), offset=(0, 64, 64)),
    ],
    "fp8": lambda: [plus(adapters.LoRAAdapter(set(), (*(t.to(torch.float8_e4m3fn) for t in (r(N, 4), r(4, K))), 2.0, None, None, None)))],
    "strength 0 beside another": lambda: [plus(lora()), plus(lora(), 0.0)],
    "reshape to the same": lambda: [plus(adapters.LoRAAdapter(set(), (r(N, 4), r(4, K), None, None, None, [N, K])))],
}


@pytest.mark.parametrize("kind", EXACT)
def test_products_of_two_factors_become_columns_exactly(packed, kind):
    patches = EXACT[kind]()
    side, refused = make(packed[KEY], KEY, patches)
    assert side.delta is None and not refused
    assert rel(side.dense(packed[KEY].spec), host_delta(packed[KEY], KEY, patches)) < 1e-5


def test_columns_of_a_layer_in_two_parts(packed):
    patches = [plus(lora(n=128, k=640)), plus(lora(n=128, k=512), offset=(1, 128, 512)), plus(lora(n=64, k=640), offset=(0, 32, 64))]
    side, refused = make(packed[SPLIT], SPLIT, patches)
    assert side.delta is None and not refused
    assert rel(side.dense(packed[SPLIT].spec), host_delta(packed[SPLIT], SPLIT, patches)) < 1e-5


OTHER = {
    "loha of a large rank": lambda: [plus(loha(12))],
    "lokr of whole factors": lambda: [plus(lokr(first=False, second=False))],
    "dora": lambda: [plus(lora(dora=1 + r(N, 1)))],
    "dora by columns": lambda: [plus(lora(dora=1 + r(1, K)), 1.0)],
    "dora after a lora": lambda: [plus(lora()), plus(lora(dora=1 + r(N, 1)))],
    "lora after a dora": lambda: [plus(lora(dora=1 + r(N, 1))), plus(lora())],
    "dora of rows": lambda: [plus(lora()), plus(lora(n=64, dora=1 + r(64, 1)), offset=(0, 64, 64))],
    "oft": lambda: [plus(lora()), plus(oft())],
    "oft with a constraint": lambda: [plus(oft(0.5))],
    "boft": lambda: [plus(boft(0.5))],
    "boft without alpha": lambda: [plus(lora()), plus(boft(None))],
    "difference": lambda: [plus(("diff", (r(N, K),)))],
    "difference of rows": lambda: [plus(("diff", (r(64, K),)), offset=(0, 64, 64))],
    "new value": lambda: [plus(lora()), plus(("set", (r(N, K),))), plus(lora())],
    "merge after a lora": lambda: [plus(lora()), plus([(r(N, K), lambda w, **_: w), plus(lora())], 0.4, 0.6)],
    "merge before a lora": lambda: [plus([(r(N, K), lambda w, **_: w)], 0.4, 0.6), plus(lora())],
    "model as lora": lambda: [plus(lora()), plus(("model_as_lora", (r(N, K),)))],
    "function": lambda: [plus(lora(), function=lambda w: w.flip(0))],
}


@pytest.mark.parametrize("kind", OTHER)
def test_the_rest_is_right_to_one_per_cent_and_what_is_exact_stays_exact(packed, kind):
    patches = OTHER[kind]()
    originals = {KEY: [(packed[KEY].dense()[0], None)]}
    weight = packed[KEY].dense()[0]
    wanted = comfy.lora.calculate_weight(patches, weight.clone(), KEY, original_weights=originals) - weight
    side, refused = make(packed[KEY], KEY, patches)
    assert not refused
    assert rel(side.dense(packed[KEY].spec), wanted) < (1e-5 if side.delta is not None else 0.01)
    exact = sum(isinstance(value, adapters.LoRAAdapter) and value.weights[4] is None and f is None for _, value, *_, f in patches)
    assert exact == 0 or any(c is not None for c in side.columns), "an exact LoRA went into the delta"


def test_a_delta_of_low_rank_becomes_columns_of_that_rank(packed):
    patches = [plus(("diff", (r(N, 5) @ r(5, K) + 1e-4 * r(N, K),)))]
    side, _ = make(packed[KEY], KEY, patches)
    assert side.delta is None and ranks(side) == 16  # ranks are filled up
    assert rel(side.dense(packed[KEY].spec), host_delta(packed[KEY], KEY, patches)) < 0.01


def test_many_loras_become_one_dense_delta(packed):
    patches = [plus(lora(60)) for _ in range(3)]
    side, _ = make(packed[KEY], KEY, patches)
    assert all(c is None for c in side.columns) and side.nbytes() == N * K * 4
    assert rel(side.dense(packed[KEY].spec), host_delta(packed[KEY], KEY, patches)) < 1e-5


@pytest.mark.parametrize("value", [lokr(first=False, second=False), loha(12), ("diff", (torch.zeros(N, K),))])
def test_an_untrained_adapter_is_no_failure_and_takes_nothing(packed, value):
    if not isinstance(value, tuple):
        value = type(value)(set(), tuple(torch.zeros_like(t) if isinstance(t, torch.Tensor) else t for t in value.weights))
    assert make(packed[KEY], KEY, [plus(value)]) == (None, [])


MISFITS = {
    "lora": (lora(k=K + 64), f"{KEY} is 512 x 128, the LoRA 512 x 192"),
    "loha": (adapters.LoHaAdapter(set(), (r(N, 2), r(2, 64), None, r(N, 2), r(2, 64), None, None, None)), "the LoRA 512 x 64"),
    "glora": (adapters.GLoRAAdapter(set(), (r(4, 5), r(6, 7), r(8, 9), r(3, 2), None, None)), "do not multiply"),
    "difference": (("diff", (r(N, K + 1),)), "SHAPE MISMATCH"),
    "new value": (("set", (r(N, K + 1),)), KEY),
    "oft": (adapters.OFTAdapter(set(), (r(7, 9, 9), None, None, None)), KEY),
    "dora": (lora(k=K + 64, dora=1 + r(N, 1)), KEY),
    "wider": (adapters.LoRAAdapter(set(), (r(N, 4), r(4, 2 * K), None, None, None, [N, 2 * K])), "512 x 256"),
    "kind": (("nonsense", (r(N, K),)), KEY),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_named_and_the_rest_applies(packed, kind, caplog):
    value, words = MISFITS[kind]
    good = [plus(lora()), plus(("diff", (r(N, K),)))]
    with caplog.at_level(logging.DEBUG):
        side, refused = make(packed[KEY], KEY, [good[0], plus(value), good[1]])
    assert len(refused) == 1 and KEY in refused[0] and words in refused[0]
    assert not caplog.records, "the host said it too"
    assert rel(side.dense(packed[KEY].spec), host_delta(packed[KEY], KEY, good)) < 1e-5
    assert (
        rel(merged_weight(packed[KEY], KEY, [good[0], plus(value), good[1]]) - packed[KEY].dense()[0], host_delta(packed[KEY], KEY, good))
        < 1e-4
    )


def test_misfits_are_planned_out(packed):
    good = plan_branch(packed[KEY], KEY, [plus(lora())], 2)
    assert (
        plan_branch(packed[KEY], KEY, [plus(lora()), plus(lora(k=K + 64)), plus(lora(n=7), offset=(0, 510, 7))], 2).nbytes
        == good.nbytes
        > 0
    )
    assert plan_branch(packed[KEY], KEY, [plus(lora(), 0.0)], 2).nbytes == 0


def test_tensors_go_to_the_device_in_their_own_type(packed, monkeypatch):
    """Nothing is cast to fp32 before it is moved."""
    seen, to = [], torch.Tensor.to

    def spy(tensor, *args, **kwargs):
        if any(isinstance(a, torch.device) for a in (*args, *kwargs.values())):
            seen.append((tensor.dtype, [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]))
        return to(tensor, *args, **kwargs)

    def half(value):
        return type(value)(set(), tuple(t.to(torch.bfloat16) if isinstance(t, torch.Tensor) else t for t in value.weights))

    patches = [plus(half(lora())), plus(half(loha(3))), plus(half(lokr(first=True, second=True)))]
    plan = plan_branch(packed[KEY], KEY, patches, 2)
    monkeypatch.setattr(torch.Tensor, "to", spy)
    make_branch(packed[KEY], KEY, plan, CPU, torch.bfloat16)
    monkeypatch.undo()
    moved = [dtype for dtype, casts in seen if not casts]
    assert moved.count(torch.bfloat16) >= 2 + 4 + 4 and not any(casts == [torch.float32] for _, casts in seen)


# -- fingerprints and the randomised form ------------------------------------------------------------------------------------------------


def test_equal_patches_have_equal_fingerprints():
    up, down, other = r(4, 2), r(2, 4), r(4, 2)

    def patches(strength=0.5, up=up, alpha=1.0, offset=(0, 0, 4)):
        return [
            (strength, adapters.LoRAAdapter({"x"}, (up, down, alpha, None, None, None)), 1.0, offset, None),
            (1.0, ("diff", (down,)), 1.0, None, lambda a: a),
        ]

    assert fingerprint(patches()) == fingerprint(patches())
    for changed in (patches(0.6), patches(up=other), patches(up=up.clone()), patches(alpha=2.0), patches(offset=(0, 1, 4)), patches()[:1]):
        assert fingerprint(changed) != fingerprint(patches())


@pytest.mark.parametrize("rank", [1, 8, 40, 100])
def test_low_rank_form_finds_the_smallest_rank_within_the_bound(rank):
    g = torch.Generator().manual_seed(3)
    matrix = torch.randn(300, rank, generator=g) @ torch.randn(rank, 500, generator=g)
    up, down = low_rank_form(matrix + 1e-3 * torch.randn(300, 500, generator=g), 120)
    assert up.shape == (300, rank) and down.shape == (rank, 500) and rel(up @ down, matrix) < 0.01
    again = low_rank_form(matrix + 1e-3 * torch.randn(300, 500, generator=torch.Generator().manual_seed(4)), 120)
    assert again[0].shape == up.shape
    assert low_rank_form(matrix, rank - 1) is None


def test_low_rank_form_of_falling_singular_values_and_of_none():
    g = torch.Generator().manual_seed(3)
    u, _ = torch.linalg.qr(torch.randn(400, 400, generator=g))
    v, _ = torch.linalg.qr(torch.randn(400, 400, generator=g))
    values = 0.9 ** torch.arange(400)
    matrix = u * values @ v
    best = int(((values**2).flip(0).cumsum(0).flip(0) > (values**2).sum() * 0.009**2).sum())
    up, down = low_rank_form(matrix, 100)
    assert best <= up.shape[1] <= best + 2 and rel(up @ down, matrix) < 0.01
    assert torch.equal(low_rank_form(matrix, 100)[0], up), "not the same each time"
    for hopeless in (u, torch.zeros(8, 8), torch.full((8, 8), float("nan"))):
        assert low_rank_form(hopeless, 4) is None
    calls = []
    qr = torch.linalg.qr
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.linalg, "qr", lambda a: (calls.append(a), qr(a))[1])
        assert low_rank_form(u, 100) is None
    assert len(calls) <= 5, "it was clear after one sketch"
