"""What is wrong with an adapter or a model is said before the model is touched."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from adapters import SITES, Net, assert_same, base_of, edit, exact, sparse
from bad_adapters import BAD
from safetensors.torch import load_file
from torch import nn

from lightning_meansparse.adapter import load_adapter, read_adapter, save_adapter
from lightning_meansparse.adapter.files import CONFIG_NAME, TENSORS_NAME
from lightning_meansparse.adapter.format import FORMAT_VERSION
from lightning_meansparse.surgery import (
    alphas,
    calibrate_,
    operators,
    restore_,
    sparsify_,
)

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


@pytest.mark.parametrize("name", BAD)
def test_adapters_that_are_not_sound(tmp_path, name):
    damage, match = BAD[name]
    net = sparse()
    folder = save_adapter(net, tmp_path)
    fresh = base_of(net)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    load_adapter(fresh, folder)  # sound as yet
    restore_(fresh)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        load_adapter(fresh, folder)
    assert operators(fresh) == {}
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match=CONFIG_NAME):
        read_adapter(tmp_path)


def test_symlinks_as_in_the_hubs_cache_are_followed(tmp_path):
    net = sparse()
    blobs = save_adapter(net, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in (CONFIG_NAME, TENSORS_NAME):
        (tmp_path / "snapshot" / name).symlink_to(blobs / name)
    fresh = base_of(net)
    load_adapter(fresh, tmp_path / "snapshot")
    assert_same(net, fresh)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_or_an_archive(tmp_path, length):
    folder = save_adapter(sparse(), tmp_path)
    data = (folder / TENSORS_NAME).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    data = length.to_bytes(8, "little") + data[8:start].ljust(length) + data[start:]
    (folder / TENSORS_NAME).write_bytes(data)
    edit(folder, lambda config: config.update(tensors_sha256=hashlib.sha256(data).hexdigest()))
    assert read_adapter(folder).sites == SITES


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


# ----------------------------------------------------------------------- the promise to old files


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


def test_version_2_is_read_for_ever(tmp_path):
    old = Path(__file__).parent / "adapter_format_2"
    net, images = exact()
    adapter = load_adapter(net, old)
    assert (adapter.source, adapter.revision) == ("timm/hf-hub:org/net", "abc")
    assert (adapter.library, adapter.architecture) == ("timm", "Net")
    assert adapter.options == {"num_classes": 3}
    pixels = {"mean": [0.5], "std": [0.25], "bgr": False, "input_size": [1, 8, 8]}
    assert adapter.pixels == pixels
    assert adapter.calibration["revision"] == "v1"
    assert adapter.evaluation["n"] == 16
    assert adapter.alphas == (0.2, 0.12345679)
    stored = load_file(old / TENSORS_NAME)
    for name, op in operators(net).items():
        assert torch.equal(op.mean, stored[f"{name}.mean"])
        assert op.count == stored[f"{name}.count"] == {"act1@in": 576, "act2@in": 256}[name]
        assert torch.equal(op.var, (stored[f"{name}.m2"] / op.count).float())
    again = save_adapter(net, tmp_path)
    written = load_file(again / TENSORS_NAME)
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], value) for name, value in stored.items())
    fresh, _ = exact()
    load_adapter(fresh, again)
    assert torch.equal(fresh(images), net(images))


def test_every_version_so_far_has_its_files():
    kept = {f"adapter_format_{version}" for version in range(1, FORMAT_VERSION + 1)}
    assert kept == {path.name for path in Path(__file__).parent.glob("adapter_format_*")}


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


def test_a_library_that_is_none_is_kept_and_not_looked_up(tmp_path):
    net = sparse()
    folder = save_adapter(net, tmp_path)
    edit(folder, lambda c: c["base"].update(library=""))
    fresh = base_of(net)
    load_adapter(fresh, folder)
    again = read_adapter(save_adapter(fresh, tmp_path / "again"))
    assert again.library == ""
    assert set(again.versions) == {"lightning_meansparse", "torch"}
