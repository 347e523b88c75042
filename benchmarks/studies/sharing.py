"""docs/benchmarks/sharing.md: what sharing connections between tasks costs or gains, from the runs of sharing.sh.

python benchmarks/studies/sharing.py [RUNS]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

from fewtune.sharing import read_tasks

STUDY = Path(__file__).with_name("sharing.yaml")
PAGE = Path(__file__).parents[2] / "docs/benchmarks/sharing.md"
LATER = "caltech"


def main(runs: Path) -> None:
    tasks = list(read_tasks(STUDY).names)
    measured: dict[float, list[dict[str, float]]] = {}
    for folder in sorted(runs.glob("share-*-seed-*")):
        share = read_tasks(folder / "tasks.yaml").share
        measured.setdefault(share, []).append(json.loads((folder / "results.json").read_text())["tasks"])
    head = ["share", "seeds", *tasks, "mean of the four", "worst of the four", f"{LATER}, added later"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for share, seeds in sorted(measured.items()):
        four = [[values[task] for task in tasks] for values in seeds]
        columns = [*zip(*four, strict=True), [mean(row) for row in four], [min(row) for row in four]]
        columns.append([values[LATER] for values in seeds if LATER in values])
        cells = [f"{100 * share:.0f} %", str(len(seeds)), *(_cell(column) for column in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    PAGE.write_text(TEXT + "\n".join(lines) + "\n", encoding="utf-8")
    print(PAGE)


def _cell(shares: Iterable[float]) -> str:
    values = [100 * share for share in shares]
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


TEXT = """# Sharing connections between tasks

Test accuracy in percent, mean and standard deviation over seeds. All shares train equally many connections for
the four tasks together; 0 % is independent GPS, 100 % one backbone for all tasks with a head each. The last
column is a task that the shared part was not trained on: its own connections are as many as those of each other
task.

Made by `sh benchmarks/studies/sharing.sh` and `python benchmarks/studies/sharing.py`.

"""

if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/sharing"))
