"""Which file a saved name means today. Everything here works on names; only the functions at the end ask ComfyUI."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ...models.comfyui import PACK
from ...models.published import asked_for

LEGACY_FILE = "transformer_blocks.safetensors"  # its presence makes a folder a checkpoint of the old form
EXTENSIONS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")
PRECISION = re.compile(r"(int4|fp4|nvfp4)(_r\d+)?(?=-|$)")
MOST_NAMED, MOST_TRIED = 6, 3
GGUF_LOADERS = {"diffusion_models": "Unet Loader (GGUF)", "text_encoders": "DualCLIPLoader (GGUF)"}
OTHER_CASE = "the same name in other upper and lower case"


@dataclass(frozen=True)
class Shelf:
    """One of the host's folders of files, in the words that messages use.

    kin: names that differ in precision, or in a rank that is left out, stand for the same model.
    families: those of models/published.py that its node loads, so that a missing one is answered with the command that fetches it.
    """

    folder: str
    what: str
    wanted: str
    widget: str
    kin: bool = False
    families: tuple[str, ...] = ()


MODELS = Shelf(  # any of the loaders opens a file of any family
    "diffusion_models", "model", "a SVDQuant checkpoint", "model_path", kin=True, families=("flux.1", "qwen-image", "z-image")
)
TEXT_ENCODERS = Shelf("text_encoders", "text encoder", "clip_l.safetensors and a T5-XXL file", "text_encoder1", families=("text encoder",))
LORAS = Shelf("loras", "LoRA", "a LoRA file", "lora_name")


@dataclass(frozen=True)
class Found:
    """`name`: the entry of today's list that is used. `how`: what was substituted for the asked name; None when it is that very entry."""

    name: str
    how: str | None = None


def with_legacy_folders(files: Sequence[str]) -> list[str]:
    """The host's list of files with, behind it, the folders among them that are checkpoints of the old form."""
    return [*files, *legacy_folders(files)]


def legacy_folders(files: Sequence[str]) -> list[str]:
    """The folders, among those that a list of files names, that are checkpoints of the old form."""
    return sorted({slashes(name).rsplit("/", 1)[0] for name in files if slashes(name).endswith("/" + LEGACY_FILE)})


def resolve(asked: str, names: Sequence[str], shelf: Shelf = MODELS) -> Found:
    """The entry of `names` that a saved `asked` means.

    In this order: the same relative path; the same base name in any sub-folder, with either separator; the same stem with .safetensors;
    and for models the rank inserted after the precision, or left out, as old and new names differ in it; the same with the other
    precision. At each step upper and lower case are told apart first, and not told apart after that.
    Raises FileNotFoundError naming the nearest candidates.
    """
    wanted = slashes(str(asked or ""))
    paths = {slashes(name): name for name in names}
    if wanted in paths:
        return Found(paths[wanted])
    if wanted.endswith("/" + LEGACY_FILE) and wanted.rsplit("/", 1)[0] in paths:
        return Found(paths[wanted.rsplit("/", 1)[0]], "its folder, which is the checkpoint")
    ordered = sorted(paths, key=lambda p: (p.count("/"), p))  # of equals the one nearest to the root, so that the choice never varies
    by_folded = {path.casefold(): paths[path] for path in reversed(ordered)}
    if wanted.casefold() in by_folded:
        return Found(by_folded[wanted.casefold()], OTHER_CASE)
    by_base = {base_name(path): paths[path] for path in reversed(ordered)}
    by_folded_base = {base.casefold(): by_base[base] for base in sorted(by_base, reverse=True)}
    asked_base = base_name(wanted)
    for base, how in (*spellings(asked_base, shelf), *spellings(asked_base.casefold(), shelf)):
        if base in by_base:
            return Found(by_base[base], how)
        if base.casefold() in by_folded_base:
            return Found(by_folded_base[base.casefold()], OTHER_CASE if base == asked_base else how)
    raise FileNotFoundError(not_found(wanted, names, shelf))


def spellings(base: str, shelf: Shelf) -> Iterator[tuple[str, str]]:
    """Base names to try for a saved base name, in order, each with what it would be called in the log."""
    yield base, "the file of that name in another folder"
    stem = base[: -len(suffix)] if (suffix := extension(base)) else base
    if not shelf.kin:
        yield stem + ".safetensors", "the .safetensors file of that name"
        return
    yield stem + ".safetensors", "the single-file form"
    yield stem, "the folder form"
    for other in rank_variants(stem):
        yield other + ".safetensors", "the same model under its other name"
        yield other, "the same model under its other name"
    for swapped in precision_variants(stem):
        for other in (swapped, *rank_variants(swapped)):
            yield other + ".safetensors", "the same model in the other precision"
            yield other, "the same model in the other precision"


def rank_variants(stem: str) -> list[str]:
    """svdq-int4-x -> svdq-int4_r32-x, and back. A rank other than 32 is another model file, so it is never dropped or made up."""
    found = PRECISION.search(stem)
    if found is None or found[2] not in (None, "_r32"):
        return []
    return [stem[: found.start()] + found[1] + ("_r32" if found[2] is None else "") + stem[found.end() :]]


