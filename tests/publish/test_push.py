"""`fewtune push`, by the hub's real client against a server on this machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fewtune as library
from fewtune.errors import ConfigError, DeltaError
from fewtune.files import read_json
from fewtune.methods import load_task_file
from fewtune.publish import push
from fewtune.publish.card import base_model
from fewtune.publish.paths import short, without_folders
from fewtune.tasks import fit, predict
from hub_server import READER, TOKEN, Hub, hub_environment, hub_server, point_client_at
from masks import mask_folder, tiny_mask_recipe
from runs import coloured_folder, fewtune, tiny_recipe

REPO = "birds/few"
QUICK = {"epochs": 1, "warmup_epochs": 0, "report": False}


@dataclass(frozen=True)
class Case:
    hub: Hub
    root: Path
    data: Path
    run: Path

    def files(self, repo: str) -> dict[str, bytes]:
        return self.hub.repos[repo]["main"][1]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    root = tmp_path_factory.mktemp("push")
    data = coloured_folder(root / "someone's home" / "garden birds")
    fit(tiny_recipe(data, **QUICK), root / "run")
    with hub_server() as hub:
        yield Case(hub, root, data, root / "run")


@pytest.fixture
def client(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The hub's client of this process, with the owner's token."""
    point_client_at(case.hub.url, tmp_path, monkeypatch)
    return monkeypatch


def test_the_command_publishes_and_says_what_and_where(case: Case) -> None:
    done = fewtune("push", case.run, REPO, "--json", env=hub_environment(case.hub, case.root / "hf", TOKEN))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert case.hub.repos[REPO]["main"][0] == told["commit"]
    assert told["task_file"] == f"hf://{REPO}@{told['commit']}/delta.safetensors"
    assert told["shortened"] == ["data", "recipe.data"]


def test_what_is_pushed_is_loaded_again(case: Case, client: pytest.MonkeyPatch) -> None:
    made = push(case.run, REPO)
    ours = library.load_delta(case.run / "delta.safetensors")
    for address in (f"hf://{REPO}", str(made.address)):
        got = library.load_delta(address)
        assert dataclasses.replace(got, metadata=ours.metadata) == ours
    images = sorted((case.data / "class0").iterdir())
    options = {"accelerator": "cpu"}
    assert predict(f"hf://{REPO}", images, **options) == predict(case.run / "delta.safetensors", images, **options)


def test_no_local_folder_is_published(case: Case, client: pytest.MonkeyPatch) -> None:
    assert push(case.run, "birds/clean").shortened == ("data", "recipe.data")
    files = case.files("birds/clean")
    for content in files.values():
        assert b"someone" not in content
        assert str(case.root).encode() not in content
    assert b"garden birds" in files["README.md"]
    metadata = library.load_delta(case.run / "delta.safetensors").metadata
    assert metadata["data"] == metadata["recipe"]["data"] == str(case.data)  # the file of the run stays as it is


def test_the_card_says_what_the_run_found(case: Case, client: pytest.MonkeyPatch) -> None:
    from huggingface_hub import ModelCard

    push(case.run, "birds/card")
    card = ModelCard(case.files("birds/card")["README.md"].decode())
    accuracy = read_json(case.run / "metrics.json")["test"]["accuracy"]
    (result,) = card.data.eval_results
    told = (result.task_type, result.dataset_name, result.metric_type)
    assert told == ("image-classification", "garden birds", "accuracy")
    assert result.metric_value == pytest.approx(accuracy["value"], abs=1e-6)
    assert card.data.library_name == "fewtune"
    assert f"| accuracy | {100 * accuracy['value']:.1f} % ({100 * accuracy['low']:.1f} to" in card.text
    assert "fewtune predict --delta hf://birds/card photographs" in card.text
    assert "class0, class1, class2" in card.text


