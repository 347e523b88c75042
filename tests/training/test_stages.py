"""The budget chosen bit by bit (`stages=`): what is chosen when, and that nothing else of training changes."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewtune
from fewtune.errors import ConfigError, TuningError
from fewtune.importance import Scores
from fewtune.methods.gradual import next_part
from fewtune.selection import Selection, select
from fewtune.sharing.tasks import read_tasks
from fewtune.tasks import evaluate, fit, prepare
from fewtune.training.learner import Learner
from fewtune.training.search import search_recipe
from fewtune.training.stages import Stages, beginnings
from fewtune.tuning.growing import grow, grow_optimizer, lifting
from layer_kinds import KINDS
from runs import coloured_folder, tiny_recipe
from selected import counts_of, matrices_of, scores_of

NEURONS = 3136
"""Of the tiny recipe's model."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


def within(small: Selection, large: Selection) -> bool:
    return all(bool(torch.isin(p.flat, large.places[n].flat).all()) for n, p in small.places.items())


# -- which connections


@pytest.mark.parametrize("granularity", ["neuron", "layer", "network"])
@pytest.mark.parametrize("k", [1, 2.5, 4])
def test_parts_grow_to_the_whole_budget(granularity: Any, k: float) -> None:
    whole = partial(select, k=k, granularity=granularity)
    chosen: Selection | None = None
    for stage in range(1, 5):
        larger = next_part(scores_of(seed=stage), whole, chosen, stage / 4)
        assert chosen is None or (within(chosen, larger) and larger.connections > chosen.connections)
        chosen = larger
    assert chosen is not None
    assert chosen.connections == whole(scores_of()).connections
    if granularity == "neuron":
        for name in chosen.places:
            fan_in = chosen.anatomy.views[name].fan_in
            assert set(counts_of(chosen, name)) <= {min(int(k), fan_in), min(int(k) + (k % 1 > 0), fan_in)}


def test_one_part_is_the_selection() -> None:
    scores = scores_of()
    for how in ({"k": 2}, {"k": 1.3, "granularity": "network"}, {"budget": 0.4, "granularity": "layer"}):
        assert next_part(scores, partial(select, **how), None, 1.0) == select(scores, **how)


def test_of_every_layer_the_best_come_first() -> None:
    scores = scores_of()
    half = next_part(scores, partial(select, k=2), None, 0.5)
    whole = select(scores, k=2)
    for name, matrix in matrices_of(scores).items():
        values = matrix[whole.places[name].mask()].sort(descending=True).values
        first = matrix[half.places[name].mask()].sort(descending=True).values
        assert torch.equal(first, values[: len(values) // 2])


def test_the_last_part_is_by_the_scores_of_then() -> None:
    """What was chosen stays though it is the worst by then; all else is the best by then."""
    first = next_part(scores_of(seed=1), partial(select, k=2), None, 0.5)
    then = scores_of(seed=2)
    worst = {n: m.masked_fill(first.places[n].mask(), 1e-6) for n, m in matrices_of(then).items()}
    scores = scores_of(worst)
    last = next_part(scores, partial(select, k=2), first, 1.0)
    for name, matrix in worst.items():
        chosen = first.places[name].mask()
        for row, (before, now) in enumerate(zip(chosen, last.places[name].mask(), strict=True)):
            assert bool((now | ~before).all())
            room = 2 - int(before.sum())
            best = matrix[row].argsort(descending=True)[:room].tolist()
            assert set((now & ~before).nonzero().flatten().tolist()) == set(best)


# -- values and the optimiser's state


@pytest.mark.parametrize("kind", ["linear, tokens", "conv2d, grouped", "transposed conv2d, grouped", "tied"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)])
def test_growing_keeps_values_and_state_exactly(kind: str, optimizer: Any) -> None:
    model = KINDS[kind].net(torch.float32, 0)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs, labels = torch.randn(6, *KINDS[kind].shape), torch.arange(6) % 3
    scores = fewtune.random_importance(model, 1)
    small, large = (select(scores, k=k, granularity="layer") for k in (1, 2.5))
    tuner = fewtune.attach(model, small)
    stepper = optimizer(tuner.param_groups(lr=1e-2, head_lr=1e-3), lr=1.0)

    def steps(count: int) -> None:
        for _ in range(count):
            stepper.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            stepper.step()

    steps(3)
    before, tuned = tuner.named_parameters(), {n: t.clone() for n, t in tuner.plain_state_dict().items()}
    values = {name: p.detach().clone() for name, p in before.items()}
    states = {n: {k: torch.as_tensor(v).clone() for k, v in stepper.state[p].items()} for n, p in before.items()}
    rates = [group["lr"] for group in stepper.param_groups]
    seen: list[dict[str, Tensor]] = []

    def choose() -> Selection:
        seen.append({n: t.clone() for n, t in model.state_dict().items()})
        assert type(model) is type(KINDS[kind].net(torch.float32, 0))
        return large

    grown, lift = grow(tuner, choose, partial(fewtune.attach, model))
    grow_optimizer(stepper, before, grown, lift)
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in seen[0].items())  # scored are the tuned weights
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in grown.plain_state_dict().items())
    assert [group["lr"] for group in stepper.param_groups] == rates
    assert {id(p) for g in stepper.param_groups for p in g["params"]} == {id(p) for p in grown.parameters()}
    for name, parameter in grown.named_parameters().items():
        places = large.places.get(name)
        old = torch.ones(parameter.numel(), dtype=torch.bool)
        if places is not None:
            old = torch.isin(places.flat, small.places[name].flat)
            original = large.anatomy.views[name].matrix(plain[name]).reshape(-1)[places.flat]
            assert torch.equal(parameter.detach().view(-1)[~old], original[~old])
        assert torch.equal(parameter.detach().reshape(-1)[old], values[name].reshape(-1))
        for key, value in states[name].items():
            now = torch.as_tensor(stepper.state[parameter][key])
            if value.ndim == 0:
                assert torch.equal(now, value)
                continue
            assert torch.equal(now.reshape(-1)[old], value.reshape(-1))
            expected = value.mean() if key == "exp_avg_sq" else torch.tensor(0.0)
            assert torch.allclose(now.reshape(-1)[~old], expected)
    steps(2)
    delta = grown.delta()
    tuned = {name: tensor.clone() for name, tensor in grown.plain_state_dict().items()}
    fresh = KINDS[kind].net(torch.float32, 0)
    delta.apply(fresh)
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in fresh.state_dict().items())
    grown.detach(keep=False)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


