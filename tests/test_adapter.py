"""Adapters round-trip exactly, and whatever is wrong is said before the model is touched."""

import copy
import json
import os
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_meansparse import adapter as room
from lightning_meansparse.adapter import base_module, load_adapter, read_adapter, save_adapter
from lightning_meansparse.adapter.base import Fingerprint
from lightning_meansparse.adapter.files import CONFIG_NAME, TENSORS_NAME
from lightning_meansparse.classifier import Classifier
from lightning_meansparse.sites import Site
from lightning_meansparse.surgery import (
    alphas,
    calibrate_,
    operators,
    restore_,
    set_alpha,
    sparsify_,
)

SITES = (Site("act1", "in", (4, 1, 1)), Site("act2", "in", (5, 1, 1)))


class Net(nn.Module):
    """Two convolutions and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.act1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.act2, self.head = nn.Conv2d(4, 5, 3), nn.GELU(), nn.Linear(5, 3)

    def forward(self, x):
        x = self.act1(self.bn(self.conv1(x)))
        return self.head(self.act2(self.conv2(x)).mean((2, 3)))


class Wrapper(LightningModule):
    """A module around a network, with a metric-like child that has no parameters."""

    def __init__(self, net):
        super().__init__()
        self.loss = nn.CrossEntropyLoss()
        self.net = net

    def forward(self, x):
        return self.net(x)


def sparse(net=None, center="channel"):
    net = (net or Net()).eval()
    sparsify_(net, SITES, alpha=0.2, center=center)
    calibrate_(net, [torch.randn(16, 1, 8, 8)])
    return net


def base_of(net):
    twin = copy.deepcopy(net)
    restore_(twin)
    return twin


def assert_same(a, b):
    assert alphas(a) == alphas(b)
    for one, other in zip(operators(a).values(), operators(b).values(), strict=True):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.var, other.var)
        assert torch.equal(one.alpha, other.alpha)
        assert one.center == other.center
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(a(x), b(x))


def edit(folder, change):
    """Rewrite a config after ``change`` was applied to it."""
    path = Path(folder) / CONFIG_NAME
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


# ------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("center", ["channel", "global", "zero"])
def test_round_trip_is_exact(tmp_path, center):
    net = sparse(center=center)
    set_alpha(net, {"act2@in": 0.123456789})
    facts = {"dataset": "noise", "split": "train", "images": 16}
    measured = {
        "n": 100,
        "eps": 8 / 255,
        "norm": "Linf",
        "attacks": ["pgd"],
        "interval": [0.1, 0.3],
    }
    folder = save_adapter(
        net,
        tmp_path / "a" / "b",
        base="org/net",
        revision="abc",
        statistics="official",
        calibration=facts,
        evaluation=measured,
    )
    assert sorted(f.name for f in folder.iterdir()) == [TENSORS_NAME, CONFIG_NAME]
    fresh = base_of(net)
    adapter = load_adapter(fresh, str(folder))
    assert_same(net, fresh)
    assert (adapter.source, adapter.revision, adapter.statistics) == ("org/net", "abc", "official")
    assert (adapter.calibration, adapter.evaluation) == (facts, measured)
    again = save_adapter(fresh, tmp_path / "again", base="org/net", revision="abc")
    assert (again / TENSORS_NAME).read_bytes() == (folder / TENSORS_NAME).read_bytes()
    assert sum(f.stat().st_size for f in folder.iterdir()) < 4096


def test_config_is_what_the_docs_say(tmp_path):
    config = json.loads((save_adapter(sparse(), tmp_path) / CONFIG_NAME).read_text())
    assert config["format_version"] == 1
    assert config["sites"][0] == {"site": "act1@in", "shape": [4, 1, 1], "alpha": 0.2}
    assert set(config["base"]["fingerprint"]) == {"float32", "float16", "bfloat16"}
    assert config["calibration"] is None


@pytest.mark.parametrize("wrap", [Wrapper, Classifier, lambda net: Wrapper(Classifier(net))])
def test_wrappers_do_not_matter(tmp_path, wrap):
    net = Net().eval()
    outer = wrap(net)
    assert base_module(outer) is net
    sparse(net)
    folder = save_adapter(outer, tmp_path)
    plain = base_of(net)
    load_adapter(plain, folder)
    assert_same(net, plain)
    other = wrap(base_of(net)).eval()
    load_adapter(other, folder)
    assert_same(net, base_module(other))


def test_base_module_of_other_shapes():
    boring = BoringModel()
    assert base_module(boring) is boring.layer
    two = Wrapper(Net())
    two.head = nn.Linear(3, 3)
    assert base_module(two) is two
    net = Net()
    assert base_module(net) is net
    compiled = nn.Module()  # stands for torch's OptimizedModule, whose import takes seconds
    compiled._orig_mod = net
    assert base_module(compiled) is net
    assert base_module(nn.DataParallel(Wrapper(net))) is net


def test_activation_outside_the_only_child(tmp_path):
    class Outside(Wrapper):
        def __init__(self):
            super().__init__(nn.Conv2d(1, 4, 3))
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(self.net(x))

    model = Outside()
    sparsify_(model, [Site("act", "in", (4, 1, 1))], alpha=0.5)
    calibrate_(model, [torch.randn(8, 1, 8, 8)])
    folder = save_adapter(model, tmp_path)
    fresh = base_of(model)
    assert [str(site) for site in load_adapter(fresh, folder).sites] == ["act@in"]
    assert_same(model, fresh)


def test_saving_again_replaces_and_leaves_other_files_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    net = sparse()
    save_adapter(net, tmp_path)
    set_alpha(net, 0.4)
    save_adapter(net, tmp_path)
    assert read_adapter(tmp_path).alphas == (0.4, 0.4)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["README.md", TENSORS_NAME, CONFIG_NAME]
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("crash_at", [0, 1])
def test_a_crash_never_leaves_a_config_without_its_tensors(tmp_path, monkeypatch, crash_at):
    replace, calls = os.replace, []

    def crashing(source, target):
        calls.append(target)
        if len(calls) > crash_at:
            raise OSError("disk full")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crashing)
        with pytest.raises(OSError, match="disk full"):
            save_adapter(sparse(), tmp_path / "new")
    assert not (tmp_path / "new" / CONFIG_NAME).exists()
    old = save_adapter(sparse(), tmp_path / "old")
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crashing)
        with pytest.raises(OSError, match="disk full"):
            save_adapter(sparse(), old)
    assert sorted(f.name for f in old.iterdir()) == [TENSORS_NAME, CONFIG_NAME]
    if crash_at == 0:
        read_adapter(old)
    else:
        with pytest.raises(ValueError, match="do not belong together"):
            read_adapter(old)


# ------------------------------------------------------------------------------------ fingerprint


def test_fingerprint_sees_weights_and_nothing_else():
    net = Net()
    mine = Fingerprint.of(net)
    sparse(net)
    assert Fingerprint.of(net) == mine
    net.bn.num_batches_tracked += 7
    assert Fingerprint.of(net) == mine
    assert mine.matches(copy.deepcopy(net).to(memory_format=torch.channels_last))
    assert Fingerprint.of(Wrapper(net)) != mine
    with torch.no_grad():
        net.head.bias[0] = torch.nextafter(net.head.bias[0], torch.tensor(9.0))
    assert Fingerprint.of(net) != mine
    assert not mine.matches(net)
    with pytest.raises(ValueError, match="meta"):
        Fingerprint.of(Net().to("meta"))


def test_half_precision_copies_are_the_same_base(tmp_path):
    net = sparse()
    folder = save_adapter(net, tmp_path / "wide")
    for dtype in (torch.float16, torch.bfloat16):
        load_adapter(base_of(net).to(dtype), folder)
    half = base_of(net).half()
    sparsify_(half, SITES, alpha=0.2)
    calibrate_(half, [torch.randn(16, 1, 8, 8).half()])
    narrow = save_adapter(half, tmp_path / "narrow")
    load_adapter(base_of(net), narrow)
    with pytest.raises(ValueError, match="another base"):
        load_adapter(base_of(net).bfloat16(), narrow)
    with pytest.raises(ValueError, match="another base"):
        load_adapter(Net().half(), folder)


def test_another_base_is_refused_unless_asked(tmp_path):
    folder = save_adapter(sparse(), tmp_path, base="org/net")
    other = Net()
    with pytest.raises(ValueError, match=r"another base \(org/net\).*check_base=False"):
        load_adapter(other, folder)
    assert operators(other) == {}
    load_adapter(other, folder, check_base=False)
    assert list(alphas(other)) == ["act1@in", "act2@in"]


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
        (lambda c: c.update(format_version=2), "Upgrade"),
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
        (lambda c: c["sites"].__setitem__(0, None), r"sites\[0\]"),
        (lambda c: c.update(center="median"), "center"),
        (lambda c: c.update(statistics=None), "statistics"),
        (lambda c: c.update(base=None), "base"),
        (lambda c: c["base"].update(fingerprint={}), "another base"),
        (lambda c: c["base"].update(source=1), "source"),
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
        (lambda t: t["act1@in.mean"].fill_(torch.nan), "finite"),
        (lambda t: t["act1@in.var"].fill_(-1), "not negative"),
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
    "text", ["", "{", "[1]", "null", '{"format_version": NaN}', "[" * 100_000, "\xff"]
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


def test_what_a_newer_version_added_is_dropped_and_named(tmp_path):
    net = sparse()
    folder = save_adapter(net, tmp_path)
    edit(folder, lambda c: (c.update(licence="MIT"), c["sites"][1].update(gain=0.1)))
    fresh = base_of(net)
    with pytest.warns(UserWarning, match=re.escape("licence, sites[1].gain")):
        load_adapter(fresh, folder)
    assert_same(net, fresh)


# -------------------------------------------------------------------------------------- where from


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder '\./nowhere'"):
        read_adapter("./nowhere")
    with pytest.raises(ValueError, match="revision"):
        read_adapter(tmp_path, revision="main")
    with pytest.raises(ConnectionError, match="Hub cannot be reached"):
        read_adapter("someone/adapter")


def test_hub_asks_for_two_files_at_the_revision(tmp_path, monkeypatch):
    net = sparse()
    folder, asked = save_adapter(net, tmp_path), []

    def download(source, **options):
        asked.append((source, options))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    fresh = base_of(net)
    load_adapter(fresh, "someone/adapter", revision="v1")
    assert_same(net, fresh)
    assert asked == [
        ("someone/adapter", {"revision": "v1", "allow_patterns": [CONFIG_NAME, TENSORS_NAME]})
    ]


def test_classifier_names_the_base(tmp_path):
    net = sparse()
    classifier = Classifier(net, source="timm/net", revision="abc")
    adapter = read_adapter(save_adapter(classifier, tmp_path))
    assert (adapter.source, adapter.revision) == ("timm/net", "abc")
