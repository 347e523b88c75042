"""Pages of docs/ from the grids of this folder and the runs recorded in results/; nothing is trained.

python benchmarks/studies/page.py                   # docs/evidence.md, with the words of page.yaml
python benchmarks/studies/page.py recipe-search     # docs/recipe-search.md, with the words of recipe-page.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fewtune.bench.foreman import status
from fewtune.bench.grid import Grid, read_grid
from fewtune.bench.intervals import Difference
from fewtune.bench.report import differences, overview, told
from fewtune.bench.results import Cell, collect, difference, over_tasks
from fewtune.bench.tables import markdown

STUDIES = Path(__file__).parent
DOCS = STUDIES.parents[1] / "docs"
NOWHERE = Path("no run folders: records alone")
Cells = Mapping[tuple[str, str], Cell]


def measured(name: str) -> tuple[Grid, Cells]:
    """A grid of this folder, and what is recorded of it."""
    grid = read_grid(STUDIES / f"{name}.yaml")
    return grid, collect(grid, NOWHERE)


@dataclass(frozen=True)
class Claim:
    """Something that the paper says: that `better` reaches a higher accuracy than `worse`."""

    text: str
    better: str
    worse: str


def side(mean: Difference) -> str:
    """On which side of 0 a difference lies, where it can be told."""
    return "not told apart" if not mean.told_apart else "better" if mean.value > 0 else "worse"


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
    said = {"better": "holds", "worse": "the contrary"}.get(side(mean), side(mean))
    return told(mean), f"{said} (could be seen: {100 * mean.seen:.1f})", "; ".join(by_task)


@dataclass(frozen=True)
class Candidate:
    """A change to GPS that was tried: the arm of that name in every grid that screens."""

    text: str
    method: str


def candidates_table(words: Mapping[str, Any]) -> Iterator[str]:
    """Candidate by candidate: what it brings beside GPS and beside random connections, on every backbone."""
    screens = {title: measured(name) for name, title in words["screens"].items()}
    beside = [f"{title}, minus {base}" for title in screens for base in ("GPS", "random")]
    yield "| " + " | ".join(["candidate", *beside, "beside GPS"]) + " |"
    yield "|---" + "|---:" * len(beside) + "|---|"
    for candidate in (Candidate(**one) for one in words["candidates"]):
        shown, said = [], []
        for title, (grid, cells) in screens.items():
            known = candidate.method in grid.methods
            pairs = [over_tasks(grid, cells, words[b], candidate.method) if known else None for b in ("base", "chance")]
            shown += map(told, pairs)
            if pairs[0] is not None:
                said.append(f"{side(pairs[0])} on {title}")
        yield "| " + " | ".join((candidate.text, *shown, "; ".join(said))) + " |"


def claims_table(claims: list[Claim], grid: Grid, cells: Cells, says: str = "the paper says") -> Iterator[str]:
    """Claim by claim."""
    yield f"| {says} | mean over tasks, points | here | task by task |"
    yield "|---|---:|---|---|"
    for claim in claims:
        yield "| " + " | ".join((claim.text, *verdict(claim, grid, cells))) + " |"


def in_short(grid: Grid, cells: Cells, base: str) -> Iterator[str]:
    """Which methods are better than one in the mean over tasks, which worse, and which cannot be told apart."""
    title = grid.methods[base].title or base
    found: dict[str, list[tuple[float, str]]] = {"better": [], "worse": [], "not told apart": []}
    for method, part in grid.methods.items():
        mean = None if method == base else over_tasks(grid, cells, base, method)
        if mean is not None:
            found[side(mean)].append((mean.value, f"{part.title or method} {told(mean)}"))
    for where, methods in found.items():
        listed = "; ".join(words for _, words in sorted(methods, reverse=True)) or "none"
        yield f"- {where} {'from' if where == 'not told apart' else 'than'} {title}: {listed}"


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
    grid, cells = measured(name)
    seen = status(grid, NOWHERE)
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
    """docs/evidence.md."""
    text = _words("page.yaml")
    claims = [Claim(**claim) for claim in text["claims"]]
    lines = [text["head"].rstrip(), "", "## In short", "", text["short_head"].strip(), ""]
    for part in text["short"]:
        grid, cells = measured(part["grid"])
        lines += [part["text"], "", *in_short(grid, cells, grid.baseline), ""]
    lines += ["## Protocol", "", text["protocol"].strip(), ""]
    grid, cells = measured(text["claims_from"])
    lines += ["## Claims of the paper", "", text["claims_head"].strip(), "", *claims_table(claims, grid, cells), ""]
    lines += _sections(text)
    for name, caption in text["pictures"].items():
        if (DOCS / name).exists():
            lines += [f"![{caption}]({name})", "", caption, ""]
    return "\n".join([*lines, text["tail"].rstrip()]) + "\n"


def recipe_search() -> str:
    """docs/recipe-search.md."""
    text = _words("recipe-page.yaml")
    lines = [text["head"].rstrip(), "", "## Candidates", "", text["candidates_head"].strip(), ""]
    lines += [*candidates_table(text), "", "## The recipe", ""]
    claims = [Claim(**claim) for claim in text["confirm"]["claims"]]
    lines += [*claims_table(claims, *measured(text["confirm"]["grid"]), "claim"), ""]
    return "\n".join([*lines, *_sections(text), text["tail"].rstrip()]).rstrip() + "\n"


def _words(file: str) -> dict[str, Any]:
    words: dict[str, Any] = yaml.safe_load((STUDIES / file).read_text(encoding="utf-8"))
    return words


def _sections(text: Mapping[str, Any]) -> Iterator[str]:
    for part in text["sections"]:
        yield from section(part["grid"], part["title"], part["text"])


PAGES: dict[str, Callable[[], str]] = {"evidence": page, "recipe-search": recipe_search}

if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "evidence"
    if name not in PAGES:
        sys.exit(f"expected one of {', '.join(PAGES)}, got {name!r}")
    (DOCS / f"{name}.md").write_text(PAGES[name](), encoding="utf-8")
