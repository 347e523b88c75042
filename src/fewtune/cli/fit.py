"""`fewtune fit`: from labelled images to a run folder with a task file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fewtune.config import Recipe
    from fewtune.training.run_folder import RunFolder
    from fewtune.training.work import Work


def fit(
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Recipes, YAML files, and key=value settings such as lr=1e-3 k=2 epochs=30."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The backbone: timm:NAME, hf:ID, torchvision:NAME, file:PATH or demo:NAME")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="The images: a folder of class folders, a CSV file, or a data set's name"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/DATA-METHOD")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was stopped, after its last finished epoch.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that is in the folder.")] = False,
    search: Annotated[bool, typer.Option("--search", help="First search for lr and k on validation images.")] = False,
    time: Annotated[
        str | None, typer.Option(help="How long --search goes on, or a folder's run may take: 90s, 20min or 1.5h")
    ] = None,
    on: Annotated[
        str, typer.Option(help="Where --search makes its short runs: local, ray, or a Ray cluster's ray://HOST:PORT")
    ] = "local",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each short run on a Ray cluster.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fine-tune a model on your images: select connections, train them, test once, and write the task file."""
    import logging

    from fewtune.recipes import read, run_name
    from fewtune.tasks import fit as run
    from fewtune.training.run_folder import RunFolder
    from fewtune.training.trainer import is_main

    if on != "local" and not (search or resume):
        raise typer.BadParameter("--on says where --search makes its short runs; give --search too")
    given, allowed = settings or [], None if time is None else seconds(time)
    if search and allowed is not None:
        given = [*given, f"search_seconds={allowed}"]
    recipe = None
    if not (resume and model is None and data is None and not given):
        recipe = read(given, model=model, data=data)
    if out is None:
        if recipe is None:
            raise typer.BadParameter("--resume needs --out, the folder of the run")
        out = Path("runs") / run_name(given, recipe)
    prepared = None
    if recipe is not None and not search and gets_preset(recipe, given):
        recipe, prepared = _preset(recipe, given, RunFolder(out), allowed, resume=resume, overwrite=overwrite)
    elif allowed is not None and not search:
        raise typer.BadParameter(
            "--time says how long --search goes on, or which preset a folder of images gets that names none; "
            "give --search too, or no preset and no recipe"
        )
    try:
        result = run(
            recipe, out, resume=resume, overwrite=overwrite, search=search, on=on, threads=threads, prepared=prepared
        )
    except KeyboardInterrupt:
        if is_main() and (RunFolder(out).config.exists() or RunFolder(out).study.exists()):
            logging.getLogger("fewtune").warning("interrupted; to go on: fewtune fit --out %s --resume", out)
        raise
    if is_main():
        _report(result.folder)
        show(result.metrics, result.folder.path, as_json)


def gets_preset(recipe: Recipe, given: list[str]) -> bool:
    """Whether a run gets a preset though it names none: classes in folders, GPS, no recipe and no YAML file."""
    from fewtune.kinds import DEFAULT

    plain = recipe.preset is None and all("=" in item for item in given)
    return plain and recipe.task == DEFAULT and recipe.method == "gps" and Path(recipe.data).is_dir()


def _preset(
    recipe: Recipe, given: list[str], folder: RunFolder, allowed: float | None, *, resume: bool, overwrite: bool
) -> tuple[Recipe, Work | None]:
    """The recipe with the preset that it gets, and what was prepared for the choice; a begun run keeps its own."""
    import logging

    from fewtune.config import read_recipe
    from fewtune.tasks import prepare
    from fewtune.training.preset import preset_for
    from fewtune.training.trainer import is_main

    if folder.config.exists() and (resume or not is_main()):
        return read_recipe([folder.config], given, model=recipe.model, data=recipe.data), None
    if is_main():
        folder.check(resume=resume, overwrite=overwrite)
    work = prepare(recipe)
    chosen, why = preset_for(work, allowed)
    if is_main():
        logging.getLogger("fewtune").info("%s", why)
    return chosen, work


def seconds(text: str) -> float:
    """Seconds of a time such as 90s, 20min or 1.5h."""
    units = {"s": 1, "min": 60, "h": 3600}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)\s*", text)
    if match is None or float(match[1]) == 0:
        raise typer.BadParameter(f"a time is a number with s, min or h, such as 90s, 20min or 1.5h; got '{text}'")
    return float(match[1]) * units[match[2]]


def _report(folder: RunFolder) -> None:
    """The run's page, where its recipe asks for one; a page that cannot be made never fails a run."""
    import logging

    from fewtune.config import read_recipe
    from fewtune.errors import FewtuneError, one_line
    from fewtune.report import write_report

    if not read_recipe([folder.config]).report:
        return
    try:
        write_report([folder.path], folder.report)
    except (FewtuneError, OSError) as error:
        logging.getLogger("fewtune").warning("no report was written: %s", one_line(error))


def show(metrics: dict[str, Any], folder: Path, as_json: bool) -> None:
    """A run's result on stdout."""
    from fewtune.cli.output import print_json, print_table
    from fewtune.progress import size
    from fewtune.tasks import TASKS
    from fewtune.training.run_folder import RunFolder

    if as_json:
        print_json({"folder": str(folder), **metrics})
        return
    chooser = next((task.metric for task in TASKS.values() if task.metric in metrics["validation"]), "accuracy")
    validation = metrics["validation"].get(chooser)
    values = {
        "method": metrics["method"],
        "trained parameters": f"{metrics['trained']:,}",
        "% of the backbone": f"{metrics['percent_of_backbone']:.3f}",
        f"validation {chooser}": f"{100 * validation:.1f} %" if validation is not None else "no validation images",
        **_tested(metrics),
        **_brought(metrics),
        "seconds": f"{metrics['seconds']:.0f}",
        "peak memory": size(metrics["peak_memory_bytes"]),
        "task file": f"{folder / 'delta.safetensors'} ({size(metrics['delta_bytes'])})",
        **({"report": str(report)} if (report := RunFolder(folder).report).exists() else {}),
    }
    print_table([{"result": key, "": value} for key, value in values.items()])


def _tested(metrics: dict[str, Any]) -> dict[str, str]:
    """The test's measures that have an interval, in percent."""
    from fewtune.metrics import percent

    intervals = {key: value for key, value in metrics.get("test", {}).items() if isinstance(value, dict)}
    if not intervals:
        return {"test": "no test images"}
    return {f"test {key.replace('_', ' ')}, 95 % interval": percent(value) for key, value in intervals.items()}


def _brought(metrics: dict[str, Any]) -> dict[str, str]:
    """Where training began, when that is a result of its own, and what it has brought since."""
    from fewtune.metrics import percent

    start = metrics.get("start", {})
    if "gain" not in start:
        return {}
    return {
        f"test accuracy of the {start['name']}": percent(start["accuracy"]),
        "what tuning brought, points": percent(start["gain"]),
    }
