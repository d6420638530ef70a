"""Files that are something else: the refusal says what, and what to do."""

import gzip
import zipfile

import pytest
from tonfa.models.formats.tensorfile import CheckpointError, TensorFile

GARBAGE = bytes(range(1, 256)) * 20
OTHERS = {
    "text": (b"Access denied. Please accept the licence of this model first.\n", ["looks like text", "Access denied", "Download it again"]),
    "json": (b'{"error": "Repository not found", "code": 404}', ["looks like text", "Download it again"]),
    "long text": ("é and more text\n".encode() * 400, ["looks like text", "Download it again"]),
    "gzip": (gzip.compress(GARBAGE), ["gzip archive", "Download it again"]),
    "7z": (b"7z\xbc\xaf\x27\x1c" + GARBAGE, ["7-Zip archive", "Download it again"]),
    "png": (b"\x89PNG\r\n\x1a\n" + GARBAGE, ["PNG picture", "Download it again"]),
    "zeros": (bytes(4096), ["zeros", "Download it again"]),
    "garbage": (GARBAGE, ["not a safetensors file", "Download it again"]),
    "gguf": (b"GGUF\x03\0\0\0" + GARBAGE, ["GGUF file", "Unet Loader (GGUF)"]),
    "pickle": (b"\x80\x02}q\x00." + GARBAGE, ["PyTorch pickle"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_file_looks_like_is_said(tmp_path, name):
    content, words = OTHERS[name]
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        TensorFile(path)
    said = str(raised.value)
    assert str(path) in said and all(word in said for word in words), said
    assert "\n" not in said and len(said) < len(str(path)) + 250


def test_a_zip_that_is_no_pickle_is_a_zip(tmp_path):
    path = tmp_path / "m.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.safetensors", GARBAGE)
    with pytest.raises(CheckpointError, match="is a zip archive.*Unpack it"):
        TensorFile(path)
