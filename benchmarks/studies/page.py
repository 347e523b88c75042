"""docs/evidence.md from the grids of this folder and the runs recorded in results/; nothing is trained.

python benchmarks/studies/page.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from fewtune.bench.foreman import status
from fewtune.bench.grid import Grid, read_grid
from fewtune.bench.report import differences, overview, told
from fewtune.bench.results import Cell, collect, difference, over_tasks
from fewtune.bench.tables import markdown

STUDIES = Path(__file__).parent
DOCS = STUDIES.parents[1] / "docs"
NOWHERE = Path("no run folders: records alone")
Cells = Mapping[tuple[str, str], Cell]


@dataclass(frozen=True)
class Claim:
    """Something that the paper says: that `better` reaches a higher accuracy than `worse`."""

    text: str
    better: str
    worse: str


def verdict(claim: Claim, grid: Grid, cells: Cells) -> tuple[str, str, str]:
    """The difference of the means over tasks, what it says of the claim, and the tasks that were measured so far."""
    by_task = []
    for task, about in grid.tasks.items():
        pair = cells.get((task, claim.worse)), cells.get((task, claim.better))
        one = None if pair[0] is None or pair[1] is None else difference(pair[0], pair[1])
        if one is not None:
            by_task.append(f"{about.title or task} {told(one)}")
    if claim.better not in grid.methods or claim.worse not in grid.methods:
        return "", "not measured yet", ""
    mean = over_tasks(grid, cells, claim.worse, claim.better)
    if mean is None:
        return "", "not measured yet on all tasks", "; ".join(by_task)
    said = "not told apart" if not mean.told_apart else "holds" if mean.value > 0 else "the contrary"
    return told(mean), f"{said} (could be seen: {100 * mean.seen:.1f})", "; ".join(by_task)


def claims_table(claims: list[Claim], grid: Grid, cells: Cells) -> Iterator[str]:
    """Claim by claim."""
    yield "| the paper says | mean over tasks, points | here | task by task |"
    yield "|---|---:|---|---|"
    for claim in claims:
        yield "| " + " | ".join((claim.text, *verdict(claim, grid, cells))) + " |"


def chosen_rates(grid: Grid, cells: Cells) -> Iterator[str]:
    """The learning rates that validation images chose."""
    yield "| learning rate chosen | " + " | ".join(part.title or name for name, part in grid.tasks.items()) + " |"
    yield "|---|" + "---:|" * len(grid.tasks)
    for method, part in grid.methods.items():
        rates = [cells[task, method].chosen.get("lr") if (task, method) in cells else None for task in grid.tasks]
        if any(rate is not None for rate in rates):
            shown = ["" if rate is None else f"{rate:g}" for rate in rates]
            yield f"| {part.title or method} | " + " | ".join(shown) + " |"


def section(name: str, title: str, text: str) -> Iterator[str]:
    """One grid: how much of it is measured, its tables, and the rates that were chosen."""
    grid = read_grid(STUDIES / f"{name}.yaml")
    seen, cells = status(grid, NOWHERE), collect(grid, NOWHERE)
    yield from (f"## {title}", "", text.strip(), "")
    yield f"{len(seen.done)} of the {len(seen.runs)} runs of [{name}.yaml](../benchmarks/studies/{name}.yaml) are done."
    yield ""
    if not cells:
        yield from ("Not measured yet.", "")
        return
    yield markdown([overview(grid, cells), differences(grid, cells)]).replace("## ", "### ")
    yield from (*chosen_rates(grid, cells), "")
    processors = sorted({record.processor for cell in cells.values() for record in cell.runs.values()})
    yield from (f"Processor: {', '.join(processors)}.", "")
    selections = STUDIES / f"results/{name}-selections.md"
    if selections.exists():
        yield selections.read_text(encoding="utf-8").replace("## ", "### ")


def page() -> str:
    """The whole page."""
    text = yaml.safe_load((STUDIES / "page.yaml").read_text(encoding="utf-8"))
    claims = [Claim(**claim) for claim in text["claims"]]
    grid = read_grid(STUDIES / f"{text['claims_from']}.yaml")
    lines = [text["head"].rstrip(), "", "## Claims of the paper", "", text["claims_head"].strip(), ""]
    lines += [*claims_table(claims, grid, collect(grid, NOWHERE)), ""]
    for part in text["sections"]:
        lines += section(part["grid"], part["title"], part["text"])
    for name, caption in text["pictures"].items():
        if (DOCS / name).exists():
            lines += [f"![{caption}]({name})", "", caption, ""]
    return "\n".join([*lines, text["tail"].rstrip()]) + "\n"


if __name__ == "__main__":
    (DOCS / "evidence.md").write_text(page(), encoding="utf-8")
