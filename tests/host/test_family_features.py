"""What reaches Qwen-Image and Z-Image through the host's forward: each feature against the dense twin in the host's own class, and against
not using it."""

from __future__ import annotations

import comfy.controlnet
import comfy.model_patcher
import comfy.ops
import pytest
import torch
from comfy_extras import nodes_easycache, nodes_model_patch
from torch import nn

from .families import FAMILIES, LIKE_2511, conditioning, loaded, made, needs_z_image, packed_files, sample, twin
from .lab import CPU, rel, snr

NEW_QWEN = pytest.mark.skipif(not LIKE_2511, reason="this ComfyUI's Qwen-Image has neither these patches nor reference methods of 2511")
QWEN, Z = "qwen-image", "z-image"


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Pair:
    """Our model and its dense twin, with the latents they give when nothing is added."""

    def __init__(self, family: str, **changes: object):
        path = made(family, **changes)
        self.family, self.ours, self.theirs = family, loaded(path), twin(path)
        self.plain = self.sample(self.ours)

    def sample(self, model: object, **how: object) -> torch.Tensor:
        return sample(model, self.family, **{"steps": 2, **how})

    def check(self, patch=lambda model: model, **how: object) -> None:
        """`patch(model)` and `how` (arguments of sample) give both models the same latents, and others than without them."""
        got, wanted = self.sample(patch(self.ours.clone()), **how), self.sample(patch(self.theirs.clone()), **how)
        assert snr(got, wanted) > 50
        if got.shape == self.plain.shape:
            assert rel(got, self.plain) > 1e-3, "the feature changed nothing"


@pytest.fixture(scope="module")
def qwen() -> Pair:
    return Pair(QWEN)


@pytest.fixture(scope="module")
def zimage() -> Pair:
    return Pair(Z)


@pytest.fixture(params=FAMILIES)
def pair(request) -> Pair:
    return request.getfixturevalue({QWEN: "qwen", Z: "zimage"}[request.param])


# -- conditioning ----------------------------------------------------------------------------------------------------------------------


def test_true_cfg_with_texts_of_different_length(pair):
    pair.check(negative=conditioning(tokens=20, seed=9), cfg=3.0)


def test_batch_of_three(pair):
    pair.check(batch=3)


def test_odd_latent_size(pair):
    pair.check(size=(9, 7))


METHODS = [None, "index", "offset", pytest.param("negative_index", marks=NEW_QWEN), pytest.param("index_timestep_zero", marks=NEW_QWEN)]


@pytest.mark.parametrize("method", METHODS)
def test_edit_references(qwen, method):
    references = [noise(1, 16, 1, 4, 6), noise(1, 16, 1, 6, 4, seed=6)]
    extra = {} if method is None else {"reference_latents_method": method}
    qwen.check(positive=conditioning(reference_latents=references, **extra), batch=2)


@NEW_QWEN
def test_reference_methods_differ(qwen):
    reference = {"reference_latents": [noise(1, 16, 1, 4, 6)]}
    found = [
        qwen.sample(qwen.ours, positive=conditioning(reference_latents_method=m, **reference)) for m in ("index", "index_timestep_zero")
    ]
    assert rel(found[0], found[1]) > 1e-3


@NEW_QWEN
def test_a_file_of_2511_has_its_reference_method_by_itself(tmp_path):
    tensors, metadata, _ = packed_files.qwen("int4", 16)
    tensors["__index_timestep_zero__"] = torch.tensor([])
    ours = loaded(packed_files.save(tmp_path / "svdq-int4_r16-2511.safetensors", tensors, metadata))
    assert ours.model.diffusion_model.default_ref_method == "index_timestep_zero"


@NEW_QWEN
def test_attention_mask_of_the_text(qwen):
    mask = torch.ones(1, 12)
    mask[:, 8:] = 0
    qwen.check(positive=conditioning(attention_mask=mask))


@needs_z_image
def test_references_of_z_image(zimage):
    zimage.check(positive=conditioning(reference_latents=[noise(1, 16, 4, 6)]), batch=2)


# -- control ---------------------------------------------------------------------------------------------------------------------------


