"""Every block of code of README and docs/ is run as it stands, or says above itself why it is not.

One small folder of images and one small run stand for those that the pages name; a random ViT of 300,000 parameters
stands for every backbone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from class_masks import class_mask_folder
from documents import (
    LANGUAGES,
    PAGES,
    ROOT,
    Block,
    blocks,
    check_command,
    check_data,
    check_python,
    commands,
    outside_fences,
)
from fewtune.cli.app import app
from fewtune.models import load_backbone
from fewtune.tasks import fit
from hub_server import Hub, hub_server, point_client_at
from images import class_folders
from masks import mask_folder, tiny_mask_recipe
from runs import tiny_recipe

RUN = [block for page in PAGES for block in blocks(page) if block.reason is None and block.language in ("sh", "python")]
RUN_PAGES = sorted({block.page for block in RUN})
BACKBONE = re.compile(r"\b(?:timm:vit|timm:swin|demo:efficientnet|demo:vit|hf:(?!//)|torchvision:)[\w./-]*")
SMALL = {
    "model": "timm:test_vit",
    "pretrained": False,
    "image_size": 32,
    "epochs": 1,
    "batch_size": 8,
    "accelerator": "cpu",
    "workers": 0,
    "search_trials": 1,
    "search_epochs": 1,
    "report": False,
}
TRAINING = ("fit", "select")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: images, masks, finished runs, task files."""
    root = tmp_path_factory.mktemp("pages")
    photos = class_folders(root / "photos", {"daisy": 12, "rose": 12})
    shutil.copy(photos / "daisy/000.png", root / "owl.png")
    fit(tiny_recipe(photos, epochs=1, report=False), root / "runs/photos")
    fit(tiny_recipe(photos, epochs=1, report=False, method="bias"), root / "runs/photos-bias")
    mask_folder(root / "scopes")
    class_mask_folder(root / "tiles")
    fit(tiny_mask_recipe(root / "scopes", epochs=1, warmup_epochs=0, report=False), root / "runs/scopes")
    shutil.copytree(photos, root / "leaves")
    (root / "tasks").mkdir()
    for task in ("birds", "birds-2025", "rust", "leaves"):
        shutil.copy(root / "runs/photos/delta.safetensors", root / f"tasks/{task}.safetensors")
    lines = [f"photos/daisy/{i:03d}.png,{('red', 'red;round', '')[i % 3]}" for i in range(12)]
    (root / "list.csv").write_text("\n".join(["path,labels", *lines]) + "\n")
    return root


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server() as server:
        yield server


@pytest.fixture
def space() -> dict[str, Any]:
    """The names that the pages' Python takes for granted."""
    images = torch.randn(8, 3, 32, 32)
    loader = [(images, torch.arange(8) % 4), (images + 1, torch.arange(8) % 4)]
    model, fresh = (
        load_backbone("timm:test_vit", num_classes=2, image_size=32, pretrained=False).model for _ in range(2)
    )
    return {"loader": loader, "images": images[:3], "model": model, "fresh": fresh}


def small(text: str) -> str:
    """A page's text with a tiny model wherever it names a backbone."""
    text = BACKBONE.sub("timm:test_vit", text)
    text = re.sub(r"\"vit_base_patch16_224[\w.]*\", ", '"test_vit", img_size=32, ', text)
    text = text.replace("pretrained=True", "pretrained=False")
    return text.replace(
        '("timm:test_vit", num_classes=1)', '("timm:test_vit", num_classes=2, image_size=32, pretrained=False)'
    )


def small_yaml(text: str) -> str:
    """A grid or a list of tasks, of tiny runs."""
    value = yaml.safe_load(small(text))
    if "share" in value:  # random weights depend on the number of classes, and these tasks need the same
        begun = load_backbone("timm:test_vit", num_classes=2, image_size=32, pretrained=False)
        torch.save(begun.model.state_dict(), "weights.pth")
        value["settings"] |= SMALL | {"model": "file:weights.pth", "arch": "timm:test_vit"}
        del value["settings"]["pretrained"]
    elif "tasks" in value:
        value = {**value, "settings": {**value.get("settings", {}), **SMALL}, "choose_epochs": False}
    for method in value.get("methods", {}).values():  # one value of each choice: nothing is chosen, so half of the runs
        method |= {key: values[0] for key, values in method.pop("choices", {}).items()}
    return yaml.safe_dump(value)


def run(words: list[str]) -> None:
    """A command as it stands, but for the size of what is trained."""
    match words:
        case ["fewtune", "--install-completion"]:  # would write into the user's shell
            check_command(words)
        case ["fewtune", *arguments]:
            if arguments[0] in TRAINING and "--resume" not in arguments:
                arguments += [f"{key}={str(value).lower()}" for key, value in SMALL.items() if key != "model"]
                arguments += ["--overwrite"] if arguments[0] == "fit" else []
            status = app([small(word) for word in arguments], standalone_mode=False)
            assert not status, words
        case ["python", script, *arguments] if not script.startswith("-"):
            subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True, timeout=300)
        case ["pip" | "make", *_]:
            check_command(words)
        case ["ls" | "cat" | "unzip" | "mkdir", *_]:
            subprocess.run(words, check=True)
        case _:
            raise AssertionError(f"the tests do not know how to run {words}")


@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.stem)
def test_page(
    page: Path,
    folder: Path,
    hub: Hub,
    space: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    point_client_at(hub.url, tmp_path / "cache", monkeypatch)
    monkeypatch.setenv("FEWTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.reason is None and installed(block):
            run_block(block, space)
    capsys.readouterr()


def installed(block: Block) -> bool:
    """Whether the libraries of a block are here: torchao asks for a newer torch than fewtune does."""
    return find_spec("torchao") is not None or re.search("torchao|quantise=int8", block.text) is None


def run_block(block: Block, space: dict[str, Any]) -> None:
    match block.language:
        case "python":
            exec(compile(small(block.text), str(block), "exec"), space)
        case "sh":
            for words in commands(block.text):
                run(words)
        case "yaml" if (name := re.match(r"# (\S+\.yaml)", block.text)) is not None:
            Path(name[1]).write_text(small_yaml(block.text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_not_run_is_right_too(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block}: name the language, one of {LANGUAGES}"
        check_data(block)
        if block.language == "python":
            check_python(block.text)
        elif block.language == "sh":
            for words in commands(block.text):
                check_command(words)
    for line in outside_fences(page):
        assert not re.match(r"( {4}|\t)(fewtune|python|pip|make) ", line), (
            f"{page.name}: a command without a fence: {line}"
        )
