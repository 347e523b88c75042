"""Writes the files of this folder with the code of commit 5e3e2d3 (0.1.0): PYTHONPATH=src:tests/support python write.py

It runs at that commit only, in this folder, and is kept to say how the files were made; the tests read them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from fewtune.bench.run import run_grid
from fewtune.segmentation.learning import MaskLearner
from fewtune.segmentation.protocol import fit as fit_masks
from fewtune.training.classifying import Classifier
from fewtune.training.protocol import prepare
from transformers import ViTConfig, ViTForImageClassification

import fewtune
from delta_cases import Small, anatomy_of, choose, made_up, state
from fewtune.bench.grid import grid_from
from fewtune.config import recipe_from
from fewtune.files import write_tensors
from fewtune.training import fit, predict
from masks import mask_folder
from runs import coloured_folder

SETTINGS: dict[str, Any] = {
    "model": "hf:vit", "image_size": 32, "test_fraction": 0.25, "epochs": 3, "batch_size": 8, "accelerator": "cpu",
    "data": "images", "lr": 1e-2,
}  # fmt: skip
MASKS = {"task": "segmentation", "data": "scenes", "augment": "flip", "val_fraction": 0.25, "warmup_epochs": 0,
         "batch_size": 4}  # fmt: skip
GRID: dict[str, Any] = {
    "settings": {k: v for k, v in SETTINGS.items() if k not in ("data", "lr")},
    "tasks": {"images": {"data": "images"}, "two": {"data": "two"}},
    "methods": {
        "gps": {"method": "gps", "choices": {"lr": [1e-3, 1e-2]}},
        "random": {"method": "gps", "importance": "random", "choices": {"lr": [1e-2]}},
        "bias": {"method": "bias", "choices": {"lr": [1e-2]}},
        "linear": {"method": "linear", "choices": {}},
    },
    "seeds": [0],
    "workers": 1,
}


def steadied(dtype: torch.dtype = torch.float32) -> Small:
    model = Small()
    with torch.no_grad():
        for number, tensor in enumerate((*model.parameters(), *model.buffers())):
            count = torch.arange(tensor.numel())
            tensor.copy_((((count * 37 + 11 * number) % 101 - 50) / 512).to(tensor.dtype).view_as(tensor))
    return model.to(dtype).eval()


def digest(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def selections_and_deltas() -> dict[str, Any]:
    expected: dict[str, Any] = {"selections": {}, "deltas": {}}
    model = steadied()
    scores = fewtune.random_importance(model, seed=0, head="head")
    for granularity in ("neuron", "layer", "network"):
        selection = fewtune.select(scores, k=2, granularity=granularity)
        selection.save(f"selection-{granularity}.safetensors")
        places = {name: p.flat for name, p in selection.places.items()}
        expected["selections"][granularity] = {
            "connections": selection.connections, "whole": list(selection.whole), "head": list(selection.head),
            "places": {name: int(flat.numel()) for name, flat in places.items()}, "digest": digest(places),
        }  # fmt: skip
    cases = {"gps": (torch.float32, 1, False), "half": (torch.float16, 1, False),
             "bfloat16": (torch.bfloat16, 2, False),
             "buffers": (torch.float32, 1, True), "ragged": (torch.float32, "ragged", False)}  # fmt: skip
    for name, (dtype, how, buffers) in cases.items():
        model = steadied(dtype)
        task = made_up(model, choose(anatomy_of(model), how), buffers=buffers, metadata={"case": name})
        task.delta.save(f"delta-{name}.safetensors")
        task.delta.apply(model)
        expected["deltas"][name] = digest(state(model))
    return expected


def interrupted(learner: type, out: str, start: Any, steps: int) -> None:
    """A run that ends in the midst of its second epoch."""
    step, made = learner.training_step, []

    def dies(self: Any, batch: Any, index: int) -> Any:
        made.append(index)
        if len(made) == steps:
            raise RuntimeError("killed")
        return step(self, batch, index)

    learner.training_step = dies
    try:
        start(out)
    except RuntimeError as error:
        if str(error) != "killed":
            raise
    else:
        raise AssertionError("the run was not interrupted")
    finally:
        learner.training_step = step
    assert not (Path(out) / "metrics.json").exists()
    assert (Path(out) / "checkpoint.ckpt").exists()


def main() -> None:
    torch.set_num_threads(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3)).save_pretrained("vit")
    coloured_folder(Path("images"), each=8, size=16)
    coloured_folder(Path("two"), classes=2, each=10, size=16)
    mask_folder(Path("scenes"), 12)
    expected = selections_and_deltas()
    expected["runs"] = {}
    for method in ("gps", "full", "bias", "linear"):
        out = f"run-{method}"
        result = fit(recipe_from({**SETTINGS, "method": method}), out)
        rows = predict(Path(out) / "delta.safetensors", [Path("images")])
        expected["runs"][out] = {"test": result.metrics["test"], "first": [rows[i] for i in (0, 9, 17)]}
    masks = {**SETTINGS, **MASKS}
    expected["runs"]["run-masks"] = {"test": fit_masks(recipe_from(masks), "run-masks").metrics["test"]}
    interrupted(Classifier, "interrupted", lambda out: fit(recipe_from(SETTINGS), out), 4)
    interrupted(MaskLearner, "interrupted-masks", lambda out: fit_masks(recipe_from(masks), out), 3)
    progress = run_grid(grid_from(GRID), Path("grid"))
    assert not progress.failed, progress.failed
    expected["grid"] = {
        name: json.loads((Path("grid") / name / "metrics.json").read_text())["test"]
        for name in sorted(progress.done) if (Path("grid") / name / "metrics.json").exists()
    }  # fmt: skip
    expected["validation"] = {
        str(path.parent): json.loads(path.read_text())["candidates"]
        for path in sorted(Path("grid").rglob("validation.json"))
    }
    expected["deltas_of_the_grid"] = {
        name: digest(dict(fewtune.load_delta(Path("grid") / name / "delta.safetensors").values))
        for name in expected["grid"]
    }
    scores = prepare(recipe_from(SETTINGS)).score(torch.device("cpu"))  # as the bench stores them while a grid runs
    write_tensors(Path("scores.safetensors"), scores, {"seconds": "1.5"})
    expected["scores"] = digest(dict(scores))
    for bulky in ("grid", "images", "two", "scenes"):  # the images are drawn again by the tests
        shutil.rmtree(bulky)
    for extra in (
        *Path().glob("*/tensorboard"),
        *Path().glob("*/curves.png"),
        *Path().glob("run-[!g]*/checkpoint.ckpt"),
    ):
        shutil.rmtree(extra) if extra.is_dir() else extra.unlink()
    for file in Path().glob("*/versions.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"platform": "Linux"}, indent=2) + "\n")
    expected["torch"], expected["cpu"] = torch.__version__, torch.backends.cpu.get_cpu_capability()
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