def test_a_selection_that_lacks_something_is_no_growth() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    scores = fewtune.random_importance(model, 0, head="2")
    one, two, other = (select(s, k=k) for s, k in ((scores, 1), (scores, 2), (_other(model), 2)))
    lifting(one, two)
    with pytest.raises(TuningError, match=r"cannot grow: connections of 0\.weight"):
        lifting(two, one)
    with pytest.raises(TuningError, match=r"cannot grow: connections of 0\.weight"):
        lifting(one, other)
    with pytest.raises(TuningError, match=r"cannot grow: 0\.bias is trained"):
        lifting(one, select(scores, k=2, bias="none"))


def _other(model: nn.Module) -> Scores:
    scores = fewtune.random_importance(model, 0, head="2")
    return Scores({name: 1 - score for name, score in scores.items()}, scores.anatomy)


# -- whole runs


def test_when_stages_begin(images: Path) -> None:
    def of(**settings: Any) -> dict[int, int]:
        return beginnings(tiny_recipe(images, **settings))

    assert of(epochs=20, stages=4) == {2: 1, 5: 2, 7: 3}
    assert of(epochs=100, stages=4) == {12: 1, 25: 2, 37: 3}
    assert of(epochs=4, stages=4) == {1: 1, 2: 2, 3: 3}
    assert of(epochs=3, stages=1) == {}


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Selection, dict[str, Tensor]]]:
    """(epoch, selection, plain weights) as each epoch begins."""
    seen: list[tuple[int, Selection, dict[str, Tensor]]] = []
    begin = Learner.on_train_epoch_start

    def note(self: Learner) -> None:
        weights = {name: tensor.clone() for name, tensor in self.tuner.plain_state_dict().items()}
        seen.append((self.current_epoch, self.tuner.selection, weights))
        begin(self)

    monkeypatch.setattr(Learner, "on_train_epoch_start", note)
    return seen


def test_a_run_in_stages(images: Path, tmp_path: Path, stages: list[Any]) -> None:
    recipe = tiny_recipe(images, k=2, stages=3, epochs=6, lr=5e-3, train_on="train+val", ema=0.5)
    result = fit(recipe, tmp_path / "run")
    counts = [selection.connections for _, selection, _ in stages]
    assert counts == pytest.approx([NEURONS * 2 / 3] + [NEURONS * 4 / 3] + [2 * NEURONS] * 4, rel=0.01)
    assert all(within(a, b) for (_, a, _), (_, b, _) in pairwise(stages))
    last = Selection.load(result.folder.selection)
    assert last == stages[-1][1]
    assert last.connections == 2 * NEURONS
    assert result.metrics["trained"] == last.trained
    # the last part is by the gradient of the weights as they were then
    work = prepare(recipe)
    model = work.backbone.model
    model.load_state_dict(stages[2][2])
    batches = [(x, y) for x, y, _ in _scored(work)]
    scores = fewtune.gradient_importance(model, batches, fewtune.SupCon(0.07), work.backbone.head)
    assert next_part(scores, partial(select, k=2), stages[1][1], 1.0) == last
    # the file knows nothing of it
    assert evaluate(result.folder.delta, images).to_json()["accuracy"] == result.metrics["test"]["accuracy"]
    fresh = prepare(recipe).backbone.model
    delta = fewtune.load_delta(result.folder.delta)
    with delta.applied_to(fresh):
        assert delta.connections == 2 * NEURONS


