"""Damaged files by the hundred: each is refused with a sentence, or read as exactly the model it was made from.

Some damage cannot be told from intent (a plain tensor whose 16-bit type was renamed, a rotary split in the metadata that is another valid
split). There a warning is demanded: never a wrong model in silence.
"""

import copy
import importlib.util
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tonfa.models.dequantize import dense_state_dict
from tonfa.models.formats.checkpoint import CheckpointError, open_checkpoint
from tonfa.models.inspect import format_report, inspect

_spec = importlib.util.spec_from_file_location("flux_files", Path(__file__).parent / "flux_files.py")
ff = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ff)

NAMES = ["mini_flux_int4", "mini_flux_nvfp4"]
TEXT = {name: ff.raw_header(ff.DATA / f"{name}.safetensors") for name in NAMES}
KEYS = {name: sorted(k for k in json.loads(TEXT[name][0]) if k != "__metadata__") for name in NAMES}
TRUTH: dict[str, tuple] = {}

FUZZ = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(-2, 2**64), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip


def facts(path):
    c = open_checkpoint(path)
    model = (c.config, c.model_class, c.precision, c.ranks)
    tensors = dict(dense_state_dict(c, torch.float32))
    c.close()
    return model, tensors, c.warnings


def judge(path, name):
    """The property. Returns what happened: "refused", "right" or "warned"."""
    if name not in TRUTH:
        TRUTH[name] = facts(ff.DATA / f"{name}.safetensors")
    report = inspect(path)
    assert report["sentence"] and format_report(report)
    try:
        model, tensors, warnings = facts(path)
    except CheckpointError as e:
        assert len(str(e)) > 20 and path.name in str(e), str(e)
        return "refused"
    right = model == TRUTH[name][0] and tensors.keys() == TRUTH[name][1].keys()
    right = right and all(torch.equal(t, TRUTH[name][1][k]) for k, t in tensors.items())
    assert right or warnings, "a wrong model in silence"
    return "right" if right else "warned"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "fuzzed.safetensors"


