"""Task files of the hub, by its real client against a server on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fewtune as library
from fewtune.errors import DeltaError
from fewtune.hub import Address, address
from fewtune.tasks import fit
from hub_server import TOKEN, Hub, hub_environment, hub_server, point_client_at
from runs import coloured_folder, fewtune, tiny_recipe

REPO = "birds/few"


@dataclass(frozen=True)
class Case:
    hub: Hub
    data: Path
    delta: Path
    first: str
    second: str


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """A repository of two commits: a task of one epoch, then one of two."""
    root = tmp_path_factory.mktemp("hub")
    data = coloured_folder(root / "data")
    for epochs in (1, 2):
        fit(tiny_recipe(data, epochs=epochs, warmup_epochs=0, report=False), root / str(epochs))
    one, two = (root / name / "delta.safetensors" for name in "12")
    with hub_server() as hub:
        first = hub.commit(REPO, {"delta.safetensors": one.read_bytes()})
        second = hub.commit(REPO, {"delta.safetensors": two.read_bytes(), "more/b.safetensors": one.read_bytes()})
        hub.commit("birds/closed", {"delta.safetensors": two.read_bytes()})
        hub.private.add("birds/closed")
        yield Case(hub, data, two, first, second)


@pytest.fixture
def settings(case: Case, tmp_path: Path) -> dict[str, str]:
    """The environment of a user with an empty cache and no token."""
    return hub_environment(case.hub, tmp_path / "hf")


def _refused(where: str, settings: dict[str, str]) -> str:
    done = fewtune("delta", "inspect", where, env=settings)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_predictions_are_those_of_the_local_file(case: Case, settings: dict[str, str]) -> None:
    options = ("--accelerator", "cpu", str(case.data / "class0"))
    ours = fewtune("predict", "--delta", f"hf://{REPO}", *options, env=settings)
    local = fewtune("predict", "--delta", case.delta, *options, env=settings)
    assert ours.returncode == local.returncode == 0, ours.stderr
    assert ours.stdout == local.stdout
    assert f"hf://{REPO}@{case.second}/delta.safetensors" in ours.stderr


def test_evaluate_records_the_commit(case: Case, settings: dict[str, str]) -> None:
    options = ("--data", str(case.data), "--accelerator", "cpu", "--json")
    ours = fewtune("evaluate", "--delta", f"hf://{REPO}@main", *options, env=settings)
    local = fewtune("evaluate", "--delta", case.delta, *options, env=settings)
    assert ours.returncode == 0, ours.stderr
    measures = json.loads(ours.stdout)
    assert measures.pop("task_file") == f"hf://{REPO}@{case.second}/delta.safetensors"
    assert measures == json.loads(local.stdout)


def test_a_commit_is_read_once_and_then_without_a_network(case: Case, settings: dict[str, str], tmp_path: Path) -> None:
    script = f"import fewtune; fewtune.load_delta('hf://{REPO}@{case.first}').save(r'{tmp_path / 'got.safetensors'}')"
    subprocess.run([sys.executable, "-c", script], env=settings, check=True, timeout=120)
    assert library.load_delta(tmp_path / "got.safetensors") != library.load_delta(case.delta)
    asked = len(case.hub.asked)
    nowhere = {**settings, "HF_ENDPOINT": "http://127.0.0.1:9"}
    subprocess.run([sys.executable, "-c", script], env=nowhere, check=True, timeout=120)
    assert len(case.hub.asked) == asked


def test_a_file_by_name(case: Case, settings: dict[str, str]) -> None:
    done = fewtune("delta", "inspect", f"hf://{REPO}/more/b.safetensors", "--json", env=settings)
    assert json.loads(done.stdout)["file"] == f"hf://{REPO}@{case.second}/more/b.safetensors"


def test_a_private_repository_by_token(case: Case, settings: dict[str, str]) -> None:
    assert "hf auth login" in _refused("hf://birds/closed", settings)
    done = fewtune("delta", "inspect", "hf://birds/closed", env={**settings, "HF_TOKEN": TOKEN})
    assert done.returncode == 0, done.stderr


def test_what_is_missing_is_refused_in_one_line(case: Case, settings: dict[str, str]) -> None:
    assert "no repository birds/none" in _refused("hf://birds/none", settings)
    assert f"{REPO} has no revision v9" in _refused(f"hf://{REPO}@v9", settings)
    assert "has no file none.safetensors" in _refused(f"hf://{REPO}/none.safetensors", settings)
    nowhere = {**settings, "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "cannot be reached" in _refused(f"hf://{REPO}", nowhere)
    assert "cannot be reached" in _refused(f"hf://{REPO}@{case.first}", nowhere)
    assert "HF_HUB_OFFLINE" in _refused(f"hf://{REPO}", {**settings, "HF_HUB_OFFLINE": "1"})


def test_a_run_records_the_commit_of_the_task_file_that_its_recipe_names(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tiny_recipe(case.data, method="full", epochs=1, warmup_epochs=0), tmp_path / "full")
    sha = case.hub.commit("birds/full", {"delta.safetensors": (tmp_path / "full" / "delta.safetensors").read_bytes()})
    point_client_at(case.hub.url, tmp_path, monkeypatch)
    recipe = tiny_recipe(case.data, importance="oracle", oracle="hf://birds/full@main", epochs=1, warmup_epochs=0)
    fit(recipe, tmp_path / "run")
    fit(recipe, tmp_path / "run", resume=True)  # which compares the recipe with what was recorded
    assert f"oracle: hf://birds/full@{sha}/delta.safetensors" in (tmp_path / "run" / "config.yaml").read_text()


def test_addresses() -> None:
    assert address("hf://a/b") == Address("a/b")
    assert address(Path("hf://a/b@v1/c/d.safetensors")) == Address("a/b", "v1", "c/d.safetensors")
    assert address("hf://a/b@refs%2Fpr%2F1").revision == "refs/pr/1"
    assert str(address("hf://a/b@refs%2Fpr%2F1")) == "hf://a/b@refs%2Fpr%2F1/delta.safetensors"
    for wrong in ("hf://a", "hf://a/b@", "hf://a/b/../c", "hf://"):
        with pytest.raises(DeltaError, match="expected hf://org/name"):
            address(wrong)