def precision_variants(stem: str) -> list[str]:
    found = PRECISION.search(stem)
    if found is None:
        return []
    others = ["fp4", "nvfp4"] if found[1] == "int4" else ["int4"]
    return [stem[: found.start()] + other + (found[2] or "") + stem[found.end() :] for other in others]


def not_found(wanted: str, names: Sequence[str], shelf: Shelf) -> str:
    """The sentence for a name that nothing matches."""
    if not wanted:
        return f"No {shelf.what} is chosen. Put {shelf.wanted} into ComfyUI/models/{shelf.folder} and choose it in {shelf.widget}."
    likely = [name for name in names if shelf.kin and PRECISION.search(base_name(slashes(name)))]
    near = difflib.get_close_matches(wanted, likely or list(names), n=MOST_NAMED, cutoff=0.3) or sorted(likely or names)[:MOST_NAMED]
    there = f"There is no {shelf.what} file at all."
    if near:
        there = f"The nearest names there: {', '.join(near)}. Choose one in {shelf.widget}."
    said = f"{capitalised(shelf.what)} '{wanted}' is not in ComfyUI's {shelf.folder} folders. {there}"
    if wanted.lower().endswith(".gguf") and shelf.folder in GGUF_LOADERS:
        return f"{said} A .gguf file is not for this node: load it with '{GGUF_LOADERS[shelf.folder]}' of the pack ComfyUI-GGUF."
    if file := asked_for(wanted, shelf.families):
        said += f" It is a published file. To fetch it, run `{download_command(file.name)}` in ComfyUI's folder, with its Python."
    tried = [base for base in dict.fromkeys(base for base, _ in spellings(base_name(wanted), shelf)) if base != wanted]
    return f"{said} (Also tried: {', '.join(tried[:MOST_TRIED])}.)" if tried else said


def download_command(name: str) -> str:
    """The command line that fetches a published file, ready to paste."""
    place = f"custom_nodes/{PACK.name}"
    quoted = place if re.fullmatch(r"[-./\w]+", place) else f'"{place}"'
    return f"python {quoted} download {name}"


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def slashes(name: str) -> str:
    return name.strip().replace("\\", "/").strip("/")


def base_name(path: str) -> str:
    return PurePosixPath(path).name


def extension(base: str) -> str:
    return next((e for e in EXTENSIONS if base.lower().endswith(e)), "")


# -- the host's folders -------------------------------------------------------------------------------------------------------------


def model_names() -> list[str]:
    """What the loader's list shows: the host's diffusion model files, then the folders of the old form."""
    return with_legacy_folders(names_in(MODELS))


def model_folders() -> list[str]:
    """Of `model_names`, the folders of the old form."""
    return legacy_folders(names_in(MODELS))


def model_path(name: str) -> str:
    """Full path of an entry of `model_names`: a file, or a folder of the old form."""
    import folder_paths

    full = folder_paths.get_full_path("diffusion_models", name)
    if full is None and (inside := folder_paths.get_full_path("diffusion_models", os.path.join(name, LEGACY_FILE))):
        full = os.path.dirname(inside)
    if full is None:
        raise FileNotFoundError(
            f"Model '{name}' was listed but is gone from ComfyUI's diffusion_models folders. Refresh (key R) and choose again."
        )
    return full


def names_in(shelf: Shelf) -> list[str]:
    """What the host lists in one of its folders."""
    import folder_paths

    return folder_paths.get_filename_list(shelf.folder)


def path_in(shelf: Shelf, name: str) -> str:
    """Full path of an entry of `names_in`."""
    import folder_paths

    full = folder_paths.get_full_path(shelf.folder, name)
    if full is None:
        raise FileNotFoundError(
            f"{capitalised(shelf.what)} '{name}' was listed but is gone from ComfyUI's {shelf.folder} folders. Refresh (key R) and choose "
            "again."
        )
    return full


def text_encoder_folders() -> list[str]:
    """Sub-folders of the host's text-encoder folders that hold .safetensors files (the deprecated loader's 4-bit T5)."""
    files = [slashes(name) for name in names_in(TEXT_ENCODERS) if name.lower().endswith(".safetensors")]
    return sorted({name.rsplit("/", 1)[0] for name in files if "/" in name})


def text_encoder_folder(name: str) -> str:
    """Full path of an entry of `text_encoder_folders`."""
    import folder_paths

    parts = slashes(name).split("/")
    for root in folder_paths.get_folder_paths("text_encoders"):
        full = os.path.join(root, *parts)
        if os.path.isdir(full) and not {".", ".."} & set(parts):
            return full
    known = text_encoder_folders()
    there = f"The folders there: {', '.join(known)}." if known else "There is no folder there."
    raise FileNotFoundError(f"Folder '{name}' is not in ComfyUI's text_encoders folders. {there} Choose one in int4_model.")


def identity(path: str) -> tuple:
    """Changes when the checkpoint does: real path, and modification time and size of its file or files."""
    real = os.path.realpath(path)
    files = [real] if os.path.isfile(real) else sorted(entry.path for entry in os.scandir(real) if entry.is_file())
    return (real, *((os.stat(f).st_mtime_ns, os.stat(f).st_size) for f in files))
