"""The callback of transformers' Trainer, in real and tiny runs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from lightning_meansparse import calibrate_, find_sites, sparsify_
from lightning_meansparse.adapter import read_adapter
from lightning_meansparse.surgery import alphas, operators

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from lightning_meansparse.hugging_face import MeanSparseTrainerCallback  # noqa: E402

N, SIDE = 21, 16


class Images(Dataset):
    """Images that do not change, or do at every reading."""

    def __init__(self, augment=False):
        self.images = torch.rand(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        self.augment = augment

    def __len__(self):
        return N

    def __getitem__(self, index):
        noise = torch.rand(1) if self.augment else 0.0
        return {"pixel_values": self.images[index] + noise, "labels": index % 3}


def resnet(seed=0):
    torch.manual_seed(seed)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.AutoModelForImageClassification.from_config(config)


def train(folder, *callbacks, model=None, data=None, **options):
    arguments = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 0.05}
    arguments |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments |= {"dataloader_pin_memory": False, "seed": 3}
    trainer = transformers.Trainer(
        model or resnet(),
        transformers.TrainingArguments(output_dir=folder, **{**arguments, **options}),
        train_dataset=data or Images(),
        eval_dataset=Images(),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def statistics(model):
    return {name: torch.stack([op.mean, op.var]) for name, op in operators(model).items()}


def by_hand(model):
    """The same weights, calibrated without a Trainer."""
    fresh = resnet(seed=9)
    fresh.load_state_dict(model.state_dict())
    sparsify_(fresh, find_sites(fresh, torch.rand(2, 3, SIDE, SIDE)), alpha=0.3)
    calibrate_(fresh, list(Images().images.split(4)))
    return fresh


def assert_same_statistics(model, other):
    mine, theirs = statistics(model), statistics(other)
    assert mine.keys() == theirs.keys()
    assert mine
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_training_is_untouched_and_then_the_model_is_calibrated(tmp_path):
    plain = train(tmp_path).model
    callback = MeanSparseTrainerCallback(alpha=0.3, save_to=tmp_path / "adapter", base="hf/org/net")
    trainer = train(tmp_path, callback)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
    assert_same_statistics(trainer.model, by_hand(plain))
    assert set(alphas(trainer.model).values()) == {0.3}
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.source == "hf/org/net"
    assert adapter.calibration["images"] == N
    assert adapter.fingerprint.matches(plain)
    # What comes next is of the sparsified model: measuring, and saving.
    batch = {"pixel_values": Images().images, "labels": torch.arange(N) % 3}
    with torch.no_grad():
        wanted = by_hand(plain).eval()(**batch)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted.loss.item(), abs=1e-5)
    with torch.no_grad():
        base = plain.eval()(**batch)
    assert not torch.allclose(base.logits, wanted.logits, atol=1e-3)
    trainer.save_model(tmp_path / "whole")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "whole")
    assert torch.equal(loaded.eval()(**batch).logits, trainer.model.eval()(**batch).logits)


def test_the_best_weights_are_the_ones_measured(tmp_path):
    trainer = train(
        tmp_path,
        MeanSparseTrainerCallback(alpha=0.3),
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that it is not the last
    )
    best = transformers.AutoModelForImageClassification.from_pretrained(
        trainer.state.best_model_checkpoint
    )
    assert not operators(best), "checkpoints in training are the base's"
    for name, value in best.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])
    assert_same_statistics(trainer.model, by_hand(best))


def test_mixed_precision_does_not_blur_the_statistics(tmp_path):
    trainer = train(tmp_path, MeanSparseTrainerCallback(alpha=0.3), bf16=True)
    assert_same_statistics(trainer.model, by_hand(trainer.model))
    trainer.evaluate()


def test_training_again_begins_with_the_base(tmp_path):
    callback = MeanSparseTrainerCallback(alpha=0.3)
    trainer = train(tmp_path, callback)
    first = statistics(trainer.model)
    seen = []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append(len(operators(model)))

    trainer.add_callback(Look)
    trainer.train()
    assert set(seen) == {0}
    assert_same_statistics(trainer.model, by_hand(trainer.model))
    assert any(not torch.equal(first[name], new) for name, new in statistics(trainer.model).items())


def test_which_images(tmp_path):
    few = MeanSparseTrainerCallback(max_batches=2, save_to=tmp_path / "few")
    train(tmp_path, few)
    assert read_adapter(tmp_path / "few").calibration["images"] == 8
    given = MeanSparseTrainerCallback(dataloader=[Images().images[:5]], save_to=tmp_path / "given")
    train(tmp_path, given, data=Images(augment=True))
    assert read_adapter(tmp_path / "given").calibration == {"data": "dataloader=", "images": 5}
    with pytest.warns(UserWarning, match="augments it"):
        train(tmp_path, MeanSparseTrainerCallback(), data=Images(augment=True))


def test_what_fails_fails_before_training(tmp_path):
    steps = []

    class Count(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            steps.append(1)

    (tmp_path / "file").write_text("")
    for callback, message in (
        (MeanSparseTrainerCallback(where="no.such.*"), "no.such"),
        (MeanSparseTrainerCallback(alpha={"nothing*": 0.1}), "matches none of"),
        (MeanSparseTrainerCallback(save_to=tmp_path / "file"), "save_to must be a folder"),
        (MeanSparseTrainerCallback(dataloader=[]), "no batch in it"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, callback, Count())
    assert not steps
    for options in ({"alpha": -1}, {"alpha": {}}, {"max_batches": 0}, {"statistics": "some"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MeanSparseTrainerCallback(**options)
    with pytest.raises(TypeError, match="only once"):
        MeanSparseTrainerCallback(dataloader=iter([]))


def test_a_failed_calibration_leaves_the_trained_base(tmp_path):
    class Nan(Images):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return item if index < N - 1 else {**item, "pixel_values": item["pixel_values"] / 0}

    model = resnet()
    with pytest.raises(ValueError, match="not finite") as caught:
        train(tmp_path, MeanSparseTrainerCallback(), model=model, data=Nan(), max_steps=1)
    assert any("holds the trained weights" in note for note in caught.value.__notes__)
    assert not operators(model)
    assert type(model) is transformers.ResNetForImageClassification


RANK = """
import os
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_hugging_face_trainer import MeanSparseTrainerCallback, train
trainer = train(sys.argv[2], MeanSparseTrainerCallback(alpha=0.3, save_to=sys.argv[2] + "/adapter"),
                ddp_backend="gloo")
assert trainer.args.world_size == 2
if trainer.is_world_process_zero():
    trainer.model.save_pretrained(sys.argv[2] + "/whole")
torch.distributed.destroy_process_group()
sys.stderr.flush()
os._exit(0)  # threads of PyTorch's own now and then abort the end of a program
"""


def test_two_processes_count_every_sample_once(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, Path(__file__).parent, tmp_path],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate()
        assert rank.returncode == 0, errors
    assert read_adapter(tmp_path / "adapter").calibration["images"] == N
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "whole")
    assert_same_statistics(loaded, by_hand(loaded))
