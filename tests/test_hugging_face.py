"""Whole sparsified models: through folders and the Hub, by the real clients, never as the base."""

import copy
import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hub import TOKEN
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load_file, safe_open

from lightning_meansparse import (
    calibrate_,
    find_sites,
    load_classifier,
    restore_,
    save_adapter,
    save_pretrained,
    set_alpha,
    sparsify_,
)
from lightning_meansparse.surgery import alphas, operators

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

AutoModel = transformers.AutoModelForImageClassification
LABELS = {0: "cat", 1: "dog", 2: "owl"}
SIDE = 16
IMAGES = torch.rand(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
PROCESSOR = transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE})

LOAD = """
import sys
order, source, wanted = sys.argv[1:]
if order == "first":
    import importlib.util
    import lightning_meansparse
    # To look for a module is not to import it.
    importlib.util.find_spec("transformers.models.auto.configuration_auto")
import torch
torch.set_num_threads(1)
from PIL import Image
from transformers import AutoModelForImageClassification, ViTForImageClassification, pipeline

ways = {
    "auto": lambda: AutoModelForImageClassification.from_pretrained(source),
    "pipeline": lambda: pipeline("image-classification", source),
    "base": lambda: ViTForImageClassification.from_pretrained(source),
}
if order == "last":
    for name, way in ways.items():
        try:
            way()
        except (ValueError, OSError) as error:
            assert "meansparse" in str(error) or "no file named" in str(error), error
        else:
            raise SystemExit(f"{name} loaded it without lightning_meansparse")
    import lightning_meansparse
images, logits, photo, answer = torch.load(wanted, weights_only=False)
assert torch.equal(ways["auto"]()(images).logits, logits)
assert ways["pipeline"]()(photo) == answer
print("the same")
"""


def vit(**options):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"image_size": SIDE, "patch_size": 4, "num_hidden_layers": 2}
    config = transformers.ViTConfig(**sizes, id2label=LABELS, **options)
    return AutoModel.from_config(config).eval()


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=LABELS
    )
    return AutoModel.from_config(config).eval()


def timm_resnet():
    return timm.create_model("test_resnet", num_classes=3).eval()


def sparse(model, alpha=0.5, **options):
    """The model with operators, and their effect on its logits checked to be one."""
    before = logits_of(model)
    sparsify_(model, find_sites(model, IMAGES, **options), alpha=alpha)
    calibrate_(model, [IMAGES])
    assert not torch.allclose(before, logits_of(model))
    return model


def logits_of(model):
    with torch.no_grad():
        found = model.eval()(IMAGES)
    return getattr(found, "logits", found)


