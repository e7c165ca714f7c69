"""An adapter round-trips exactly, through wrappers, dtypes, crashes and the Hub."""

import copy
import json
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from adapters import SITES, Net, Wrapper, assert_same, base_of, exact, sparse
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_meansparse.adapter import base_module, load_adapter, read_adapter, save_adapter
from lightning_meansparse.adapter.base import Fingerprint
from lightning_meansparse.adapter.files import CONFIG_NAME, TENSORS_NAME
from lightning_meansparse.callback.batches import CalibrationData, calibration_facts
from lightning_meansparse.classifier import Classifier
from lightning_meansparse.data import ImageDataModule
from lightning_meansparse.sites import Site
from lightning_meansparse.surgery import (
    alphas,
    calibrate_,
    operators,
    set_alpha,
    sparsify_,
)

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
    assert config["format_version"] == 2
    site = {"site": "act1@in", "shape": [4, 1, 1], "axis": [-3], "alpha": 0.2}
    assert config["sites"][0] == site
    assert set(config["base"]["fingerprint"]) == {"float32", "float16", "bfloat16"}
    assert config["calibration"] is None
    assert config["versions"]["torch"] == str(torch.__version__)


def test_counts_and_sums_are_those_of_the_data(tmp_path):
    net, images = exact()
    sparsify_(net, SITES, alpha=0.2)
    seen = []
    net.act1.register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
    calibrate_(net, images.split(5))
    adapter = read_adapter(save_adapter(net, tmp_path))
    values = torch.cat([each.transpose(0, 1).flatten(1) for each in _batches(seen)], dim=1)
    assert int(adapter.tensors["act1@in.count"]) == values.shape[1] == 16 * 36
    m2 = (values - values.mean(1, keepdim=True)).square().sum(1)
    assert torch.allclose(adapter.tensors["act1@in.m2"].flatten(), m2, rtol=1e-6)
    calibrate_(net, images.split(4), statistics="official")
    official = read_adapter(save_adapter(net, tmp_path, statistics="official"))
    assert int(official.tensors["act1@in.count"]) == 4  # batches


def _batches(seen):
    assert len(seen) == 4
    return seen


@pytest.mark.parametrize("count", [0, 1, 3, 10**12 + 7])
def test_variances_survive_the_sum_bit_for_bit(tmp_path, count):
    net = sparse()
    for op in operators(net).values():
        exponents = torch.randint(-140, 120, op.var.shape).double()
        op.var.copy_(torch.rand(op.var.shape).double() * 2**exponents)
        op.count = count
    fresh = base_of(net)
    load_adapter(fresh, save_adapter(net, tmp_path))
    assert_same(net, fresh)
    assert {op.count for op in operators(fresh).values()} == {count}


def test_what_is_known_of_the_statistics_stays_with_them(tmp_path):
    net = sparse()
    facts = {"dataset": "noise", "split": "train", "images": 16}
    folder = save_adapter(net, tmp_path / "a", base="org/net", revision="abc", calibration=facts)
    fresh = base_of(net)
    load_adapter(fresh, folder)
    set_alpha(fresh, 0.4)
    again = read_adapter(save_adapter(fresh, tmp_path / "b"))
    assert (again.source, again.revision, again.calibration) == ("org/net", "abc", facts)
    other = read_adapter(save_adapter(fresh, tmp_path / "b", base="org/other", calibration={}))
    assert (other.source, other.revision, other.calibration) == ("org/other", None, {})
    calibrate_(fresh, [torch.randn(8, 1, 8, 8)])
    assert read_adapter(save_adapter(fresh, tmp_path / "b")).calibration is None


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


# -------------------------------------------------------------------------------------- where from


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder '\./nowhere'"):
        read_adapter("./nowhere")
    with pytest.raises(ValueError, match="revision"):
        read_adapter(tmp_path, revision="main")
    with pytest.raises(ConnectionError, match="Hub cannot be reached"):
        read_adapter("someone/adapter")


def test_classifier_names_the_base(tmp_path):
    net = sparse()
    classifier = Classifier(net, source="timm/net", revision="abc")
    adapter = read_adapter(save_adapter(classifier, tmp_path))
    assert (adapter.source, adapter.revision) == ("timm/net", "abc")


@pytest.mark.parametrize("form", ["{}", "{}/", "hf/{}", "timm/local-dir:{}", "{}/../mine"])
@pytest.mark.parametrize("exists", [True, False])
def test_of_a_local_base_only_the_last_name_is_written(tmp_path, form, exists):
    folder = tmp_path / "private" / "mine"
    if exists:
        folder.mkdir(parents=True)
    source = form.format(folder)
    model = Classifier(sparse(), source=source)
    for base in (None, source):
        text = (save_adapter(model, tmp_path / "a", base=base) / CONFIG_NAME).read_text()
        assert json.loads(text)["base"]["source"] == "mine"
        assert "private" not in text


def test_relative_local_bases(tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "timm" / "resnet18").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    net = sparse()
    for base, name in {
        "runs/mine": "mine",
        "./runs/gone": "gone",
        "~/runs/gone": "gone",
        "hf/runs/mine": "mine",
        ".": tmp_path.name,
        "timm/resnet18": "timm/resnet18",
        "timm/hf-hub:org/net": "timm/hf-hub:org/net",
        "torchvision/resnet18": "torchvision/resnet18",
        "hf/org/net": "hf/org/net",
        "org/net": "org/net",
    }.items():
        assert read_adapter(save_adapter(net, tmp_path / "a", base=base)).source == name


@pytest.mark.filterwarnings("ignore:.*weights_only")
def test_checkpoints_that_are_none(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"callbacks": {}}, path)
    with pytest.raises(ValueError, match=r"revision is for .*x\.ckpt is a checkpoint"):
        read_adapter(path, revision="main")
    with pytest.raises(ValueError, match=r"x\.ckpt holds no MeanSparse statistics"):
        read_adapter(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"x\.ckpt must hold a Lightning checkpoint, got list"):
        read_adapter(path)
    torch.save({"hyper_parameters": Net()}, path)
    whole = path.read_bytes()
    for content in (whole, whole[:100], b"", b"text", b"\x80\x02.", pickle.dumps(Net())):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"x\.ckpt is no checkpoint, or holds more than tensors"
        ):
            read_adapter(path)


# ----------------------------------------------------------------------- facts about calibration


def facts_of(datamodule, origin="ImageDataModule.calibration_dataloader()"):
    data = CalibrationData(origin, list, list)
    return calibration_facts(data, SimpleNamespace(datamodule=datamodule), 7)


def test_facts_name_the_data_set_with_its_revision_and_split(tmp_path):
    measured = {"data": "ImageDataModule.calibration_dataloader()", "images": 7}
    on_hub = ImageDataModule("org/name", config_name="a", revision="v1", train_split="training")
    named = {"dataset": "org/name", "name": "a", "revision": "v1", "split": "training"}
    assert facts_of(on_hub) == {**measured, **named}
    in_folder = ImageDataModule(tmp_path / "mine")
    assert facts_of(in_folder) == {**measured, "dataset": "mine", "split": "train"}
    in_memory = ImageDataModule({"train": (torch.rand(2, 1, 4, 4), torch.zeros(2).long())})
    assert facts_of(in_memory) == measured
    elsewhere = {"data": "dataloader=", "images": 7}
    assert facts_of(on_hub, "dataloader=") == elsewhere
    assert facts_of(None, "dataloader=") == elsewhere
