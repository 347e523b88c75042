"""The linear probe: the head is fitted to convergence on the features of the frozen backbone."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fewtune.errors import DataError, ModelError, TuningError
from fewtune.methods.base import Batch, Candidate, Fit, Fitted, Method, Run, Settings
from fewtune.neurons import describe
from fewtune.progress import shown
from fewtune.selection import Selection
from fewtune.tuning import attach

REGULARISATION = tuple(float(10.0**power) for power in np.arange(-5, 2.5, 0.5))
"""C of scikit-learn's logistic regression that are tried: inverse strengths, from strong to weak."""

ITERATIONS = 5000
NEVER = -1e4  # the logit's offset of a class without training images


@dataclass(frozen=True)
class Features:
    """What the head is given, [N, width], and the labels, [N]."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Probe:
    """A fitted probe: the head's weight [C, width] and bias [C], and how its regularisation was chosen.

    `accuracies` and `losses` are those of the validation images, by regularisation; empty where there were none.
    """

    weight: Tensor
    bias: Tensor
    regularisation: float
    accuracies: dict[float, float]
    losses: dict[float, float]

    @property
    def validation(self) -> dict[str, float]:
        """Accuracy and loss of the validation images at the chosen regularisation; empty where there were none."""
        c = self.regularisation
        return {"accuracy": self.accuracies[c], "loss": self.losses[c]} if c in self.accuracies else {}


def linear(model: nn.Module, head: tuple[str, ...]) -> Selection:
    """No connection and no bias: the head alone."""
    return Selection(describe(model, head), {}, {})


def linear_head(model: nn.Module, head: tuple[str, ...]) -> nn.Linear:
    """The model's head where it is one linear layer with a bias; ModelError where it is something else."""
    layers = [module for name in head for module in model.get_submodule(name).modules() if not list(module.children())]
    layers = [layer for layer in layers if list(layer.parameters())]
    if len(layers) != 1 or not isinstance(layers[0], nn.Linear) or layers[0].bias is None:
        raise ModelError(
            f"a linear probe needs a head of one Linear layer with a bias, got {layers}; use another method"
        )
    return layers[0]


@torch.no_grad()
def head_features(model: nn.Module, layer: nn.Linear, batches: Iterable[Batch], device: torch.device) -> Features:
    """Run `batches` of (images, labels) through the model and keep exactly what the head is given."""
    seen: list[Tensor] = []
    labels: list[Tensor] = []
    model.eval()
    with layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().cpu())):
        for batch in batches:
            model(batch[0].to(device))
            labels.append(batch[1])
    inputs = torch.cat(seen)
    if inputs.ndim != 2:
        raise ModelError(f"a linear probe needs a head that is given [images, width], got {tuple(inputs.shape)}")
    classes = torch.cat(labels)
    if classes.ndim != 1:
        raise DataError(
            f"a linear probe needs one class an image, got labels {tuple(classes.shape)}; use another method"
        )
    return Features(inputs, classes)