class Residuals(comfy.controlnet.ControlBase):
    """What a Qwen-Image ControlNet hands the model."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options=None):
        return {"input": [None, noise(1, 20, packed_files.HIDDEN, seed=1)]}

    def copy(self):
        return self


def test_controlnet_residuals(qwen):
    qwen.check(positive=conditioning(control=Residuals(), control_apply_to_uncond=False))


class Vae:
    """Stands for a VAE: some latent of the right size."""

    def __init__(self, *middle: int):
        self.middle = middle

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        return noise(image.shape[0], 16, *self.middle, image.shape[1] // 8, image.shape[2] // 8, seed=11)

    def spacial_compression_encode(self) -> int:
        return 8


def model_patch(module: nn.Module) -> comfy.model_patcher.ModelPatcher:
    """What ModelPatchLoader returns for a file, with random weights in it."""
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.5 * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    return comfy.model_patcher.ModelPatcher(module, load_device=CPU, offload_device=CPU)


def test_diffsynth_controlnet(qwen):
    net = nodes_model_patch.QwenImageBlockWiseControlNet(2, dim=packed_files.HIDDEN, dtype=torch.float32, operations=comfy.ops.manual_cast)
    patch, image = model_patch(net), noise(1, 64, 96, 3).abs()
    node = nodes_model_patch.QwenImageDiffsynthControlnet()
    qwen.check(lambda model: node.diffsynth_controlnet(model, patch, Vae(1), image, 0.7)[0])


@needs_z_image
@pytest.mark.parametrize("refiner_control", [False, True])
def test_fun_controlnet_of_z_image(zimage, refiner_control):
    import comfy.ldm.lumina.controlnet

    net = comfy.ldm.lumina.controlnet.ZImage_Control(
        dim=packed_files.HIDDEN, n_heads=2, n_kv_heads=2, n_control_layers=15, refiner_control=refiner_control,
        dtype=torch.float32, operations=comfy.ops.manual_cast,
    )  # fmt: skip
    patch, image = model_patch(net), noise(1, 64, 96, 3).abs()
    node = nodes_model_patch.ZImageFunControlnet()
    zimage.check(lambda model: node.diffsynth_controlnet(model, patch, Vae(), image, 0.7)[0])


# -- patches ---------------------------------------------------------------------------------------------------------------------------


def test_a_block_is_replaced(qwen):
    def replaced(args, extra):
        out = extra["original_block"](args)
        return {"img": out["img"] * 1.1, "txt": out["txt"]}

    def patch(model):
        model.set_model_patch_replace(replaced, "dit", "double_block", 0)
        return model

    qwen.check(patch)


def test_a_patch_behind_every_block(pair):
    def shifted(args):
        args["img"] = args["img"] * 1.05
        return args

    def patch(model):
        model.set_model_patch(shifted, "double_block")
        return model

    pair.check(patch)


@NEW_QWEN
@pytest.mark.parametrize("name", ["attn1_patch", "post_input"])
def test_patches_of_attention_and_input(qwen, name):
    def scaled(q, k, v, pe=None, attn_mask=None, extra_options=None):
        assert extra_options["img_slice"][0] == 12
        return {"q": q * 1.2, "k": k, "v": v}

    def moved(args):
        return {**args, "img": args["img"] * 1.1}

    def patch(model):
        model.set_model_patch(scaled if name == "attn1_patch" else moved, name)
        return model

    qwen.check(patch)


def test_attention_override(pair):
    def sharper(func, q, *args, **kwargs):
        return func(q * 2, *args, **kwargs)

    def patch(model):
        model.model_options["transformer_options"]["optimized_attention_override"] = sharper
        return model

    pair.check(patch)


def test_easycache(pair):
    def patch(model):
        node = nodes_easycache.EasyCacheNode
        return node.execute(model, 0.9, 0.1, 0.95, False).result[0]

    got, wanted = (pair.sample(patch(model.clone()), steps=6) for model in (pair.ours, pair.theirs))
    assert snr(got, wanted) > 50
    assert rel(got, pair.sample(pair.ours, steps=6)) > 1e-4, "nothing was reused"
