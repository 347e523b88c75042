"""A batch of several tasks answers as each task alone; tasks come, change and go; the backbone is never touched."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

import fewtune
from banks import BACKBONES, alone, applied_alone, images, task, timm_model
from delta_cases import made_up, same_bits, state
from fewtune.delta import Delta
from fewtune.delta.packing import bit_length, encode_all
from fewtune.errors import DataError, DeltaError
from fewtune.serving import TaskBank

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Largest difference of a logit to the task alone, relative to the largest of that image's logits."""
CLASSES = {"a": 3, "b": 7, "c": 2}


def bank_of(model: nn.Module, k: int = 1) -> TaskBank:
    bank = TaskBank(model)
    for seed, (name, classes) in enumerate(CLASSES.items()):
        bank.add(name, task(model, k, seed, classes))
    return bank


def assert_close(answers: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.shape == wanted.shape
        assert (answer - wanted).abs().max() <= TOLERANCE[answer.dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("name", BACKBONES)
def test_a_mixed_batch_answers_as_each_task_alone(name: str, k: int, dtype: torch.dtype, caplog) -> None:
    model = BACKBONES[name]().to(dtype)
    before, bank = state(model), bank_of(model, k)
    deltas = {task_name: task(model, k, seed, classes) for seed, (task_name, classes) in enumerate(CLASSES.items())}
    asked, batch = list("bacab"), images(5).to(dtype)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    bank.logits(batch, asked)  # what is found out once needs passes of its own
    passes.clear()
    mixed = bank.logits(batch, asked)
    assert len(passes) == 1
    assert not caplog.records
    assert_close(mixed, alone(model, [deltas[n] for n in asked], batch))
    assert same_bits(state(model), before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", BACKBONES)
def test_exact_is_bit_equal_to_the_task_applied(name: str) -> None:
    model = BACKBONES[name]()
    bank, batch = bank_of(model), images(4)
    exact = bank.logits(batch, list("abab"), exact=True)
    for seed, (task_name, rows) in enumerate({"a": [0, 2], "b": [1, 3]}.items()):
        expected = applied_alone(model, task(model, 1, seed, CLASSES[task_name]), batch[rows])
        assert torch.equal(torch.stack([exact[i] for i in rows]), expected)


def test_the_order_of_a_batch_does_not_matter() -> None:
    bank, batch, asked = bank_of(BACKBONES["vit"]()), images(6), list("abcabc")
    order = [5, 0, 3, 1, 4, 2]
    answers, shuffled = bank.logits(batch, asked), bank.logits(batch[order], [asked[i] for i in order])
    assert_close(shuffled, [answers[i] for i in order])


def test_a_removed_task_is_gone_and_a_replaced_one_answers_anew() -> None:
    model = BACKBONES["vit"]()
    bank, batch = bank_of(model), images(2)
    kept, before = bank.logits(batch[:1], "b"), bank.logits(batch[:1], "a")
    bank.remove("c")
    assert bank.tasks() == ("a", "b")
    with pytest.raises(DataError, match="no task 'c'; there are a, b"):
        bank.logits(batch, ["a", "c"])
    with pytest.raises(DataError, match="no task 'c'"):
        bank.remove("c")
    bank.add("a", new := task(model, 5, seed=9, classes=4))
    assert bank.tasks() == ("a", "b")
    assert_close(bank.logits(batch[:1], "a"), [applied_alone(model, new, batch[:1])[0]])
    assert before[0].shape != bank.logits(batch[:1], "a")[0].shape
    assert torch.equal(bank.logits(batch[:1], "b")[0], kept[0])


def test_a_task_of_another_backbone_is_refused_and_the_old_one_stays(tmp_path) -> None:
    model, other = BACKBONES["vit"](), BACKBONES["vit"]()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.mul_(1.01)
    bank, before = bank_of(model), state(model)
    answer = bank.logits(images(1), "a")[0]
    with pytest.raises(DeltaError, match="another backbone"):
        bank.add("a", task(other))
    (tmp_path / "bad.safetensors").write_bytes(b"no task at all")
    with pytest.raises(DeltaError, match="not a delta file"):
        bank.add("a", tmp_path / "bad.safetensors")
    assert torch.equal(bank.logits(images(1), "a")[0], answer)
    assert same_bits(state(model), before)


def test_changed_running_statistics_travel_with_their_task() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.batch_norm, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.Linear(8, 3)

        def get_classifier(self) -> nn.Module:
            return self.head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.batch_norm(self.stem(x)).relu().mean((2, 3)))

    torch.manual_seed(0)
    model = Net().eval()
    selection = fewtune.select(fewtune.random_importance(model, seed=0), k=1)
    deltas = [made_up(model, selection, seed, buffers=bool(seed)).delta for seed in (0, 1)]
    bank = TaskBank(model)
    for name, delta in zip("ab", deltas, strict=True):
        bank.add(name, delta)
    assert_close(bank.logits(images(2), ["b", "a"]), alone(model, deltas[::-1], images(2)))


class Misled(nn.Module):
    """Images stand in another order than in the batch where the layer sees them: it cannot be told whose they are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(3, 8), nn.Linear(8, 3)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x.mean(3).permute(2, 0, 1)).relu().mean(0))


def test_what_cannot_share_a_pass_takes_one_a_task_and_says_so_once(caplog) -> None:
    model = Misled()
    bank, batch = bank_of(model), images(3)
    with caplog.at_level(logging.WARNING):
        answers = bank.logits(batch, list("cab"))
        bank.logits(batch, list("cab"))
    deltas = {name: task(model, 1, seed, classes) for seed, (name, classes) in enumerate(CLASSES.items())}
    assert_close(answers, alone(model, [deltas[n] for n in "cab"], batch))
    assert len(caplog.records) == 1
    assert "layer.weight is used in a way" in caplog.text


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "swinv2_tiny_window8_256"])
def test_weights_used_by_other_code_than_their_layers_share_a_pass_too(name: str, caplog) -> None:
    small = {"img_size": 32, "embed_dim": 24, "num_heads": 3}
    match name.partition("_")[0]:
        case "swinv2":
            small = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
        case _:
            small |= {"patch_size": 8, "depth": 2}
    model = timm_model(name, **small)
    bank = bank_of(model)
    deltas = {n: task(model, 1, seed, classes) for seed, (n, classes) in enumerate(CLASSES.items())}
    assert_close(bank.logits(images(3), list("cab")), alone(model, [deltas[n] for n in "cab"], images(3)))
    assert not caplog.records


def test_200_tasks_at_once_take_no_more_than_their_files_expanded(tmp_path) -> None:
    model = BACKBONES["vit"]()
    bank = TaskBank(model)
    for seed in range(200):
        bank.add(str(seed), task(model, 1 + seed % 5, seed, classes=2 + seed % 7))
    held = 0
    for seed in range(200):
        delta = task(model, 1 + seed % 5, seed, classes=2 + seed % 7)
        held += expanded_bytes(delta)
    assert len(bank.tasks()) == 200
    assert bank.nbytes <= 1.2 * held
    asked = [str(seed) for seed in range(0, 200, 20)]
    batch = images(len(asked))
    deltas = [task(model, 1 + int(n) % 5, int(n), classes=2 + int(n) % 7) for n in asked]
    assert_close(bank.logits(batch, asked), alone(model, deltas, batch))


def expanded_bytes(delta: Delta) -> int:
    """Bytes of a task file's blocks, expanded: places as the file's own integers, values, what is trained whole."""
    _, tables, integers = encode_all(delta.selection().places)
    places = sum(len(numbers) * -(-bit_length(numbers) // 8) for numbers in (tables, integers))
    return places + sum(t.nbytes for group in (delta.values, delta.whole, delta.buffers) for t in group.values())


def test_tasks_come_and_go_while_others_ask() -> None:
    model = BACKBONES["vit"]()
    bank, batch = bank_of(model), images(4)
    expected, first = bank.logits(batch, list("abab")), task(model, 1, seed=0)
    wrong: list[str] = []

    def ask() -> None:
        for _ in range(15):
            answers = bank.logits(batch, list("abab"))
            if any((a - e).abs().max() > 1e-4 * e.abs().max() for a, e in zip(answers, expected, strict=True)):
                wrong.append("another answer")

    def change() -> None:
        for i in range(15):
            bank.add(f"new {i % 2}", first)
            bank.remove(f"new {i % 2}")

    threads = [threading.Thread(target=f) for f in (ask, ask, change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert bank.tasks() == ("a", "b", "c")


def test_predictions_have_the_tasks_own_classes() -> None:
    model = BACKBONES["vit"]()
    bank = TaskBank(model)
    bank.add("birds", replace(task(model, classes=2), metadata={"class_names": ["wren", "owl"]}))
    [prediction] = bank.predict(images(1), "birds")
    assert prediction.task == "birds"
    assert list(prediction.probabilities) == ["wren", "owl"]
    assert prediction.probability == max(prediction.probabilities.values())
    assert prediction.probability == prediction.probabilities[prediction.label]
    assert abs(sum(prediction.probabilities.values()) - 1) < 1e-6
    with pytest.raises(DataError, match="1 images and 2 tasks"):
        bank.predict(images(1), ["birds", "birds"])
