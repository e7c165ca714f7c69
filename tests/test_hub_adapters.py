"""Adapters on the Hub: pushed by the real client, loaded by one name, whatever the network does."""

import copy
import json
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from adapters import base_of, sparse
from hub import READ_TOKEN, TOKEN
from huggingface_hub import HfApi
from journeys import BASES, IMAGES, LOAD, publish_base, train
from safetensors.torch import save

import lightning_meansparse.hub
from lightning_meansparse import (
    calibrate_,
    find_sites,
    load_adapter,
    load_classifier,
    restore_,
    save_adapter,
    set_alpha,
    sparsify_,
)
from lightning_meansparse.adapter import files, read_adapter
from lightning_meansparse.adapter.files import CONFIG_NAME, TENSORS_NAME
from lightning_meansparse.classifier import Classifier
from lightning_meansparse.cli import main
from lightning_meansparse.hub import push_adapter
from lightning_meansparse.surgery import alphas

pytest.importorskip("transformers")

GREY = IMAGES[:, :1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Classifier and checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("trained")
    return {kind: train(kind, folder) for kind in BASES}


def logits_of(classifier):
    with torch.no_grad():
        return classifier(IMAGES)


def test_from_checkpoints_to_logits_in_a_fresh_process(hub, logged_in, trained, tmp_path):
    for kind, (classifier, checkpoint) in trained.items():
        publish_base(kind, classifier, tmp_path)
        commit = push_adapter(checkpoint, f"org/{kind}-sparse")
        files = hub.files(f"org/{kind}-sparse", commit)
        assert set(files) == {"README.md", CONFIG_NAME, TENSORS_NAME}
        assert sum(map(len, files.values())) < 100_000
        base = json.loads(files[CONFIG_NAME])["base"]
        assert base["source"] == BASES[kind]
        assert len(base["revision"]) == 40
    torch.save(IMAGES, tmp_path / "images.pt")
    arguments = [str(tmp_path / "images.pt"), str(tmp_path / "logits.pt"), *BASES]
    environment = hub.environment()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "logits.pt")
    asked = len(hub.requests)
    for kind, (classifier, _) in trained.items():
        assert torch.equal(found[kind], logits_of(classifier)), kind
        with hub.offline():
            again = load_classifier(f"meansparse/org/{kind}-sparse")
        assert torch.equal(logits_of(again), found[kind])
    assert len(hub.requests) == asked  # from the cache of the other process


@pytest.fixture
def published(hub, logged_in, trained, tmp_path):
    """A classifier whose base and adapter are on the Hub, the latter as org/sparse."""
    classifier, checkpoint = trained["convnext"]
    publish_base("convnext", classifier, tmp_path)
    push_adapter(checkpoint, "org/sparse")
    return classifier


def test_what_is_loaded_says_where_it_comes_from_and_can_be_saved_again(hub, published, tmp_path):
    loaded = load_classifier("meansparse/org/sparse")
    assert type(loaded) is type(published)
    assert not loaded.training
    assert loaded.source == BASES["convnext"]
    assert loaded.revision == hub.repositories["model", "org/convnext"].branches["main"]
    assert torch.equal(loaded.mean, published.mean)
    assert alphas(loaded) == alphas(published)
    folder = save_adapter(loaded, tmp_path / "again")
    first, again = hub.files("org/sparse"), (folder / TENSORS_NAME).read_bytes()
    assert again == first[TENSORS_NAME]
    assert (folder / CONFIG_NAME).read_bytes() == first[CONFIG_NAME]
    for same in (folder, f"meansparse/{folder}"):
        assert torch.equal(logits_of(load_classifier(same)), logits_of(published))


def test_revisions_of_adapter_and_base(hub, published):
    """Old revisions stay what they were, whatever is published later."""
    old = hub.repositories["model", "org/sparse"].branches["main"]
    expected = logits_of(published)
    changed = copy.deepcopy(published)
    set_alpha(changed, 0.5)
    pinned = hub.repositories["model", "org/convnext"].branches["main"]
    hub.commit("org/convnext", {"model.safetensors": b"another base"})
    again = f"{BASES['convnext']}@{pinned}"
    new = push_adapter(changed, "org/sparse", base=again, commit_message="More")
    assert hub.history("org/sparse") == ["More", "Upload MeanSparse adapter", "initial commit"]
    for revision in (old, old[:7]):
        assert torch.equal(
            logits_of(load_classifier("meansparse/org/sparse", revision=revision)), expected
        )
    for revision in (None, "main", new):
        loaded = load_classifier("meansparse/org/sparse", revision=revision)
        assert set(alphas(loaded).values()) == {0.5}
    push_adapter(published, "org/sparse", base=again, revision="gentle")
    assert new == hub.repositories["model", "org/sparse"].branches["main"]
    gentle = load_classifier("meansparse/org/sparse", revision="gentle")
    assert torch.equal(logits_of(gentle), expected)
    with pytest.raises(FileNotFoundError, match="no 'org/sparse' at revision 'v9'"):
        load_classifier("meansparse/org/sparse", revision="v9")


