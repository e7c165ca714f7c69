"""The attacks and the evaluation around them: strong enough, legal, and leaving no trace."""

from __future__ import annotations

import builtins
import copy
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_meansparse.attacks import (
    SUITES,
    AttackSpec,
    BaseExamples,
    Evaluation,
    evaluate,
    parse_eps,
    resolve_attacks,
)
from lightning_meansparse.attacks.ball import Ball, sample_seed
from lightning_meansparse.demo.network import ConvNet
from lightning_meansparse.sites import Site
from lightning_meansparse.surgery import alphas, calibrate_, operators, set_alpha, sparsify_

EPS = 0.05
N = 80
APGD = "lightning_meansparse.attacks.apgd.APGD"
SHORT = [
    "fgsm",
    {"attack": "pgd", "options": {"steps": 10}},
    {"attack": "apgd-ce", "options": {"steps": 20}},
    {"attack": "square", "options": {"n_queries": 30}},
    {"attack": "adaptive", "options": {"steps": 20}},
]


def _data(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four smooth patterns under noise: easy to tell apart, and easy to attack."""
    patterns = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    patterns = F.interpolate(patterns, size=(12, 12), mode="bilinear")
    labels = torch.randint(4, (count,), generator=generator)
    noise = torch.randn(count, 1, 12, 12, generator=generator)
    return (0.25 + 0.35 * patterns[labels] + 0.15 * noise).clamp(0, 1), labels


@pytest.fixture(scope="module")
def task() -> tuple[ConvNet, Tensor, Tensor]:
    """A standard-trained, sparsified net (alpha 0) with test images; tests deepcopy the net."""
    generator = torch.Generator().manual_seed(1)
    images, labels = _data(1500, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ConvNet(1, 4, 8)
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for step in range(80):
            rows = slice(step * 64 % 1400, step * 64 % 1400 + 64)
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
    model.eval()
    widths = (8, 16, 16, 32)
    sparsify_(model, [Site(f"stage{i}.act", "in", (w, 1, 1)) for i, w in enumerate(widths, 1)])
    calibrate_(model, images.split(250))
    return model, *_data(N, generator)


@pytest.fixture
def net(task: tuple[ConvNet, Tensor, Tensor]) -> ConvNet:
    return copy.deepcopy(task[0])


@pytest.fixture
def images(task: tuple[ConvNet, Tensor, Tensor]) -> Tensor:
    return task[1].clone()


@pytest.fixture
def labels(task: tuple[ConvNet, Tensor, Tensor]) -> Tensor:
    return task[2].clone()


@pytest.fixture(scope="module")
def short(task: tuple[ConvNet, Tensor, Tensor]) -> Evaluation:
    """The short suite at alpha 0.6, once for all tests that only look at a result."""
    model = copy.deepcopy(task[0])
    set_alpha(model, 0.6)
    return evaluate(model, task[1], task[2], attacks=SHORT, eps=EPS, keep_examples=True)


class Linear(nn.Module):
    """Logits linear in the pixels; ``scale`` makes them as large as one likes."""

    def __init__(self, classes: int, size: int = 12, scale: float = 1.0) -> None:
        super().__init__()
        self.head = nn.Linear(size * size, classes)
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self.head(images.flatten(1))


def own_labels(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images).argmax(1)


# --- names and budgets ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "value"),
    [("8/255", 8 / 255), (0.1, 0.1), ("0.1", 0.1), (1, 1.0), (" 4 / 255 ", 4 / 255), ("1e-1", 0.1)],
)
def test_eps_reads_numbers_and_fractions(given: float | str, value: float) -> None:
    assert parse_eps(given) == pytest.approx(value, abs=0, rel=1e-15)


@pytest.mark.parametrize("given", ["", "eight", "1/0", "1/2/3", 0, -0.1, float("nan"), "inf", "-1"])
def test_eps_refuses_what_is_no_radius(given: float | str) -> None:
    with pytest.raises(ValueError, match=r"eps must be .*got"):
        parse_eps(given)


@pytest.mark.parametrize("given", [None, True, [0.1]])
def test_eps_refuses_other_types(given: Any) -> None:
    with pytest.raises(TypeError, match=r"eps must be a number or text"):
        parse_eps(given)


def test_suites_run_in_order_of_kind() -> None:
    kinds = ["gradient", "blackbox", "transfer", "adaptive"]
    for name in SUITES:
        order = [kinds.index(spec.kind) for spec in resolve_attacks(name)]
        assert order == sorted(order)
    names = [spec.name for spec in resolve_attacks(["adaptive", "square", "pgd"])]
    assert names == ["pgd", "square", "adaptive"]


def test_standard_spells_out_autoattacks_budgets() -> None:
    specs = {spec.name: spec for spec in resolve_attacks("standard")}
    assert list(specs) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert specs["apgd-ce"].options["steps"] == 100
    assert specs["apgd-t"].options["steps"] == 100
    assert specs["apgd-t"].options["n_targets"] == 9
    assert specs["fab-t"].options["steps"] == 100
    assert specs["fab-t"].options["multi_targeted"] is True
    assert specs["square"].options["n_queries"] == 5000


def test_every_named_attack_states_its_budget() -> None:
    for suite in SUITES.values():
        for spec in suite:
            assert {"steps", "n_queries"} & set(spec.options), spec.name


def test_specs_survive_json_pickle_and_deepcopy() -> None:
    for suite in SUITES.values():
        for spec in suite:
            assert AttackSpec(**spec.as_dict()) == spec
            assert pickle.loads(pickle.dumps(spec)) == spec
            assert copy.deepcopy(spec) == spec
            with pytest.raises(TypeError):
                spec.options["steps"] = 1  # type: ignore[index]


def test_a_dictionary_changes_a_known_attack() -> None:
    (spec,) = resolve_attacks({"attack": "square", "options": {"n_queries": 7}, "name": "few"})
    known = SUITES["square"][0]
    assert spec.options == {**known.options, "n_queries": 7}
    assert (spec.name, spec.kind, spec.attack) == ("few", "blackbox", known.attack)
    (spec,) = resolve_attacks({"attack": "adaptive", "rule": "identity"})
    assert (spec.rule, spec.temperature) == ("identity", None)


def test_a_class_path_is_an_attack() -> None:
    (spec,) = resolve_attacks("torchattacks.PGDL2")
    assert (spec.name, spec.attack, spec.kind) == ("pgdl2", "torchattacks.PGDL2", "gradient")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("pdg", r"'pdg' is not known; known are fgsm.*standard"),
        ([], "attacks is empty"),
        ({"attack": "pgd", "step": 3}, r"unknown keys 'step'; known are"),
        ({"options": {}}, "needs 'attack'"),
        (["pgd", {"attack": "pgd", "options": {"steps": 9}}], "two different attacks named 'pgd'"),
        ({"attack": "pgd", "name": "worst"}, "reserved"),
        ({"attack": "pgd", "name": "a/b"}, "without spaces or slashes"),
        ({"attack": "pgd", "options": {"eps": 1}}, "must not hold 'eps'"),
        ({"attack": "pgd", "rule": "identity"}, "its kind is 'adaptive'"),
        ({"attack": "pgd", "kind": "white"}, "kind of attack 'pgd' must be one of"),
        ({"attack": "adaptive", "temperature": None}, "belongs to rule='smooth'"),
    ],
)
def test_wrong_suites_are_explained(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_attacks(given)


def test_suites_of_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="names, dictionaries or AttackSpec"):
        resolve_attacks([3])  # type: ignore[list-item]


# --- strength --------------------------------------------------------------------------------


def test_a_weak_net_falls(short: Evaluation) -> None:
    assert short.clean.sum() >= 0.95 * N
    assert short.standing[:, 0].sum() < short.clean.sum()


def test_a_weak_net_falls_to_nothing_at_a_large_radius(
    net: ConvNet, images: Tensor, labels: Tensor
) -> None:
    result = evaluate(net, images, labels, attacks=SHORT[2:3], eps=0.3)
    assert result.worst.sum() == 0


def test_adaptive_sees_through_masking(short: Evaluation) -> None:
    """Wide bands hide the gradient: exact APGD leaves many more standing than the adaptive one."""
    assert short.apparent is not None
    assert short.apparent.sum() - short.worst.sum() >= 0.15 * N


def test_adaptive_alone_beats_exact_at_equal_steps(
    net: ConvNet, images: Tensor, labels: Tensor, short: Evaluation
) -> None:
    set_alpha(net, 0.6)
    alone = evaluate(net, images, labels, attacks=SHORT[4], eps=EPS)
    assert alone.apparent is None
    assert alone.worst.sum() <= short.standing[:, 2].sum() - 0.15 * N


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_apgd_agrees_with_torchattacks(
    net: ConvNet, images: Tensor, labels: Tensor, norm: str
) -> None:
    import torchattacks

    from lightning_meansparse.attacks.apgd import APGD as Ours

    eps, steps = (EPS, 50) if norm == "Linf" else (0.6, 50)
    net.requires_grad_(False)
    reference = torchattacks.APGD(net, norm=norm, eps=eps, steps=steps, seed=0)
    theirs = net(reference(images, labels)).argmax(1) == labels
    ours = net(Ours(net, eps=eps, norm=norm, steps=steps)(images, labels)).argmax(1) == labels
    assert 0.1 * N < theirs.sum() < 0.95 * N
    assert (ours != theirs).sum() <= max(1, 0.02 * N)


def test_fgsm_is_torchattacks_fgsm(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    import torchattacks

    ours = evaluate(net, images, labels, attacks="fgsm", eps=EPS)
    theirs = evaluate(net, images, labels, attacks="torchattacks.FGSM", eps=EPS)
    assert torch.equal(ours.worst, theirs.worst)
    assert 0 < ours.worst.sum() < ours.clean.sum()
    assert issubclass(type(torchattacks.FGSM(net)), torchattacks.attack.Attack)


def test_confident_models_are_not_robust_models(images: Tensor) -> None:
    """Huge logits saturate cross-entropy in float32; the attack must not notice."""
    torch.manual_seed(0)
    meek = Linear(4)
    proud = copy.deepcopy(meek)
    proud.scale = 1e4
    labels = own_labels(meek, images)
    meek_left, proud_left = (
        int(evaluate(m, images, labels, attacks=["pgd", SHORT[2]], eps=0.03).worst.sum())
        for m in (meek, proud)
    )
    assert meek_left < N
    assert abs(meek_left - proud_left) <= 2


def test_our_cross_entropy_has_the_direction_and_order_of_the_usual_one() -> None:
    from lightning_meansparse.attacks.pgd import cross_entropy

    logits = (10 * torch.randn(50, 6, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(6, (50,))
    usual = F.cross_entropy(logits, labels, reduction="none")
    ours = cross_entropy(labels)(logits)
    assert torch.equal(usual.argsort(), ours.argsort())
    slopes = [torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (usual, ours)]
    parallel = F.cosine_similarity(slopes[0], slopes[1])
    torch.testing.assert_close(parallel, torch.ones_like(parallel))


@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted", "margin"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_apgd_solves_linear_models(images: Tensor, loss: str, norm: str) -> None:
    """The robust accuracy of a two-class linear model is known in closed form."""
    torch.manual_seed(0)
    model = Linear(2)
    inner = images.clamp(0.3, 0.7)  # far from the borders of [0, 1]
    labels = own_labels(model, inner)
    model.requires_grad_(False)
    weight = model.head.weight[0] - model.head.weight[1]
    dual = weight.abs().sum() if norm == "Linf" else weight.norm()
    logits = model(inner)
    distance = (logits[:, 0] - logits[:, 1]).abs() / dual
    eps = float(distance.median())
    spec = AttackSpec("apgd", APGD, {"steps": 20, "loss": loss})
    result = evaluate(model, inner, labels, attacks=spec, eps=eps, norm=norm)
    clear = (distance - eps).abs() > 0.02 * eps
    assert torch.equal(result.worst[clear], distance[clear] > eps)


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 10, 30, 1000])
def test_any_number_of_classes(images: Tensor, classes: int) -> None:
    torch.manual_seed(classes)
    model = Linear(classes)
    few = images[:6]
    suite = [
        {"attack": name, "options": {"steps": 3}}
        for name in ("pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t")
    ]
    suite += [{"attack": "square", "options": {"n_queries": 3}}]
    result = evaluate(model, few, own_labels(model, few), attacks=suite, eps=1e-4)
    assert result.clean.all()
    assert result.attacked[:, 0].all()
    result = evaluate(model, few, own_labels(model, few), attacks=suite[2:4], eps=0.9)
    assert not result.worst.any()


# --- what an example may be -------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_examples_stay_in_the_ball(net: ConvNet, images: Tensor, labels: Tensor, norm: str) -> None:
    eps = EPS if norm == "Linf" else 0.5
    suite = [*SHORT[:3], {"attack": "fab-t", "options": {"steps": 5}}, SHORT[4]]
    suite += SHORT[3:4] if norm == "Linf" else []  # its grid does not fit 12 pixels under L2
    result = evaluate(
        net, images[:24], labels[:24], attacks=suite, eps=eps, norm=norm, keep_examples=True
    )
    assert result.examples is not None
    delta = result.examples.double() - images[:24].double()
    size = delta.abs().amax((1, 2, 3)) if norm == "Linf" else delta.flatten(1).norm(dim=1)
    assert size.max() <= eps
    assert size[~result.worst & result.clean].min() > 0
    assert result.examples.min() >= 0
    assert result.examples.max() <= 1


def test_flags_are_those_of_the_exact_forward(
    task: tuple[ConvNet, Tensor, Tensor], short: Evaluation
) -> None:
    model = copy.deepcopy(task[0])
    set_alpha(model, 0.6)
    assert short.examples is not None
    with torch.no_grad():
        right = model(short.examples).argmax(1) == task[2]
    assert torch.equal(right, short.worst)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_clip_makes_anything_legal(norm: str) -> None:
    center = torch.rand(16, 3, 5, 5)
    center[0] = 0
    center[1] = 1
    eps = 8 / 255
    wild = center + torch.randn_like(center)
    wild[2, 0, 0, 0], wild[3, 0, 0, 0], wild[4] = float("nan"), float("inf"), float("-inf")
    legal = Ball(center, eps, norm).clip(wild)
    delta = legal.double() - center.double()
    size = delta.abs().amax((1, 2, 3)) if norm == "Linf" else delta.flatten(1).norm(dim=1)
    assert legal.isfinite().all()
    assert legal.min() >= 0
    assert legal.max() <= 1
    assert size.max() <= eps
    inside = center + 0.1 * (legal - center)
    assert torch.equal(Ball(center, eps, norm).clip(inside), inside)


def _attack(found: Callable[[Tensor, Tensor], Any]) -> type:
    from torchattacks.attack import Attack

    class Custom(Attack):
        def __init__(self, model: nn.Module) -> None:
            super().__init__("custom", model)

        def forward(self, images: Tensor, labels: Tensor) -> Any:
            return found(images, labels)

    return Custom


def _run_custom(
    monkeypatch: pytest.MonkeyPatch, found: Callable[[Tensor, Tensor], Any], *args: Any, **kw: Any
) -> Evaluation:
    monkeypatch.setattr(sys.modules[__name__], "Custom", _attack(found), raising=False)
    return evaluate(*args, attacks=AttackSpec("custom", f"{__name__}.Custom"), eps=EPS, **kw)


def test_an_attack_outside_the_ball_is_pulled_back(
    net: ConvNet, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = images.flip(0)  # an image of another class fools every model, but is far away
    result = _run_custom(
        monkeypatch, lambda x, y: other[: len(x)], net, images, labels, keep_examples=True
    )
    assert result.examples is not None
    assert (result.examples.double() - images.double()).abs().max() <= EPS
    assert result.worst.sum() > 0.3 * N


def test_nan_examples_fool_nobody(
    net: ConvNet, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = _run_custom(monkeypatch, lambda x, y: x * float("nan"), net, images, labels)
    assert torch.equal(result.worst, result.clean)


def test_an_attack_that_repairs_wrong_samples_gains_nothing(
    net: ConvNet, images: Tensor, labels: Tensor
) -> None:
    wrong = (labels + 1) % 4
    result = evaluate(net, images, wrong, attacks="pgd", eps=0.3)
    assert not (result.worst & ~result.clean).any()
    assert torch.equal(result.attacked[:, 0], result.clean)


def test_failing_attacks_are_named(
    net: ConvNet, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match=r"attack 'custom' .* failed: .*returned NoneType"):
        _run_custom(monkeypatch, lambda x, y: None, net, images, labels)


class NaNLogits(nn.Module):
    """NaN for the true class where the first pixel is bright: argmax would call that right."""

    def forward(self, images: Tensor) -> Tensor:
        logits = images.flatten(1)[:, :3].clone()
        return torch.where(logits[:, :1] > 0.5, torch.nan, logits)


def test_nan_logits_count_as_wrong() -> None:
    images = torch.rand(10, 1, 4, 4)
    images[:5, 0, 0, 0], images[5:, 0, 0, 0] = 0.9, 0.1
    labels = own_labels(NaNLogits(), images)
    result = evaluate(NaNLogits(), images, labels, attacks="fgsm", eps=1e-6)
    assert result.clean.tolist() == [False] * 5 + [True] * 5


# --- consistency -------------------------------------------------------------------------------


def test_standing_only_falls(short: Evaluation) -> None:
    flags = torch.cat([short.clean[:, None], short.standing], dim=1).int()
    assert (flags.diff(dim=1) <= 0).all()
    assert torch.equal(short.attacked, flags[:, :-1].bool())
    assert torch.equal(short.worst, flags[:, -1].bool())
    assert ((short.forwards > 0) == short.attacked).all()
    assert (short.backwards[~short.attacked] == 0).all()
    assert torch.equal(short.clean, short.predictions == short.labels)
    assert torch.equal(short.clean, short.margin > 0)


def test_counts_are_those_of_the_model(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    seen = [0, 0]

    def forward(module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        seen[0] += len(logits)
        if logits.requires_grad:
            logits.register_hook(lambda g: seen.__setitem__(1, seen[1] + len(g)))

    net.register_forward_hook(forward)
    suite = [*SHORT, {"attack": "apgd-t", "options": {"steps": 4}}, "torchattacks.BIM"]
    result = evaluate(net, images[:16], labels[:16], attacks=suite, eps=EPS / 2)
    assert seen[0] == result.forwards.sum() + 16  # the clean forward
    assert seen[1] == result.backwards.sum()


def test_the_order_of_samples_does_not_matter(
    net: ConvNet, images: Tensor, labels: Tensor, short: Evaluation
) -> None:
    """Another order and other batch sizes: float32 sums differ, so a few flags on the edge may."""
    set_alpha(net, 0.6)
    order = torch.randperm(N)
    result = evaluate(
        net, images[order], labels[order], attacks=SHORT, eps=EPS, indices=order, batch_size=17
    )
    back = order.argsort()
    assert torch.equal(result.indices[back], torch.arange(N))
    assert torch.equal(result.clean[back], short.clean)
    assert (result.standing[back] != short.standing).float().mean() <= 0.02


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_noise_belongs_to_the_sample(norm: str) -> None:
    center = torch.rand(6, 1, 5, 5)
    numbers = torch.tensor([3, 1, 4, 1, 5, 9])
    whole = Ball(center, 0.1, norm).random(7, numbers)
    part = Ball(center[4:5], 0.1, norm).random(7, numbers[4:5])
    assert torch.equal(whole[4:5], part)
    assert not torch.equal(whole, Ball(center, 0.1, norm).random(8, numbers))
    assert not torch.equal(whole, Ball(center, 0.1, norm).random(7, numbers, run=1))
    many = {sample_seed(s, i, r) for s in range(4) for i in range(50) for r in range(4)}
    assert len(many) == 800


def test_the_same_seed_gives_the_same_result(
    net: ConvNet, images: Tensor, labels: Tensor, short: Evaluation
) -> None:
    set_alpha(net, 0.6)
    torch.manual_seed(123)
    again = evaluate(net, images, labels, attacks=SHORT, eps=EPS, keep_examples=True)
    assert torch.equal(again.standing, short.standing)
    assert again.examples is not None
    assert short.examples is not None
    assert torch.equal(again.examples, short.examples)


def test_base_examples_are_made_once(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    base = BaseExamples()
    spent = []
    for alpha in (0.2, 0.4):
        set_alpha(net, alpha)
        alone = evaluate(net, images, labels, attacks=SHORT[4], eps=EPS)
        shared = evaluate(net, images, labels, attacks=SHORT[4], eps=EPS, base=base)
        assert torch.equal(alone.standing, shared.standing)
        spent.append((int(alone.backwards.sum()), int(shared.backwards.sum())))
        assert alphas(net) == dict.fromkeys(operators(net), alpha)
    assert spent[0][0] == spent[0][1]
    assert spent[1][1] < spent[1][0]
    with pytest.raises(ValueError, match=r"make a new BaseExamples\(\) per batch"):
        evaluate(net, images.flip(0), labels, attacks=SHORT[4], eps=EPS, base=base)
    with pytest.raises(ValueError, match="eps, norm, seed"):
        evaluate(net, images, labels, attacks=SHORT[4], eps=EPS / 2, base=base)


def test_progress_names_each_attack(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    said: list[str] = []
    evaluate(net, images[:4], labels[:4], attacks=SHORT[:2], eps=EPS, progress=said.append)
    assert [text.partition(":")[0] for text in said[1:]] == ["fgsm", "pgd"]
    assert "of 4 images" in said[1]


# --- no trace ----------------------------------------------------------------------------------


class Stubborn(nn.Module):
    """BatchNorm and dropout that would show if a module came out of eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.fail_after: int | None = None

    def forward(self, images: Tensor) -> Tensor:
        assert not self.norm.training
        assert not self.drop.training
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                self.norm.running_mean += 1  # damage on the way out
                raise KeyboardInterrupt
        return self.head(self.drop(self.norm(self.conv(images))).mean((2, 3)))


def _trace(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "dtypes": [t.dtype for t in (*model.parameters(), *model.buffers())],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "rules": [(op.backward, op.temperature) for op in operators(model).values()],
        "alphas": alphas(model),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),
        "python": random.getstate(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, np.ndarray):
        return bool((one == two).all())
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[k], two[k]) for k in one)
    return bool(one == two)


