"""Records the finished runs of sharing.sh in results/sharing.jsonl, and makes docs/benchmarks/sharing.md of them.

python benchmarks/studies/sharing.py [RUNS]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fewtune.bench.tables import Table, markdown
from fewtune.files import write_text
from fewtune.sharing import read_tasks

STUDY = Path(__file__).with_name("sharing.yaml")
RECORD = Path(__file__).parent / "results/sharing.jsonl"
PAGE = Path(__file__).parents[2] / "docs/benchmarks/sharing.md"
LATER = "caltech"


def record(runs: Path) -> list[dict[str, Any]]:
    """What is recorded, and the runs below `runs` that are finished: test accuracy by task."""
    lines = RECORD.read_text(encoding="utf-8").splitlines() if RECORD.exists() else []
    known = {line["run"]: line for line in map(json.loads, lines)}
    for results in runs.glob("share-*-seed-*/results.json"):
        tasks = json.loads(results.read_text())["tasks"]
        if LATER in tasks:
            asked = read_tasks(results.with_name("tasks.yaml"))
            share, seed = asked.share, asked.settings.get("seed", 0)
            known[results.parent.name] = {"run": results.parent.name, "share": share, "seed": seed, "tasks": tasks}
    ordered = [known[run] for run in sorted(known)]
    write_text(RECORD, "".join(f"{json.dumps(line)}\n" for line in ordered))
    return ordered


def table(recorded: list[dict[str, Any]]) -> Table:
    """A row for each share."""
    tasks = list(read_tasks(STUDY).names)
    columns = ["share", "seeds", *tasks, "mean of the four", "that minus 0 %, seed by seed", "worst of the four"]
    means = {line["run"]: mean(line["tasks"][task] for task in tasks) for line in recorded}
    alone = {line["seed"]: means[line["run"]] for line in recorded if not line["share"]}
    rows = []
    for share in sorted({line["share"] for line in recorded}):
        lines = [line for line in recorded if line["share"] == share]
        figures = [[line["tasks"][task] for line in lines] for task in tasks]
        figures += [[means[line["run"]] for line in lines]]
        figures += [[means[line["run"]] - alone[line["seed"]] for line in lines if share and line["seed"] in alone]]
        figures += [[min(line["tasks"][task] for task in tasks) for line in lines]]
        figures += [[line["tasks"][LATER] for line in lines]]
        rows.append((f"{100 * share:.0f} %", str(len(lines)), *map(_cell, figures)))
    return Table("Test accuracy, %", (*columns, f"{LATER}, added later"), tuple(rows))


def _cell(shares: Iterable[float]) -> str:
    values = [100 * share for share in shares]
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


TEXT = """# Sharing connections between tasks

Mean and standard deviation over three seeds. All shares train equally many connections for the four tasks together;
0 % is independent GPS, 100 % one backbone for all tasks with a head each. Every part is trained for ten epochs at the
rate 3e-3: no share has a rate that was chosen for it, which may favour some. The last column is a task that the shared
part was not trained on: its own connections are as many as those of each other task.

Made by `sh benchmarks/studies/sharing.sh` and `python benchmarks/studies/sharing.py`.

"""


def main(runs: Path) -> None:
    write_text(PAGE, TEXT + markdown([table(record(runs))]).rstrip() + "\n")
    print(PAGE)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/sharing"))