def test_pushing_once_more_changes_nothing(hub, published):
    head = hub.repositories["model", "org/sparse"].branches["main"]
    assert push_adapter(load_classifier("meansparse/org/sparse"), "org/sparse") == head
    assert len(hub.history("org/sparse")) == 2


def measured(classifier, images=IMAGES):
    sites = find_sites(classifier.model, (images - classifier.mean) / classifier.std)
    sparsify_(classifier.model, sites, alpha=0.3)
    calibrate_(classifier, [images])
    return classifier


def test_weights_that_timm_itself_has_on_the_hub(hub, logged_in, tmp_path):
    """By their name, but at the commit that was measured, with the options that were given."""
    weights = timm.create_model("test_resnet").state_dict()
    old = hub.commit("timm/test_resnet.r160_in1k", {"model.safetensors": save(weights)})
    options = {"in_chans": 1, "mean": 0.5, "std": 0.25}
    model = measured(load_classifier("timm/test_resnet", **options), GREY)
    assert model.revision == old
    push_adapter(model, "org/sparse")
    newer = {name: value * 1.01 for name, value in weights.items()}
    hub.commit("timm/test_resnet.r160_in1k", {"model.safetensors": save(newer)})
    assert load_classifier("timm/test_resnet").revision != old
    again = load_classifier("meansparse/org/sparse")
    assert (again.source, again.revision, again.in_chans) == ("timm/test_resnet", old, 1)
    assert torch.equal(again(GREY), model(GREY))


def test_weights_of_torchvision_go_by_their_name(hub, logged_in, monkeypatch):
    state, fetched = torchvision.models.resnet18().state_dict(), []
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url",
        lambda url, **options: fetched.append(url) or state,
    )
    model = measured(load_classifier("torchvision/resnet18"))
    push_adapter(model, "org/sparse")
    base = json.loads(hub.files("org/sparse")[CONFIG_NAME])["base"]
    assert (base["source"], base["revision"]) == ("torchvision/resnet18", "IMAGENET1K_V1")
    assert base["library"] == "torchvision"
    fetched.clear()
    assert torch.equal(logits_of(load_classifier("meansparse/org/sparse")), logits_of(model))
    assert set(fetched) == {torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url}


# ----------------------------------------------------------------------------- when it goes wrong


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(lightning_meansparse.hub, "_WAITS", (0.0, 0.0, 0.0))


@pytest.mark.parametrize("on", ["repos/create", "preupload", "POST .*/commit/", "GET .*/models/"])
def test_a_busy_hub_is_asked_again(hub, logged_in, at_once, on):
    hub.fail(on, times=3)
    push_adapter(named(), "org/sparse")
    assert len(hub.history("org/sparse")) == 2
    read_adapter("org/sparse")


def test_an_upload_that_breaks_off_leaves_nothing_half(hub, logged_in, at_once):
    model = named()
    hub.cut("POST .*/commit/", times=4)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        push_adapter(model, "org/sparse")
    assert hub.files("org/sparse") == {}
    hub.cut("POST .*/commit/", times=3)
    push_adapter(model, "org/sparse")
    assert set(alphas(load(model)).values()) == {0.2}
    set_alpha(model, 0.4)
    hub.cut("POST .*/commit/", after=True)  # it arrived, and only the answer did not
    commit = push_adapter(model, "org/sparse", commit_message="Once")
    assert hub.repositories["model", "org/sparse"].branches["main"] == commit
    assert hub.history("org/sparse").count("Once") == 1
    assert set(alphas(load(model)).values()) == {0.4}