def _scored(work: Any) -> Any:
    from fewtune.training.loaders import image_loader

    return image_loader(work.scored, work.recipe.batch_size, seed=work.recipe.seed, shuffle=True)


@pytest.mark.parametrize("units", ["weight", "input"])
def test_growing_moves_no_weight(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: str) -> None:
    grow_now, grown = Stages._grow, []

    def watched(self: Stages, trainer: Any, module: Learner, stage: int) -> None:
        before = {name: tensor.clone() for name, tensor in module.tuner.plain_state_dict().items()}
        grow_now(self, trainer, module, stage)
        after = module.tuner.plain_state_dict()
        grown.append(all(torch.equal(after[name], tensor) for name, tensor in before.items()))

    monkeypatch.setattr(Stages, "_grow", watched)
    recipe = tiny_recipe(images, k=2, stages=3, units=units, lr=1e-2, importance="magnitude")
    result = fit(recipe, tmp_path / "run")
    assert grown == [True, True]
    assert evaluate(result.folder.delta, images).to_json()["accuracy"] == result.metrics["test"]["accuracy"]


def test_one_stage_is_gps_to_the_bit(images: Path, tmp_path: Path) -> None:
    one, plain = (fit(tiny_recipe(images, **how), tmp_path / str(len(how))) for how in ({"stages": 1}, {}))
    first, second = (fewtune.load_delta(run.folder.delta) for run in (one, plain))
    assert first.values.keys() == second.values.keys()
    assert all(torch.equal(first.values[name], second.values[name]) for name in second.values)
    assert Selection.load(one.folder.selection) == Selection.load(plain.folder.selection)


@pytest.mark.parametrize(
    ("killed", "more"), [(1, {"ema": 0.5}), (2, {"ema": 0.5}), (3, {"head_init": "probe", "importance": "random"})]
)
def test_a_killed_run_goes_on_the_same(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int, more: dict[str, Any]
) -> None:
    """Killed as the first epoch of a stage, whose selection is saved already, ends; before and after it too."""
    monkeypatch.setattr("fewtune.methods.linear.REGULARISATION", (1e1,))
    recipe = tiny_recipe(images, k=2, stages=3, epochs=5, lr=5e-3, **more)
    whole = fit(recipe, tmp_path / "whole")
    end = Learner.on_train_epoch_end

    def stop(self: Learner) -> None:
        if self.current_epoch == killed:
            raise KeyboardInterrupt
        end(self)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "on_train_epoch_end", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(recipe, tmp_path / "parts")
    parts = fit(recipe, tmp_path / "parts", resume=True)
    one, other = (fewtune.load_delta(run.folder.delta) for run in (whole, parts))
    assert all(torch.equal(one.values[name], other.values[name]) for name in one.values)
    assert parts.metrics["validation"] == whole.metrics["validation"]
    assert parts.metrics["test"] == whole.metrics["test"]


def test_an_early_epoch_that_is_the_best_is_kept_with_the_connections_that_came_later(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate that ruins everything, the probe: its file says so of all connections, which hold pretrained values."""
    monkeypatch.setattr("fewtune.methods.linear.REGULARISATION", (1e1,))
    recipe = tiny_recipe(images, k=2, stages=2, head_init="probe", lr=3.0, epochs=4)
    result = fit(recipe, tmp_path / "run")
    assert result.metrics["validation"]["epoch"] == -1
    assert result.metrics["start"]["gain"]["value"] == 0
    delta, model = fewtune.load_delta(result.folder.delta), prepare(recipe).backbone.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with delta.applied_to(model):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) or name.startswith("head.")


def test_a_search_tries_stages(images: Path, tmp_path: Path, stages: list[Any]) -> None:
    recipe = tiny_recipe(images, stages=2, search_lr=[1e-3], search_k=[2], search_epochs=4, search_trials=1)
    search_recipe(prepare(recipe), tmp_path / "search.db")
    assert [s.connections for _, s, _ in stages] == pytest.approx([NEURONS, 2 * NEURONS] + 2 * [2 * NEURONS], rel=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": 4}, "stages=4: each stage is an epoch at least, and there are 3"),
        ({"stages": 2, "granularity": "columns"}, "whole columns at once"),
        ({"stages": 2, "selection": "file"}, "is there from the beginning"),
        ({"stages": 2, "importance": "oracle", "oracle": "run"}, "knows the end"),
        ({"stages": 2, "method": "lora"}, "method=lora chooses no connections bit by bit"),
    ],
)
def test_mistakes(images: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_recipe(images, **settings)


def test_tasks_that_share_are_chosen_at_once(tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text("settings: {model: 'timm:test_vit', stages: 2}\ntasks: {a: {data: a}, b: {data: b}}\n")
    with pytest.raises(ConfigError, match="leave columns and stages out"):
        read_tasks(file)


def test_several_processes_are_refused(images: Path) -> None:
    callback = Stages(prepare(tiny_recipe(images, stages=2)))
    with pytest.raises(ConfigError, match="stages works in one process"):
        callback.setup(SimpleNamespace(world_size=2), None, "fit")  # type: ignore[arg-type]
