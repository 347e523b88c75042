"""The tables of a grid: what was measured here, and the paper's layouts with ours beside the printed values."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from fewtune.bench.grid import Grid
from fewtune.bench.intervals import Difference
from fewtune.bench.paper_tables import Column, PaperTable, mean_of, numbers, paper_table, plain
from fewtune.bench.results import Cell, collect, difference, over_tasks
from fewtune.bench.tables import Table
from fewtune.config import Recipe

BACKBONES = {
    "timm:vit_base_patch16_224": "ViT-B/16",
    "timm:swin_base_patch4_window7_224": "Swin-B",
    "timm:convnext_base": "ConvNeXt-B",
}
"""How the paper calls the models whose names begin so."""

Cells = Mapping[tuple[str, str], Cell]


def grid_tables(grid: Grid, out: Path) -> list[Table]:
    """One table a task with all that was measured; where there are several tasks, an overview and the differences."""
    cells = collect(grid, out)
    tables = [_task_table(grid, task, cells) for task in grid.tasks if any(key[0] == task for key in cells)]
    return tables + ([overview(grid, cells), differences(grid, cells)] if len(tables) > 1 else [])


def paper_tables(grid: Grid, out: Path) -> list[Table]:
    """Those of the paper's tables to which the grid has something to say, ours beside the printed values."""
    cells = collect(grid, out)
    return [table for number in numbers() if (table := beside(paper_table(number), grid, cells)).ours]


def printed(number: int) -> Table:
    """A table of the paper alone, as transcribed, with the means that are computed from its cells."""
    return beside(paper_table(number), None, {})


# -- what was measured here


def _task_table(grid: Grid, task: str, cells: Cells) -> Table:
    base = cells.get((task, grid.baseline))
    some = next(cell for key, cell in cells.items() if key[0] == task)
    against = f"minus {_title(grid.methods[grid.baseline].title, grid.baseline)} (95 % interval)"
    columns = (
        "method", "chosen on validation", f"test {some.measure}, mean ± sd (seeds)", against, "test loss", "trained",
        "trained, %", "ms a training step", "ms a test image", "peak memory, MB", "selection, s", "task file, MB",
    )  # fmt: skip
    rows = []
    for method, part in grid.methods.items():
        cell = cells.get((task, method))
        if cell is None:
            rows.append((_title(part.title, method), *[""] * (len(columns) - 1)))
            continue
        between = None if base is None or cell is base else difference(base, cell)
        rows.append(
            (
                _title(part.title, method),
                ", ".join(f"{key} {_short(value)}" for key, value in cell.chosen.items()),
                _accuracy(cell),
                told(between),
                _number(cell.loss, 1, 3),
                f"{cell.trained:,}",
                f"{cell.percent:.2f}",
                _number(cell.step_seconds, 1e3),
                _number(cell.test_seconds_per_image, 1e3, 1),
                _number(cell.peak_memory, 1e-6),
                _number(cell.selection_seconds, 1, 1),
                f"{cell.delta_bytes / 1e6:.2f}",
            )
        )
    tested = some.metrics[0].get("test", {}).get("images")
    notes = [
        f"{some.recipe.model}; {some.metrics[0].get('train_images')} training images (validation images included), "
        f"{tested} test images, batch {some.recipe.batch_size}",
        "the differences are paired by test image and seed; their 95 % intervals hold both (one seed: images alone)",
    ]
    return Table(_title(grid.tasks[task].title, task), columns, tuple(rows), tuple(notes), text_columns=2)


def overview(grid: Grid, cells: Cells) -> Table:
    """Methods x tasks, the mean over tasks where all are finished, what is trained, and the loss."""
    rows = []
    for method, part in grid.methods.items():
        row = [cells.get((task, method)) for task in grid.tasks]
        there = [cell for cell in row if cell is not None]
        means, losses = ([getattr(cell, key) for cell in row if cell is not None] for key in ("mean", "loss"))
        whole = len(there) == len(row)
        rows.append(
            (
                _title(part.title, method),
                *("" if cell is None else _accuracy(cell) for cell in row),
                _number(mean_of(means) if whole else None, 100, 2),
                _number(mean_of(losses) if whole else None, 1, 3),
                _number(statistics.fmean(cell.percent for cell in there) if there else None, 1, 2),
            )
        )
    titles = [_title(task.title, name) for name, task in grid.tasks.items()]
    columns = ("method", *titles, "mean", "mean test loss", "trained, %")
    return Table("All tasks", columns, tuple(rows), ("mean ± standard deviation over seeds (their number)",))