def test_a_hub_that_stays_busy(hub, logged_in, at_once):
    hub.fail("POST .*/commit/", times=100)
    with pytest.raises(ConnectionError, match=r"the Hub said: .*503"):
        push_adapter(named(), "org/sparse")
    assert hub.files("org/sparse") == {}


def test_somebody_else_commits_in_between(hub, logged_in, at_once, monkeypatch):
    commit = HfApi.create_commit
    others = iter([{"notes.txt": b"1"}])

    def late(*args, **options):
        for other in others:
            hub.commit("org/sparse", other, title="Notes")
        return commit(*args, **options)

    monkeypatch.setattr(HfApi, "create_commit", late)
    push_adapter(named(), "org/sparse")
    assert hub.history("org/sparse")[:2] == ["Upload MeanSparse adapter", "Notes"]
    assert hub.files("org/sparse")["notes.txt"] == b"1"


def test_who_may_not_push(hub, monkeypatch):
    model = named()
    with pytest.raises(PermissionError, match="hf auth login"):
        push_adapter(model, "org/sparse")
    assert hub.requests == []
    hub.create("org/sparse")
    for token in (READ_TOKEN, "hf_expired"):
        with pytest.raises(PermissionError, match="cannot be written with this token"):
            push_adapter(model, "org/sparse", token=token)
    with pytest.raises(ValueError, match=r"'org/name', got '\.\./org/sparse'"):
        push_adapter(model, "../org/sparse", token=TOKEN)
    with hub.offline(), pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        push_adapter(model, "org/sparse", token=TOKEN)
    hub.close()
    monkeypatch.setattr(lightning_meansparse.hub, "_WAITS", ())
    with pytest.raises(ConnectionError, match="cannot be reached"):
        push_adapter(model, "org/sparse", token=TOKEN)


def test_private_repositories(hub, monkeypatch):
    model = named()
    push_adapter(model, "org/secret", token=TOKEN, private=True)
    assert hub.repositories["model", "org/secret"].private
    for token in (None, READ_TOKEN):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        for loading in (read_adapter, lambda name: load_classifier(f"meansparse/{name}")):
            with pytest.raises(FileNotFoundError, match=r"that you may read.*hf auth login"):
                loading("org/secret")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    read_adapter("org/secret")


def test_a_base_that_nobody_can_fetch_is_said_at_once(hub, logged_in):
    model = named(base=None)
    with pytest.warns(UserWarning, match="called None, which nobody can fetch"):
        push_adapter(model, "org/sparse")
    with pytest.raises(ValueError, match="base is called None, which is not fetched"):
        load_classifier("meansparse/org/sparse")
    with pytest.raises(ValueError, match="base, timm/hf-hub:org/gone, is not on the Hub"):
        push_adapter(named(base="timm/hf-hub:org/gone"), "org/other")
    assert ("model", "org/other") not in hub.repositories


# --------------------------------------------------------------------------------- downloads


def test_downloads_that_break_off(hub, logged_in):
    model = named()
    push_adapter(model, "org/sparse")
    hub.cut("GET .*safetensors", times=2)
    assert set(alphas(load(model)).values()) == {0.2}


def test_unreachable_and_not_in_the_cache(hub, logged_in):
    push_adapter(named(), "org/sparse")
    with hub.offline(), pytest.raises(ConnectionError, match="not in the local cache"):
        read_adapter("org/sparse")
    hub.fail(".*", times=1000, status=500)
    with pytest.raises(ConnectionError, match="Hub cannot be reached"):
        read_adapter("org/sparse")
    hub.faults.clear()
    first = read_adapter("org/sparse")
    hub.close()
    assert read_adapter("org/sparse").config() == first.config()


def test_large_files_are_not_downloaded(hub, monkeypatch):
    hub.commit("org/large", {CONFIG_NAME: b" " * 2000, TENSORS_NAME: b""})
    monkeypatch.setattr(files, "_MAX_CONFIG_BYTES", 1999)
    with pytest.raises(ValueError, match=r"org/large/meansparse_config\.json has 2,000 bytes"):
        read_adapter("org/large")
    assert not [request for request in hub.requests if "resolve" in request]


def test_repositories_that_hold_something_else(hub):
    hub.commit("org/timm", {"config.json": b'{"architecture": "resnet18"}'})
    for name in ("org/timm", "org/empty"):
        hub.create(name)
        with pytest.raises(FileNotFoundError, match=r"holds no meansparse_config\.json"):
            load_classifier(f"meansparse/{name}")
        with pytest.raises(FileNotFoundError, match=r"meansparse_config\.json is missing"):
            read_adapter(name)