def folder_of(model, path, **options):
    return save_pretrained(model, path, image_processor=PROCESSOR, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- where they are found again --------------------------------------------------------------


def test_through_the_hub_with_labels_and_image_processor(hub, logged_in, tmp_path):
    model = sparse(vit())
    folder_of(model, tmp_path / "vit", push_to_hub="org/vit", license="mit")
    assert hub.history("org/vit")[0] != "initial commit"
    assert len(hub.history("org/vit")) == 2, "all files in one commit"
    card = ModelCard.load("org/vit")
    assert (card.data.library_name, card.data.license) == ("transformers", "mit")
    assert "Robustness was not evaluated" in card.text
    place: dict = {}
    for code in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        exec(code, place)
    assert place["images"].shape == (1, 3, SIDE, SIDE)
    seen = model(2 * place["images"] - 1).logits
    assert torch.allclose(place["logits"], seen, atol=1e-6)
    assert place["classify"](PHOTO)
    loaded = AutoModel.from_pretrained("org/vit")
    assert isinstance(loaded, transformers.ViTForImageClassification)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.config.id2label == LABELS
    answers = transformers.pipeline("image-classification", "org/vit")(PHOTO)
    assert {answer["label"] for answer in answers} == set(LABELS.values())
    with torch.no_grad():
        seen = model(**PROCESSOR(PHOTO, return_tensors="pt")).logits.softmax(-1)[0]
    scores = [answer["score"] for answer in answers]
    assert scores == pytest.approx(sorted(seen.tolist(), reverse=True), abs=1e-6)
    with hub.offline():
        assert torch.equal(logits_of(AutoModel.from_pretrained("org/vit")), logits_of(model))


def test_in_other_processes_and_not_without_the_import(tmp_path):
    model = sparse(vit())
    folder = folder_of(model, tmp_path / "vit")
    pipe = transformers.pipeline("image-classification", model, image_processor=PROCESSOR)
    torch.save((IMAGES, logits_of(model), PHOTO, pipe(PHOTO)), tmp_path / "wanted.pt")
    for order in ("first", "last"):
        done = subprocess.run(
            [sys.executable, "-c", LOAD, order, folder, tmp_path / "wanted.pt"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == "the same\n", done.stderr


def test_revisions_are_kept_apart(hub, logged_in, tmp_path):
    model = sparse(vit())
    folder_of(model, tmp_path, push_to_hub="org/vit")
    first, wanted = HfApi().model_info("org/vit").sha, logits_of(model)
    set_alpha(model, 1.5)
    model.push_to_hub("org/vit")
    assert torch.equal(logits_of(AutoModel.from_pretrained("org/vit")), logits_of(model))
    assert torch.equal(logits_of(AutoModel.from_pretrained("org/vit", revision=first)), wanted)
    assert not torch.equal(wanted, logits_of(model))


def test_a_private_one_needs_the_token(hub, tmp_path):
    model = sparse(vit())
    folder_of(model, tmp_path, push_to_hub="org/secret", token=TOKEN, private=True)
    with pytest.raises(OSError, match="org/secret"):
        AutoModel.from_pretrained("org/secret")
    loaded = AutoModel.from_pretrained("org/secret", token=TOKEN)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_load_classifier_takes_them_by_every_name(hub, logged_in, tmp_path):
    model = sparse(vit())
    folder = folder_of(model, tmp_path, push_to_hub="org/vit")
    for name in (folder, f"hf/{folder}", "hf/org/vit", "meansparse/org/vit"):
        classifier = load_classifier(name)
        assert torch.equal(logits_of(classifier.model), logits_of(model)), name
        assert classifier.labels == tuple(LABELS.values())
        assert classifier.mean.flatten().tolist() == [0.5] * 3
        assert classifier.input_size == (3, SIDE, SIDE)
    with pytest.raises(ValueError, match="made for another base"):
        load_classifier("hf/org/vit", num_classes=5)
    with pytest.raises(ValueError, match="cannot be made from its configuration alone"):
        load_classifier("hf/org/vit", pretrained=False)


# ---- as transformers has it -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "where"),
    [(vit, "activations"), (vit, "activations+residual"), (resnet, "activations")],
)
def test_saved_and_loaded_again_and_again(make, where, tmp_path):
    model = sparse(make(), where=where)
    wanted = logits_of(model)
    for turn in range(3):
        model.save_pretrained(tmp_path / str(turn))
        model = AutoModel.from_pretrained(tmp_path / str(turn))
        assert torch.equal(logits_of(model), wanted)
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert torch.equal(logits_of(model), wanted)


def test_the_weights_have_the_names_and_values_of_the_base(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path / "base")
    folder = folder_of(sparse(model), tmp_path / "whole")
    base = load_file(tmp_path / "base" / "model.safetensors")
    whole = load_file(folder / "model.meansparse.safetensors")
    assert base.keys() == whole.keys()
    assert all(torch.equal(base[key], whole[key]) for key in base)


def test_in_shards_in_half_precision_on_a_device(tmp_path):
    model = sparse(vit())
    folder = folder_of(model, tmp_path, max_shard_size="10KB", variant="fp32")
    assert len(list(folder.glob("model.meansparse.fp32-*.safetensors"))) > 1
    loaded, report = AutoModel.from_pretrained(
        folder, variant="fp32", device_map="cpu", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert torch.equal(logits_of(loaded), logits_of(model))
    half = AutoModel.from_pretrained(folder, variant="fp32", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert next(iter(operators(half).values())).mean.dtype == torch.float32
    with torch.no_grad():
        close = half(IMAGES.bfloat16()).logits.float()
    assert torch.allclose(close, logits_of(model), atol=0.02)
    half.save_pretrained(tmp_path / "half")
    again = AutoModel.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(IMAGES.bfloat16()).logits, half(IMAGES.bfloat16()).logits)


def test_alpha_is_saved_and_restored_models_are_bases_again(tmp_path):
    model = vit()
    base = logits_of(model)
    loaded = AutoModel.from_pretrained(folder_of(sparse(model), tmp_path / "first"))
    set_alpha(loaded, 0.9)
    loaded.save_pretrained(tmp_path / "second")
    assert set(alphas(AutoModel.from_pretrained(tmp_path / "second")).values()) == {0.9}
    restore_(loaded)
    assert type(loaded) is transformers.ViTForImageClassification
    assert torch.equal(logits_of(loaded), base)
    loaded.save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["model_type"] == "vit"
    assert not operators(AutoModel.from_pretrained(tmp_path / "base"))


def test_the_configuration_answers_for_the_base(tmp_path):
    folder = folder_of(sparse(vit()), tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder, hidden_dropout_prob=0.5)
    assert (config.model_type, config.base_config.model_type) == ("meansparse", "vit")
    assert (config.num_labels, config.image_size, config.id2label) == (3, SIDE, LABELS)
    assert config.base_config.hidden_dropout_prob == config.hidden_dropout_prob == 0.5
    config.save_pretrained(tmp_path / "again")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "again")
    assert again.to_dict() == config.to_dict()
    with pytest.raises(AttributeError, match="no_such_field"):
        config.no_such_field  # noqa: B018


def test_the_image_processor_comes_from_where_the_model_does(tmp_path):
    model = vit()
    with pytest.raises(ValueError, match=r"image_processor: this ViT.* was not loaded from"):
        save_pretrained(sparse(model), tmp_path / "whole")
    restore_(model)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"image_processor: .*base.* gives none"):
        save_pretrained(sparse(AutoModel.from_pretrained(tmp_path / "base")), tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    PROCESSOR.save_pretrained(tmp_path / "base")
    whole = save_pretrained(
        sparse(AutoModel.from_pretrained(tmp_path / "base")), tmp_path / "whole"
    )
    found = transformers.AutoImageProcessor.from_pretrained(whole)
    assert found.size == PROCESSOR.size


def test_wrappers_are_looked_through(tmp_path):
    classifier = load_classifier(vit(), mean=0.5, std=0.5)
    sparsify_(classifier, find_sites(classifier, IMAGES), alpha=0.5)
    calibrate_(classifier, [IMAGES])
    loaded = AutoModel.from_pretrained(folder_of(classifier, tmp_path))
    assert torch.equal(logits_of(loaded), logits_of(classifier.model))


# ---- what is refused --------------------------------------------------------------------------


def test_what_cannot_be_saved_leaves_no_trace(tmp_path):
    with pytest.raises(ValueError, match="no MeanSparse operators"):
        folder_of(vit(), tmp_path / "new")
    model = vit()
    sparsify_(model, find_sites(model, IMAGES), alpha=0.5)
    with pytest.raises(ValueError, match="not calibrated"):
        model.save_pretrained(tmp_path / "new")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    with pytest.raises(TypeError, match="its base is a Sequential"):
        folder_of(sparse(net), tmp_path / "new")
    backbone = transformers.ViTMAEModel(
        transformers.ViTMAEConfig(
            **{k: getattr(vit().config, k) for k in ("hidden_size", "intermediate_size")},
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=4,
        )
    )
    sparsify_(backbone, find_sites(backbone, IMAGES), alpha=0.5)
    calibrate_(backbone, [IMAGES])
    with pytest.raises(ValueError, match="no image classifier"):
        backbone.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        folder_of(sparse(vit()), tmp_path / "file")


def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    model = sparse(vit())
    folder = folder_of(model, tmp_path)
    before = contents(folder)
    set_alpha(model, 0.7)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(model, folder, image_processor=Broken())
    assert contents(folder) == before


def test_nothing_of_an_older_model_stays_in_the_folder(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    (tmp_path / "README.md").write_text("mine")
    folder = folder_of(sparse(model), tmp_path)
    assert (folder / "README.md").read_text() == "mine"
    assert sorted(contents(folder)) == [
        "README.md",
        "config.json",
        "meansparse.safetensors",
        "meansparse_config.json",
        "model.meansparse.safetensors",
        "preprocessor_config.json",
    ]


def test_parts_of_different_models_do_not_go_together(tmp_path):
    one, other = folder_of(sparse(vit()), tmp_path / "1"), folder_of(sparse(vit()), tmp_path / "2")
    weights = "model.meansparse.safetensors"
    (one / weights).write_bytes((other / weights).read_bytes())
    with pytest.raises(ValueError, match="made for another base"):
        AutoModel.from_pretrained(one)
    (one / weights).unlink()
    torch.save(vit().state_dict(), one / "pytorch_model.meansparse.bin")
    with pytest.raises(OSError, match="no file named"):
        AutoModel.from_pretrained(one)
    (other / "meansparse.safetensors").unlink()
    with pytest.raises(OSError, match=r"meansparse\.safetensors"):
        AutoModel.from_pretrained(other)
    config = json.loads((one / "config.json").read_text())
    for wrong in (None, {}, {"model_type": "meansparse"}, {"model_type": "nothing"}, [1]):
        (one / "config.json").write_text(json.dumps({**config, "base_config": wrong}))
        with pytest.raises(ValueError, match="base_config must be"):
            AutoModel.from_pretrained(one)


# ---- timm -------------------------------------------------------------------------------------


def test_timm_folders_and_repositories_hold_base_and_adapter(hub, logged_in, tmp_path):
    model = timm_resnet()
    base, weights = logits_of(model), copy.deepcopy(model.state_dict())
    folder = save_pretrained(sparse(model), tmp_path / "net", push_to_hub="org/net")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_classes"] == 3
    assert "num_classes" not in config["model_args"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(weights)
    for name in (f"local-dir:{folder}", "hf-hub:org/net"):  # timm itself knows the base alone
        assert torch.equal(logits_of(timm.create_model(name, pretrained=True).eval()), base)
    for name in (folder, "meansparse/org/net"):
        classifier = load_classifier(name)
        assert torch.equal(logits_of(classifier.model), logits_of(model))
        assert classifier.input_size == (3, 160, 160)
    wrapped = AutoModel.from_pretrained("org/net").eval()
    assert torch.allclose(logits_of(wrapped), base, atol=1e-6)


def test_timm_pushes_a_sparsified_model_as_its_base(hub, logged_in):
    model = timm_resnet()
    base = logits_of(model)
    sparse(model)
    timm.models.push_to_hf_hub(model, "org/base", safe_serialization=True)
    assert torch.equal(logits_of(timm.create_model("hf-hub:org/base", pretrained=True)), base)


def test_timm_models_inside_transformers_are_whole_models_too(tmp_path):
    save_pretrained(sparse(timm_resnet()), tmp_path / "timm")
    model = sparse(AutoModel.from_pretrained(tmp_path / "timm").eval())
    whole = save_pretrained(model, tmp_path / "whole")
    assert torch.equal(logits_of(AutoModel.from_pretrained(whole)), logits_of(model))
    direct = transformers.pipeline("image-classification", str(whole))(PHOTO)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "timm")
    pipe = transformers.pipeline("image-classification", model, image_processor=processor)
    assert direct == pipe(PHOTO)
    with pytest.raises(RuntimeError):
        timm.create_model(f"local-dir:{whole}", pretrained=True)
    assert torch.equal(logits_of(load_classifier(whole).model), logits_of(model))


def test_an_adapter_alone_is_no_whole_model(tmp_path):
    save_adapter(sparse(vit()), tmp_path)
    with pytest.raises(ValueError, match=r"config\.json"):
        AutoModel.from_pretrained(tmp_path)
