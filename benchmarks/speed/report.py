"""Tables and plots from the recorded benchmarks: docs/benchmarks/*.json -> docs/benchmarks/tables.md and *.png.

    python benchmarks/speed/report.py

docs/benchmarks/cost.json is what `fewtune bench cost --json` printed.
"""

from __future__ import annotations

import json
from typing import Any

import matplotlib.pyplot as plt

from results import FOLDER, load

Run = dict[str, Any]
MB = 2**20
RATIOS = ("/ full", "/ dense mask", "/ LoRA r=8", "/ bias-only", "/ frozen limit")
COLOURS = {"GPS": "tab:green", "full": "tab:red", "dense mask": "tab:red"}


def title(run: Run) -> str:
    """What a run measured and on what, as a heading."""
    settings = {key: value for key, value in run["settings"].items() if key not in ("model", "rounds")}
    told = [f"batch {settings.pop('batch')}"] if "batch" in settings else []
    told += [
        f"{key} {value}" if key in ("columns", "clock", "library") else str(value) for key, value in settings.items()
    ]
    return f"{run['settings']['model']}: " + ", ".join([*told, run["machine"]["device"]])


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; the first column is text, the others are figures."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def step_table(run: Run) -> list[str]:
    """Milliseconds of the phases and of the step, and ratios to other methods."""
    figures = run["figures"]
    ratios = [ratio for ratio in RATIOS if any(ratio in row for row in figures.values())]
    rows = [
        [method, *(f"{row[key]:.0f}" for key in ("forward", "backward", "optimizer", "step"))]
        + [f"{row[ratio]:.2f}" for ratio in ratios]
        for method, row in figures.items()
    ]
    return table(["method", "forward ms", "backward ms", "optimizer ms", "step ms", *ratios], rows)


def memory_table(run: Run) -> list[str]:
    """Megabytes, and saved-for-backward as a ratio to tuning biases alone and to full fine-tuning."""
    figures = run["figures"]
    bases = [base for base in ("bias-only", "full") if base in figures]
    rows = []
    for method, row in figures.items():
        if "saved" not in row:  # a scoring pass, of which the peak alone is known
            rows.append([method, "", "", "", "", "", f"{row['peak'] / MB:.1f}", "", *("" for _ in bases)])
            continue
        state = (row["gradients"] + row["optimizer"]) / max(1, row["trained"])
        sizes = [f"{row[key] / MB:.1f}" for key in ("saved", "gradients", "optimizer", "held beside", "peak")]
        ratios = [f"{row['saved'] / figures[base]['saved']:.2f}" for base in bases]
        rows.append([method, f"{row['trained']:,}", *sizes, f"{state:.1f}", *ratios])
    header = ["method", "trained", "saved MiB", "gradients MiB", "optimizer MiB", "held beside MiB", "peak MiB"]
    header += ["gradient + optimizer bytes / value"]
    return table(header + [f"saved / {base}" for base in bases], rows)


def task_table(run: Run) -> list[str]:
    """Milliseconds and bytes of task files."""
    columns = list(next(iter(run["figures"].values())))
    rows = [
        [method, *(f"{row[key]:,.0f}" if "bytes" in key else f"{row[key]:.1f}" for key in columns)]
        for method, row in run["figures"].items()
    ]
    return table(["", *(key if "bytes" in key else f"{key} ms" for key in columns)], rows)


def importance_table(run: Run) -> list[str]:
    """Seconds of an importance pass, and how many epochs of full fine-tuning it lasts."""
    rows = [
        [way, f"{row['seconds']:.1f}", f"{row['epochs of full fine-tuning']:.2f}"]
        for way, row in run["figures"].items()
    ]
    return table(["importance by gradient", "seconds", "epochs of full fine-tuning"], rows)


def cost_table() -> list[str]:
    """The paper's cost figure: training and inference, method by method."""
    file = FOLDER / "cost.json"
    if not file.exists():
        return []
    measured = json.loads(file.read_text())
    rows = []
    for name, row in measured["figures"].items():
        training = f"{row['train_ms']:,.0f}", f"{row['train_peak_bytes'] / MB:,.0f}"
        inference = f"{row['inference_ms']:,.0f}", f"{row['inference_peak_bytes'] / MB:,.0f}"
        selection = f"{row['selection_seconds']:.1f}" if row["selection_seconds"] else ""
        rows.append([name, f"{row['trained']:,}", *training, *inference, selection])
    about = (
        f"{measured['model']}: batch {measured['batch']}, {measured['rounds']} rounds, {measured['threads']} threads"
    )
    header = ["method", "trained", "train ms", "train MiB", "inference ms", "inference MiB", "selection s"]
    return ["", "## Cost of training and inference", "", f"### {about}", "", *table(header, rows)]


def bars(runs: list[Run], value: str, scale: float, label: str, file: str) -> None:
    """One panel a run: a bar a method, stacked by phase for times."""
    phases = ("forward", "backward", "optimizer") if value == "step" else (value,)
    figure, axes = plt.subplots(1, len(runs), figsize=(6 * len(runs), 4.2), squeeze=False)
    for axis, run in zip(axes[0], runs, strict=True):
        methods = [method for method, row in run["figures"].items() if phases[0] in row][::-1]
        left = [0.0] * len(methods)
        for shade, phase in zip((1.0, 0.7, 0.4), phases, strict=False):
            widths = [run["figures"][method][phase] / scale for method in methods]
            colours = [next((c for key, c in COLOURS.items() if m.startswith(key)), "tab:blue") for m in methods]
            axis.barh(methods, widths, left=left, color=colours, alpha=shade, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        if len(phases) > 1:
            axis.legend(fontsize=7, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
        axis.set_title(title(run).replace(": ", "\n", 1), fontsize=8)
        axis.set_xlabel(label)
    figure.tight_layout()
    figure.savefig(FOLDER / file, dpi=110)
    plt.close(figure)


def main() -> None:
    steps, memory, tasks = load("training_step"), load("memory"), load("tasks")
    lines = [
        "# Benchmark tables",
        "",
        "Written by `benchmarks/speed/report.py`; what they mean: [benchmarks](../benchmarks.md).",
    ]
    for heading, runs, make in (
        ("Time of one training step", steps, step_table),
        ("Memory of one training step", memory, memory_table),
        ("Task files", tasks, task_table),
        ("A selection", load("importance"), importance_table),
    ):
        lines += ["", f"## {heading}", ""] if runs else []
        for run in runs:
            versions = ", ".join(f"{key} {value}" for key, value in run["machine"].items() if key != "device")
            lines += [f"### {title(run)}", "", versions, "", *make(run)]
    lines += cost_table()
    (FOLDER / "tables.md").write_text("\n".join(lines).rstrip() + "\n")
    measured = [run for run in steps if run["settings"]["columns"] == "as measured"]
    if measured:
        bars(measured[:4], "step", 1.0, "milliseconds", "training_step.png")
    if memory:
        bars(
            [run for run in memory if run["settings"]["columns"] == "as measured"][:4],
            "saved",
            MB,
            "MiB saved for backward",
            "memory.png",
        )


if __name__ == "__main__":
    main()