def fit_probe(train: Features, val: Features | None, classes: int, regularisation: float | None = None) -> Probe:
    """Converged multinomial logistic regression (L-BFGS) on standardised features.

    Where no regularisation is given, it is the one of `REGULARISATION` with the best validation accuracy; of equals
    the one with the lower validation loss. Without validation images a fifth of the training images is held back to
    choose it, and the probe is then fitted on all of them.

    Raises:
        TuningError: a fit does not converge.
    """
    if val is None and regularisation is None:
        part, held_back = held(train)
        regularisation = fit_probe(part, held_back, classes).regularisation
    mean, scale = train.inputs.mean(0), train.inputs.std(0, correction=0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    fitted, accuracies, losses = {}, {}, {}
    strengths = REGULARISATION if regularisation is None else (regularisation,)
    for c in shown(strengths, "logistic regression", len(strengths)):
        weight, bias = _logistic_regression((train.inputs - mean) / scale, train.labels, c, classes)
        weight, bias = weight / scale, bias - (weight / scale) @ mean  # for features as they are
        fitted[c] = weight, bias
        if val is not None:
            accuracies[c], losses[c] = _judged(val, weight, bias)
    best = max(fitted, key=lambda c: (accuracies.get(c, 0.0), -losses.get(c, 0.0)))
    return Probe(*fitted[best], best, accuracies, losses)


def held(features: Features) -> tuple[Features, Features]:
    """Four fifths and one fifth, with every class in both as far as it has two images; the same on every call."""
    order = torch.argsort(features.labels, stable=True)
    fifth = torch.zeros(len(order), dtype=torch.bool)
    fifth[order[4::5]] = True
    return (
        Features(features.inputs[~fifth], features.labels[~fifth]),
        Features(features.inputs[fifth], features.labels[fifth]),
    )


def _judged(val: Features, weight: Tensor, bias: Tensor) -> tuple[float, float]:
    """Accuracy and cross-entropy."""
    logits = val.inputs @ weight.T + bias
    accuracy = (logits.argmax(1) == val.labels).float().mean()
    return float(accuracy), float(nn.functional.cross_entropy(logits, val.labels))


def _logistic_regression(x: Tensor, labels: Tensor, c: float, classes: int) -> tuple[Tensor, Tensor]:
    """Weight [C, width] and bias [C] for standardised inputs."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            model = LogisticRegression(C=c, max_iter=ITERATIONS).fit(x.double().numpy(), labels.numpy())
        except ConvergenceWarning:
            raise TuningError(f"the linear probe with C={c:g} did not converge in {ITERATIONS} iterations") from None
    rows, offsets = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # one row for the difference of the two classes
        rows, offsets = np.concatenate([-rows, rows]) / 2, np.concatenate([-offsets, offsets]) / 2
    weight, bias = torch.zeros(classes, x.shape[1]), torch.full((classes,), NEVER)
    seen = torch.as_tensor(model.classes_)
    weight[seen], bias[seen] = torch.as_tensor(rows).float(), torch.as_tensor(offsets).float()
    return weight, bias


class LinearSettings(Settings):
    """Of the linear probe."""

    regularisation: float | None = Field(
        None, gt=0, description="C of the linear probe's logistic regression; left out, chosen on validation images"
    )


def probe_head(run: Run) -> Probe:
    """Fit the probe on the run's training images and put it into the model's head.

    Raises:
        ModelError: the head is no single Linear layer with a bias.
        TuningError: a fit does not converge.
    """
    layer = linear_head(run.model, run.head)
    run.model.to(run.device)

    def features(part: Literal["train", "val"]) -> Features | None:
        batches = run.plain_batches(part)
        return None if batches is None else head_features(run.model, layer, batches, run.device)

    train = features("train")
    assert train is not None
    probe = fit_probe(train, features("val"), run.classes, run.settings(LinearSettings).regularisation)
    with torch.no_grad():
        layer.weight.copy_(probe.weight)
        layer.bias.copy_(probe.bias)
    return probe


def train_probe(run: Run) -> Fitted:
    """Fit the probe; what was tried on the validation images goes with it."""
    linear_head(run.model, run.head)
    tuner = attach(run.model.to(run.device), linear(run.model, run.head))
    probe = probe_head(run)
    tuner.sync()
    chosen: dict[str, Any] = {"regularisation": probe.regularisation}
    if probe.accuracies:
        chosen["accuracy"] = probe.validation["accuracy"]
        chosen["tried"] = {f"{c:g}": accuracy for c, accuracy in probe.accuracies.items()}
        chosen["losses"] = {f"{c:g}": loss for c, loss in probe.losses.items()}
    tried = (Candidate({"regularisation": float(f"{c:g}")}, a, probe.losses[c]) for c, a in probe.accuracies.items())
    return Fitted(tuner, chosen, tuple(tried))


LINEAR = Method(
    "linear",
    lambda run, prepared: attach(run.model, linear(run.model, run.head)),
    LinearSettings,
    fit=Fit(train_probe, lambda rules: rules.one_label, ("regularisation",)),
)
