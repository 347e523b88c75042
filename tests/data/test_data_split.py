"""Stratified draws, and splits as torch data sets."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import images
from fewtune.data import Split, eval_transform, load_data
from fewtune.data.sampling import complement, stratified

# Draws


@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=80),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
    keep=st.integers(0, 1),
    at_least=st.integers(0, 1),
)
def test_stratified_draws(labels: list[int], share: float, seed: int, keep: int, at_least: int) -> None:
    count = round(share * len(labels))
    drawn = stratified(labels, count, seed, keep=keep, at_least=at_least)
    sizes, taken = np.bincount(labels), np.bincount(np.asarray(labels)[drawn], minlength=max(labels) + 1)
    assert len(set(drawn.tolist())) == len(drawn)
    assert sorted([*drawn, *complement(drawn, len(labels))]) == list(range(len(labels)))
    low, high = np.minimum(np.minimum(at_least, sizes), np.maximum(sizes - keep, 0)), np.maximum(sizes - keep, 0)
    assert (taken >= low).all()
    assert (taken <= high).all()
    assert len(drawn) == np.clip(count, low.sum(), high.sum())
    if not keep and not at_least:
        assert (np.abs(taken - count * sizes / len(labels)) < 1).all()  # each class by its share
    assert np.array_equal(drawn, stratified(labels, count, seed, keep=keep, at_least=at_least))


# Splits as torch data sets


def test_cached_square_gives_the_very_tensors_of_the_files(tmp_path: Path) -> None:
    spec = SimpleNamespace(image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.9)
    root = images.class_folders(tmp_path, {"a": 3, "b": 3}, size=21)
    split = load_data(root, val_fraction=0).train.with_transform(eval_transform("plain", spec))
    expected = [split[i] for i in range(6)]
    cached = split.cached(8, square=True)
    shutil.rmtree(root)
    for i, (tensor, label) in enumerate(expected):
        assert torch.equal(cached[i][0], tensor)
        assert cached[i][1] == label


def test_cached_keeps_the_aspect_and_does_not_enlarge(tmp_path: Path) -> None:
    images.picture(40, 20).save(tmp_path / "large.png")
    images.picture(8, 6).save(tmp_path / "small.png")
    split = Split([tmp_path / "large.png", tmp_path / "small.png"], [0, 1], ["large", "small"])
    cached = split.cached(10)
    assert [cached.image(i).size for i in range(2)] == [(20, 10), (8, 6)]
    assert np.array_equal(np.asarray(cached.image(1)), np.asarray(split.image(1)))


def test_split_can_go_to_worker_processes(tmp_path: Path) -> None:
    split = load_data(images.class_folders(tmp_path, {"a": 5, "b": 5}, size=4)).train.with_transform(np.asarray)
    again = pickle.loads(pickle.dumps(split))
    assert np.array_equal(again[3][0], split[3][0])
    assert again.with_transform(None)[3][0].mode == "RGB"
