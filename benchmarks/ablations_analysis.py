"""Selections of the ablations, made once for each draw of images; how scores agree and how selections overlap."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

from ablations_grid import BLOCKS, SEEDS, TASK, TRIALS, Draw, Trial, base_recipe, oracle_of, selection_file

SELECTION_BATCH = 32
"""The paper's batch; a selection's contrastive loss contrasts within it."""

COMPARED = ("gradient", "cross-entropy")
"""Scores that are compared with the oracle's."""

PARTS = {f"block {n + 1}": f"blocks.{n}.*" for n in range(BLOCKS)}
TASKS = (Draw("flowers", 0), Draw(TASK, 0), Draw("textile", 0))


def draw_gps(draw: Draw, cache: Path, out: Path) -> None:
    """The selection by GPS alone, on a draw of images."""
    if not selection_file(Trial(draw, "gps"), out).exists():
        _select([Trial(draw, "gps")], cache, out)


def draw_selections(draw: Draw, cache: Path, out: Path) -> None:
    """Scores the connections on a draw of images by all criteria, saves the trials' selections, compares scores."""
    path = out / "agreement" / f"{draw.key}.json"
    if path.exists():
        return
    from fewtune.training.files import write_json

    trials = [trial for trial in TRIALS if trial.draw == draw and trial.method == "gps"]
    scores = _select(trials, cache, out)
    path.parent.mkdir(exist_ok=True)
    write_json(path, _agreement(scores, draw.seed) if "oracle" in scores else {})
    print(f"{draw.key}: {len(trials)} selections", flush=True)


def _select(trials: list[Trial], cache: Path, out: Path) -> dict[str, Any]:
    """Saves the selections of trials on one draw of images; the scores by which they were made, by kind."""
    from fewtune.training.protocol import prepare
    from fewtune.training.selecting import choose, score

    (out / "selections").mkdir(exist_ok=True)
    work = prepare(base_recipe(trials[0].draw, "gps", cache, batch_size=SELECTION_BATCH))
    scores: dict[str, Any] = {}
    for trial in trials:
        settings = {key: value for key, value in trial.settings.items() if key not in ("epochs", "batch_size")}
        recipe = work.recipe.changed(**settings, **oracle_of(trial, out))
        kind = _kind(recipe)
        if kind not in scores:
            scores[kind] = score(recipe, work.backbone, work.data.train, _cpu())
        choose(recipe, scores[kind]).save(selection_file(trial, out))
    return scores


def _kind(recipe: Any) -> str:
    if recipe.importance != "gradient":
        return recipe.importance
    return "cross-entropy" if recipe.objective == "cross_entropy" else "gradient"


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def _agreement(scores: dict[str, Any], seed: int) -> dict[str, Any]:
    """Rank correlations with |w_full - w_0|, by layer and over the network; of the gradient alone after seed 0."""
    from dataclasses import asdict

    from fewtune.analysis import rank_correlation

    kinds = COMPARED if seed == 0 else ("gradient",)
    return {kind: asdict(rank_correlation(scores[kind], scores["oracle"])) for kind in kinds}


def agreements(out: Path) -> dict[int, Any]:
    """Seed -> criterion -> rank correlations with the oracle, for the seeds that are done."""
    files = {seed: out / "agreement" / f"{Draw(TASK, seed).key}.json" for seed in SEEDS}
    return {seed: json.loads(file.read_text()) for seed, file in files.items() if file.exists()}


def _selection(draw: Draw, name: str, out: Path) -> Any:
    from fewtune import Selection

    file = selection_file(Trial(draw, name), out)
    return Selection.load(file) if file.exists() else None


def _shared(named: dict[str, Any]) -> dict[str, Any] | None:
    """All pairs, and how many of the selections chose a connection; None where there are not two."""
    from dataclasses import asdict

    from fewtune.analysis import chosen_by, sharing, sharing_by_layer

    there = {name: selection for name, selection in named.items() if selection is not None}
    if len(there) < 2:
        return None
    pairs = [{**asdict(pair), "above_chance": pair.above_chance} for pair in sharing(there)]
    layers: dict[str, list[float]] = {}
    for a, b in combinations(there.values(), 2):
        for name, pair in sharing_by_layer(a, b).items():
            layers.setdefault(name, []).append(pair.above_chance)
    blocks = {part: [v for n, vs in layers.items() if n.startswith(p[:-1]) for v in vs] for part, p in PARTS.items()}
    return {
        "pairs": pairs,
        "chosen_by": chosen_by(there),
        "above_chance_by_block": {part: sum(values) / len(values) for part, values in blocks.items()},
    }


def overlaps(out: Path) -> dict[str, Any]:
    """Overlap of selections with K = 1 over tasks, over seeds, and of each criterion's with the oracle's."""
    seeds = [Draw(TASK, seed) for seed in SEEDS]
    found: dict[str, Any] = {
        "tasks": _shared({draw.task: _selection(draw, "gps", out) for draw in TASKS}),
        "seeds": _shared({f"seed {draw.seed}": _selection(draw, "gps", out) for draw in seeds}),
        "criteria": {},
    }
    for name in ("gps", "head-ce", "magnitude", "neuron-random"):
        rows = [
            _shared({name: _selection(draw, name, out), "oracle": _selection(draw, "oracle", out)}) for draw in seeds
        ]
        found["criteria"][name] = [row["pairs"][0] for row in rows if row is not None]
    return found


def locations(out: Path) -> dict[str, Any]:
    """Where the connections of each granularity lie, shares by block (seed 0)."""
    from fewtune.analysis import located

    chosen = {name: _selection(Draw(TASK, 0), name, out) for name in ("gps", "layer", "network", "net-random")}
    return {
        name: {part: where.share for part, where in located(selection, PARTS).items()}
        for name, selection in chosen.items()
        if selection is not None
    }
