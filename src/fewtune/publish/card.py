"""The model card of a run: what it was tuned from and on, how well it does, and how it is used."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from fewtune.config import Recipe
from fewtune.hub import library
from fewtune.metrics import Interval
from fewtune.report.reading import Run
from fewtune.tasks import kind_of
from fewtune.training.run_folder import MAY_DIFFER

UNTOLD = ("command", "platform")
"""What a run notes beside its versions: of the user's machine alone."""


def model_card(run: Run, metadata: Mapping[str, Any], repo: str, *, digests: bool) -> str:
    """The text of README.md: metadata of the hub in YAML, then Markdown.

    Args:
        run: the finished run.
        metadata: of its task file, without local folders.
        repo: the repository, org/name.
        digests: whether the task file holds digests of its training images.
    """
    hub = library()
    name, described = repo.partition("/")[2], metadata["backbone"]
    kind = kind_of(metadata)
    measured = measures(run)
    data = hub.ModelCardData(
        library_name="fewtune",
        pipeline_tag=kind.pipeline,
        base_model=base_model(described),
        datasets=_data_set(str(metadata["data"])),
        tags=["fewtune", "parameter-efficient-fine-tuning", str(metadata["method"])],
        model_name=name,
        eval_results=[_result(hub, kind.pipeline, metadata, run, title, value) for title, value in measured.items()],
    )
    card = hub.ModelCard.from_template(
        data,
        template_str=files("fewtune.publish").joinpath("templates", "card.md.j2").read_text(encoding="utf-8"),
        name=name,
        repo=repo,
        run=run,
        metadata=metadata,
        draws=kind.draws,
        source=described["source"],
        weights=str(described["source"]).removeprefix("file:") if described["source"].startswith("file:") else None,
        measured={title: _percent(value) for title, value in measured.items()},
        test_images=run.metrics.get("test", {}).get("images"),
        settings=yaml.safe_dump(changed_settings(metadata["recipe"]), sort_keys=False, allow_unicode=True),
        versions=", ".join(f"{name} {version}" for name, version in run.versions.items() if name not in UNTOLD),
        digests=digests,
    )
    return str(card)


def measures(run: Run) -> dict[str, Interval]:
    """What the test measured, with its intervals; empty where there was no test set."""
    test = run.metrics.get("test", {})
    return {name: Interval(**value) for name, value in test.items() if isinstance(value, dict) and "low" in value}


def base_model(described: Mapping[str, Any]) -> str | None:
    """The backbone's repository on the hub; None where it is of another place."""
    kind, _, name = str(described["source"]).partition(":")
    if kind == "hf" and name.count("/") == 1 and not Path(name).exists():
        return name
    if kind != "timm" or not described.get("arguments", {}).get("pretrained", True):
        return None
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:")
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return None
    whole = str(config.hf_hub_id)
    return whole if not whole.endswith("/") else f"{whole}{config.architecture}.{config.tag}"


def changed_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the defaults and have to do with the result."""
    defaults = {
        key: list(field.default) if isinstance(field.default, tuple) else field.default
        for key, field in Recipe.model_fields.items()
    }
    return {key: value for key, value in recipe.items() if key not in MAY_DIFFER and value != defaults.get(key)}


def _data_set(data: str) -> str | None:
    """The id of a data set of the hub; None for others."""
    return data.removeprefix("hf:").partition("?")[0] if data.startswith("hf:") else None


def _result(hub: Any, pipeline: str, metadata: Mapping[str, Any], run: Run, title: str, value: Interval) -> Any:
    data = str(metadata["data"])
    return hub.EvalResult(
        task_type=pipeline,
        dataset_type=_data_set(data) or data,
        dataset_name=data,
        dataset_split="test",
        metric_type=title,
        metric_name=title.replace("_", " "),
        metric_value=round(value.value, 6),
    )


def _percent(value: Interval) -> str:
    return f"{100 * value.value:.1f} % ({100 * value.low:.1f} to {100 * value.high:.1f})"