def differences(grid: Grid, cells: Cells) -> Table:
    """Methods x tasks: the difference from the baseline with its interval, and that of the mean over tasks."""
    base, rows = _title(grid.methods[grid.baseline].title, grid.baseline), []
    for method in [method for method in grid.methods if method != grid.baseline]:
        pairs = [(cells.get((task, grid.baseline)), cells.get((task, method))) for task in grid.tasks]
        by_task = [None if a is None or b is None else difference(a, b) for a, b in pairs]
        mean = over_tasks(grid, cells, grid.baseline, method)
        seen = "" if mean is None else f"{100 * mean.seen:.1f}"
        rows.append((_title(grid.methods[method].title, method), *map(told, by_task), told(mean), seen))
    titles = [_title(task.title, name) for name, task in grid.tasks.items()]
    notes = (
        "points, with 95 % intervals over seeds and test images together (of the mean: the tasks are fixed)",
        "could be seen: the true difference of the means that would have been told from 0 in four of five such grids",
    )
    return Table(f"Minus {base}", ("method", *titles, "mean", "could be seen"), tuple(rows), notes)


def told(between: Difference | None) -> str:
    """A difference in points with its interval; "" where there is none."""
    if between is None:
        return ""
    return f"{100 * between.value:+.1f} ({100 * between.low:+.1f} to {100 * between.high:+.1f})"


def _title(title: str | None, name: str) -> str:
    return title or name


def _accuracy(cell: Cell) -> str:
    if cell.mean is None:
        return ""
    spread = "" if cell.deviation is None else f" ± {100 * cell.deviation:.1f}"
    return f"{100 * cell.mean:.1f}{spread} ({len(cell.values)})"


def _number(value: float | None, scale: float, digits: int = 0) -> str:
    return "" if value is None else f"{scale * value:,.{digits}f}"


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# -- beside the paper


def beside(table: PaperTable, grid: Grid | None, cells: Cells) -> Table:
    """A table of the paper; below each of its rows the grid's methods of the same name, where they have a cell.

    A cell of ours stands only under a column whose data set and backbone it was measured with; a mean only where all
    of its data sets were.
    """
    rows: list[tuple[str, ...]] = []
    ours: set[int] = set()
    left = list(grid.methods) if grid is not None else []
    for row in table.cells:
        rows.append((row[table.label], "paper", *_printed_cells(table, row)))
        for method in [name for name in left if _row_of(table, grid, name, cells) == _row_name(table, row)]:
            added = _our_cells(table, grid, method, cells, _row_backbone(row[table.label]))
            if any(added):
                ours.add(len(rows))
                rows.append((f"{method} (fewtune)", "measured", *added))
    known = {_row_name(table, row) for row in table.cells}
    for method in [name for name in left if _row_of(table, grid, name, cells) not in known]:
        added = _our_cells(table, grid, method, cells, None)
        if any(added):
            ours.add(len(rows))
            rows.append((f"{method} (fewtune)", "measured", *added))
    columns = [*(name for name in table.header if name != table.label), *table.computed]
    return Table(
        f"Tab. {table.number}: {table.title}", (table.label, "", *columns), tuple(rows), table.notes, table.groups, 2,
        frozenset(ours),
    )  # fmt: skip


def _printed_cells(table: PaperTable, row: Mapping[str, str]) -> list[str]:
    computed = [table.group_mean(dict(row), name) for name in table.computed]
    return [
        *(text for name, text in row.items() if name != table.label),
        *("" if value is None else f"{value:.2f}" for value in computed),
    ]


