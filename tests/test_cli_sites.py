"""`meansparse sites`: the table is what `find_sites` gives, and it says what is left out."""

import io
import json
import re
import subprocess
import sys

import pytest
import timm
import torch
from rich.console import Console
from torch import nn

from lightning_meansparse import find_sites, load_classifier
from lightning_meansparse.classifier import Classifier, save_classifier
from lightning_meansparse.cli import main, sites
from lightning_meansparse.demo import ConvNet


def table(text: str) -> list[list[str]]:
    """The rows of a table that was piped: the lines between the heads and the count."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("name "))
    end = next(i for i, line in enumerate(lines) if re.match(r"\d+ sites? ", line))
    return [re.split(r"  +", line.rstrip()) for line in lines[start + 1 : end]]


@pytest.fixture
def odd(monkeypatch) -> nn.Module:
    """A network with all that can be left out, in place of the named one."""
    namespace: dict = {"torch": torch}
    exec(  # code without a source: nothing in it can be written anew
        "def forward(self, x):\n"
        "    x = self.stem(x)\n"
        "    bias = torch.tanh(self.table)\n"
        "    gate = self.gate(x.mean((2, 3), keepdim=True))\n"
        "    x = torch.relu(x * gate + bias)\n"
        "    x = self.act(torch.linalg.cross(x[:, 3:6], x[:, :3], dim=1))\n"
        "    return self.head(x.mean((2, 3)))\n",
        namespace,
    )
    odd = type("Odd", (nn.Module,), {"forward": namespace["forward"]})()
    odd.stem, odd.gate, odd.act = nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.GELU()
    odd.head, odd.spare, odd.table = nn.Linear(3, 2), nn.SiLU(), nn.Parameter(torch.ones(1))
    classifier = Classifier(odd, input_size=(3, 16, 16), source="timm/odd")
    monkeypatch.setattr(sites, "_load", lambda name, pretrained: classifier)
    return odd


# ------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("where", ["activations", "activations+gates", "activations+residual"])
def test_the_table_is_what_find_sites_gives(where, capsys) -> None:
    args = ["sites", "timm/efficientnet_b0", "--image-size", "64", "--where", where]
    assert main(args) == 0
    text = capsys.readouterr().out
    model = timm.create_model("efficientnet_b0")
    expected = find_sites(model, torch.rand(2, 3, 64, 64), where=where)
    rows = table(text)
    assert [row[:5] for row in rows] == [
        [str(site), site.kind, str(site.shape), str(site.axis[0]), site.role] for site in expected
    ]
    assert all(model.get_submodule(row[5]) for row in rows)
    assert f"\n{len(expected)} sites (33 activation" in text
    everything = find_sites(model, torch.rand(2, 3, 64, 64), where="activations+gates+residual")
    left = [site.role for site in everything if site not in expected]
    for role, noun in (("gate", "gates"), ("residual", "residual sums")):
        shown = re.search(rf"^left out: (\d+) {noun} \(--where activations\+", text, re.MULTILINE)
        assert (int(shown[1]) if shown else 0) == left.count(role)
    assert text.startswith("timm/efficientnet_b0: EfficientNet, images 3×64×64\n")
    assert "normalisation: timm's pretrained_cfg of efficientnet_b0" in text


def test_several_axes_and_the_image_itself_have_cells(odd, capsys) -> None:
    assert main(["sites", "timm/odd", "--where", "stem@in", "--where", "activations"]) == 0
    rows = {row[0]: row for row in table(capsys.readouterr().out)}
    assert rows["stem@in"] == ["stem@in", "Conv2d", "(3, 1, 1)", "-3", "other", "the image"]
    assert sites._shown((-4, -3)) == "(-4, -3)"


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_names_stay_whole_in_a_terminal_of_any_width(width, monkeypatch) -> None:
    file = io.StringIO()
    made = Console(file=file, width=width, force_terminal=True, highlight=False)
    monkeypatch.setattr("rich.console.Console", lambda **options: made)
    assert main(["sites", "timm/test_resnet", "--where", "activations+gates+residual"]) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    expected = find_sites(timm.create_model("test_resnet"), torch.rand(2, 3, 64, 64))
    assert len(expected) > 5
    for site in expected:
        assert re.search(rf"^{re.escape(str(site))}\s", text, re.MULTILINE), site
    assert "…" not in text.partition("timm/test_resnet: ResNet")[2]
    assert (
        re.search(r"^    ReLU  \(16, 1, 1\)  -3  activation  conv1\.0$", text, re.M) or width > 60
    )


def test_a_pipe_gets_plain_text_one_line_a_site() -> None:
    code = "import sys; from lightning_meansparse.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "sites", "timm/test_resnet", "--where", "*"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "30", "PATH": ""},
    )
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert len(table(done.stdout)) > 50
    assert {len(row) for row in table(done.stdout)} == {6}


def test_json_has_every_name(odd, capsys) -> None:
    assert main(["sites", "timm/odd", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"], facts["images"]) == ("timm/odd", [3, 16, 16])
    assert facts["sites"] == []
    left = {entry["why"].partition(" (")[0]: entry["names"] for entry in facts["left_out"]}
    assert left == {
        "gate": ["gate@in"],
        "call whose value does not depend on the image": ["::tanh[0]"],
        "activation module that is never called": ["spare"],
        "place that cannot be reached": ["::relu[0]@in"],
        "place whose channels are undecided": ["act@in"],
    }
    assert main(["sites", "timm/odd", "--json", "--where", "gates"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sites"] == [
        {
            "name": "gate@in",
            "call": "Sigmoid",
            "shape": [8, 1, 1],
            "axis": [-3],
            "role": "gate",
            "producer": "stem",
        }
    ]


# --------------------------------------------------------------------------------- what is left out


def test_what_is_left_out_has_a_reason(odd, capsys) -> None:
    assert main(["sites", "timm/odd"]) == 0
    left = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert len(left) == 5
    for line, parts in zip(
        left,
        [
            ("1 gate (--where activations+gates): gate@in",),
            ("1 call whose value does not depend on the image: ::tanh[0]",),
            ("1 activation module that is never called: spare",),
            ("1 place that cannot be reached (", "Odd", "::relu[0]@in"),
            ("1 place whose channels are undecided (", "linalg_cross", "act@in"),
        ],
        strict=True,
    ):
        assert all(part in line for part in parts), line


def test_names_that_differ_by_numbers_are_told_as_one() -> None:
    names = ["blocks.0.1.act@in", "blocks.10.2.act@in", "blocks.0::add[0]@out", "block1.act@in"]
    assert sites._patterns(names) == "2 × blocks.*.*.act@in, blocks.0::add[0]@out, block1.act@in"
    many = [f"s{stage}.b{block}.se.act@in" for stage in range(3) for block in range(3)]
    assert sites._patterns([*many, "stem.act@in"]) == "9 × s*.b*.se.act@in, stem.act@in"
    assert sites._count(2, "call whose value is constant") == "2 calls whose value is constant"
    assert sites._count(1, "site") == "1 site"


# -------------------------------------------------------------------------------------- the models


def test_folders_of_every_kind(tmp_path, capsys) -> None:
    save_classifier(load_classifier(ConvNet(width=4)), tmp_path / "own")
    assert main(["sites", str(tmp_path / "own")]) == 0
    rows = table(capsys.readouterr().out)
    assert [row[0] for row in rows] == [f"stage{i}.act@in" for i in (1, 2, 3, 4)]

    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1], num_heads=[2], window_size=4
    )
    config.save_pretrained(tmp_path / "hf")  # neither weights nor an image processor
    assert main(["sites", str(tmp_path / "hf")]) == 0
    ((name, kind, shape, *_, producer),) = table(capsys.readouterr().out)
    assert name.startswith("swin.encoder.layers.0.blocks.0.")
    assert (kind, shape) == ("GELUActivation", "(32,)")
    assert producer.startswith("swin.encoder.layers.0.blocks.0.")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["timm/resnet81"], "timm has no classifier 'resnet81'"),
        (["resnet18"], "Did you mean: timm/resnet18"),
        (["torchvision/fcn_resnet50"], "torchvision has no classifier"),
        (["timm/vit_tiny_patch16_224", "--image-size", "64"], "; its own size is 3×224×224: "),
        (["timm/test_resnet", "--image-size", "0"], "--image-size must be at least 1"),
        (["timm/test_resnet", "--image-size", "few"], "invalid int value: 'few'"),
        (["timm/test_resnet", "--where", "layr1*"], "where: 'layr1*' matches none of the"),
        (["timm/test_resnet", "--where", ""], "where must be one of 'activations'"),
        (["timm/test_resnet", "--where", "gates"], "selects nothing. The model's places by role:"),
        (["timm/test_resnet.nothing", "--pretrained"], "timm has no weights for"),
        ([], "required: model (meansparse sites --help lists the options)"),
    ],
)
def test_wrong_input_ends_in_one_line(args, told, capsys) -> None:
    assert main(["sites", *args]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("meansparse sites: ")
    assert told in error


def test_what_is_no_classifier_of_images_ends_in_one_line(tmp_path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig(hidden_size=8).save_pretrained(tmp_path)
    assert main(["sites", str(tmp_path)]) == 2
    assert "a bert model, of which transformers has no image classifier" in capsys.readouterr().err
