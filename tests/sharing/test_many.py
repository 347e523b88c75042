"""`fewtune fit-many`: what is shared, what each task has of its own, killed and gone on with, a task added later."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

import fewtune
from fewtune.cli import main
from fewtune.config import recipe_from
from fewtune.delta import load_delta
from fewtune.delta.levels import shared_of
from fewtune.errors import ConfigError, DeltaError
from fewtune.models import load_backbone
from fewtune.serving import TaskBank
from fewtune.sharing import fit_many, read_tasks
from fewtune.sharing.shares import rest_of, summed_ranks, without
from fewtune.tasks import evaluate, fit, load_task
from fewtune.training.seen import Seen
from fewtune.training.trainer import SaveEpochs
from runs import SETTINGS, coloured_folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, of two and of three classes, on one file of random weights."""
    root = tmp_path_factory.mktemp("many")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=5).state_dict(), root / "weights.pth")
    settings = {**SETTINGS, "model": f"file:{root / 'weights.pth'}", "arch": "timm:test_vit", "epochs": 2, "k": 2}
    del settings["pretrained"]
    named = {f"task{i}": {"data": str(coloured_folder(root / f"images{i}", 2 + i % 2, 8))} for i in range(2)}
    (root / "tasks.yaml").write_text(yaml.safe_dump({"settings": settings, "share": 0.5, "tasks": named}))
    return root / "tasks.yaml"


