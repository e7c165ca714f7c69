"""What is wrong with an adapter or a model is said before the model is touched."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from adapters import SITES, Net, assert_same, base_of, edit, exact, sparse
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_meansparse import adapter as room
from lightning_meansparse.adapter import load_adapter, read_adapter, save_adapter
from lightning_meansparse.adapter.files import CONFIG_NAME, TENSORS_NAME
from lightning_meansparse.surgery import (
    alphas,
    calibrate_,
    operators,
    sparsify_,
)

PIXELS = {"mean": [0.5], "std": [0.25], "bgr": False, "input_size": [1, 8, 8]}

# ------------------------------------------------------------------------------- what is not sound


def test_models_that_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="no MeanSparse operators"):
        save_adapter(Net(), tmp_path)
    net = Net()
    sparsify_(net, SITES)
    with pytest.raises(ValueError, match="not calibrated"):
        save_adapter(net, tmp_path)
    net = sparse()
    with pytest.raises(ValueError, match="evaluation lacks eps, norm"):
        save_adapter(net, tmp_path, evaluation={"n": 3, "attacks": []})
    for bad in ({"x": float("nan")}, {"x": torch.ones(1)}):
        with pytest.raises(ValueError, match="plain JSON"):
            save_adapter(net, tmp_path, calibration=bad)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="directory"):
        save_adapter(net, tmp_path / "file")
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_statistics_of_changed_weights_are_not_saved(tmp_path):
    net = sparse()
    fresh = base_of(net)
    load_adapter(fresh, save_adapter(net, tmp_path))
    with torch.no_grad():
        fresh.conv1.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="Calibrate again"):
        save_adapter(fresh, tmp_path)
    calibrate_(fresh, [torch.randn(16, 1, 8, 8)])
    save_adapter(fresh, tmp_path)


def test_sparsified_model_and_lacking_sites(tmp_path):
    net = sparse()
    folder = save_adapter(net, tmp_path)
    before = alphas(net)
    with pytest.raises(ValueError, match="already sparsified"):
        load_adapter(net, folder)
    assert alphas(net) == before
    other = nn.Sequential(nn.Conv2d(1, 4, 3))
    with pytest.raises(ValueError, match=r"lacks sites.*act1@in"):
        load_adapter(other, folder)
    renamed = base_of(net)
    renamed.act_2 = renamed.act2
    del renamed.act2
    with pytest.raises(ValueError, match=r"act2@in \(it has .*act_2"):
        load_adapter(renamed, folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(format_version=3), r"format_version is 3.*up to 2. Upgrade"),
        (lambda c: c.update(format_version="1"), "format_version"),
        (lambda c: c.update(format_version=True), "format_version"),
        (lambda c: c.pop("format_version"), "format_version"),
        (lambda c: c.update(sites=[]), "sites is empty"),
        (lambda c: c.update(sites="act1@in"), "sites must be a list"),
        (lambda c: c["sites"].append(c["sites"][0]), "named twice"),
        (lambda c: c["sites"].pop(), "too many act2@in"),
        (lambda c: c["sites"][0].update(site="act9@in"), "missing act9@in"),
        (lambda c: c["sites"][0].update(site="../../etc/passwd"), r"sites\[0\].*name"),
        (lambda c: c["sites"][0].update(shape=[4]), "shape"),
        (lambda c: c["sites"][0].update(shape=[10**12]), "shape"),
        (lambda c: c["sites"][0].update(shape=[-4, 1, 1]), "shape"),
        (lambda c: c["sites"][0].update(alpha=-0.1), "alpha"),
        (lambda c: c["sites"][0].update(alpha="0.1"), "alpha"),
        (lambda c: c["sites"][0].update(alpha=10**400), "alpha"),
        (lambda c: c["sites"][0].update(axis=[-1]), r"axis must be \[-3\]"),
        (lambda c: c["sites"][1].update(site="../act2@in"), "missing ../act2@in"),
        (lambda c: c["sites"].__setitem__(0, None), r"sites\[0\]"),
        (lambda c: c.update(center="median"), "center"),
        (lambda c: c.update(statistics=None), "statistics"),
        (lambda c: c.update(base=None), "base"),
        (lambda c: c["base"].update(fingerprint={}), "another base"),
        (lambda c: c["base"].update(source=1), "source"),
        (lambda c: c["base"].update(options=[]), "options"),
        (lambda c: c["base"].update(pixels={}), "mean must be 1 to 4 numbers"),
        (lambda c: c["base"].update(pixels=PIXELS | {"std": [10**400]}), "std must be finite"),
        (lambda c: c["base"].update(pixels=PIXELS | {"bgr": 1}), "bgr"),
        (lambda c: c["base"].update(pixels=PIXELS | {"input_size": [3]}), "input_size"),
        (lambda c: c.update(versions=["1"]), "versions"),
        (lambda c: c["versions"].update(torch=2), "versions"),
        (lambda c: c.update(calibration=[]), "calibration"),
        (lambda c: c.update(evaluation={"n": 1}), "evaluation lacks"),
        (lambda c: c.update(tensors_sha256="0"), "do not belong together"),
    ],
)
def test_bad_configs(tmp_path, change, match):
    net = sparse()
    folder = save_adapter(net, tmp_path)
    edit(folder, change)
    fresh = base_of(net)
    with pytest.raises(ValueError, match=match):
        load_adapter(fresh, folder)
    assert operators(fresh) == {}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("act1@in.mean"), "missing act1@in.mean"),
        (lambda t: t.update(extra=torch.ones(1)), "too many extra"),
        (lambda t: t.update({"act1@in.mean": torch.ones(4)}), "shape"),
        (lambda t: t.update({"act1@in.mean": torch.ones(4, 1, 1).half()}), "float32"),
        (lambda t: t.pop("act1@in.count"), "missing act1@in.count"),
        (lambda t: t.update({"act1@in.m2": torch.ones(4, 1, 1)}), "float64"),
        (lambda t: t.update({"act1@in.count": torch.ones(4).long()}), "shape"),
        (lambda t: t["act1@in.mean"].fill_(torch.nan), "mean must be finite"),
        (lambda t: t["act1@in.mean"][2].fill_(-torch.inf), "mean must be finite"),
        (lambda t: t["act1@in.m2"].fill_(torch.inf), "m2 must be finite"),
        (lambda t: t["act1@in.m2"][1].fill_(-1e-9), "not negative"),
        (lambda t: t["act1@in.m2"].fill_(1e300), "finite in float32"),
        (lambda t: t["act1@in.count"].fill_(-1), "count must be finite and not negative"),
    ],
)
def test_bad_tensors(tmp_path, change, match):
    net = sparse()
    folder = save_adapter(net, tmp_path)
    tensors = load_file(folder / TENSORS_NAME)
    change(tensors)
    save_file(tensors, folder / TENSORS_NAME)
    fresh = base_of(net)
    with pytest.raises(ValueError, match=match):
        load_adapter(fresh, folder)
    assert operators(fresh) == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "null",
        '{"format_version": NaN}',
        '{"format_version": 1, "sites": [], "sites": []}',
        '{"a": [{"b": 1, "b": 1}]}',
        '{"format_version": 1e999}',
        "[" * 100_000,
        "9" * 5000,
        "\xff",
    ],
)
def test_broken_json(tmp_path, text):
    folder = save_adapter(sparse(), tmp_path)
    (folder / CONFIG_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=CONFIG_NAME):
        read_adapter(folder)


def test_broken_missing_and_huge_files(tmp_path, monkeypatch):
    folder = save_adapter(sparse(), tmp_path)
    (folder / TENSORS_NAME).write_bytes(b"pickle?")
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        read_adapter(folder)
    for legacy in (True, False):
        tensors = {"act1@in.mean": torch.ones(4, 1, 1)}
        torch.save(tensors, folder / TENSORS_NAME, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match=r"is a pickle.*not opened"):
            read_adapter(folder)
    (folder / TENSORS_NAME).unlink()
    os.mkfifo(folder / TENSORS_NAME)
    with pytest.raises(FileNotFoundError, match=TENSORS_NAME):
        read_adapter(folder)
    monkeypatch.setattr(room.files, "_MAX_CONFIG_BYTES", 10)
    with pytest.raises(ValueError, match="more than the 10"):
        read_adapter(folder)
    with pytest.raises(FileNotFoundError, match=CONFIG_NAME):
        read_adapter(tmp_path.parent)


def test_symlinks_as_in_the_hubs_cache_are_followed(tmp_path):
    net = sparse()
    blobs = save_adapter(net, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in (CONFIG_NAME, TENSORS_NAME):
        (tmp_path / "snapshot" / name).symlink_to(blobs / name)
    fresh = base_of(net)
    load_adapter(fresh, tmp_path / "snapshot")
    assert_same(net, fresh)


def test_truncated_files_anywhere(tmp_path):
    folder = save_adapter(sparse(), tmp_path)
    for name in (CONFIG_NAME, TENSORS_NAME):
        whole = (folder / name).read_bytes()
        for size in range(0, len(whole) - 1, 37):
            (folder / name).write_bytes(whole[:size])
            with pytest.raises(ValueError, match=name):
                read_adapter(folder)
        (folder / name).write_bytes(whole)
    read_adapter(folder)


def test_what_a_newer_version_added_is_named_and_kept(tmp_path):
    net = sparse()
    folder = save_adapter(net, tmp_path)
    edit(
        folder,
        lambda c: (
            c.update(licence="MIT"),
            c["sites"][1].update(gain=0.1),
            c["base"].update(size=[1, {"a": None}]),
        ),
    )
    fresh = base_of(net)
    named = re.escape("licence, sites[1].gain, base.size")
    with pytest.warns(UserWarning, match=named):
        load_adapter(fresh, folder)
    assert_same(net, fresh)
    again = save_adapter(fresh, tmp_path / "again")
    config = json.loads((again / CONFIG_NAME).read_text())
    assert (config["licence"], config["sites"][1]["gain"]) == ("MIT", 0.1)
    assert config["base"]["size"] == [1, {"a": None}]
    with pytest.warns(UserWarning, match=named):
        read_adapter(again)


# ------------------------------------------------------------------------ the promise to version 1


def test_version_1_is_read_for_ever(tmp_path):
    """The files were written by version 0.1.0; their base has the same weights on every machine."""
    old = Path(__file__).parent / "adapter_format_1"
    net, images = exact()
    adapter = load_adapter(net, old)
    assert (adapter.source, adapter.revision) == ("org/net", "abc")
    assert adapter.calibration == {"dataset": "noise", "split": "train", "images": 16}
    assert adapter.versions == {"lightning_meansparse": "0.1.0"}
    assert adapter.alphas == (0.2, 0.12345679)
    stored = load_file(old / TENSORS_NAME)
    for name, op in operators(net).items():
        assert torch.equal(op.mean, stored[f"{name}.mean"])
        assert torch.equal(op.var, stored[f"{name}.var"])
        assert op.count == 0  # not known
    again = save_adapter(net, tmp_path)
    assert json.loads((again / CONFIG_NAME).read_text())["format_version"] == 2
    fresh, _ = exact()
    load_adapter(fresh, again)
    assert torch.equal(fresh(images), net(images))
    measured, _ = exact()
    sparsify_(measured, adapter.sites)
    calibrate_(measured, [images])
    for name, op in operators(measured).items():
        assert torch.allclose(op.var, stored[f"{name}.var"], rtol=1e-5)


def test_adapters_in_the_documentation_are_read():
    found = list((Path(__file__).parent.parent / "docs" / "records").rglob(CONFIG_NAME))
    assert found
    for path in found:
        assert read_adapter(path.parent).sites


def test_version_1_does_not_have_the_keys_of_version_2(tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(Path(__file__).parent / "adapter_format_1", folder)
    edit(folder, lambda c: (c["base"].update(options={"num_classes": 3}), c.update(versions=1)))
    with pytest.warns(UserWarning, match=r"versions, base\.options"):
        adapter = read_adapter(folder)
    assert adapter.options is None