def test_a_private_repository_and_a_branch(case: Case, client: pytest.MonkeyPatch) -> None:
    push(case.run, "birds/closed", private=True)
    assert "birds/closed" in case.hub.private
    made = push(case.run, "birds/closed", revision="v1")
    assert case.hub.repos["birds/closed"]["v1"][0] == made.address.revision
    library.load_delta("hf://birds/closed@v1")
    client.setenv("HF_TOKEN", "")
    with pytest.raises(DeltaError, match="no repository birds/closed on the hub that you may read"):
        library.load_delta("hf://birds/closed@v1")
    client.setenv("HF_TOKEN", TOKEN)
    push(case.run, "birds/open")
    with pytest.raises(ConfigError, match="birds/open is public already"):
        push(case.run, "birds/open", private=True)


def test_another_kind_of_task_and_another_method(case: Case, client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fit(tiny_mask_recipe(mask_folder(tmp_path / "masks"), **QUICK), tmp_path / "segmentation")
    fit(tiny_recipe(case.data, method="lora", **QUICK), tmp_path / "lora")
    for name in ("segmentation", "lora"):
        push(tmp_path / name, f"birds/{name}")
    card = case.files("birds/segmentation")["README.md"]
    assert b"pipeline_tag: image-segmentation" in card
    assert b"type: dice" in card
    got = load_task_file("hf://birds/lora")
    assert got.metadata["method"] == "lora"
    assert got.metadata["data"] == "garden birds"


def test_what_cannot_be_pushed_is_told_in_one_line(case: Case, client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for token, told in (("hf_wrong", "does not accept your token"), (READER, "that may write"), ("", "hf auth login")):
        client.setenv("HF_TOKEN", token)
        with pytest.raises(DeltaError, match=told):
            push(case.run, REPO)
    for repo, revision in (("few", None), ("a/b/c", None), (REPO, "a" * 40)):
        with pytest.raises(ConfigError, match=r"org/name|is a commit"):
            push(case.run, repo, revision=revision)
    with pytest.raises(ConfigError, match="is no folder"):
        push(tmp_path / "none", REPO)
    point_client_at("http://127.0.0.1:9", tmp_path, client)
    with pytest.raises(DeltaError, match=r"cannot be reached .* nothing was published"):
        push(case.run, REPO)


def test_of_a_path_the_last_part_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, left in {
        "/srv/me/my data/birds": "birds",
        "/srv/me/birds/": "birds",
        "~/birds": "birds",
        "../birds": "birds",
        r"C:\Users\me\birds": "birds",
        "file:/srv/me/vit.pth": "file:vit.pth",
        "task:kvasir-seg?root=/srv/me/sets": "task:kvasir-seg?root=sets",
        "hf:google/vit-base": "hf:google/vit-base",
        "timm:vit_small_patch16_224": "timm:vit_small_patch16_224",
        "hf://org/name@main/delta.safetensors": "hf://org/name@main/delta.safetensors",
    }.items():
        assert short(text) == left
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets" / "birds").mkdir(parents=True)
    assert short("sets/birds") == "birds"
    cleaned, changed = without_folders({"class_names": ["/a"], "recipe": {"k": 1, "model": "file:/m/b.pth"}})
    assert cleaned == {"class_names": ["/a"], "recipe": {"k": 1, "model": "file:b.pth"}}
    assert changed == ["recipe.model"]


def test_the_base_model_is_named_as_the_hub_names_it() -> None:
    timm = {"source": "timm:vit_base_patch16_224.augreg_in21k", "arguments": {"pretrained": True}}
    assert base_model(timm) == "timm/vit_base_patch16_224.augreg_in21k"
    assert base_model({**timm, "arguments": {"pretrained": False}}) is None
    assert base_model({"source": "hf:google/vit-base-patch16-224"}) == "google/vit-base-patch16-224"
    assert base_model({"source": "file:vit.pth"}) is None
    assert base_model({"source": "demo:vit-small"}) is None
