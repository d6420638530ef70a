"""The published files that this pack knows: where each lies on the hub, and what a saved or typed name means. Plain data, no network."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

OWNER = "nunchaku-ai"  # was mit-han-lab, then nunchaku-tech; the hub leads those names here
INT4, FP4 = "int4", "fp4"
R32 = ((INT4, 32), (FP4, 32))
R32_R128 = ((INT4, 32), (INT4, 128), (FP4, 32), (FP4, 128))
Z_IMAGE = ((INT4, 32), (INT4, 128), (INT4, 256), (FP4, 32), (FP4, 128))  # rank 256 was published in INT4 only
SVDQ = re.compile(r"svdq-(int4|fp4|nvfp4)(?:_r(\d+))?-(.+)")


class NotPublished(ValueError):  # noqa: N818  (the message is a sentence for the person at the keyboard)
    """A name, precision or rank that is not published. The message is a sentence that says what is."""


@dataclass(frozen=True)
class Model:
    """One model of the table. `path` lies in `repo` and may hold {precision} and {rank}, for which `offered` has the pairs that exist."""

    name: str
    family: str
    repo: str
    path: str
    offered: tuple[tuple[str, int], ...] = ()
    folder: str = "diffusion_models"


@dataclass(frozen=True)
class File:
    """One file on the hub, and the folder of ComfyUI/models that it belongs into."""

    repo: str
    path: str
    folder: str
    family: str = ""

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


def _svdq(family: str, repo: str, offered: tuple, *names: str, under: str = "") -> tuple[Model, ...]:
    return tuple(Model(n, family, f"{OWNER}/{repo}", f"{under}svdq-{{precision}}_r{{rank}}-{n}.safetensors", offered) for n in names)


def _encoders(repo: str, **names: str) -> tuple[Model, ...]:
    return tuple(Model(name, "text encoder", repo, f"{path}.safetensors", (), "text_encoders") for name, path in names.items())


EDIT = "qwen-image-edit-2509"
MODELS: tuple[Model, ...] = (
    *_svdq("flux.1", "nunchaku-flux.1-dev", R32, "flux.1-dev"),
    *_svdq("flux.1", "nunchaku-flux.1-schnell", R32, "flux.1-schnell"),
    *_svdq("flux.1", "nunchaku-flux.1-krea-dev", R32, "flux.1-krea-dev"),
    *_svdq("flux.1", "nunchaku-flux.1-kontext-dev", R32, "flux.1-kontext-dev"),
    *_svdq("flux.1", "nunchaku-flux.1-fill-dev", R32, "flux.1-fill-dev"),
    *_svdq("flux.1", "nunchaku-flux.1-canny-dev", R32, "flux.1-canny-dev"),
    *_svdq("flux.1", "nunchaku-flux.1-depth-dev", R32, "flux.1-depth-dev"),
    *_svdq("flux.1", "nunchaku-flux.1-dev-colossus", R32, "flux.1-dev-colossusv12"),
    *_svdq("flux.1", "nunchaku-shuttle-jaguar", R32, "shuttle-jaguar"),
    *_encoders(f"{OWNER}/nunchaku-t5", t5="awq-int4-flux.1-t5xxl"),
    *_encoders(
        "comfyanonymous/flux_text_encoders",
        clip_l="clip_l", t5xxl_fp16="t5xxl_fp16", t5xxl_fp8_e4m3fn="t5xxl_fp8_e4m3fn", t5xxl_fp8_e4m3fn_scaled="t5xxl_fp8_e4m3fn_scaled",
    ),
    *_svdq(
        "qwen-image", "nunchaku-qwen-image", R32_R128,
        *(f"qwen-image{x}" for x in ("", "-lightningv1.0-4steps", "-lightningv1.1-8steps")),
    ),
    *_svdq(
        "qwen-image", "nunchaku-qwen-image-edit", R32_R128,
        *(f"qwen-image-edit{x}" for x in ("", "-lightningv1.0-4steps", "-lightningv1.0-8steps")),
    ),
    *_svdq("qwen-image", f"nunchaku-{EDIT}", R32_R128, *(f"{EDIT}{x}" for x in ("", "-lightningv2.0-4steps", "-lightningv2.0-8steps"))),
    *_svdq(
        "qwen-image", f"nunchaku-{EDIT}", R32_R128, *(f"{EDIT}-lightning-{n}steps-251115" for n in (4, 8)), under="lightning-251115/",
    ),
    *_svdq("z-image", "nunchaku-z-image-turbo", Z_IMAGE, "z-image-turbo"),
)  # fmt: skip


def file_of(model: Model, precision: str | None = None, rank: int | None = None) -> File:
    """The file of a model in a precision and rank, both of which must be offered (or None where the model is a single file)."""
    path = model.path.format(precision=precision, rank=rank)
    return File(model.repo, path, model.folder, model.family)


def files() -> Iterator[File]:
    """Every file of the table."""
    for model in MODELS:
        if not model.offered:
            yield file_of(model)
        for precision, rank in model.offered:
            yield file_of(model, precision, rank)


def known(name: str) -> tuple[Model, str | None, int | None] | None:
    """(model, precision, rank) that a name says, None for what it leaves out; None when it names no model of the table.

    Names are short ones ("flux.1-dev"), file names, old folder names ("svdq-int4-flux.1-dev"), each with or without folders before it.
    """
    base = re.sub(r"\.(safetensors|sft)$", "", name.strip().replace("\\", "/").strip("/").rsplit("/", 1)[-1].casefold())
    said = SVDQ.fullmatch(base)
    for model in MODELS:
        if said and model.offered and said[3] == model.name:
            return model, INT4 if said[1] == INT4 else FP4, int(said[2]) if said[2] else None
        if base == model.name or (not model.offered and base == file_of(model).name.removesuffix(".safetensors")):
            return model, None, None
    return None


def choose(model: Model, precision: str | None, rank: int | None) -> File:
    """The file in that precision, of that rank (32, or the nearest to it, where rank is None). NotPublished when there is none."""
    if not model.offered:
        if precision or rank:
            raise NotPublished(f"{model.name} is one file ({file_of(model).name}); leave --precision and --rank out.")
        return file_of(model)
    fitting = [(p, r) for p, r in model.offered if precision in (None, p) and rank in (None, r)]
    if not fitting:
        there = ", ".join(f"{p} of rank {r}" for p, r in model.offered)
        asked = " ".join(filter(None, (precision, f"of rank {rank}" if rank else None)))
        raise NotPublished(f"{model.name} is not published in {asked}. There is: {there}.")
    return file_of(model, *fitting[0])


def resolve(name: str, precision: str | None = None, rank: int | None = None, prefer: str = INT4) -> File:
    """The file that a name means. What `precision` and `rank` say goes before what the name says, and that before `prefer`.

    OWNER/REPO/FILE names any .safetensors file on the hub. NotPublished, with the nearest names, for one that means nothing.
    """
    found = known(name)
    parts = name.strip().strip("/").split("/")
    if len(parts) > 2 and (found is None or parts[1] == found[0].repo.split("/")[1]):  # else its first parts are a person's own folders
        if precision or rank:
            raise NotPublished(f"{name} is one file; leave --precision and --rank out.")
        return _on_the_hub(parts, found)
    if found is None:
        names = [model.name for model in MODELS]
        near = difflib.get_close_matches(name.casefold(), [*names, *(file.name for file in files())], n=4, cutoff=0.4)
        hint = f"The nearest names: {', '.join(near)}. " if near else ""
        raise NotPublished(
            f"'{name}' is no published file that this pack knows. {hint}`download --list` shows all; OWNER/REPO/FILE names any other."
        )
    model, said_precision, said_rank = found
    return choose(model, precision or said_precision or (prefer if model.offered else None), rank or said_rank)


def _on_the_hub(parts: Sequence[str], found: tuple | None) -> File:
    repo, path = "/".join(parts[:2]), "/".join(parts[2:])
    if not all(re.fullmatch(r"[\w.-]+", part) and part.strip(".") for part in parts):
        raise NotPublished(f"'{'/'.join(parts)}' is no OWNER/REPO/FILE of the hub.")
    if not path.endswith(".safetensors"):
        raise NotPublished(f"{path} is no .safetensors file, and this pack opens no other (a .pt or .bin file can run code).")
    if found:
        return File(repo, path, found[0].folder, found[0].family)
    encoder = re.match(r"(t5|clip|awq-.*t5)", parts[-1], re.IGNORECASE)
    return File(repo, path, "text_encoders" if encoder else "diffusion_models")


def asked_for(name: str, families: Sequence[str]) -> File | None:
    """The published file of one of `families` that a saved name means, or None: for the error of a loader that does not find it."""
    found = known(name)
    if found is None or found[0].family not in families:
        return None
    try:
        return choose(*found)
    except NotPublished:
        return None


def table() -> str:
    """What `download --list` prints."""
    rows = []
    for model in MODELS:
        ranks = {p: "/".join(str(r) for q, r in model.offered if q == p) for p, _ in model.offered}
        what = ", ".join(f"{p} r{r}" for p, r in ranks.items()) or file_of(model).name
        rows.append((model.name, what, model.repo))
    wide = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{name:{wide[0]}}  {what:{wide[1]}}  {repo}" for name, what, repo in rows)