# ------------------------------------------------------------------- what a stranger's file may ask


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"source": "/etc"}, "called '/etc', which is not fetched"),
        ({"source": "timm/local-dir:/etc"}, "not fetched"),
        ({"source": "hf/../../etc"}, "not fetched"),
        ({"source": "timm/hf-hub:org/../../x"}, "not fetched"),
        ({"source": "timm/hf-hub:org/convnext", "options": {"checkpoint_path": "x"}}, "checkpoint"),
        ({"options": {"attn_implementation": "org/kernel"}}, "needs attn_implementation"),
        ({"source": "timm/hf-hub:org/gone"}, "could not be fetched"),
        ({"revision": "0" * 40}, "could not be fetched"),
        ({"revision": "../../x"}, r"at revision '\.\./\.\./x', which is not fetched"),
        ({"source": "timm/hf-hub:org/convnext@../x", "revision": None}, "which is not fetched"),
        ({"options": {"img_size": [8, 8]}}, r"with the options that the adapter names \(img_size"),
        ({"source": "meansparse/org/sparse", "revision": None}, "holds no"),
    ],
)
def test_bases_that_are_not_fetched(hub, published, change, match):
    config = json.loads(hub.files("org/sparse")[CONFIG_NAME])
    config["base"] |= change
    hub.commit("org/sparse", {CONFIG_NAME: json.dumps(config).encode()})
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=match):
        load_classifier("meansparse/org/sparse")


def test_another_base_under_the_same_name(hub, published, trained, tmp_path):
    other = copy.deepcopy(published)
    restore_(other)
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    publish_base("convnext", other, tmp_path)  # the same repository, later
    config = json.loads(hub.files("org/sparse")[CONFIG_NAME])
    config["base"]["revision"] = "main"
    hub.commit("org/sparse", {CONFIG_NAME: json.dumps(config).encode()})
    with pytest.raises(ValueError, match=r"does not fit timm/hf-hub:org/convnext.*another base"):
        load_classifier("meansparse/org/sparse")
    config["base"]["source"] = "hf/org/vit"
    publish_base("vit", trained["vit"][0], tmp_path)
    hub.commit("org/sparse", {CONFIG_NAME: json.dumps(config).encode()})
    with pytest.raises(ValueError, match=r"does not fit hf/org/vit.*lacks sites"):
        load_classifier("meansparse/org/sparse")


def test_options_that_an_adapter_makes_useless(hub, published):
    for options in ({"num_classes": 3}, {"mean": 0.5, "std": 0.5}, {"pretrained": False}):
        with pytest.raises(ValueError, match="an adapter says how its base is loaded"):
            load_classifier("meansparse/org/sparse", **options)


def named(base="torchvision/resnet18"):
    """A small network with operators, under a base's name that is not looked up."""
    return Classifier(sparse(), source=base)


def load(model):
    fresh = base_of(model)
    load_adapter(fresh, "org/sparse")
    assert torch.equal(fresh.model(torch.ones(1, 1, 8, 8)), model.model(torch.ones(1, 1, 8, 8)))
    return fresh


# -------------------------------------------------------------------------------- in a shell


def test_the_command_pushes_a_folder_with_its_base(hub, logged_in, tmp_path, capsys):
    hub.commit("org/base", {"config.json": b"{}"})
    folder = save_adapter(named(base=None), tmp_path / "sweep" / "adapter")
    words = [str(folder), "org/sparse", "--base", "timm/hf-hub:org/base", "--private"]
    assert main(["push", *words, "--license", "mit", "--message", "First"]) == 0
    commit = hub.repositories["model", "org/sparse"].branches["main"]
    assert commit in capsys.readouterr().out
    assert hub.repositories["model", "org/sparse"].private
    assert hub.history("org/sparse")[0] == "First"
    base = json.loads(hub.files("org/sparse")[CONFIG_NAME])["base"]
    assert base["source"] == "timm/hf-hub:org/base"
    assert base["revision"] == hub.repositories["model", "org/base"].branches["main"]
    assert b"license: mit" in hub.files("org/sparse")["README.md"]
    assert main(["push", str(tmp_path / "sweep"), *words[1:4]]) == 2
    assert "records" in capsys.readouterr().err  # of the sweep, which left none
