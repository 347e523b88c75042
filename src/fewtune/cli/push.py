"""`fewtune push`: a run's task file on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewtune.cli.options import AsJson


def push(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    repository: Annotated[
        str, typer.Argument(help="org/name on the Hugging Face hub. If it does not exist, it is made.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to commit to. Default: main.")] = None,
    as_json: AsJson = False,
) -> None:
    """Publish the task file with a model card made from the run, by your own token (`hf auth login`, or HF_TOKEN).

    Of local paths in the task file only the last part is published.
    """
    from fewtune.cli.output import print_json
    from fewtune.publish import push as publish
    from fewtune.publish.push import to_json, told

    made = publish(run, repository, private=private, revision=revision)
    if as_json:
        print_json(to_json(made))
    else:
        print("\n".join(told(made)))
