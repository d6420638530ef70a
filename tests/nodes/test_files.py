"""Saved model names against lists of files: the rules of nodes/host/files.py. No host needed."""

from dataclasses import replace

import pytest
from tonfa.nodes.host.files import LORAS, identity, resolve, with_legacy_folders

FILES = [
    "svdq-int4_r32-flux.1-dev.safetensors",
    "nunchaku/svdq-fp4_r32-flux.1-fill-dev.safetensors",
    "nunchaku/svdq-int4_r32-flux.1-schnell.safetensors",
    "other/deep/svdq-int4_r32-flux.1-schnell.safetensors",
    "svdq-int4-flux.1-canny-dev/transformer_blocks.safetensors",
    "svdq-int4-flux.1-canny-dev/unquantized_layers.safetensors",
    "sub\\svdq-int4_r128-shuttle-jaguar.safetensors",
    "flux1-dev.safetensors",
    "svdq-int4_r128-z-image-turbo.safetensors",
]
NAMES = with_legacy_folders(FILES)


def test_folders_of_the_old_form_are_listed_behind_the_files():
    assert [*FILES, "svdq-int4-flux.1-canny-dev"] == NAMES
    assert with_legacy_folders(["transformer_blocks.safetensors"]) == ["transformer_blocks.safetensors"]
    assert with_legacy_folders(["a\\b\\transformer_blocks.safetensors"])[-1] == "a/b"


@pytest.mark.parametrize(
    ("asked", "name", "substituted"),
    [
        ("svdq-int4_r32-flux.1-dev.safetensors", "svdq-int4_r32-flux.1-dev.safetensors", False),
        ("svdq-int4-flux.1-canny-dev", "svdq-int4-flux.1-canny-dev", False),
        ("nunchaku\\svdq-fp4_r32-flux.1-fill-dev.safetensors", "nunchaku/svdq-fp4_r32-flux.1-fill-dev.safetensors", False),
        ("sub/svdq-int4_r128-shuttle-jaguar.safetensors", "sub\\svdq-int4_r128-shuttle-jaguar.safetensors", False),
        # the same base name elsewhere, the nearest to the root first
        ("svdq-fp4_r32-flux.1-fill-dev.safetensors", "nunchaku/svdq-fp4_r32-flux.1-fill-dev.safetensors", True),
        ("gone\\svdq-int4_r32-flux.1-dev.safetensors", "svdq-int4_r32-flux.1-dev.safetensors", True),
        ("svdq-int4_r32-flux.1-schnell.safetensors", "nunchaku/svdq-int4_r32-flux.1-schnell.safetensors", True),
        # the same stem
        ("svdq-int4_r32-flux.1-dev", "svdq-int4_r32-flux.1-dev.safetensors", True),
        ("flux1-dev.sft", "flux1-dev.safetensors", True),
        # old folder names
        ("svdq-int4-flux.1-dev", "svdq-int4_r32-flux.1-dev.safetensors", True),
        ("models/svdq-int4-flux.1-schnell", "nunchaku/svdq-int4_r32-flux.1-schnell.safetensors", True),
        ("svdq-int4_r32-flux.1-canny-dev.safetensors", "svdq-int4-flux.1-canny-dev", True),
        # the other precision of the same model
        ("svdq-fp4_r32-flux.1-dev.safetensors", "svdq-int4_r32-flux.1-dev.safetensors", True),
        ("svdq-fp4-flux.1-dev", "svdq-int4_r32-flux.1-dev.safetensors", True),
        ("svdq-int4-flux.1-fill-dev", "nunchaku/svdq-fp4_r32-flux.1-fill-dev.safetensors", True),
        ("svdq-fp4_r128-shuttle-jaguar.safetensors", "sub\\svdq-int4_r128-shuttle-jaguar.safetensors", True),
        ("nunchaku/svdq-fp4_r128-z-image-turbo.safetensors", "svdq-int4_r128-z-image-turbo.safetensors", True),
        # a file of a folder of the old form stands for the folder
        ("svdq-int4-flux.1-canny-dev/transformer_blocks.safetensors", "svdq-int4-flux.1-canny-dev/transformer_blocks.safetensors", False),
    ],
)
def test_what_a_saved_name_means(asked, name, substituted):
    found = resolve(asked, NAMES)
    assert found.name == name
    assert (found.how is not None) == substituted


