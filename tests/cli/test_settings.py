"""`fewtune settings`, the list at the end of `fewtune fit --help`, and completion in shells."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fewtune.cli.app import app
from fewtune.config import Recipe
from fewtune.errors import ConfigError
from fewtune.recipes.settings import settings


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.stdout
    return result.stdout


def test_every_setting_has_a_meaning_a_kind_and_a_default() -> None:
    listed = [setting for group in settings().values() for setting in group]
    assert sorted(setting.key for setting in listed) == sorted(Recipe.model_fields)
    assert [setting.key for setting in listed if not setting.meaning] == []
    by_key = {setting.key: setting for setting in listed}
    assert by_key["optimizer"][1:3] == ("adam / adamw / sgd", "adam")
    assert by_key["k"][1:3] == ("float", "None")
    assert (by_key["model"].default, by_key["warmup_lr"].default) == ("", "1e-07")


def test_command_prints_them_all_or_those_asked_for() -> None:
    listed = json.loads(run("settings", "--json"))
    assert {row["key"] for row in listed} == set(Recipe.model_fields)
    whole = run("settings")
    assert all(f" {key} " in whole for key in Recipe.model_fields)
    some = run("settings", "warm", "smoothing")
    assert "warmup_epochs" in some
    assert "label_smoothing" in some
    assert "weight_decay" not in some
    assert "Machine" not in some
    with pytest.raises(ConfigError, match="no setting has colour"):
        run("settings", "colour")


def test_help_of_fit_ends_with_them() -> None:
    text = run("fit", "--help")
    assert "--resume" in text
    assert all(f" {key} " in text for key in Recipe.model_fields)


def test_shells_complete_commands() -> None:
    environment = {**os.environ, "_FEWTUNE_COMPLETE": "complete_bash", "COMP_WORDS": "fewtune eval", "COMP_CWORD": "1"}
    script = "import sys; sys.argv = ['fewtune']; from fewtune.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["evaluate"]