@pytest.fixture(scope="module")
def out(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "many"
    assert not fit_many(read_tasks(tasks), folder).failed
    return folder


def test_the_two_levels_have_their_parts_of_the_budget(tasks: Path, out: Path) -> None:
    shared = load_delta(out / "shared.safetensors")
    alone = fit(read_tasks(tasks).recipe("task0"), out.parent / "alone").folder.delta
    independent = load_delta(alone).selection()
    assert shared.connections == independent.connections  # half of both tasks' connections, once
    assert not shared.selection().whole
    for name in ("task0", "task1"):
        task = load_delta(out / name / "delta.safetensors")
        assert task.connections == independent.connections / 2
        assert not any(
            torch.isin(places.flat, shared.selection().places[weight].flat).any()
            for weight, places in task.selection().places.items()
        )
        assert set(task.selection().whole) == set(independent.whole)
    total = shared.connections + sum(load_delta(out / f"task{i}/delta.safetensors").connections for i in range(2))
    assert total == 2 * independent.connections


def test_a_task_answers_through_every_door_the_same(tasks: Path, out: Path) -> None:
    file = out / "task1" / "delta.safetensors"
    metrics = json.loads((out / "task1" / "metrics.json").read_text())
    again = evaluate(file, read_tasks(tasks).tasks["task1"]["data"], accelerator="cpu")
    assert again.to_json()["accuracy"]["value"] == metrics["test"]["accuracy"]["value"]
    loaded = load_task(file)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = loaded.backbone.model(images)
    plain = _plain(tasks)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    bank = TaskBank(plain)
    bank.add("task1", file)
    torch.testing.assert_close(torch.stack(bank.logits(images, "task1", exact=True)), expected, rtol=0, atol=0)
    task = load_delta(file)
    shared = shared_of(task.metadata, file)
    assert shared is not None
    shared.apply(plain)
    task.apply(plain, on=shared)
    with torch.no_grad():
        assert torch.equal(plain(images), expected)
    task.revert(plain)
    shared.revert(plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def _plain(tasks: Path) -> torch.nn.Module:
    weights = tasks.with_name("weights.pth")
    return load_backbone(f"file:{weights}", num_classes=5, image_size=32, architecture="timm:test_vit").model


def test_a_task_added_later_trains_its_own_part_alone(tasks: Path, out: Path, monkeypatch: Any) -> None:
    before = (out / "shared.safetensors").read_bytes(), (out / "task0/delta.safetensors").read_bytes()
    monkeypatch.setattr("fewtune.sharing.many.train", pytest.fail)
    data = coloured_folder(out.parent / "later", 2, 8)
    outcome = fit_many(read_tasks(tasks, [f"tasks.later.data={data}"]), out)
    assert set(outcome.metrics) == {"task0", "task1", "later"}
    assert ((out / "shared.safetensors").read_bytes(), (out / "task0/delta.safetensors").read_bytes()) == before
    later = load_delta(out / "later/delta.safetensors")
    assert later.connections == load_delta(out / "task0/delta.safetensors").connections
    assert json.loads((out / "results.json").read_text())["tasks"].keys() == outcome.metrics.keys()
    with pytest.raises(ConfigError, match=r"made with share=0\.5, and share=1 is asked for"):
        fit_many(read_tasks(tasks, ["share=1"]), out)


def command(monkeypatch: Any, capsys: Any, *arguments: str | Path) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["fewtune", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out + told.err


def test_task_files_are_flattened_and_averaged(
    tasks: Path, out: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    first, second = (out / name / "delta.safetensors" for name in ("task0", "task1"))
    flat, mean = tmp_path / "flat.safetensors", tmp_path / "mean.safetensors"
    assert command(monkeypatch, capsys, "delta", "flatten", first, "--out", flat)[0] == 0
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = [load_task(file).backbone.model(images) for file in (flat, first)]
    assert torch.equal(*answers)
    status, told = command(monkeypatch, capsys, "delta", "average", first, second, "--out", mean)
    assert status == 2
    assert "say whose head to take" in told
    assert not mean.exists()
    asked = ("delta", "average", first, second, "--head-of", first, "--out", mean, "--json")
    status, told = command(monkeypatch, capsys, *asked)
    facts = json.loads(told[told.index("{") : told.rindex("}") + 1])
    shared = load_delta(out / "shared.safetensors")
    assert facts["in several"] >= shared.connections
    made = load_delta(mean)
    assert [one["file"] for one in made.metadata["made"]["from"]] == ["delta.safetensors"] * 2
    seen = [Seen.of(load_delta(file).metadata) for file in (first, second, mean)]
    assert seen[2].digests == seen[0].digests | seen[1].digests  # type: ignore[union-attr]


class Killed(Exception):
    pass


def test_killed_in_the_shared_part_it_goes_on_to_the_same_files(
    tasks: Path, out: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    saved = SaveEpochs.on_train_epoch_end

    def once(self: SaveEpochs, *arguments: Any) -> None:
        saved(self, *arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(SaveEpochs, "on_train_epoch_end", once)
        with pytest.raises(Killed):
            fit_many(read_tasks(tasks), tmp_path / "cut")
    assert not (tmp_path / "cut/shared.safetensors").exists()
    fit_many(read_tasks(tasks), tmp_path / "cut")
    for name in ("shared.safetensors", "task0/delta.safetensors", "task1/test_predictions.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (out / name).read_bytes()


def test_nothing_shared_is_gps_and_all_shared_leaves_a_head(tasks: Path, out: Path, tmp_path: Path) -> None:
    nothing = read_tasks(tasks, ["share=0"])
    fit_many(nothing, tmp_path / "nothing")
    assert not (tmp_path / "nothing/shared.safetensors").exists()
    fit(nothing.recipe("task0"), tmp_path / "gps")
    assert (tmp_path / "nothing/task0/delta.safetensors").read_bytes() == (
        tmp_path / "gps/delta.safetensors"
    ).read_bytes()
    fit_many(read_tasks(tasks, ["share=1"]), tmp_path / "all")
    task = load_delta(tmp_path / "all/task0/delta.safetensors")
    assert (task.connections, set(task.whole)) == (0, set(task.selection().head))
    assert load_delta(tmp_path / "all/shared.safetensors").selection().whole


def test_parts_of_the_budget_are_not_lost_to_rounding(tasks: Path) -> None:
    many = read_tasks(tasks, ["share=0.9", "k=10"])
    assert (many.own_k(), many.shared_k()) == (1, 18)


def test_ranks_weigh_all_tasks_alike() -> None:
    model = timm.create_model("test_vit", num_classes=2)
    small, large = fewtune.random_importance(model, seed=0), fewtune.random_importance(model, seed=1)
    scaled = fewtune.Scores({name: 1e6 * score for name, score in large.items()}, large.anatomy)
    first = summed_ranks([small, large], small.anatomy, "neuron")
    assert fewtune.select(first, k=1) == fewtune.select(summed_ranks([small, scaled], small.anatomy, "neuron"), k=1)
    alone = fewtune.select(summed_ranks([small], small.anatomy, "neuron"), k=3)
    assert alone == fewtune.select(small, k=3)
    rest = fewtune.select(rest_of(small, alone), k=1)
    assert rest == without(fewtune.select(small, k=4), alone)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["share=2"], "share"),
        (["shares=1", "k=1"], "shares"),
        (["share=0.25", "k=1"], "leaves 0.5 shared connections a neuron"),
        (["tasks.task0.image_size=64"], "image_size must be the same for all tasks"),
        (["method=lora"], "share connections of method=gps"),
        (["mixup=0.2"], "mixup and cutmix"),
        (["devices=2"], "trains on one device"),
    ],
)
def test_mistakes_are_told_before_any_work(
    tasks: Path, overrides: list[str], words: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    arguments = ["fewtune", "fit-many", str(tasks), *overrides, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_random_weights_that_differ_are_refused(tasks: Path, tmp_path: Path) -> None:
    changes = ["model=timm:test_vit", "arch=null", "pretrained=false"]
    with pytest.raises(ConfigError, match="does not begin from the same weights"):
        fit_many(read_tasks(tasks, changes), tmp_path / "out")


def test_a_task_file_moved_away_from_its_shared_part_says_so(out: Path, tmp_path: Path) -> None:
    moved = tmp_path / "delta.safetensors"
    moved.write_bytes((out / "task0/delta.safetensors").read_bytes())
    with pytest.raises(DeltaError, match=r"stands on the shared part shared\.safetensors"):
        load_task(moved)
    assert recipe_from(load_delta(moved).metadata["recipe"]).k == 1
