"""Scores saved and loaded: the same selection comes of them; another file is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fewtune
from fewtune import CrossEntropy, gradient_importance, select
from fewtune.errors import ImportanceError
from fewtune.files import read_tensors, write_tensors
from fewtune.importance import Scores
from scored import batches, net


@pytest.fixture
def scores() -> Scores:
    return gradient_importance(net(), batches(), CrossEntropy(), roles={"norm.*": "other"})


def test_round_trip(scores: Scores, tmp_path: Path) -> None:
    scores.save(tmp_path / "scores.safetensors", seconds="1.5")
    loaded, metadata = Scores.load(tmp_path / "scores.safetensors")
    assert metadata == {"seconds": "1.5"}
    assert list(loaded) == list(scores)
    assert all(torch.equal(t, scores[n]) and t.dtype == scores[n].dtype for n, t in loaded.items())
    assert loaded.anatomy == scores.anatomy
    assert select(loaded, k=2) == select(scores, k=2)


def test_half_precision_and_random_scores(tmp_path: Path) -> None:
    for scores in (fewtune.magnitude_importance(net(torch.bfloat16)), fewtune.random_importance(net())):
        scores.save(tmp_path / "scores")
        loaded, metadata = Scores.load(tmp_path / "scores")
        assert metadata == {}
        assert all(torch.equal(t, scores[n]) and t.dtype == scores[n].dtype for n, t in loaded.items())


def test_other_files_are_refused(scores: Scores, tmp_path: Path) -> None:
    path = tmp_path / "scores"

    def refused(says: str) -> None:
        with pytest.raises(ImportanceError, match=says) as error:
            Scores.load(path)
        assert "\n" not in str(error.value)

    refused("does not exist")
    path.write_bytes(b"no tensors")
    refused("cannot be read as a safetensors file")
    select(scores, k=1).save(path)
    refused("is a fewtune-selection file; expected a fewtune-scores")
    scores.save(path)
    tensors, header = read_tensors(path, ImportanceError)
    said = json.loads(header["fewtune"])

    def forged(tensors: dict[str, torch.Tensor], **changes: object) -> None:
        write_tensors(path, tensors, {"fewtune": json.dumps(said | changes)})

    forged(tensors, version=2)
    refused("has version 2; this fewtune reads up to 1: update fewtune")
    forged(tensors, anatomy={})
    refused("is not a scores file, or it is damaged")
    forged({name: tensor for name, tensor in tensors.items() if name != "conv.weight"})
    refused("the scores are of other weights")
    forged(tensors | {"conv.weight": torch.ones(2, 2)})
    refused(r"scores of conv\.weight have another shape")
    forged(tensors | {"conv.weight": tensors["conv.weight"].long()})
    refused(r"scores of conv\.weight are of torch\.int64")
    forged(tensors | {"conv.weight": -tensors["conv.weight"]})
    refused("scores are negative")
