"""Whatever stands in the files: an adapter is read, or refused in words, and never by halves.

``FUZZ_CASES=10000 pytest tests/test_adapter_fuzz.py`` looks longer, and at other cases each time.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from adapters import SITES, assert_same, base_of, exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_meansparse.adapter import load_adapter, save_adapter
from lightning_meansparse.adapter.files import CONFIG_NAME, TENSORS_NAME
from lightning_meansparse.surgery import calibrate_, operators, restore_, sparsify_

CASES = int(os.environ.get("FUZZ_CASES", "0"))
often = settings(
    max_examples=CASES or 250,
    derandomize=not CASES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 1, 2, 3, 2**24, 2**63, 10**400, 0.5, -0.0, 1e38, 1e39, -1e308]),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["act1@in", "act2@in", "@in", "../x@in", "act1@out[0]", "channel", "official", "float16"]
    ),
    st.sampled_from(["/etc/passwd", "a\0b", "\ud800", "site", "__class__", "x" * 10_000]),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(TEXTS | st.sampled_from(["site", "shape", "alpha", "base"]), inner)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A base, its adapter's files in memory, and a folder to write others into."""
    net, images = exact()
    base = base_of(net)
    sparsify_(net, SITES, alpha=0.2)
    calibrate_(net, [images])
    folder = save_adapter(net, tmp_path_factory.mktemp("fuzz"), calibration={"images": 16})
    files = {name: (folder / name).read_bytes() for name in (CONFIG_NAME, TENSORS_NAME)}
    return base, files, folder


def check(sound, config: bytes, tensors: bytes) -> bool:
    """Read these files onto the base. Returns whether they were accepted."""
    base, _, folder = sound
    (folder / CONFIG_NAME).write_bytes(config)
    (folder / TENSORS_NAME).write_bytes(tensors)
    before = (type(base), [*base.modules()], {k: v.clone() for k, v in base.state_dict().items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            adapter = load_adapter(base, folder)
        except ValueError:
            accepted = False
        else:
            accepted = True
            _accepted(base, adapter, folder.parent / "again")
    restore_(base)
    assert (type(base), [*base.modules()]) == before[:2]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in base.modules())
    assert all(torch.equal(v, before[2][k]) for k, v in base.state_dict().items())
    return accepted


def _accepted(model, adapter, again: Path) -> None:
    """What was taken has numbers that an operator can work with, and can be written again."""
    assert [*operators(model)] == [str(site) for site in adapter.sites]
    for op in operators(model).values():
        assert bool(op.mean.isfinite().all() & op.var.isfinite().all() & (op.var >= 0).all())
        assert bool(op.alpha.isfinite() & (op.alpha >= 0))
    twin = base_of(model)
    load_adapter(twin, save_adapter(model, again))
    assert_same(model, twin)


def signed(config: dict, tensors: bytes) -> bytes:
    """The config with the hash of these tensors, so that what else is wrong is looked at."""
    config["tensors_sha256"] = hashlib.sha256(tensors).hexdigest()
    return json.dumps(config).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """Bytes replaced, cut out, put in or cut off."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = start + draw(st.sampled_from([0, 1, 1, 2, 8, 100, len(data)]))
        data = data[:start] + draw(st.binary(max_size=9)) + data[stop:]
    return data


@st.composite
def altered(draw, value):
    """The JSON value with other values, keys too many or too few, at one to three places."""
    root = {"": json.loads(json.dumps(value))}
    for _ in range(draw(st.integers(1, 3))):
        place, key = root, ""
        while isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 3)):
            place = place[key]
            keys = [*place] if isinstance(place, dict) else [*range(len(place))]
            key = draw(st.sampled_from(keys))
        action = draw(st.sampled_from(["replace", "replace", "remove", "add", "double"]))
        if action == "remove" and place is not root:
            del place[key]
        elif action == "add" and isinstance(place[key], dict):
            place[key][draw(TEXTS)] = draw(JSON)
        elif action == "double" and isinstance(place, list):
            place.append(place[key])
        else:
            place[key] = draw(JSON)
    return root[""]


@st.composite
def other_tensors(draw, data: bytes):
    """One or two of the tensors with other numbers, shapes, dtypes or names."""
    tensors = safetensors.torch.load(data)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(tensors)))
        value = tensors.pop(name)
        change = draw(
            st.sampled_from(["number", "number", "all", "shape", "dtype", "name", "gone"])
        )
        if change in ("number", "all") and value.numel():
            numbers = st.sampled_from([-1.0, -1e-9, 1e38, 1e300]) | st.floats(width=32)
            if not value.is_floating_point():
                numbers = st.integers(-(2**63), 2**63 - 1)
            number = torch.tensor(draw(numbers), dtype=torch.float64).to(value.dtype)
            place = slice(None) if change == "all" else draw(st.integers(0, value.numel() - 1))
            value = value.clone()
            value.reshape(-1)[place] = number
        elif change == "shape":
            shape = draw(st.sampled_from([(), (0,), (4,), (1, 4, 1, 1), (5, 1, 1)]))
            value = value.new_zeros(shape)
        elif change == "dtype":
            dtype = draw(st.sampled_from(["float16", "float32", "float64", "int64", "bool"]))
            value = value.to(getattr(torch, dtype))
        elif change == "name":
            name = draw(st.sampled_from(["", "x", f"../{name}", f"{name} ", name.upper()]))
        if change != "gone":
            tensors[name] = value
    return tensors


@often
@given(data=st.data())
def test_damaged_bytes(sound, data):
    _, files, _ = sound
    which = data.draw(st.sampled_from([CONFIG_NAME, TENSORS_NAME]))
    found = {**files, which: data.draw(damaged(files[which]))}
    if which == TENSORS_NAME and data.draw(st.booleans()):
        found[CONFIG_NAME] = signed(json.loads(files[CONFIG_NAME]), found[TENSORS_NAME])
    check(sound, found[CONFIG_NAME], found[TENSORS_NAME])


@often
@given(data=st.data())
def test_other_json(sound, data):
    _, files, _ = sound
    config = data.draw(altered(json.loads(files[CONFIG_NAME])))
    text = json.dumps(config).encode("utf-8", "surrogatepass")
    if isinstance(config, dict) and data.draw(st.booleans()):
        text = signed(config, files[TENSORS_NAME])
    check(sound, text, files[TENSORS_NAME])


@often
@given(data=st.data())
def test_other_tensors(sound, data):
    _, files, _ = sound
    written = safetensors.torch.save(data.draw(other_tensors(files[TENSORS_NAME])))
    check(sound, signed(json.loads(files[CONFIG_NAME]), written), written)


@often
@given(config=st.binary(max_size=200), tensors=st.binary(max_size=200))
def test_any_bytes(sound, config, tensors):
    assert not check(sound, config, tensors)


def test_the_sound_files_are_accepted(sound):
    """Or the tests above would hold for a reader that refuses everything."""
    _, files, _ = sound
    assert check(sound, files[CONFIG_NAME], files[TENSORS_NAME])
    config = json.loads(files[CONFIG_NAME])
    config["new"] = [None]
    assert check(sound, signed(config, files[TENSORS_NAME]), files[TENSORS_NAME])