@FUZZ
@given(name=st.sampled_from(NAMES), data=st.data())
def test_changed_shapes(target, name, data):
    text, blob = TEXT[name]
    header = json.loads(text)
    entry = header[data.draw(st.sampled_from(KEYS[name]))]
    old = list(entry["shape"])
    at = data.draw(st.integers(0, len(old) - 1))
    factor = data.draw(st.sampled_from([2, 4, 16]))
    entry["shape"] = data.draw(
        st.one_of(
            st.sampled_from([old[::-1], [*old, 1], [1, *old], old[:-1], [], [0, *old], [-old[0], -old[-1]], [float(x) for x in old]]),
            st.just([x * factor if i == at else x // factor for i, x in enumerate(old)]),
            st.just([x + factor if i == at else x for i, x in enumerate(old)]),
            st.lists(st.integers(0, 2**70), max_size=10),
            JUNK,
        )
    )
    result = judge(ff.write_raw(target, header, blob), name)
    assert result == "refused" or entry["shape"] == old or entry["shape"] == []


@FUZZ
@given(name=st.sampled_from(NAMES), data=st.data())
def test_changed_types(target, name, data):
    text, blob = TEXT[name]
    header = json.loads(text)
    entry = header[data.draw(st.sampled_from(KEYS[name]))]
    same_size = {"BF16": ["F16", "I16", "U16"], "I8": ["U8", "F8_E4M3", "BOOL"], "F8_E4M3": ["F8_E5M2", "I8", "U8"], "I32": ["F32", "U32"]}
    others = same_size[entry["dtype"]]
    entry["dtype"] = data.draw(st.one_of(st.sampled_from(others), st.sampled_from(["F32", "F64", "F4", "bf16", ""]), JUNK))
    judge(ff.write_raw(target, header, blob), name)


@FUZZ
@given(name=st.sampled_from(NAMES), data=st.data())
def test_changed_offsets(target, name, data):
    text, blob = TEXT[name]
    header = json.loads(text)
    keys = KEYS[name]
    entry = header[data.draw(st.sampled_from(keys))]
    a, b = entry["data_offsets"]
    shift = data.draw(st.integers(-4096, 4096))
    choices = [[a + shift, b], [a, b + shift], [a + shift, b + shift], [b, a], [a], [a, b, b], [-1, b], [a, 2**63], [a, b + 2**64], JUNK]
    choice = data.draw(st.sampled_from(range(len(choices))))
    entry["data_offsets"] = data.draw(JUNK) if choices[choice] is JUNK else choices[choice]
    judge(ff.write_raw(target, header, blob), name)


@FUZZ
@given(name=st.sampled_from(NAMES), data=st.data())
def test_dropped_and_renamed(target, name, data):
    """Files that are whole safetensors files, but lack some tensors or have them under other names."""
    text, blob = TEXT[name]
    header = json.loads(text)
    out, bits, at = {"__metadata__": header.pop("__metadata__")}, [], 0
    chosen = set(data.draw(st.lists(st.sampled_from(KEYS[name]), min_size=1, max_size=3, unique=True)))
    drop = data.draw(st.booleans())
    for i, key in enumerate(KEYS[name]):
        start, end = header[key]["data_offsets"]
        to = key
        if key in chosen:
            if drop:
                continue
            v2 = next(iter(ff.as_v2({key: None})))
            to = data.draw(
                st.sampled_from([v2, key + "x", "x" + key, key[:-1], key.replace(".0.", ".1.", 1), key.replace(".", "", 1), f"t{i}", ""])
            )
        if to in out:
            continue
        out[to] = header[key] | {"data_offsets": [at, at + end - start]}
        bits.append(blob[start:end])
        at += end - start
    result = judge(ff.write_raw(target, out, b"".join(bits)), name)
    if drop:
        harmless = all(k.endswith("smooth_orig") for k in chosen)
        top = all(k.endswith(("smooth_orig", "wtscale", "wcscales")) for k in chosen)
        assert result == ("right" if harmless else "warned" if top else "refused")


@FUZZ
@given(name=st.sampled_from(NAMES), data=st.data())
def test_garbled_header_bytes(target, name, data):
    text, blob = TEXT[name]
    raw = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.integers(0, 2))
        if how == 0:
            raw[at] = data.draw(st.integers(0, 255))
        elif how == 1:
            del raw[at : at + data.draw(st.integers(1, 40))]
        else:
            raw[at:at] = data.draw(st.binary(max_size=8))
        if not raw:
            break
    judge(ff.write_raw(target, bytes(raw), blob), name)


@FUZZ
@given(name=st.sampled_from(NAMES), data=st.data())
def test_cut_and_lengthened(target, name, data):
    text, blob = TEXT[name]
    whole = struct.pack("<Q", len(text)) + text.encode() + blob
    size = data.draw(st.one_of(st.integers(0, len(whole) - 1), st.integers(0, len(text) + 8)))
    target.write_bytes(whole[:size] + data.draw(st.sampled_from([b"", b"\0" * 16])))
    assert judge(target, name) == "refused"


@FUZZ
@given(name=st.sampled_from(NAMES), length=st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 30_000)))
def test_header_length(target, name, length):
    text, blob = TEXT[name]
    result = judge(ff.write_raw(target, text, blob, length=length), name)
    assert result == "refused" or length == len(text)


@FUZZ
@given(name=st.sampled_from(NAMES), data=st.data())
def test_metadata(target, name, data):
    text, blob = TEXT[name]
    header = json.loads(text)
    meta = header["__metadata__"]
    key = data.draw(st.sampled_from(["config", "comfy_config", "quantization_config", "model_class"]))
    how = data.draw(st.sampled_from(["text", "drop", "type", "value", "value", "value", "all"]))
    if how == "text":
        meta[key] = data.draw(st.text(max_size=30))
    elif how == "drop":
        del meta[key]
    elif how == "type":
        meta[key] = data.draw(JUNK)
    elif how == "all":
        header["__metadata__"] = data.draw(JUNK)
    elif key != "model_class":
        tree = json.loads(meta[key])
        place = tree
        while True:
            step = data.draw(st.sampled_from(sorted(place)))
            if not isinstance(place[step], dict) or data.draw(st.integers(0, 4)) == 0:
                break
            place = place[step]
        value = data.draw(st.one_of(JUNK, st.sampled_from(["int4", "fp4_e2m1_all", "FluxSchnell", [6, 4, 6], 128, 19, 1])))
        place[step] = copy.deepcopy(value)
        meta[key] = json.dumps(tree)
    judge(ff.write_raw(target, header, blob), name)


@FUZZ
@given(name=st.sampled_from(NAMES), data=st.data())
def test_duplicated_entries(target, name, data):
    """JSON lets a name come twice and readers take the last; the two may say different things, so this is damage."""
    text, blob = TEXT[name]
    header = json.loads(text)
    key, other = (data.draw(st.sampled_from(KEYS[name])) for _ in range(2))
    extra = f"{json.dumps(key)}:{json.dumps(header[other])}"
    front = data.draw(st.booleans())
    doubled = "{" + extra + "," + text[1:] if front else text.rstrip()[:-1] + "," + extra + "}"
    assert judge(ff.write_raw(target, doubled, blob), name) == "refused"
