"""`fewtune fit-many`: a shared part trained on all tasks together, then each task's own part on top of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewtune import classification
from fewtune.classification.work import ImageWork, fresh_backbone
from fewtune.config import Recipe, recipe_from
from fewtune.data import ImageData
from fewtune.delta import Delta, load_delta
from fewtune.delta.checks import inventory
from fewtune.delta.levels import made, stands_on
from fewtune.errors import ConfigError, FewtuneError
from fewtune.files import write_json, write_text
from fewtune.importance import Scores
from fewtune.methods.gps import choose
from fewtune.neurons import Role, describe
from fewtune.selection import Selection
from fewtune.sharing.shares import rest_of, summed_ranks, without
from fewtune.sharing.tasks import ManyTasks, write_tasks
from fewtune.sharing.work import JointWork, OwnWork
from fewtune.training.fit import fit, train
from fewtune.training.loaders import seed_all
from fewtune.training.run_folder import RunFolder
from fewtune.training.tuners import score

log = logging.getLogger("fewtune")

SHARED = "shared.safetensors"
"""The shared part, beside the tasks' folders."""
KIND = "shared part"
"""What its file says of its kind of task."""
DENSE = ("bias", "scale", "norm", "relative_position")
"""Settings of what is trained whole: of the tasks' own parts, or of the shared one where all is shared."""


