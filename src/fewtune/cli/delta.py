"""`fewtune delta`: look at task files, apply, revert, compare and combine them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewtune.cli.options import AsJson, TaskFile

app = typer.Typer(
    help="Look into task files, apply them to checkpoints, take them out, compare and combine them.",
    no_args_is_help=False,
)

Out = Annotated[Path, typer.Option(help="The file to write (.safetensors).")]


@app.command("inspect")
def inspect(file: TaskFile, as_json: AsJson = False) -> None:
    """Show what a task file holds: its backbone, classes, settings, and the changes of every layer."""
    from fewtune.cli.output import print_json
    from fewtune.delta import Delta
    from fewtune.hub import resolve
    from fewtune.methods import load_task_file
    from fewtune.progress import size

    fetched = resolve(file)
    delta = load_task_file(fetched.path)
    held = delta.selection() if isinstance(delta, Delta) else delta
    quantised = sorted(set(delta.quantised.values())) if isinstance(delta, Delta) else []
    facts: dict[str, Any] = {
        "bytes": fetched.path.stat().st_size,
        "connections": held.connections,
        "trained": held.trained,
        "buffers": len(delta.buffers),
        **({"quantised": quantised} if quantised else {}),
    }
    if as_json:
        print_json({"file": str(fetched), **facts, "metadata": delta.metadata, "per_layer": held.per_layer()})
        return
    backbone = delta.metadata.get("backbone", {})
    print(f"file        {fetched} ({size(facts['bytes'])})")
    print(f"backbone    {backbone.get('source', 'not named')} at {backbone.get('image_size', '?')} px")
    if quantised:
        print(f"quantised   {'; '.join(quantised)}")
    print(f"classes     {', '.join(delta.metadata.get('class_names', [])) or 'not named'}")
    print(f"method      {delta.metadata.get('method', 'not named')}, data {delta.metadata.get('data', 'not named')}")
    print(held.summary())


@app.command("export")
def export(file: TaskFile, out: Out, as_json: AsJson = False) -> None:
    """Write the weights of the tuned model as a plain checkpoint that timm (or its own library) loads."""
    import logging

    from fewtune.cli.output import print_json
    from fewtune.files import save_state
    from fewtune.tasks import load_task

    _must_be_safetensors(out)
    task = load_task(file, logging.getLogger("fewtune").info)
    save_state(task.plain_state_dict(), out)
    described = task.backbone.describe()
    if as_json:
        print_json({"file": str(out), "backbone": described})
    else:
        classes = len(task.delta.metadata["class_names"])
        print(f"{out}: {described['source']}, {classes} classes, {task.backbone.image_size} px")


@app.command("apply")
def apply(
    file: TaskFile, checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of the backbone.")], out: Out
) -> None:
    """Write a task into a checkpoint of its backbone. A checkpoint of another backbone is refused."""
    from fewtune.classification.checkpoints import apply_to_checkpoint

    _must_be_safetensors(out)
    apply_to_checkpoint(file, checkpoint, out)
    print(out)


@app.command("revert")
def revert(
    file: TaskFile,
    tuned: Annotated[Path, typer.Argument(help="A checkpoint with the task in it.")],
    out: Out,
    backbone: Annotated[
        Path | None, typer.Option(help="The backbone's checkpoint. Default: it is loaded by its name.")
    ] = None,
) -> None:
    """Take a task out of a checkpoint. The original values come from the backbone."""
    import logging

    from fewtune.classification.checkpoints import revert_checkpoint

    _must_be_safetensors(out)
    revert_checkpoint(file, tuned, out, backbone, logging.getLogger("fewtune").info)
    print(out)


@app.command("diff")
def diff(first: TaskFile, second: TaskFile, as_json: AsJson = False) -> None:
    """Compare two tasks of one backbone: which connections both changed, and by how much they differ there."""
    from fewtune.cli.output import print_json, print_table
    from fewtune.delta import load_delta

    a, b = load_delta(first), load_delta(second)
    rows = [_difference(name, a, b) for name in {**a.positions, **b.positions}]
    if as_json:
        print_json({"same": a == b, "tensors": rows})
        return
    print_table(
        [
            {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()}
            for row in rows
        ]
    )
    print("the two files hold the same task" if a == b else "the two tasks differ")


Files = Annotated[list[Path], typer.Argument(help="Two or more task files of one backbone.")]
HeadOf = Annotated[
    Path | None,
    typer.Option(help="The file whose head and classes to take. Without it, heads of the same classes are averaged."),
]


@app.command("add")
def add(files: Files, out: Out, head_of: HeadOf = None, as_json: AsJson = False) -> None:
    """Add up the changes of several tasks into a new task file, and say how many connections they share."""
    from fewtune.delta.arithmetic import add as how

    _combine(how, files, out, head_of, as_json)


@app.command("average")
def average(files: Files, out: Out, head_of: HeadOf = None, as_json: AsJson = False) -> None:
    """Average the changes of several tasks into a new task file, and say how many connections they share."""
    from fewtune.delta.arithmetic import average as how

    _combine(how, files, out, head_of, as_json)


@app.command("flatten")
def flatten(file: TaskFile, out: Out) -> None:
    """Make one file of a task and the shared part that it needs (see fit-many)."""
    import logging

    from fewtune.classification.combine import flatten_file

    _must_be_safetensors(out)
    flat = flatten_file(file, out, logging.getLogger("fewtune").info)
    print(f"{out}: {flat.connections:,} connections")


def _combine(how: Any, files: list[Path], out: Path, head_of: Path | None, as_json: bool) -> None:
    import logging

    from fewtune.classification.combine import combine_files
    from fewtune.cli.output import print_json

    _must_be_safetensors(out)
    made = combine_files(how, files, out, head_of, logging.getLogger("fewtune").info)
    facts = {"connections": made.delta.connections, "in several": made.shared, "opposed": made.opposed}
    if as_json:
        print_json({"file": str(out), **facts})
        return
    print(f"{out}: {made.delta.connections:,} connections")
    print(f"{made.shared:,} of them changed in several tasks, {made.opposed:,} of these in opposite directions")


def _difference(name: str, a: Any, b: Any) -> dict[str, Any]:
    """Counts of changed entries in each file and in both, and the largest difference of the new values there."""
    import torch

    sides = []
    for delta in (a, b):
        values = {**delta.values, **delta.whole, **delta.buffers}.get(name)
        position = delta.positions.get(name)
        if values is None:
            sides.append((torch.empty(0, dtype=torch.int64), torch.empty(0)))
        else:
            flat = values.reshape(-1)
            sides.append((torch.arange(len(flat)) if position is None else position, flat))
    (places_a, values_a), (places_b, values_b) = sides
    in_a, in_b = torch.isin(places_a, places_b), torch.isin(places_b, places_a)
    shared_a, shared_b = values_a[in_a][places_a[in_a].argsort()], values_b[in_b][places_b[in_b].argsort()]
    largest = float((shared_a.double() - shared_b.double()).abs().max()) if len(shared_a) else 0.0
    return {
        "tensor": name,
        "first": len(places_a),
        "second": len(places_b),
        "both": int(in_a.sum()),
        "largest difference": largest,
    }


def _must_be_safetensors(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise typer.BadParameter(f"--out must end in .safetensors, got {out}")
