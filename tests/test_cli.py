"""The command: help that is there at once, errors in one line, and every command end to end."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from lightning_meansparse import __version__
from lightning_meansparse.adapter import read_adapter, save_adapter
from lightning_meansparse.classifier import load_classifier, save_classifier
from lightning_meansparse.cli import main
from lightning_meansparse.cli.commands import COMMANDS
from lightning_meansparse.cli.demo import demonstrate
from lightning_meansparse.cli.errors import explain, plain
from lightning_meansparse.demo import ConvNet
from lightning_meansparse.records import HELD_OUT, TEST, read_records, splits
from lightning_meansparse.sites import find_sites
from lightning_meansparse.surgery import calibrate_, sparsify_

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
]

ROOT = Path(__file__).parent.parent
DATA = str(ROOT / "lightning_meansparse" / "demo" / "fashion_mnist")
FIT = str(ROOT / "recipes" / "fashion_mnist_pgd.yaml")
SWEEP = str(ROOT / "recipes" / "fashion_mnist_sweep.yaml")
SMALL = [
    "--data.dataset",
    DATA,
    *("--data.limit_train", "32"),
    *("--data.limit_holdout", "8"),
    *("--data.limit_test", "6"),
    *("--data.batch_size", "16"),
    *("--trainer.accelerator", "cpu"),
]
CHEAP = (
    '[{"attack": "pgd", "options": {"steps": 1}}, '
    '{"attack": "adaptive-ce", "options": {"steps": 1}}]'
)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    return str(save_classifier(load_classifier(ConvNet(width=4)), folder))


# ------------------------------------------------------------------------------- help and errors


def test_help_and_version_need_no_torch():
    code = (
        "import sys; from lightning_meansparse.cli import main; "
        "assert main(['--help']) == main([]) == main(['--version']) == main(['swep']) - 2 == 0; "
        "assert main(['report', '--help']) == main(['demo', '--help']) == 0; "
        "heavy = {'torch', 'lightning', 'jsonargparse', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "meansparse: no command 'swep': did you mean 'sweep'? "
        "(meansparse --help tells what each does)\n"
    )
    for name, command in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert f"$ {command.example}" in done.stdout
    assert f"meansparse {__version__}" in done.stdout


@pytest.mark.parametrize("command", ["fit", "sweep"])
def test_help_of_a_command_shows_what_it_does_and_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    known = COMMANDS[command]
    assert known.example in text
    assert " ".join(known.summary.split()) in " ".join(text.split())
    assert text.index("--model.eps") < text.index("--data.dataset") < text.index("--trainer.m")
    assert text.startswith(f"usage: meansparse {command} --config FILE")
    assert "Radius of the ball in pixel units" in " ".join(text.split())


def test_examples_name_files_that_exist():
    named = re.findall(r"recipes/\S+", " ".join(c.example for c in COMMANDS.values()))
    assert named
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["fit"], "--model.model and --model.eps and --data.dataset are missing (meansparse fit"),
        (["fit", "--model.epss", "1"], "unrecognized arguments: --model.epss"),
        (["fit", "--config", "nope.yaml"], "--config: File does not exist"),
        (
            ["fit", "--config", FIT, "--model.method", "fgsm"],
            "--model.method must be 'pgd' or 'trades' or 'none', got 'fgsm'",
        ),
        (["fit", "--config", FIT, "--model.eps", "0"], "eps must be positive"),
        (["sweep", "--config", SWEEP, "--model.attacks", "fgms"], "attacks: 'fgms' is not known"),
        (["sweep", "--config", SWEEP, "--model.model", "nowhere"], "nowhere"),
        (["report", "nowhere"], "There is no folder 'nowhere'"),
        (["report"], "required: directory (meansparse report --help lists the options)"),
        (["demo", "--images", "0"], "--images must be at least 1"),
        (["demo", "--steps", "few"], "invalid int value: 'few'"),
    ],
)
def test_wrong_input_ends_in_one_line(args, told, capsys, in_tmp_path):
    assert main(args) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith(f"meansparse {args[0]}: ")
    assert told in error[0]
    assert "Traceback" not in error[0]
    assert not list(in_tmp_path.iterdir())


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("MEANSPARSE_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="no folder"):
        main(["report", "nowhere"])


def test_a_fault_of_the_program_is_not_called_wrong_input(capsys):
    assert explain("meansparse fit", KeyError("x")) == 1
    text = capsys.readouterr().err
    assert "unexpected KeyError" in text
    assert text.count("\n") == 1


def test_ctrl_c_ends_in_one_line(monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_meansparse.cli.report.Words.parse_args", stop)
    assert main(["report", "x"]) == 130
    assert capsys.readouterr().err == "meansparse report: interrupted\n"


def test_types_are_told_in_words():
    union = (
        'Parser key "trainer.max_epochs": Does not validate against any of the Union subtypes '
        "Subtypes: [<class 'int'>, <class 'NoneType'>] Errors: - Expected a <class 'int'> "
        "- Expected a <class 'NoneType'> Given value type: <class 'str'> Given value: many"
    )
    assert plain(union) == "--trainer.max_epochs must be int or null, got 'many'"
    assert plain("the following arguments are required: a.b") == "--a.b is missing"
    assert plain("anything else") == "anything else"


# ------------------------------------------------------------------------------- from end to end


def test_fit_then_sweep_then_report_then_validate(in_tmp_path, capsys):
    fit = ["fit", "--config", FIT, *SMALL, "--trainer.max_epochs", "1", "--model.steps", "1"]
    fit += ["--model.model.init_args.width", "4", "--model.val_steps", "1"]
    assert main(fit) == 0
    out = capsys.readouterr().out
    assert "val_adv_acc" in out
    trained = "outputs/fashion_mnist_pgd/classifier"
    assert f"classifier: {trained}" in out
    checkpoint = next(Path("outputs/fashion_mnist_pgd").rglob("*.ckpt"))

    sweep = ["sweep", "--config", SWEEP, *SMALL, "--model.model", trained]
    sweep += ["--model.alphas", "[0.2]", "--model.attacks", CHEAP]
    assert main(sweep) == 0
    shown = capsys.readouterr()
    assert re.search(r"held-out images.*, n = 8", shown.out)
    assert "test images, n = 6 (reported)" in shown.out
    assert "worst case" in shown.out
    assert "GPU available" not in shown.out + shown.err
    output = Path("outputs/fashion_mnist_sweep")
    table, metadata = read_records(output / "records.parquet")
    assert splits(table) == (HELD_OUT, TEST)
    assert metadata["command"].startswith("meansparse sweep --config")
    assert metadata["data"]["name"] == "fashion_mnist"
    files = {path.name for path in output.iterdir()}
    assert {"report.html", "report.png", "results.md", "sites.json", "adapter"} <= files

    before = (output / "report.html").read_bytes()
    assert main(["report", str(output), "--output", "again"]) == 0
    assert Path("again/report.html").read_bytes() == before

    validate = ["validate", "--config", SWEEP, *SMALL, "--model.model", trained]
    validate += ["--model.attacks", CHEAP, "--ckpt_path", str(checkpoint), "--alpha", "0.4"]
    stamp = (output / "records.parquet").stat().st_mtime_ns
    capsys.readouterr()
    assert main(validate) == 0
    assert re.search(r"^ *0\.4 ", capsys.readouterr().out, re.MULTILINE)
    assert (output / "records.parquet").stat().st_mtime_ns == stamp


def test_validate_measures_an_adapter_at_its_own_alpha(classifier, in_tmp_path, capsys):
    model = load_classifier(classifier)
    images = torch.rand(8, 1, 28, 28)
    sparsify_(model.model, find_sites(model.model, images[:2]), alpha=0.3)
    calibrate_(model, [images])
    save_adapter(model, "made")
    args = ["validate", "--config", SWEEP, *SMALL, "--model.model", classifier]
    assert main([*args, "--model.attacks", CHEAP, "--model.adapter", "made"]) == 0
    assert re.search(r"^ *0\.3 ", capsys.readouterr().out, re.MULTILINE)


def test_no_held_out_images_is_told(classifier, in_tmp_path, capsys):
    sweep = ["sweep", "--config", SWEEP, *SMALL, "--model.model", classifier]
    assert main([*sweep, "--data.holdout", "0", "--data.limit_holdout", "null"]) == 2
    assert "no held-out images" in capsys.readouterr().err


def test_recipes_hold_what_the_package_ships():
    recipe = yaml.safe_load(Path(FIT).read_text())
    sweep = yaml.safe_load(Path(SWEEP).read_text())
    for key in ("holdout", "seed", "dataset"):
        assert recipe["data"][key] == sweep["data"][key], "held-out images must not be trained on"
    assert recipe["model"]["eps"] == sweep["model"]["eps"]
    assert (ROOT / sweep["model"]["model"] / "config.json").is_file()


def test_the_demo_tells_writes_and_ends_well(classifier, in_tmp_path):
    console = Console(file=io.StringIO(), width=120)
    small = {
        "images": 10,
        "test_images": 6,
        "checkpoint": Path(classifier),
        "attacks": json.loads(CHEAP),
    }
    demonstrate(console, Path("shown"), steps=1, alphas=[0.1], **small)
    Path("shown/notes.txt").touch()
    # Once more into the same folder, otherwise.
    sweep = demonstrate(console, Path("shown"), steps=2, alphas=[0.2, 0.6], **small)
    text = console.file.getvalue()
    for part in ("1/4 Fine-tune", "2/4 Sweep", "3/4 Test", "4/4 Report", "shown/report.html"):
        assert part in text
    assert sweep.verdict.split(":")[0] in text
    assert len(sweep.alphas) == 3
    table, _ = read_records("shown/records.parquet")
    assert splits(table) == (HELD_OUT, TEST)
    written = {path.name for path in Path("shown").iterdir()}
    assert {
        "notes.txt",
        "sweep.json",
        "report.html",
        "report.png",
        "records.parquet",
        "sites.json",
        "adapter",
    } <= written
    assert set(read_adapter("shown/adapter").alphas) == {sweep.chosen_alpha}
    assert os.listdir() == ["shown"]


def test_the_demo_without_its_files_says_so(in_tmp_path):
    with pytest.raises(FileNotFoundError, match="install the package again"):
        demonstrate(Console(file=io.StringIO()), Path("shown"), checkpoint=Path("nowhere"))