@dataclass(frozen=True)
class Outcome:
    """What came out: the metrics of every task by name, and of those that failed why."""

    folder: Path
    metrics: dict[str, dict[str, Any]]
    failed: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Test accuracy (validation where there is no test) of each task, their mean, and the worst task."""
        values = {name: accuracy(metrics) for name, metrics in self.metrics.items()}
        summary: dict[str, Any] = {"tasks": values, "failed": self.failed}
        if values:
            worst = min(values, key=values.__getitem__)
            summary |= {"mean": sum(values.values()) / len(values), "worst": {"task": worst, "accuracy": values[worst]}}
        return summary


def accuracy(metrics: dict[str, Any]) -> float:
    """Of the test images of a run, else of its validation images."""
    test = metrics.get("test")
    return float(test["accuracy"]["value"] if test is not None else metrics["validation"]["accuracy"])


def fit_many(many: ManyTasks, out: Path) -> Outcome:
    """Do what is not done yet; begun runs go on after their last finished epoch.

    `out` holds shared.safetensors and a run folder for every task, whose task file names the shared file by its
    SHA-256. A shared part that lies there is never trained again: a task that is added later trains its own part on
    it. A task that fails is told, and the others go on.

    Raises:
        ConfigError: `out` holds other things, or a shared part of another share.
        FewtuneError: the shared part cannot be trained.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "tasks.yaml").exists())):
        raise ConfigError(f"{out} is not the folder of fit-many; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    shared = _present(many, out / SHARED)
    write_text(out / "tasks.yaml", write_tasks(many))
    if shared is None and many.share:
        shared = _trained(many, out)
    outcome = Outcome(out, {}, {})
    for number, name in enumerate(many.names, 1):
        log.info("task %d of %d: %s", number, len(many.names), name)
        try:
            outcome.metrics[name] = _own(many, name, out, shared)
        except FewtuneError as error:
            outcome.failed[name] = str(error)
            log.error("%s failed: %s", name, error)
    write_json(out / "results.json", outcome.to_json())
    return outcome


def _present(many: ManyTasks, file: Path) -> Delta | None:
    """The shared part that lies there; ConfigError where it is of another share."""
    if not file.exists():
        return None
    shared = load_delta(file)
    if shared.metadata.get("share") != many.share:
        raise ConfigError(
            f"{file} was made with share={shared.metadata.get('share')}, and share={many.share:g} is asked for; "
            "choose another --out"
        )
    log.info("the shared part is that of %s", ", ".join(shared.metadata["tasks"]))
    return shared


def _trained(many: ManyTasks, out: Path) -> Delta:
    """A new shared part, or one that was begun and goes on."""
    if len(many.names) < 2:
        raise ConfigError("one task has nothing to share: name two or more, or take share=0")
    folder, recipe = RunFolder(out / "shared"), _shared_recipe(many)
    works = {name: prepared(many.recipe(name)) for name in many.names}
    data = {name: work.data for name, work in works.items()}
    seed_all(recipe.seed)
    joint = JointWork.of(recipe, data)
    _must_be_one_backbone(works, joint)
    if folder.config.exists():
        folder.resumed(recipe)
    else:
        folder.begin(recipe)
    if not folder.selection.exists():
        anatomy = describe(joint.backbone.model, joint.backbone.head)
        choose(recipe, summed_ranks(_scores(works), anatomy, recipe.granularity)).save(folder.selection)
    works.clear()
    log.info("the shared part is trained on %s together", ", ".join(data))
    module = train(joint, folder)
    with torch.no_grad():
        joint_delta = module.tuner.delta()
    assert isinstance(joint_delta, Delta)
    shared = headless(joint_delta, recipe, joint.data, {"tasks": list(data), "share": many.share})
    shared.save(out / SHARED)
    folder.checkpoint.unlink(missing_ok=True)
    return shared


def _shared_recipe(many: ManyTasks) -> Recipe:
    """The settings of all tasks, without what a task says of its own."""
    frozen = {} if many.share == 1 else dict.fromkeys(DENSE, "none")
    named = "+".join(many.recipe(name).data for name in many.names)
    one_device = {"devices": 1, "strategy": "auto"}
    return recipe_from({**many.settings, "data": named, "k": many.shared_k(), **frozen, **one_device})


def prepared(recipe: Recipe) -> ImageWork:
    """A task's images and a fresh backbone."""
    work = classification.CLASSIFICATION.prepare(recipe)
    assert isinstance(work, ImageWork)
    return work


def _scores(works: dict[str, ImageWork]) -> Iterator[Scores]:
    for name, work in works.items():
        log.info("scores of %s", name)
        seed_all(work.recipe.seed)
        yield score(work)


def _must_be_one_backbone(works: dict[str, ImageWork], joint: JointWork) -> None:
    """ConfigError where tasks begin from other weights: random ones depend on the head's size."""
    first = dict(joint.backbone.model.named_parameters())
    head = describe(joint.backbone.model, joint.backbone.head).named(Role.HEAD)
    for name, work in works.items():
        for parameter, tensor in work.backbone.model.named_parameters():
            if parameter not in head and not torch.equal(tensor, first[parameter]):
                raise ConfigError(
                    f"{name} does not begin from the same weights as the others ({parameter}): take pretrained weights "
                    "or file:PATH"
                )


def headless(joint: Delta, recipe: Recipe, data: ImageData, noted: dict[str, Any]) -> Delta:
    """The shared part with a head of one class, all zeros: each task brings its own."""
    backbone = fresh_backbone(recipe, replace(data, class_names=("none",)))
    model, selection = backbone.model, joint.selection()
    with joint.applied_to(model):
        present = inventory(model)
        tuned = {n: present.parameters[n].detach().clone() for n in (*selection.places, *selection.whole)}
        buffers = {name: present.tensors[name].detach().clone() for name in joint.buffers}
    anatomy = describe(model, backbone.head)
    tuned |= {name: torch.zeros(anatomy.shapes[name]) for name in anatomy.named(Role.HEAD)}
    metadata = {"task": KIND, "backbone": backbone.describe(), "recipe": recipe.model_dump(mode="json"), **noted}
    return made(model, Selection(anatomy, selection.places, selection.dense), tuned, buffers, metadata)


def _own(many: ManyTasks, name: str, out: Path, shared: Delta | None) -> dict[str, Any]:
    """A task's own part, trained and tested; done already, what was measured then."""
    recipe, folder = many.recipe(name), RunFolder(out / name)
    if shared is None:
        return fit(recipe, folder.path, prepared, resume=folder.config.exists()).metrics
    noted = stands_on(out / SHARED)
    on_shared = recipe.changed(k=many.own_k() or recipe.k)
    if many.share == 1:
        on_shared = on_shared.changed(**dict.fromkeys(DENSE, "none"))

    def prepare(asked: Recipe) -> OwnWork:
        return OwnWork.of(prepared(asked), shared, noted)

    if not folder.config.exists():
        folder.begin(on_shared)
    if not folder.selection.exists():
        seed_all(on_shared.seed)
        work = prepare(on_shared)
        if many.share == 1:
            chosen = Selection(describe(work.backbone.model, work.backbone.head), {}, {})
        else:
            chosen = without(choose(on_shared, rest_of(score(work), shared.selection())), shared.selection())
        chosen.save(folder.selection)
    return fit(on_shared, folder.path, prepare, resume=True).metrics