def test_own_precision_wins_over_the_other():
    names = ["svdq-fp4_r32-flux.1-dev.safetensors", "svdq-int4_r32-flux.1-dev.safetensors"]
    assert resolve("svdq-fp4-flux.1-dev", names).name == names[0]
    assert resolve("svdq-int4-flux.1-dev", names[::-1]).name == names[1]


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("SVDQ-INT4_R32-FLUX.1-Dev.safetensors", "svdq-int4_r32-flux.1-dev.safetensors"),
        ("Nunchaku\\svdq-fp4_r32-flux.1-fill-dev.safetensors", "nunchaku/svdq-fp4_r32-flux.1-fill-dev.safetensors"),
        ("old/svdq-fp4_r32-FLUX.1-fill-dev.safetensors", "nunchaku/svdq-fp4_r32-flux.1-fill-dev.safetensors"),
        ("SVDQ-int4-FLUX.1-canny-dev", "svdq-int4-flux.1-canny-dev"),
        ("SVDQ-FP4-flux.1-dev", "svdq-int4_r32-flux.1-dev.safetensors"),
    ],
)
def test_upper_and_lower_case_is_told_apart_only_where_both_are_there(asked, name):
    found = resolve(asked, NAMES)
    assert found.name == name and found.how is not None
    both = ["a/Model.safetensors", "model.safetensors", "MODEL.safetensors"]
    assert [resolve(n, both).name for n in both] == both
    assert resolve("Model.safetensors", both).name == "MODEL.safetensors"  # in its place, before another folder


def test_a_name_not_found_shows_what_is_there_before_what_was_tried():
    with pytest.raises(FileNotFoundError) as error:
        resolve("svdq-int4-flux.1-kontext-dev", NAMES)
    near, tried = str(error.value).split("Also tried: ")
    assert "svdq-int4-flux.1-canny-dev" in near and near.index("nearest names") < near.index("Choose one")
    assert tried.split(", ")[0] == "svdq-int4-flux.1-kontext-dev.safetensors" and tried.count(",") == 2
    with pytest.raises(FileNotFoundError, match=r"Unet Loader \(GGUF\).*ComfyUI-GGUF") as error:
        resolve("flux1-schnell-Q4_K_S.GGUF", NAMES)
    assert "tried" not in str(error.value)


@pytest.mark.parametrize("asked", ["svdq-int4_r64-flux.1-dev.safetensors", "svdq-int4-flux.1-kontext-dev", "flux1-schnell.safetensors"])
def test_another_model_or_rank_is_never_taken(asked):
    with pytest.raises(FileNotFoundError, match="svdq-int4_r32-flux.1-dev.safetensors") as error:
        resolve(asked, NAMES)
    assert asked in str(error.value)


def test_nothing_there():
    with pytest.raises(FileNotFoundError, match="no model file at all"):
        resolve("svdq-int4-flux.1-dev", [])
    for nothing in ("", None):
        with pytest.raises(FileNotFoundError, match="No model is chosen"):
            resolve(nothing, NAMES)


def test_identity_follows_the_file(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"1")
    link = tmp_path / "link.safetensors"
    link.symlink_to(file)
    before = identity(str(file))
    assert identity(str(link)) == before
    file.write_bytes(b"22")
    assert identity(str(file)) != before
    folder = identity(str(tmp_path))
    (tmp_path / "b").write_bytes(b"")
    assert identity(str(tmp_path)) != folder


# -- LoRA files ---------------------------------------------------------------------------------------------------------------------

LORA_NAMES = ["style.safetensors", "flux/Canny.safetensors", "flux\\tools\\depth.safetensors", "svdq-int4-lora.safetensors", "old.pt"]


@pytest.mark.parametrize(
    ("asked", "name", "substituted"),
    [
        ("style.safetensors", "style.safetensors", False),
        ("flux\\Canny.safetensors", "flux/Canny.safetensors", False),
        ("canny.safetensors", "flux/Canny.safetensors", True),
        ("other/depth.safetensors", "flux\\tools\\depth.safetensors", True),
        ("style", "style.safetensors", True),
        ("style.pt", "style.safetensors", True),
    ],
)
def test_what_a_saved_lora_name_means(asked, name, substituted):
    found = resolve(asked, LORA_NAMES, LORAS)
    assert found.name == name and (found.how is not None) == substituted


@pytest.mark.parametrize("asked", ["svdq-fp4-lora.safetensors", "svdq-int4_r32-lora.safetensors", "stile.safetensors"])
def test_loras_have_no_other_precision_and_are_never_guessed(asked):
    with pytest.raises(FileNotFoundError, match=r"^LoRA '.*' is not in ComfyUI's loras folders.*Choose one in lora_name_3") as error:
        resolve(asked, LORA_NAMES, replace(LORAS, widget="lora_name_3"))
    assert "diffusion_models" not in str(error.value)


def test_no_lora_at_all():
    with pytest.raises(FileNotFoundError, match=r"no LoRA file at all\.$"):
        resolve("a.safetensors", [], LORAS)
    with pytest.raises(
        FileNotFoundError, match=r"No LoRA is chosen\. Put a LoRA file into ComfyUI/models/loras and choose it in lora_name\."
    ):
        resolve("", LORA_NAMES, LORAS)
