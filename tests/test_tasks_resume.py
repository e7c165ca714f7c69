"""A sweep that is killed goes on where it was, and never mixes two configurations."""

import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal

import pyarrow.compute as pc
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file
from sweeps import FGSM, data, sweep_of, trained_network, trainer

from lightning_meansparse.records import HELD_OUT, read_records, write_records
from lightning_meansparse.surgery import alpha_set
from lightning_meansparse.tasks.journal import clear
from lightning_meansparse.tasks.measuring import Measurement

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
]

QUICK = {"alphas": [0.3, 0.6, 1.0], "attacks": FGSM, "screen": FGSM}
RACE = {**QUICK, "select": "racing", "save_examples": True, "check_images": 3}


def run(folder, *, test=True, images=None, model=None, **options):
    """Validate and test a sweep into a folder."""
    module = images or data(train=120, holdout=70, batch_size=16, test=20)
    sweep = sweep_of(model, **{**QUICK, "output": folder, **options})
    once = trainer()
    once.validate(sweep, module, verbose=False)
    if test:
        once.test(sweep, module, verbose=False)
    return sweep


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------------------------------- killed


def mortal(folder, moment, log, options):
    """Run a sweep in this process, which dies before or after its n-th file is put in place."""
    replace, attack, events = os.replace, Measurement._attack, itertools.count()

    def deadly(source, target):
        for act in (lambda: None, lambda: replace(source, target)):
            act()
            if next(events) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    def noted(self, images, labels, indices, round):
        with log.open("a") as file:
            file.write(f"{self.split} {round.name} {indices.tolist()}\n")
        return attack(self, images, labels, indices, round)

    os.replace, Measurement._attack = deadly, noted
    run(folder, **options)