@pytest.fixture
def stubborn() -> Stubborn:
    model = Stubborn().train()
    model.norm.eval()  # mixed modes, as in fine-tuning with frozen statistics
    model.head.bias.requires_grad_(False)
    return model


FAB = {"attack": "fab-t", "options": {"steps": 2}}
QUICK = ["fgsm", SHORT[3], FAB, {"attack": "adaptive", "options": {"steps": 2}}]


@pytest.mark.parametrize(
    "around", [nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad]
)
def test_no_trace_is_left(stubborn: Stubborn, around: Callable[[], Any]) -> None:
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    with around():
        # Lightning makes its batches inside inference mode.
        given, classes = images.clone(), labels.clone()
        before = _trace(stubborn)
        result = evaluate(stubborn, given, classes, attacks=QUICK, eps=EPS)
        after = _trace(stubborn)
    for key in before:
        assert _same(before[key], after[key]), key
    assert result.backwards.sum() > 0
    assert torch.equal(given, images)
    assert torch.equal(classes, labels)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_no_trace_is_left_after_an_exception(stubborn: Stubborn, after: int) -> None:
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    before = _trace(stubborn)
    stubborn.fail_after = after
    with pytest.raises(KeyboardInterrupt):
        evaluate(stubborn, images, labels, attacks=QUICK, eps=EPS)
    for key, value in _trace(stubborn).items():
        assert _same(before[key], value), key


