"""A model that lies in several .safetensors files of a folder, as diffusers and transformers write large ones."""

import json
import re
from pathlib import Path

from .tensorfile import CheckpointError, Entry, TensorFile

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


def files_of(path: Path, inside: str, expected: str) -> list[Path]:
    """The files behind what a person picked: the file, or the shards of a folder or of its sub-folder `inside`, where it has one.

    Raises CheckpointError where there is nothing, ending with the sentence `expected`, and for a list of shards that cannot be followed.
    """
    if not path.exists():
        raise CheckpointError(f"There is no file {path}.")
    if not path.is_dir():
        return [path]
    folder = path / inside if (path / inside).is_dir() else path
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        try:
            shards = set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values())
            found = [folder / Path(str(name)).name for name in sorted(shards)]
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as e:
            raise CheckpointError(f"{indices[0]} cannot be read as the list of a model's files ({e}). Download it again.") from e
        if missing := [p.name for p in found if not p.is_file()]:
            raise CheckpointError(f"{folder} lacks {missing[0]}, which {indices[0].name} lists. Download it again.")
        return found
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{path} is a folder without .safetensors files. {expected}")
    return found


def merged(files: list[TensorFile]) -> tuple[dict[str, Entry], dict[str, str]]:
    """Every tensor by its name, and the headers' metadata as one. Raises CheckpointError for a tensor that two files have."""
    out: dict[str, Entry] = {}
    for f in files:
        for key, entry in f.entries.items():
            if key in out:
                raise CheckpointError(
                    f"{key} is in both {out[key].file.path.name} and {f.path.name} of {f.path.parent}: give the file that is meant."
                )
            out[key] = entry
    return out, {key: value for f in files for key, value in f.metadata.items()}


def is_shard(path: str | Path) -> bool:
    """Whether a file is, by its name, one of several."""
    return bool(_SHARD.search(str(path)))