def lives_through(folder, moment, log, options):
    process = multiprocessing.get_context("fork").Process(
        target=mortal, args=(folder, moment, log, options)
    )
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What uninterrupted sweeps leave, by the way alpha is chosen."""
    folder = tmp_path_factory.mktemp("whole")
    trained_network()
    for name, options in (("grid", QUICK), ("racing", RACE)):
        run(folder / name, **options)
    return folder


@pytest.mark.parametrize(("name", "options", "seed"), [("grid", QUICK, 1), ("racing", RACE, 2)])
def test_killed_again_and_again_it_ends_like_one_that_was_not(tmp_path, whole, name, options, seed):
    moments, log = random.Random(seed), tmp_path / "log"
    kills = 0
    # Later and later, or it would never end.
    while not lives_through(tmp_path / "sweep", moments.randrange(4 + 6 * kills), log, options):
        kills += 1
    assert kills >= 2
    assert contents(tmp_path / "sweep") == contents(whole / name)
    batches = log.read_text().splitlines()
    assert len(batches) - len(set(batches)) <= kills


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(40))
def test_no_moment_is_too_bad_to_be_killed_at(tmp_path, whole, moment):
    lived = lives_through(tmp_path / "sweep", moment, tmp_path / "log", QUICK)
    assert lived or lives_through(tmp_path / "sweep", -1, tmp_path / "log", QUICK)
    assert contents(tmp_path / "sweep") == contents(whole / "grid")


def test_an_interrupted_round_says_what_it_has(tmp_path, whole, monkeypatch, caplog):
    interrupted(tmp_path / "sweep", monkeypatch, batches=3)
    assert len(list((tmp_path / "sweep" / "parts").iterdir())) == 3
    table, metadata = read_records(tmp_path / "sweep")  # a report on the way
    assert table.num_rows == 3 * 16 * 4 * 2
    assert metadata["eps"] == 0.03
    with caplog.at_level(logging.INFO, logger="lightning_meansparse"):
        run(tmp_path / "sweep")
    said = [record.getMessage() for record in caplog.records]
    assert "held-out, round main: going on, 48 of 70 samples were measured before" in said
    assert not any("calibrating" in line for line in said)
    assert contents(tmp_path / "sweep") == contents(whole / "grid")


def interrupted(folder, monkeypatch, *, batches, run=run, **options):
    """Run a sweep until a process has measured so many batches."""
    attack, begun = Measurement._attack, itertools.count()

    def stop(self, *batch):
        if next(begun) == batches:
            raise OSError("enough")
        return attack(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Measurement, "_attack", stop)
        with pytest.raises(Exception, match="enough"):
            run(folder, **options)


@pytest.mark.parametrize(
    "damage",
    ["cut short", "of another sweep", "under another name", "of samples twice", "of fewer rows"],
)
def test_a_part_that_is_not_ours_is_measured_again(tmp_path, whole, monkeypatch, caplog, damage):
    interrupted(tmp_path / "sweep", monkeypatch, batches=2)
    first, second = sorted((tmp_path / "sweep" / "parts").iterdir())
    if damage == "of samples twice":
        rows, metadata = read_records(second)
        second, first = first, first.with_name(first.name.replace(first.stem[-8:], "9" * 8))
        write_records(rows, first, {**metadata, "part": first.name})
    elif damage == "of fewer rows":
        rows, metadata = read_records(first)
        write_records(rows.slice(1), first, metadata)
    elif damage == "cut short":
        first.write_bytes(first.read_bytes()[:100])
    elif damage == "under another name":
        shutil.copy(second, first)
    else:
        interrupted(tmp_path / "other", monkeypatch, batches=2, seed=5)
        shutil.copy(tmp_path / "other" / "parts" / first.name, first)
    interrupted(tmp_path / "sweep", monkeypatch, batches=0)
    assert not first.exists()
    run(tmp_path / "sweep")
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len([line for line in warned if line.startswith("measuring a batch again")]) == 1
    assert contents(tmp_path / "sweep") == contents(whole / "grid")


def validate(folder, ranks):
    """Validate a racing sweep on so many processes."""
    many = {"devices": ranks, "strategy": DDPStrategy(start_method="fork")} if ranks > 1 else {}
    sweep = sweep_of(**QUICK, select="racing", output=folder, save_examples=True)
    trainer(**many).validate(
        sweep, data(train=120, holdout=70, batch_size=8, test=20), verbose=False
    )


def kept(folder):
    """Round and number of every sample of which the folder holds a part."""
    tables = [read_records(path)[0] for path in (folder / "parts").iterdir()]
    pairs = [
        sorted(set(zip(*t.select(["round", "index"]).to_pydict().values(), strict=True)))
        for t in tables
    ]
    return [pair for each in pairs for pair in each]


@pytest.mark.parametrize("then", [1, 2, 4])
def test_what_two_processes_have_measured_any_number_goes_on_with(tmp_path, monkeypatch, then):
    one, many, log = tmp_path / "one", tmp_path / "many", tmp_path / "log"
    validate(one, 1)
    interrupted(many, monkeypatch, batches=4, run=validate, ranks=2)
    once = kept(many)
    assert {round for round, _ in once} == {"race-1", "race-2"}
    interrupted(many, monkeypatch, batches=1, run=validate, ranks=then)
    twice = kept(many)
    assert set(once) < set(twice)
    attack = Measurement._attack

    def noted(self, images, labels, indices, round):
        with log.open("a") as file:
            file.writelines(f"{round.name} {index}\n" for index in indices.tolist())
        return attack(self, images, labels, indices, round)

    monkeypatch.setattr(Measurement, "_attack", noted)
    validate(many, then)
    measured = [line.split() for line in log.read_text().splitlines()]
    met = sorted([*twice, *((name, int(index)) for name, index in measured)])
    (rows, _), (expected, _) = (read_records(each / "records.parquet") for each in (many, one))
    assert rows.drop_columns(["margin"]).equals(expected.drop_columns(["margin"]))
    columns = rows.select(["round", "index"]).to_pydict().values()
    assert met == sorted(set(zip(*columns, strict=True))), "each sample once in a round"
    assert not (many / "parts").exists()
    examples = [
        (path.stem.removeprefix("held-out-")[:-9], index)
        for path in (many / "examples").iterdir()
        for index in load_file(path)["indices"].tolist()
    ]
    assert sorted(examples) == met


def test_examples_of_a_batch_that_was_not_finished_go_away(tmp_path, whole, monkeypatch):
    folder = tmp_path / "sweep"
    interrupted(folder, monkeypatch, batches=2, **RACE)
    part = min((folder / "parts").iterdir())
    examples = folder / "examples" / f"{part.stem}.safetensors"
    orphan = examples.with_name(f"{part.stem[:-8]}99999999.safetensors")
    shutil.copy(examples, orphan)
    run(folder, **RACE)
    assert not orphan.exists()
    assert contents(folder) == contents(whole / "racing")


# ---------------------------------------------------------------------------- finished, or other


def test_a_finished_sweep_is_not_measured_again(tmp_path, whole, monkeypatch, caplog):
    shutil.copytree(whole / "racing", tmp_path / "sweep")
    before = contents(tmp_path / "sweep")

    def never(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(Measurement, "_attack", never)
    with caplog.at_level(logging.INFO, logger="lightning_meansparse"):
        again = run(tmp_path / "sweep", **RACE)
    said = [r.getMessage() for r in caplog.records]
    assert "test: everything is in the records, nothing is measured again" in said
    assert contents(tmp_path / "sweep") == before
    stored, metadata = read_records(tmp_path / "sweep" / "records.parquet")
    assert again.records.num_rows == stored.num_rows
    assert (again.chosen_alpha, again.reason) == (
        metadata["chosen_alpha"],
        metadata["select"]["reason"],
    )
    alone = sweep_of(**{**RACE, "output": tmp_path / "sweep"})
    trainer().test(alone, data(train=120, holdout=70, batch_size=16, test=20), verbose=False)
    assert alone.verdict == again.verdict


def other_weights():
    network = sweep_of().classifier.model
    with torch.no_grad():
        network[0].weight.mul_(1.01)
    return network


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (lambda: {"eps": 0.04}, "eps was 0.03, is 0.04"),
        (lambda: {"alphas": [0.3]}, r"alphas was \[0.0, 0.3, 0.6, 1.0\], is \[0.0, 0.3\]"),
        (lambda: {"attacks": [FGSM, "pgd"]}, r'attacks was \["fgsm"\], is \["pgd", "fgsm"\]'),
        (
            lambda: {"attacks": {**FGSM, "options": {"step_size": 0.5}}},
            r"attacks\[fgsm\].options.step_size was 1.0, is 0.5",
        ),
        (lambda: {"select": "racing"}, 'select.method was "grid", is "racing"'),
        (lambda: {"seed": 3}, "seed was 0, is 3"),
        (lambda: {"model": other_weights()}, "model.weights was "),
        (
            lambda: {"images": data(train=120, holdout=70, batch_size=8, test=20)},
            "data.held-out.batch_size was 16, is 8",
        ),
        (
            lambda: {"images": data(train=120, holdout=70, batch_size=16, test=20, seed=1)},
            "data.held-out.fingerprint was .*numbers was ",
        ),
        (
            lambda: {"images": data(train=120, holdout=70, batch_size=16, test=20, calibration=9)},
            "calibration.images was null, is 9",
        ),
    ],
)
def test_another_configuration_is_refused_and_nothing_is_touched(
    tmp_path, whole, monkeypatch, changed, told
):
    folder = tmp_path / "sweep"
    shutil.copytree(whole / "grid", folder)
    (folder / "records.parquet").unlink()
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}

    def never(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr("lightning_meansparse.tasks.sweep.calibrated", never)
    with pytest.raises(ValueError, match=told) as raised:
        run(folder, **changed())
    assert "Name another output, or delete this folder" in str(raised.value)
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == before


def test_data_without_a_fingerprint_are_looked_at(tmp_path):
    class Plain(data().__class__):
        fingerprint = property(lambda self: None, lambda self, value: None)

    images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 2
    pairs = {"train": (images, labels), "test": (images[:8], labels[:8])}
    for shift in (0.0, 0.01):
        pairs["train"] = ((images + shift).clamp(0, 1), labels)
        module = Plain(pairs, batch_size=8, holdout=16)
        if shift:
            with pytest.raises(ValueError, match="fingerprint was"):
                run(tmp_path, images=module, test=False)
        else:
            run(tmp_path, images=module, test=False)


def test_a_folder_of_unknown_origin_is_refused(tmp_path, whole):
    shutil.copytree(whole / "grid", tmp_path / "sweep")
    (tmp_path / "sweep" / "sweep.json").unlink()
    with pytest.raises(ValueError, match=r"holds records.parquet, sites.json, adapter.* and no"):
        run(tmp_path / "sweep")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged or of another version"):
        run(tmp_path / "other")


def test_records_that_are_damaged_are_measured_again(tmp_path, whole, caplog):
    shutil.copytree(whole / "grid", tmp_path / "sweep")
    (tmp_path / "sweep" / "records.parquet").write_bytes(b"PAR1")
    run(tmp_path / "sweep")
    assert any("measuring everything again" in r.getMessage() for r in caplog.records)
    assert contents(tmp_path / "sweep") == contents(whole / "grid")


def test_nothing_is_written_without_output_or_in_a_dry_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options in ({}, {"fast_dev_run": 1}):
        sweep = sweep_of(**QUICK, output=tmp_path / "sweep" if options else None)
        trainer(**options).validate(sweep, data(), verbose=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="save_examples needs a folder"):
        sweep_of(save_examples=True)


def test_clearing_takes_what_a_sweep_of_the_same_command_wrote_and_nothing_else(tmp_path, whole):
    folder = tmp_path / "sweep"
    shutil.copytree(whole / "racing", folder)
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    with pytest.raises(ValueError, match=r"holds records.parquet, .*which 'demo' did not write"):
        clear(folder, command="demo")
    assert contents(folder) == before
    content = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**content, "notes": {"command": "demo"}}))
    clear(folder, command="demo")
    assert list(contents(folder)) == ["notes.txt"]
    clear(tmp_path / "nothing", command="demo")


# -------------------------------------------------------------------------------------- examples


def test_kept_examples_are_those_that_the_records_speak_of(whole):
    table, metadata = read_records(whole / "racing" / "records.parquet")
    sweep = sweep_of(adapter=whole / "racing" / "adapter")
    images = data(train=120, holdout=70, batch_size=16, test=20)
    images.setup()
    part = images.parts["holdout"]
    clean = {int(row): part[i][0] for i, row in enumerate(part.rows)}
    files = sorted((whole / "racing" / "examples").glob("held-out-race-1-*.safetensors"))
    seen, broken = [], 0
    for file in files:
        kept = load_file(file)
        originals = torch.stack([clean[i] for i in kept["indices"].tolist()])
        for alpha in metadata["alphas"]:
            examples = kept[f"alpha_{alpha:g}"]
            assert (examples - originals).abs().max() <= 0.03 + 1e-6
            with alpha_set(sweep.classifier, alpha), torch.no_grad():
                stands = sweep.classifier(examples).argmax(1) == kept["labels"]
            rows = table.filter(
                (pc.field("split") == HELD_OUT)
                & (pc.field("round") == "race-1")
                & (pc.field("alpha") == alpha)
                & (pc.field("attack") == "fgsm")
            ).to_pydict()
            flags = dict(zip(rows["index"], rows["standing"], strict=True))
            assert stands.tolist() == [flags[i] for i in kept["indices"].tolist()]
            broken += int((~stands).sum())
        seen += kept["indices"].tolist()
    assert len(seen) == 35
    assert broken > 0