def test_operators_come_back_after_an_exception(
    net: ConvNet, images: Tensor, labels: Tensor
) -> None:
    set_alpha(net, 0.4)
    before = _trace(net)
    calls = [0]

    def forward(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls[0] += 1
        if calls[0] > 30:  # in the adaptive attack proper, after its start on the base model
            raise KeyboardInterrupt

    handle = net.register_forward_pre_hook(forward)
    with pytest.raises(KeyboardInterrupt):
        evaluate(net, images, labels, attacks=SHORT[4], eps=EPS / 10)
    handle.remove()
    for key, value in _trace(net).items():
        assert _same(before[key], value), key


def test_attack_results_are_the_same_in_every_grad_mode(
    net: ConvNet, images: Tensor, labels: Tensor
) -> None:
    flags = []
    for around in (nullcontext, torch.no_grad, torch.inference_mode):
        with around():
            flags.append(evaluate(net, images[:20], labels[:20], attacks=SHORT[:3], eps=EPS))
    assert 0 < flags[0].worst.sum() < 20
    assert all(torch.equal(flags[0].standing, other.standing) for other in flags[1:])


def test_a_model_made_in_inference_mode(images: Tensor) -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(144, 3))
        labels = own_labels(model, images)
        result = evaluate(model, images, labels, attacks="pgd", eps=0.3)
    assert result.worst.sum() < result.clean.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_attacked_in_float32(
    net: ConvNet, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> None:
    net.to(dtype)
    wide = copy.deepcopy(net).float()
    result = evaluate(net, images[:20], labels[:20], attacks=SHORT[:3], eps=EPS)
    expected = evaluate(wide, images[:20], labels[:20], attacks=SHORT[:3], eps=EPS)
    assert torch.equal(result.standing, expected.standing)
    assert {p.dtype for p in net.parameters()} == {dtype}


def test_autocast_does_not_reach_the_attack(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    plain = evaluate(net, images[:20], labels[:20], attacks=SHORT[:4], eps=EPS)
    with torch.autocast("cpu", torch.bfloat16):
        cast = evaluate(net, images[:20], labels[:20], attacks=SHORT[:4], eps=EPS)
    assert torch.equal(plain.margin, cast.margin)
    assert torch.equal(plain.standing, cast.standing)


def test_channels_last_images_and_models(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    three = nn.Sequential(nn.Conv2d(3, 1, 1), net).eval()
    rgb = F.interpolate(images[:6], 20).expand(-1, 3, -1, -1).contiguous()
    classes = own_labels(three, rgb)
    three.to(memory_format=torch.channels_last)
    last = rgb.contiguous(memory_format=torch.channels_last)
    suite = [SHORT[3], FAB, {"attack": "apgd-t", "options": {"steps": 2}}, "fgsm"]
    for norm, eps in (("Linf", 0.1), ("L2", 1.0)):
        given = evaluate(three, last, classes, attacks=suite, eps=eps, norm=norm)
        plain = evaluate(three, rgb, classes, attacks=suite, eps=eps, norm=norm)
        assert torch.equal(given.standing, plain.standing)
        assert given.attacked[:, 0].all()


@pytest.mark.parametrize("size", [(20, 14), (5, 40), (40, 5)])
def test_square_takes_narrow_images(size: tuple[int, int]) -> None:
    images = torch.rand(6, 1, *size)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(size[0] * size[1], 3))
    labels = own_labels(model, images)
    assert evaluate(model, images, labels, attacks=SHORT[3], eps=0.3).worst.sum() < 6
    with pytest.raises(RuntimeError, match=r"quadratic images of 25 pixels .*leave it out"):
        evaluate(model, images, labels, attacks=SHORT[3], eps=0.3, norm="L2")


def test_models_without_parameters_and_wrapped_ones(images: Tensor) -> None:
    class Brightness(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            half = pixels.flatten(1)
            return torch.stack([half[:, :72].mean(1), half[:, 72:].mean(1)], 1)

    labels = own_labels(Brightness(), images)
    result = evaluate(Brightness(), images, labels, attacks=[*SHORT[:4], FAB], eps=0.5)
    assert result.clean.all()
    assert not result.worst.any()


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2", "L1", "inf"])
def test_wrong_norms(net: ConvNet, images: Tensor, labels: Tensor, norm: str) -> None:
    message = "'Linf'" if norm == "linf" else "norm must be one of"
    with pytest.raises(ValueError, match=message):
        evaluate(net, images, labels, attacks="pgd", eps=EPS, norm=norm)


@pytest.mark.parametrize(
    ("attack", "norm", "message"),
    [
        ("torchattacks.PGD", "L2", r"not sound under norm='L2' \(but is under Linf\)"),
        ("torchattacks.PGDL2", "Linf", r"not sound under norm='Linf' \(but is under L2\)"),
        ("torchattacks.APGDT", "L2", "'apgd-t' is sound"),
        ("torchattacks.AutoAttack", "Linf", "attacks='standard' spells them out"),
        ("torchattacks.JSMA", "Linf", "not sound"),
        ({"attack": "torchattacks.PGD", "options": {"step": 3}}, "Linf", "takes no 'step'"),
        (
            {"attack": "torchattacks.PGD", "start": "base", "kind": "adaptive"},
            "Linf",
            "cannot start",
        ),
        ("torchattacks.Nothing", "Linf", "must be a class derived from torchattacks.Attack"),
        ("torch.nn.Linear", "Linf", "must be a class derived from torchattacks.Attack"),
    ],
)
def test_unsound_attacks(
    net: ConvNet, images: Tensor, labels: Tensor, attack: Any, norm: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(net, images, labels, attacks=attack, eps=EPS, norm=norm)


def test_any_torchattacks_class_with_options(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    spec = {"attack": "torchattacks.PGDL2", "options": {"alpha": 0.3, "steps": 10}}
    result = evaluate(net, images, labels, attacks=spec, eps=1.0, norm="L2")
    assert result.attacks == ("pgdl2",)
    assert result.worst.sum() < 0.5 * N


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y: (x * 4 - 2, y), ValueError, "looks normalised"),
        (lambda x, y: (x + 0.2, y), ValueError, r"images must lie in \[0, 1\]"),
        (lambda x, y: (x * float("nan"), y), ValueError, r"images must lie in \[0, 1\]"),
        (lambda x, y: ((x * 255).byte(), y), TypeError, "divide by 255"),
        (lambda x, y: (x[0], y), ValueError, r"shape \(N, C, H, W\)"),
        (lambda x, y: (x[:0], y[:0]), ValueError, "must not be empty"),
        (lambda x, y: (x.numpy(), y), TypeError, "images must be a torch.Tensor"),
        (lambda x, y: (x, y.int()), TypeError, "labels must be an int64 tensor"),
        (lambda x, y: (x, F.one_hot(y)), ValueError, "labels must have shape"),
        (lambda x, y: (x, y + 3), ValueError, "below the number of classes 4"),
        (lambda x, y: (x, y - 1), ValueError, "class numbers >= 0"),
    ],
)
def test_wrong_batches(
    net: ConvNet,
    images: Tensor,
    labels: Tensor,
    change: Callable[[Tensor, Tensor], Any],
    error: type[Exception],
    message: str,
) -> None:
    before = _trace(net)
    with pytest.raises(error, match=message):
        evaluate(net, *change(images, labels), attacks="fgsm", eps=EPS)
    assert all(_same(before[key], value) for key, value in _trace(net).items())


class Output(dict[str, Tensor]):
    """Looks like a Hugging Face output object."""


class Odd(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, images: Tensor) -> Any:
        return self.make(images.flatten(1))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: Output(logits=x), TypeError, r"load_classifier\(model\) unwraps Hugging Face"),
        (lambda x: (x, x), TypeError, "must return a tensor of logits"),
        (lambda x: x[:, :1], ValueError, "2 to 1000 classes"),
        (lambda x: x.repeat(1, 7), ValueError, "2 to 1000 classes"),
        (lambda x: x.view(len(x), 12, 12), ValueError, "must return logits of shape"),
        (lambda x: x.long(), TypeError, "floating-point logits"),
        (lambda x: x.detach(), RuntimeError, "no gradient with respect to the pixels"),
    ],
)
def test_what_is_no_classifier(
    images: Tensor, make: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    few, labels = images[:8], torch.zeros(8, dtype=torch.int64)
    labels = few.flatten(1).argmax(1)
    with pytest.raises(error, match=message):
        evaluate(Odd(make), few, labels, attacks="fgsm", eps=EPS)


def test_functions_are_no_classifiers(images: Tensor, labels: Tensor) -> None:
    with pytest.raises(TypeError, match=r"classifier must be a torch\.nn\.Module"):
        evaluate(lambda x: x, images, labels, attacks="fgsm", eps=EPS)  # type: ignore[arg-type]


@pytest.fixture
def without_torchattacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = builtins.__import__
    gone = ("torchattacks", "scipy")

    def fake(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in gone:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    for name in [name for name in sys.modules if name.partition(".")[0] in gone]:
        monkeypatch.setitem(sys.modules, name, None)
    return


@pytest.mark.usefixtures("without_torchattacks")
def test_missing_torchattacks_names_the_extra(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    assert resolve_attacks("standard")
    with pytest.raises(ImportError, match=r'pip install "lightning_meansparse\[attacks\]"'):
        evaluate(net, images, labels, attacks="pgd", eps=EPS)