def _row_name(table: PaperTable, row: Mapping[str, str]) -> str:
    return table.rows.get(row[table.label]) or plain(row[table.label].rpartition(" + ")[2])


def _row_backbone(label: str) -> str | None:
    """The backbone that a row names: "Swin-B + Full"."""
    return label.partition(" + ")[0] if " + " in label else None


def _row_of(table: PaperTable, grid: Grid | None, method: str, cells: Cells) -> str | None:
    """Which of the paper's rows a method of the grid belongs to."""
    assert grid is not None
    if grid.methods[method].paper is not None:
        return plain(grid.methods[method].paper or "")
    some = next((cell for (_, name), cell in cells.items() if name == method), None)
    return None if some is None else namesake(some.recipe)


def namesake(recipe: Recipe) -> str:
    """The paper's name of a method, or of a way to select, without citations and in small letters."""
    if recipe.method != "gps":
        return recipe.method
    match recipe.importance, recipe.objective, recipe.granularity:
        case "gradient", "supcon", "neuron":
            return "gps"
        case "gradient", "supcon", "layer":
            return "layer"
        case "gradient", "supcon", "network":
            return "net"
        case "gradient", "cross_entropy", "neuron":
            return "head+ce"
        case "random", _, "neuron":
            return "neuron random"
        case "random", _, "network":
            return "net random"
        case importance, _, "neuron":
            return importance
    return f"{recipe.importance} {recipe.granularity}"


def backbone_name(model: str) -> str | None:
    """How the paper calls a model; None where it has no results with it."""
    return next((name for start, name in BACKBONES.items() if model.startswith(start)), None)


def _our_cells(table: PaperTable, grid: Grid | None, method: str, cells: Cells, on: str | None) -> list[str]:
    """A row of ours under the paper's columns; "" where something was not measured."""
    by_key: dict[tuple[str, str | None], Cell] = {}
    for (_, name), cell in cells.items():
        if name == method and cell.recipe.data.startswith("task:"):
            key = cell.recipe.data.removeprefix("task:").partition("?")[0]
            by_key[key, backbone_name(cell.recipe.model)] = cell

    def value(column: Column, of: tuple[str, ...]) -> float | None:
        measured = [by_key.get((key, column.on or on)) for key in of]
        return mean_of([None if cell is None else WHAT.get(column.what, _ood(column.what))(cell) for cell in measured])

    texts = []
    for name in table.header:
        if name != table.label:
            column = table.columns.get(name)
            ours = None if column is None else value(column, column.of)
            texts.append("" if ours is None or column is None else _text(column.what, ours, by_key, column, on))
    for groups in table.computed.values():
        whole = Column((), "accuracy", next(iter(table.columns.values())).on)
        mean = mean_of([value(whole, group) for group in groups])
        texts.append("" if mean is None else f"{mean:.2f}")
    return texts


def _text(what: str, value: float, cells: Mapping[tuple[str, str | None], Cell], column: Column, on: str | None) -> str:
    """A value as the paper writes it; with its standard deviation over seeds where it is of one data set."""
    one = cells[column.of[0], column.on or on] if len(column.of) == 1 else None
    if what == "accuracy" and one is not None:
        return f"{value:.1f}" + ("" if one.deviation is None else f" ± {100 * one.deviation:.2f}")
    return f"{value:.2f}"


def _ood(key: str) -> Callable[[Cell], float | None]:
    def scored(cell: Cell) -> float | None:
        sets = [metrics["ood"][key] for metrics in cell.metrics if key in metrics.get("ood", {})]
        values = [one["mce"] if key == "imagenet-c" else one["accuracy"]["value"] for one in sets]
        return 100 * statistics.fmean(values) if values else None

    return scored


WHAT: dict[str, Callable[[Cell], float | None]] = {
    "accuracy": lambda cell: None if cell.mean is None else 100 * cell.mean,
    "percent": lambda cell: cell.percent,
    "million": lambda cell: cell.trained / 1e6,
}
"""What a column can be a mean of."""
