"""Tasks of methods that add modules share the backbone's tensors, and batches with other tasks, a pass each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from banks import task
from delta_cases import same_bits, state
from fewtune.errors import DeltaError
from fewtune.serving import TaskBank
from methods_cases import HEADS, METHODS, output, pictures, plain_model, train, tuned

KIND = "vit"


@pytest.mark.parametrize("method", METHODS)
def test_they_answer_as_alone_beside_tasks_that_share_a_pass(method: str) -> None:
    tuner = tuned(method, KIND)
    train(tuner, KIND, steps=1)
    file, expected = tuner.delta(), output(tuner.model, KIND)
    model = plain_model(KIND)
    model.reset_classifier(2)
    before, bank = state(model.double()), TaskBank(model)
    bank.add("inserted", file)
    bank.add("sparse", task(model, classes=4))
    images = pictures(KIND)
    only = bank.logits(images, "sparse")
    answers = bank.logits(images, ["inserted", "sparse", "inserted"])
    assert [len(answer) for answer in answers] == [5, 4, 5]
    torch.testing.assert_close(torch.stack([answers[0], answers[2]]), expected[[0, 2]])
    torch.testing.assert_close(answers[1], only[1])
    assert same_bits(state(model), before)
    backbone_bytes = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith(HEADS[KIND]))
    assert bank.task("inserted").nbytes < backbone_bytes / 2


def test_one_of_another_backbone_is_refused() -> None:
    file = tuned("lora", KIND).delta()
    with pytest.raises(DeltaError, match="another backbone"):
        TaskBank(plain_model(KIND, seed=2)).add("lora", file)


def test_a_task_of_masks_is_refused() -> None:
    model = plain_model(KIND)
    with pytest.raises(DeltaError, match="a task of segmentation"):
        TaskBank(model).add("masks", replace(task(model), metadata={"task": "segmentation"}))
