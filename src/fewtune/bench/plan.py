"""From a grid to its runs: what each is, where it lies, and what must be finished before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fewtune.bench.grid import Grid
from fewtune.config import Recipe
from fewtune.methods import CRITERIA, METHODS
from fewtune.methods.criteria import OF_IMAGES
from fewtune.training.run_folder import RunFolder

Kind = Literal["choose", "train"]
KINDS: tuple[Kind, ...] = ("choose", "train")

SCORED_BY = (
    "model", "arch", "pretrained", "image_size", "data", "shots", "val_fraction", "test_fraction", "train_on",
    "limit_train", "seed", "importance", "objective", "temperature", "batch_size",
)  # fmt: skip
"""The settings on which the scores of a gradient importance depend (dropout is off while they are taken)."""
LATER = ("exclude", "reach", "settle", "scored_images", "head_init", "quantise")
"""Settings on which scores depend too; named only where given, so that files of older grids are found."""


@dataclass(frozen=True)
class Run:
    """One run of the grid: a choice tried on validation images, or the training with what was chosen."""

    kind: Kind
    task: str
    method: str
    seed: int
    choice: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    """Names of the runs that must be finished before."""

    @property
    def name(self) -> str:
        """Its folder below the grid's: TASK/METHOD/seed-0, or TASK/METHOD/choose/lr=0.001/seed-0."""
        tried = f"choose/{_choice_name(self.choice)}/" if self.kind == "choose" else ""
        return f"{self.task}/{self.method}/{tried}seed-{self.seed}"

    def recipe(self, grid: Grid, chosen: dict[str, Any]) -> Recipe:
        """Its resolved recipe; `chosen` is what was chosen on validation images (for kind "train")."""
        if self.kind == "choose":
            return grid.recipe(self.task, self.method, self.choice, self.seed, **grid.choose)
        train_on = "train+val" if grid.protocol == "last" else "train"
        return grid.recipe(self.task, self.method, {}, self.seed, **chosen, train_on=train_on)

    def result(self, out: Path) -> Path:
        """The file that stands in its folder when it is finished, and only then."""
        return result_file(self.kind, out / self.name)


def result_file(kind: Kind, folder: Path) -> Path:
    """What stands in the folder of a run of this kind when it is finished, and only then."""
    return folder / "validation.json" if kind == "choose" else RunFolder(folder).metrics


Added = Mapping[tuple[str, str], Sequence[dict[str, Any]]]
"""(task, method) -> choices beyond those of the grid, tried because the best lay at an edge."""


def plan(grid: Grid, added: Added | None = None) -> dict[str, Run]:
    """All runs by name, in the order in which they are done: a seed on all tasks before the next, later methods last.

    So a grid that is stopped early knows all tasks, by fewer seeds. Choosing runs come before what they are needed for,
    and the methods of one seed together.
    """
    return {run.name: run for run in sorted(_runs(grid, added or {}), key=lambda run: _turn(grid, run))}


def _turn(grid: Grid, run: Run) -> tuple[bool, int]:
    seeds = grid.seeds_of(run.method)
    return run.method in grid.later, seeds.index(run.seed) if run.kind == "train" else 0


def _runs(grid: Grid, added: Added) -> Iterator[Run]:
    for task in grid.tasks:
        choosing: dict[str, list[Run]] = {method: [] for method in grid.methods}
        for method in grid.methods:
            if grid.chooses(task, method):
                for choice in (*grid.choices_of(method), *added.get((task, method), ())):
                    choosing[method] += [Run("choose", task, method, seed, choice) for seed in grid.choosing_seeds]
        for method in grid.methods:
            yield from choosing[method]
        others = [seed for method in grid.methods for seed in grid.seeds_of(method)]
        for seed in dict.fromkeys([*grid.seeds, *others]):
            for method in [method for method in grid.methods if seed in grid.seeds_of(method)]:
                yield Run("train", task, method, seed, needs=tuple(run.name for run in choosing[method]))


def _choice_name(choice: dict[str, Any]) -> str:
    text = ",".join(f"{key}={value}" for key, value in choice.items()) or "only"
    if len(text) <= 80 and not set(text) & set('/\\:*?"<>| '):
        return text
    return hashlib.sha256(json.dumps(choice, default=str).encode()).hexdigest()[:16]


def scores_file(recipe: Recipe, task: Path) -> Path | None:
    """Where the scores of a recipe lie, shared by all runs of a task that need the same; None where none are kept."""
    if METHODS[recipe.method].score is None or recipe.selection is not None:
        return None
    if CRITERIA[recipe.importance] not in OF_IMAGES:
        return None
    given = {key: value for key in LATER if (value := getattr(recipe, key)) != Recipe.model_fields[key].default}
    if recipe.objective == "supcon":
        given.pop("head_init", None)  # features alone are contrasted
    said = json.dumps([getattr(recipe, key) for key in SCORED_BY] + ([given] if given else []), default=str)
    return task / "scores" / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.safetensors"
