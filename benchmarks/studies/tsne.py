"""docs/evidence-tsne.png: features of test images before tuning and after, method by method (the paper's Sec. 8.3).

    python benchmarks/studies/tsne.py RUNS/evidence-cnn eurosat gps neuron-random full bias

RUNS/evidence-cnn is the folder of the grid's runs; the task files of seed 0 are read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from fewtune.analysis import image_features, in_the_plane, neighbours_alike
from fewtune.bench.grid import read_grid
from fewtune.classification.loaded import load_task
from fewtune.data import load_data
from fewtune.models import load_backbone
from fewtune.training.loaders import image_loader

STUDIES = Path(__file__).parent
IMAGES = 600


def main(runs: Path, task: str, methods: list[str]) -> None:
    grid = read_grid(STUDIES / f"{runs.name}.yaml")
    recipe = grid.recipe(task, methods[0], {}, 0)
    data = load_data(recipe.data, test_fraction=recipe.test_fraction, limit_test=IMAGES)
    tasks = {name: load_task(runs / task / name / "seed-0/delta.safetensors") for name in methods}
    models = {name: loaded.backbone.model for name, loaded in tasks.items()}
    untouched = load_backbone(recipe.model, num_classes=data.num_classes, image_size=recipe.image_size)
    assert data.test is not None
    test = data.test.with_transform(tasks[methods[0]].transform)
    figure, axes = plt.subplots(1, 1 + len(methods), figsize=(3.2 * (1 + len(methods)), 3.5), layout="constrained")
    for axis, (name, model) in zip(axes, {"before tuning": untouched.model, **models}.items(), strict=True):
        features, labels = image_features(model, image_loader(test, 64))
        layout, title = in_the_plane(features), grid.methods[name].title if name in grid.methods else name
        axis.scatter(layout[:, 0], layout[:, 1], c=labels.numpy(), cmap="tab10", s=5)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{title}\nnearest alike: {100 * neighbours_alike(features, labels):.1f} %", fontsize=9)
    figure.savefig(STUDIES.parents[1] / "docs/evidence-tsne.png", dpi=90)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
