"""LoRA files for tests: one of every format, of random numbers, for a FLUX.1 of any size, with what each is meant to change.

The names and shapes here are written out from the formats' own makers and share no code with the readers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flux:
    """Sizes of a FLUX.1; mlp ratio 4. in_width: input channels after patching (16 latent channels give 64)."""

    hidden: int = 128
    depth: int = 2
    depth_single: int = 2
    in_width: int = 64
    context: int = 96
    vec: int = 64
    head_dim: int = 64


@dataclass(frozen=True)
class Linear:
    """A linear of the host's Flux: native name, shape, and (diffusers name, first row, rows) of what diffusers keeps in its place."""

    native: str
    n: int
    k: int
    parts: tuple[tuple[str, int, int], ...]


def linears(f: Flux, outside: bool = True) -> list[Linear]:
    h, out = f.hidden, []
    for i in range(f.depth):
        ours, theirs = f"double_blocks.{i}.", f"transformer_blocks.{i}."
        for side, dash, qkv, proj, mlp in (
            ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
            ("txt", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
        ):
            out += [
                Linear(f"{ours}{side}_mod.lin", 6 * h, h, ((f"{theirs}{dash}.linear", 0, 6 * h),)),
                Linear(f"{ours}{side}_attn.qkv", 3 * h, h, tuple((f"{theirs}attn.{p}", j * h, h) for j, p in enumerate(qkv))),
                Linear(f"{ours}{side}_attn.proj", h, h, ((f"{theirs}attn.{proj}", 0, h),)),
                Linear(f"{ours}{side}_mlp.0", 4 * h, h, ((f"{theirs}{mlp}.net.0.proj", 0, 4 * h),)),
                Linear(f"{ours}{side}_mlp.2", h, 4 * h, ((f"{theirs}{mlp}.net.2", 0, h),)),
            ]
    for i in range(f.depth_single):
        ours, theirs = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        qkv = [(f"{theirs}attn.to_{p}", j * h, h) for j, p in enumerate("qkv")]
        out += [
            Linear(f"{ours}modulation.lin", 3 * h, h, ((f"{theirs}norm.linear", 0, 3 * h),)),
            Linear(f"{ours}linear1", 7 * h, h, (*qkv, (f"{theirs}proj_mlp", 3 * h, 4 * h))),
            Linear(f"{ours}linear2", h, 5 * h, ((f"{theirs}proj_out", 0, h),)),
        ]
    return out + (linears_outside(f) if outside else [])


def linears_outside(f: Flux) -> list[Linear]:
    h, t = f.hidden, "time_text_embed."
    return [
        Linear(native, n, k, ((theirs, 0, n),))
        for native, n, k, theirs in (
            ("img_in", h, f.in_width, "x_embedder"),
            ("txt_in", h, f.context, "context_embedder"),
            ("time_in.in_layer", h, 256, f"{t}timestep_embedder.linear_1"),
            ("time_in.out_layer", h, h, f"{t}timestep_embedder.linear_2"),
            ("vector_in.in_layer", h, f.vec, f"{t}text_embedder.linear_1"),
            ("vector_in.out_layer", h, h, f"{t}text_embedder.linear_2"),
            ("guidance_in.in_layer", h, 256, f"{t}guidance_embedder.linear_1"),
            ("guidance_in.out_layer", h, h, f"{t}guidance_embedder.linear_2"),
            ("final_layer.linear", 64, h, "proj_out"),
            ("final_layer.adaLN_modulation.1", 2 * h, h, "norm_out.linear"),
        )
    ]


def norms(f: Flux) -> list[tuple[str, str]]:
    """(native name without .scale or .weight, diffusers name) of every RMSNorm."""
    out = []
    for i in range(f.depth):
        for side, added in (("img", ""), ("txt", "added_")):
            for q in ("query", "key"):
                out.append((f"double_blocks.{i}.{side}_attn.norm.{q}_norm", f"transformer_blocks.{i}.attn.norm_{added}{q[0]}"))
    for i in range(f.depth_single):
        for q in ("query", "key"):
            out.append((f"single_blocks.{i}.norm.{q}_norm", f"single_transformer_blocks.{i}.attn.norm_{q[0]}"))
    return out


@dataclass
class Made:
    """A file and what it is meant to do at strength 1, in the host's own layout.

    tensors  the file
    deltas   native linear -> [N, K] fp32 that is added to its weight
    biases   native linear -> [N] fp32 that is added to its bias
    added    native norm -> vector that is added; `values`: vector that it is set to
    weights  native linear -> the weight that the deltas are for, where they depend on it
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Maker:
    """Random tensors of one file. size: the deltas' typical share of a weight of unit gain."""

    def __init__(self, flux: Flux, rank: int = 4, dtype: torch.dtype = torch.bfloat16, alpha: float | None = None, seed: int = 0,
                 size: float = 0.3, skip: tuple[str, ...] = (), weights: Mapping[str, Tensor] | None = None) -> None:  # fmt: skip
        self.flux, self.rank, self.dtype, self.alpha, self.size, self.skip = flux, rank, dtype, alpha, size, skip
        self.rng = torch.Generator().manual_seed(seed)
        self.made = Made()
        self.given = weights

    def random(self, *shape: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.rng) * gain).to(self.dtype)

    def weight(self, linear: Linear) -> Tensor:
        """The weight [n, k] that a delta is for."""
        if linear.native not in self.made.weights:
            key = f"{linear.native}.weight"
            given = self.given[key] if self.given is not None else torch.randn(linear.n, linear.k, generator=self.rng) * linear.k**-0.5
            self.made.weights[linear.native] = given.float()
        return self.made.weights[linear.native]

    def parts(self, linear: Linear, vocabulary: str) -> Iterator[tuple[str, int, int]]:
        """(module name, first row, rows), in one vocabulary; rows of norm_out.linear are in diffusers' order."""
        for part in linear.parts if vocabulary == "diffusers" else ((linear.native, 0, linear.n),):
            if not any(s in part[0] for s in self.skip):
                yield part

    def add(self, linear: Linear, module: str, first: int, delta: Tensor) -> None:
        """Note a delta of some rows. diffusers' norm_out.linear is (scale, shift), the host's final layer (shift, scale)."""
        total = self.made.deltas.setdefault(linear.native, torch.zeros(linear.n, linear.k))
        total[first : first + len(delta)] += native_rows(module, delta.float())

    def add_bias(self, linear: Linear, module: str, first: int, bias: Tensor) -> None:
        total = self.made.biases.setdefault(linear.native, torch.zeros(linear.n))
        total[first : first + len(bias)] += native_rows(module, bias.float())

    def pair(self, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(down [r, k], up [n, r], delta)."""
        down, up = self.random(self.rank, k, gain=k**-0.5), self.random(n, self.rank, gain=self.size * self.rank**-0.5)
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        return down, up, scale * (up.float() @ down.float())

    def put_alpha(self, module: str) -> None:
        if self.alpha is not None:
            self.made.tensors[f"{module}.alpha"] = torch.tensor(self.alpha)

    def vector(self, n: int) -> Tensor:
        return self.random(n, gain=self.size)


def native_rows(module: str, rows: Tensor) -> Tensor:
    """Rows as the host has them."""
    return torch.cat(rows.chunk(2)[::-1]) if module.endswith("norm_out.linear") else rows


PEFT = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")  # PEFT's name for an adapter without one
NAMED = ("lora_A.my_style.weight", "lora_B.my_style.weight")
LINEAR_LAYER = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")


def pairs(m: Maker, vocabulary: str, prefix: str, suffixes: tuple[str, str] = PEFT, dots: bool = True, outside: bool = True) -> Made:
    """A plain LoRA on every linear."""
    for linear in linears(m.flux, outside):
        for module, first, rows in m.parts(linear, vocabulary):
            down, up, delta = m.pair(rows, linear.k)
            name = prefix + (module if dots else module.replace(".", "_"))
            m.made.tensors |= {f"{name}.{suffixes[0]}": down, f"{name}.{suffixes[1]}": up}
            m.put_alpha(name)
            m.add(linear, module, first, delta)
    return m.made


def xlabs(m: Maker, prefix: str = "", singles: bool = False) -> Made:
    """Attention only: qkv and proj of the image (1) and text (2) side, with singles the qkv rows of linear1 and linear2."""
    m.alpha = None  # the format has none
    by_name = {x.native: x for x in linears(m.flux)}
    wanted = []
    for i in range(m.flux.depth):
        for number, side in ((1, "img"), (2, "txt")):
            for layer in ("qkv", "proj"):
                wanted.append(
                    (f"double_blocks.{i}.processor.{layer}_lora{number}", by_name[f"double_blocks.{i}.{side}_attn.{layer}"], None)
                )
    for i in range(m.flux.depth_single if singles else 0):
        wanted.append((f"single_blocks.{i}.processor.qkv_lora", by_name[f"single_blocks.{i}.linear1"], 3 * m.flux.hidden))
        wanted.append((f"single_blocks.{i}.processor.proj_lora", by_name[f"single_blocks.{i}.linear2"], None))
    for name, linear, rows in wanted:
        down, up, delta = m.pair(rows or linear.n, linear.k)
        m.made.tensors |= {f"{prefix}{name}.down.weight": down, f"{prefix}{name}.up.weight": up}
        m.add(linear, linear.native, 0, delta)
    return m.made


def control(m: Maker, vocabulary: str, prefix: str) -> Made:
    """FLUX-tools' LoRA: pairs with a bias of lora_B, norms replaced, and an img_in of twice the channels."""
    m.alpha = None
    for linear in linears(m.flux):
        linear = Linear(linear.native, linear.n, 2 * linear.k, linear.parts) if linear.native == "img_in" else linear
        for module, first, rows in m.parts(linear, vocabulary):
            down, up, delta = m.pair(rows, linear.k)
            bias = m.vector(rows)
            m.made.tensors |= {f"{prefix}{module}.{suffix}": t for suffix, t in zip((*PEFT, "lora_B.bias"), (down, up, bias), strict=True)}
            m.add(linear, module, first, delta)
            m.add_bias(linear, module, first, bias)
    for native, theirs in norms(m.flux):
        if any(s in theirs for s in m.skip):
            continue
        value = (1 + m.vector(m.flux.head_dim).float()).to(m.dtype)
        m.made.tensors[prefix + (f"{theirs}.weight" if vocabulary == "diffusers" else f"{native}.scale")] = value
        m.made.values[native] = value.float()
    return m.made


def adapters(m: Maker, prefix: str, vocabulary: str, make: Callable[[Maker, str, Tensor], tuple[dict[str, Tensor], Tensor]],
             dots: bool = True) -> Made:  # fmt: skip
    """One adapter of another kind on every linear of the blocks; `make` gets the weight's rows and gives (suffix -> tensor, delta)."""
    for linear in linears(m.flux, outside=False):
        for module, first, rows in m.parts(linear, vocabulary):
            name = prefix + (module if dots else module.replace(".", "_"))
            tensors, delta = make(m, name, m.weight(linear)[first : first + rows])
            m.made.tensors |= {f"{name}.{suffix}": t for suffix, t in tensors.items()}
            m.add(linear, module, first, delta)
    return m.made


def factors(n: int) -> tuple[int, int]:
    """n = a b with a the largest divisor up to 8."""
    a = next(a for a in (8, 7, 6, 5, 4, 3, 2, 1) if n % a == 0)
    return a, n // a


def lokr(m: Maker, _: str, w: Tensor, decomposed: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """kron(w1, w2); alpha / rank counts only where a factor is itself a product."""
    (a, c), (b, d) = factors(w.shape[0]), factors(w.shape[1])
    w1 = m.random(a, b, gain=m.size * w.shape[1] ** -0.5)
    if not decomposed:
        w2 = m.random(c, d)
        return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(2.0)}, torch.kron(w1.float(), w2.float())
    left, right = m.random(c, m.rank), m.random(m.rank, d, gain=m.rank**-0.5)
    delta = torch.kron(w1.float(), left.float() @ right.float())
    return {"lokr_w1": w1, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": torch.tensor(2.0)}, delta * 2.0 / m.rank


def loha(m: Maker, _: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    (n, k), r = w.shape, m.rank
    a1, b1, a2, b2 = m.random(n, r), m.random(r, k, gain=m.size * k**-0.5), m.random(n, r), m.random(r, k, gain=1 / r)
    delta = (a1.float() @ b1.float()) * (a2.float() @ b2.float())
    return {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(3.0)}, delta * 3.0 / r


def glora(m: Maker, _: str, w: Tensor, old: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """W a1 a2 + b1 b2; the old form has the pairs the other way round."""
    (n, k), r = w.shape, m.rank
    left, right = m.random(k, r, gain=k**-0.5), m.random(r, k, gain=m.size * r**-0.5)
    up, down = m.random(n, r, gain=m.size * r**-0.5), m.random(r, k, gain=k**-0.5)
    delta = w @ left.float() @ right.float() + up.float() @ down.float()
    names = ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")
    tensors = {f"{name}.weight": t for name, t in zip(names, (left, right, up, down), strict=True)}
    return tensors | {"alpha": torch.tensor(2.0)}, delta * 2.0 / r


def rotation(blocks: Tensor) -> Tensor:
    q = blocks.float() - blocks.float().transpose(-1, -2)
    eye = torch.eye(q.shape[-1])
    return (eye + q) @ torch.linalg.inv(eye - q)


def oft(m: Maker, _: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Blocks of rows, rotated: each block of W becomes R^T W."""
    b = 16
    blocks = m.random(w.shape[0] // b, b, b, gain=m.size / b)
    turned = rotation(blocks).transpose(1, 2) @ w.view(-1, b, w.shape[1])
    return {"oft_blocks": blocks}, turned.reshape(w.shape) - w


def boft(m: Maker, _: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Two butterfly steps: rows gathered with strides of half a block and of a block, rotated in blocks, put back."""
    b, steps = 8, 2
    blocks = m.random(steps, w.shape[0] // b, b, b, gain=m.size / b)
    out = w
    for i, r in enumerate(rotation(blocks)):
        stride = 2**i * b // 2
        rows = torch.arange(w.shape[0]).view(-1, 2, stride).transpose(1, 2).reshape(-1)
        turned = (r @ out[rows].view(-1, b, w.shape[1])).reshape(w.shape)
        out = torch.empty_like(w).index_copy_(0, rows, turned)
    return {"oft_blocks": blocks}, out - w


def dora(m: Maker, _: str, w: Tensor, columns: bool = False, peft: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """(W + BA) scaled to a stored norm of every output row, or input column, as the host does it: rows are measured before BA is added."""
    down, up, delta = m.pair(*w.shape)
    norm = (w + delta).norm(dim=0, keepdim=True) if columns else w.norm(dim=1, keepdim=True)
    scale = (norm * (1 + 0.1 * torch.randn(norm.shape, generator=m.rng))).to(m.dtype)
    out = (w + delta) * (scale.float() / (norm + torch.finfo(torch.float32).eps)) - w
    names = (*PEFT, "lora_magnitude_vector") if peft else (*KOHYA, "dora_scale")
    tensors = dict(zip(names, (down, up, scale.flatten() if peft else scale), strict=True))
    return tensors | ({} if m.alpha is None else {"alpha": torch.tensor(m.alpha)}), out


def whole(m: Maker, _: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    delta = m.random(*w.shape, gain=m.size * w.shape[1] ** -0.5)
    return {"diff": delta}, delta


def replaced(m: Maker, _: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    value = m.random(*w.shape, gain=w.shape[1] ** -0.5)
    return {"set_weight": value}, value.float() - w


def biases(m: Maker, vocabulary: str, prefix: str, dots: bool = True) -> Made:
    for linear in linears(m.flux):
        for module, first, rows in m.parts(linear, vocabulary):
            bias = m.vector(rows)
            m.made.tensors[prefix + (module if dots else module.replace(".", "_")) + ".diff_b"] = bias
            m.add_bias(linear, module, first, bias)
    return m.made


def norm_patches(m: Maker, suffix: str, native: str | None = None) -> Made:
    """Patches of RMSNorms. native: what follows the native name there (".scale" in older ComfyUI, "" in newer)."""
    for ours, theirs in norms(m.flux):
        vector = ((1.0 if suffix == "set_weight" else 0.0) + m.vector(m.flux.head_dim).float()).to(m.dtype)
        name = f"transformer.{theirs}" if native is None else f"diffusion_model.{ours}{native}"
        m.made.tensors[f"{name}.{suffix}"] = vector
        (m.made.values if suffix == "set_weight" else m.made.added)[ours] = vector.float()
    return m.made


def mixed(*made: Made) -> Made:
    """Several files in one."""
    out = Made()
    for one in made:
        for name, table in vars(one).items():
            getattr(out, name).update(table)
    return out


# -- files that nunchaku converted ---------------------------------------------------------------------------------------------------------

V1 = {  # native layer of a block -> v1 layer
    "img_attn.qkv": "qkv_proj", "txt_attn.qkv": "qkv_proj_context", "img_attn.proj": "out_proj", "txt_attn.proj": "out_proj_context",
    "img_mlp.0": "mlp_fc1", "img_mlp.2": "mlp_fc2", "txt_mlp.0": "mlp_context_fc1", "txt_mlp.2": "mlp_context_fc2",
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "modulation.lin": "norm.linear",
}  # fmt: skip


def base_pairs(flux: Flux, rank: int = 16, dtype: torch.dtype = torch.bfloat16, seed: int = 99) -> dict[str, tuple[Tensor, Tensor]]:
    """A 4-bit model's own low-rank pairs: v1 layer -> (down [K, R], up [N, R])."""
    rng = torch.Generator().manual_seed(seed)
    h, layers = flux.hidden, {}
    for i in range(flux.depth):
        for layer, v1 in V1.items():
            if "mod" not in layer:
                n = {"qkv": 3 * h, "mlp.0": 4 * h}.get(layer.split("_")[1].removeprefix("attn."), h)
                layers[f"transformer_blocks.{i}.{v1}"] = (n, 4 * h if layer.endswith("mlp.2") else h)
    for i in range(flux.depth_single):
        for v1, n, k in (("qkv_proj", 3 * h, h), ("out_proj", h, h), ("mlp_fc1", 4 * h, h), ("mlp_fc2", h, 4 * h)):
            layers[f"single_transformer_blocks.{i}.{v1}"] = (n, k)
    return {v1: tuple(torch.randn(x, rank, generator=rng).to(dtype) for x in (k, n)) for v1, (n, k) in layers.items()}


def converted(m: Maker, base: Mapping[str, tuple[Tensor, Tensor]]) -> Made:
    """A LoRA on every linear, as nunchaku's converter would have written it for a model with these low-rank pairs."""
    from tonfa.models.formats.nunchaku import ceil_to, interleave_rows, pack_down, pack_up

    def wider(t: Tensor, dim: int) -> Tensor:
        shape = list(t.shape)
        shape[dim] = ceil_to(shape[dim], 16) - shape[dim]
        return torch.cat([t, t.new_zeros(shape)], dim)

    def put(v1: str, down: Tensor, up: Tensor) -> None:
        own_down, own_up = base[v1]
        m.made.tensors[f"{v1}.lora_down"] = pack_down(wider(torch.cat([own_down.t(), down]), 0))
        m.made.tensors[f"{v1}.lora_up"] = pack_up(wider(torch.cat([own_up, up], 1), 1))

    for linear in linears(m.flux):
        made = [(module, first, *m.pair(rows, linear.k)) for module, first, rows in m.parts(linear, "diffusers")]
        for module, first, _, _, delta in made:
            m.add(linear, module, first, delta)
        downs, ups = [x[2] for x in made], [x[3] for x in made]
        stack, _, rest = linear.native.partition(".")
        index, _, layer = rest.partition(".")
        prefix = f"{'single_' * (stack == 'single_blocks')}transformer_blocks.{index}."
        if "_blocks" not in stack:
            for (module, _, down, up, _), suffixes in zip(made, [PEFT] * len(made), strict=True):
                m.made.tensors |= {f"{module}.{suffixes[0]}": down, f"{module}.{suffixes[1]}": up}
        elif layer == "linear1":
            put(f"{prefix}qkv_proj", torch.cat(downs[:3]), torch.block_diag(*ups[:3]))
            put(f"{prefix}mlp_fc1", downs[3], ups[3])
        elif layer == "linear2":
            put(f"{prefix}out_proj", downs[0][:, : linear.n], ups[0])
            put(f"{prefix}mlp_fc2", downs[0][:, linear.n :], ups[0])
        elif "mod" in layer:
            m.made.tensors[f"{prefix}{V1[layer]}.lora_down"] = wider(downs[0], 0)
            m.made.tensors[f"{prefix}{V1[layer]}.lora_up"] = wider(interleave_rows(ups[0], linear.n // linear.k), 1)
        else:
            put(prefix + V1[layer], torch.cat(downs), torch.block_diag(*ups))
    return m.made


def converted_file(base: Mapping[str, tuple[Tensor, Tensor]], flux: Flux = Flux(), **options: object) -> Made:  # noqa: B008 (frozen)
    """`converted` with the options of lora_file. The dtype is the base's."""
    return converted(Maker(flux, **{"dtype": next(iter(base.values()))[0].dtype, **options}), base)


# -- the formats ---------------------------------------------------------------------------------------------------------------------------

# name -> (format as read_lora names it, whether ComfyUI 0.3.64 and 0.29.0 both read the file wholly and rightly by themselves, maker)
FILES: dict[str, tuple[str, bool, Callable[[Maker], Made]]] = {
    "diffusers": ("diffusers", True, lambda m: pairs(m, "diffusers", "transformer.")),
    "diffusers default": ("diffusers", True, lambda m: pairs(m, "diffusers", "transformer.", DEFAULT)),
    "diffusers named": ("diffusers", False, lambda m: pairs(m, "diffusers", "transformer.", NAMED)),
    "diffusers down up": ("diffusers", True, lambda m: pairs(m, "diffusers", "transformer.", ("lora.down.weight", "lora.up.weight"))),
    "diffusers linear layer": ("diffusers", True, lambda m: pairs(m, "diffusers", "transformer.", LINEAR_LAYER)),
    "diffusers no weight": ("diffusers", True, lambda m: pairs(m, "diffusers", "transformer.", ("lora_A", "lora_B"))),
    "diffusers bare": ("diffusers", False, lambda m: pairs(m, "diffusers", "")),
    "kohya": ("kohya", True, lambda m: pairs(m, "native", "lora_unet_", KOHYA, dots=False)),
    "kohya split": ("kohya split", False, lambda m: pairs(m, "diffusers", "lora_unet_", KOHYA, dots=False)),
    "onetrainer": ("OneTrainer", True, lambda m: pairs(m, "diffusers", "lora_transformer_", KOHYA, dots=False)),
    "comfyui": ("ComfyUI", True, lambda m: pairs(m, "native", "diffusion_model.")),
    "comfyui down up": ("ComfyUI", True, lambda m: pairs(m, "native", "diffusion_model.", KOHYA)),
    "bfl": ("BFL", False, lambda m: pairs(m, "native", "")),
    "peft diffusers": ("PEFT", False, lambda m: pairs(m, "diffusers", "base_model.model.")),
    "peft bfl": ("PEFT", False, lambda m: pairs(m, "native", "base_model.model.")),
    "peft bfl default": ("PEFT", False, lambda m: pairs(m, "native", "base_model.model.", DEFAULT)),
    "peft unet": ("PEFT", False, lambda m: pairs(m, "diffusers", "unet.base_model.model.")),
    "xlabs": ("xlabs", False, xlabs),
    "xlabs singles": ("xlabs", False, lambda m: xlabs(m, singles=True)),
    "xlabs prefix": ("xlabs", False, lambda m: xlabs(m, "diffusion_model.")),
    "control": ("BFL control", True, lambda m: control(m, "native", "")),
    "control prefix": ("BFL control", False, lambda m: control(m, "native", "diffusion_model.")),
    "control peft": ("BFL control", False, lambda m: control(m, "native", "base_model.model.")),
    "control diffusers": ("BFL control", False, lambda m: control(m, "diffusers", "transformer.")),
    "lokr": ("LyCORIS", True, lambda m: adapters(m, "lycoris_", "diffusers", lokr, dots=False)),
    "lokr decomposed": ("kohya", True, lambda m: adapters(m, "lora_unet_", "native", lambda *a: lokr(*a, decomposed=True), dots=False)),
    "lokr peft": ("PEFT", False, lambda m: adapters(m, "base_model.model.", "native", lokr)),
    "loha": ("kohya", True, lambda m: adapters(m, "lora_unet_", "native", loha, dots=False)),
    "loha split": ("kohya split", False, lambda m: adapters(m, "lora_unet_", "diffusers", loha, dots=False)),
    "glora": ("kohya", True, lambda m: adapters(m, "lora_unet_", "native", glora, dots=False)),
    "glora old": ("kohya split", False, lambda m: adapters(m, "lora_unet_", "diffusers", lambda *a: glora(*a, old=True), dots=False)),
    "oft": ("kohya", True, lambda m: adapters(m, "lora_unet_", "native", oft, dots=False)),
    "boft": ("kohya", False, lambda m: adapters(m, "lora_unet_", "native", boft, dots=False)),
    "dora rows": ("kohya", True, lambda m: adapters(m, "lora_unet_", "native", dora, dots=False)),
    "dora columns": ("diffusers", True, lambda m: adapters(m, "transformer.", "diffusers", lambda *a: dora(*a, columns=True))),
    "dora peft": ("PEFT", False, lambda m: adapters(m, "base_model.model.", "diffusers", lambda *a: dora(*a, peft=True))),
    "diff": ("ComfyUI", True, lambda m: adapters(m, "diffusion_model.", "native", whole)),
    "diff split": ("diffusers", True, lambda m: adapters(m, "transformer.", "diffusers", whole)),
    "set": ("ComfyUI", True, lambda m: adapters(m, "diffusion_model.", "native", replaced)),
    "biases": ("ComfyUI", True, lambda m: biases(m, "native", "diffusion_model.")),
    "biases kohya": ("kohya", True, lambda m: biases(m, "native", "lora_unet_", dots=False)),
    "biases split": ("diffusers", False, lambda m: biases(m, "diffusers", "transformer.")),
    "norms": ("diffusers", True, lambda m: norm_patches(m, "diff")),
    "norms old names": ("ComfyUI", False, lambda m: norm_patches(m, "diff", ".scale")),
    "norms new names": ("ComfyUI", False, lambda m: norm_patches(m, "w_norm", "")),
    "norms set": ("diffusers", True, lambda m: norm_patches(m, "set_weight")),
}  # fmt: skip


def lora_file(file: str, flux: Flux = Flux(), **options: object) -> Made:  # noqa: B008 (frozen)
    """One of FILES. options: rank, dtype, alpha, seed, size, skip (module names to leave out), weights (native key -> dense weight)."""
    return FILES[file][2](Maker(flux, **options))
