"""The trials of a search as an Optuna study in an SQLite file, which optuna-dashboard reads too.

Trial n draws from a sampler that is seeded by (seed, n), so a study of one trial at a time that was killed goes on to
the same trials as one that was not. Of several at a time, what is drawn depends on which others have ended.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fewtune.errors import ConfigError, MissingExtra, one_line
from fewtune.training.loaders import seed_of

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

NAME = "search"
"""The study's name in its file."""
UNPRUNED_TRIALS, UNPRUNED_EPOCHS = 2, 1
"""So many trials must be complete, and so many epochs of a trial done, before it is compared with their median."""


@dataclass(frozen=True)
class Space:
    """What is searched: the learning rate between the ends of a list, K and drop path among the values of theirs.

    A list without a value leaves its setting out.
    """

    lr: tuple[float, ...]
    k: tuple[float, ...] = ()
    drop_path: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        """How many combinations the listed values have."""
        return len(self.lr) * max(1, len(self.k)) * max(1, len(self.drop_path))

    @property
    def first(self) -> list[dict[str, float]]:
        """Every listed learning rate once, each with the next K and drop path: tried before anything is drawn."""
        lists = {"k": self.k, "drop_path": self.drop_path}
        return [
            {"lr": lr, **{name: values[i % len(values)] for name, values in lists.items() if values}}
            for i, lr in enumerate(self.lr)
        ]

    def distributions(self) -> dict[str, BaseDistribution]:
        """The same for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        searched: dict[str, BaseDistribution] = {"lr": FloatDistribution(min(self.lr), max(self.lr), log=True)}
        for name, values in (("k", self.k), ("drop_path", self.drop_path)):
            if values:
                searched[name] = CategoricalDistribution(values)
        return searched


class Study:
    """Asks for what to try next and keeps what came of it.

    Args:
        path: the SQLite file; a study that lies there goes on.
        space: what is searched.
        seed: of the sampler.

    Raises:
        MissingExtra: Optuna is not installed.
        ConfigError: `path` holds no study of fewtune, or one of another space.
    """

    def __init__(self, path: Path, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed
        self.study = _open(path)
        for trial in self._of("RUNNING"):  # left behind by a process that was killed: what is tried next
            self.study.tell(trial.number, state=trial.state.FAIL)
            self.study.enqueue_trial(trial.params)

    def _of(self, *states: str) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        return self.study.get_trials(states=[TrialState[state] for state in states])

    @property
    def done(self) -> list[FrozenTrial]:
        """Complete and pruned trials, in the order in which they were begun."""
        return self._of("COMPLETE", "PRUNED")

    @property
    def complete(self) -> list[FrozenTrial]:
        """The trials that were trained to their end."""
        return self._of("COMPLETE")

    @property
    def seconds(self) -> float:
        """What all finished trials took, and what was noted beside them, over all parts of a resumed search."""
        return float(self.study.user_attrs.get("seconds", 0.0))

    def spend(self, seconds: float) -> None:
        """Note more seconds of work."""
        self.study.set_user_attr("seconds", self.seconds + seconds)

    def ask(self) -> Trial:
        """The next trial, with its settings in `params`: the listed learning rates first, then what is drawn."""
        import optuna

        number, first = len(self._of("COMPLETE", "PRUNED", "RUNNING")), self.space.first
        self.study.sampler = optuna.samplers.TPESampler(n_startup_trials=len(first), seed=seed_of(self.seed, number))
        if number < len(first) and not self._of("WAITING"):
            self.study.enqueue_trial(first[number])
        return self.study.ask(self.space.distributions())

    def hopeless(self, trial: Trial, epoch: int, value: float) -> bool:
        """Keep what validation measured of an epoch; whether the trial falls behind the others.

        The curve of a trial that was begun again has its first part already.
        """
        if epoch not in self.study.get_trials(deepcopy=False)[trial.number].intermediate_values:
            trial.report(value, epoch)
        return trial.should_prune()

    def tell(self, trial: Trial, value: float, *, pruned: bool, **noted: float | None) -> FrozenTrial:
        """Keep what validation measured of a trial, and whatever else is said of it (plain numbers)."""
        from optuna.trial import TrialState

        for name, one in noted.items():
            trial.set_user_attr(name, one)
        if pruned:
            return self.study.tell(trial, state=TrialState.PRUNED)
        return self.study.tell(trial, value)

    def best(self) -> FrozenTrial:
        """The complete trial with the highest value, of equals the one with the lower validation loss."""
        return max(self.complete, key=_goodness)


def _goodness(trial: FrozenTrial) -> tuple[float, float]:
    loss = trial.user_attrs["val_loss"]  # None where it became infinite
    return float(trial.value or 0.0), -math.inf if loss is None else -loss


def _open(path: Path) -> optuna.Study:
    try:
        import optuna
        from sqlalchemy.exc import DatabaseError
    except ModuleNotFoundError:
        raise MissingExtra("Optuna", "search") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(
            storage=f"sqlite:///{path.resolve()}",
            study_name=NAME,
            load_if_exists=True,
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(UNPRUNED_TRIALS, UNPRUNED_EPOCHS),
        )
    except DatabaseError as error:
        raise ConfigError(f"{path} is no study of a search: {one_line(error)}") from None
