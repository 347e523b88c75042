"""Weight averaging of attached models, by torch, timm and Lightning.

The laws: weights that were not selected keep their bits in the averaged copy, however long one averages; the averaged
values are in the averaged copy's weights; the model that is trained is not touched by its average.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, WeightAveraging
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader

from attaching import batch, choose, cross_entropy_step, same_bits, small_convnet, small_vit, state_of
from fewtune.errors import TuningError
from fewtune.tuning import Tuner, attach
from fewtune.tuning.layers import Tuned

DECAY = 0.9
STEPS = 20

AVERAGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch, exponential": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(DECAY)),
    "torch, with buffers": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True),
    "timm": lambda m: ModelEmaV3(m, decay=DECAY),
    "timm, one by one": lambda m: ModelEmaV3(m, decay=DECAY, foreach=False),
}


def update(average: nn.Module, model: nn.Module) -> None:
    average.update(model) if isinstance(average, ModelEmaV3) else average.update_parameters(model)


def train_with(make: Callable[[nn.Module], nn.Module], model: nn.Module, tuner: Tuner) -> tuple[nn.Module, dict]:
    """Trains some steps; the averaged copy, and the average of the trained values in float64."""
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.01, weight_decay=0.1)
    average = make(model)
    expected: dict[str, Tensor] = {}
    for number in range(STEPS):
        optimizer.zero_grad()
        cross_entropy_step(model, number)
        optimizer.step()
        update(average, model)
        for name, parameter in tuner.named_parameters().items():
            now = parameter.detach().double()
            # AveragedModel begins with the values of its first update, timm's with those at its making.
            first = tuner_before(tuner, name) if isinstance(average, ModelEmaV3) else now
            expected[name] = torch.lerp(expected.get(name, first), now, 1 - DECAY)
    return average, expected


def untrained(before: dict[str, Tensor], tuner: Tuner) -> set[str]:
    """Names of what no training moves. (Averages of a counter of batches are rounded down: torch's way.)"""
    return {n for n in before if not n.endswith("num_batches_tracked")} - set(tuner.named_parameters())


def tuner_before(tuner: Tuner, name: str) -> Tensor:
    return tuner._trained[name].before.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("make", [small_vit, small_convnet])
def test_laws_of_an_averaged_copy(make: Callable[[], nn.Module], kind: str, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    before = state_of(model)
    tuner = attach(model, choose(model))
    average, expected = train_with(AVERAGES[kind], model, tuner)
    trained = state_of(model)

    averaged = average.module.eval()
    state = state_of(averaged)
    for name, places in tuner.selection.places.items():
        values = state[f"{name}_selected"].reshape(-1)
        torch.testing.assert_close(values.double(), expected[name].reshape(-1), rtol=1e-4, atol=1e-6)
        whole = before[name].clone().reshape(-1)
        whole[places.flat] = values.to(dtype)
        assert torch.equal(state[name].reshape(-1), whole), f"{name}: other weights than values and frozen ones"
        assert not torch.equal(state[name], trained[name])
    for name in untrained(before, tuner):
        assert torch.equal(state[name], before[name]), name

    images = batch(dtype=dtype)[0]
    with torch.no_grad():
        output = averaged(images)
    plain = make().to(dtype).eval()
    plain.load_state_dict({n: t for n, t in state.items() if n in plain.state_dict()})
    with torch.no_grad():
        assert torch.equal(output, plain(images))
    assert same_bits(state_of(model), trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_averaged_copy_computes_with_the_average_without_being_asked_for_a_state(dtype: torch.dtype) -> None:
    """In half precision the averaged weights round each step; what counts is the average of the masters."""
    model = small_vit().to(dtype)
    tuner = attach(model, choose(model))
    average, _ = train_with(AVERAGES["torch, exponential"], model, tuner)
    images = batch(dtype=dtype)[0]
    with torch.no_grad():
        output = average.eval()(images)
    synced = copy.deepcopy(average.module)
    synced.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        assert torch.equal(synced(images), output)


def test_stochastic_weight_averaging_and_new_statistics() -> None:
    """torch's own way to end: averaged weights, then statistics of batch normalisation anew, where that is asked."""
    model = small_convnet()
    tuner = attach(model, choose(model), running_statistics="update")
    average = AveragedModel(model)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    seen = []
    for number in range(4):
        optimizer.zero_grad()
        cross_entropy_step(model, number)
        optimizer.step()
        average.update_parameters(model)
        seen.append(model.stem.weight_selected.detach().clone())
    before = average.module.norm1.running_mean.clone()
    update_bn([batch(9, dtype=torch.float32)[0]], average)
    assert not torch.equal(average.module.norm1.running_mean, before)
    torch.testing.assert_close(average.module.stem.weight_selected.detach(), torch.stack(seen).mean(0))


class Module(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.tuner = attach(model, choose(model))
        self.validated: list[dict[str, Tensor]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.tuner.parameters(), lr=0.01, weight_decay=0.1)

    def training_step(self, items: list[Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.model(items[0]), items[1])

    def validation_step(self, items: list[Tensor], _: int) -> None:
        self.model(items[0])
        self.validated.append(state_of(self.model))


class Following(Callback):
    """The average of the trained values, taken beside Lightning's."""

    def __init__(self) -> None:
        self.expected: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer, module: Module, *rest) -> None:
        self.trained = state_of(module.model)
        for name, parameter in module.tuner.named_parameters().items():
            now = parameter.detach().double()
            self.expected[name] = torch.lerp(self.expected.get(name, now), now, 1 - DECAY)


def assert_delta_of_the_backbone(
    tuner: Tuner, backbone: Callable[[], nn.Module], final: dict[str, Tensor], drifted: bool
) -> None:
    """Where frozen weights drifted, no delta leads to them: an error says so, and its way out is the right one."""
    fresh = backbone()
    if drifted:
        with pytest.raises(TuningError, match="that were not selected have other numbers"):
            tuner.delta()
        state, tuner = tuner.state_dict(), attach(backbone(), tuner.selection)
        tuner.load_state_dict(state)
    tuner.delta().apply(fresh, verify="full")
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(tensor, final[name], rtol=BY_WEIGHTED_SUM if drifted else 0, atol=0)


def loader(seed: int) -> DataLoader:
    images, labels = batch(seed, size=12, dtype=torch.float32)
    return DataLoader(list(zip(images, labels, strict=True)), batch_size=4)


BY_LERP = 0.0
BY_WEIGHTED_SUM = 1e-6
"""d e + (1 - d) w rounds even where e = w, so that frozen weights end a few units of the last place away."""


@pytest.mark.parametrize(
    ("make", "drift"),
    [
        (lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(DECAY)), BY_LERP),
        (lambda: EMAWeightAveraging(decay=DECAY), BY_WEIGHTED_SUM),
    ],
    ids=["WeightAveraging", "EMAWeightAveraging"],
)
@pytest.mark.parametrize("backbone", [small_vit, small_convnet])
def test_lightning(
    backbone: Callable[[], nn.Module], make: Callable[[], Callback], drift: float, tmp_path: Path
) -> None:
    """Validation sees the average, training goes on with its own values, and the end has the average."""
    model = backbone()
    before = state_of(model)
    module, following = Module(model), Following()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[following, make()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader(0), loader(1))
    final, validated = state_of(model), module.validated[-1]
    assert any(isinstance(m, Tuned) for m in model.modules())
    for name, places in module.tuner.selection.places.items():
        expected = following.expected[name].reshape(-1)
        for state in (final, validated):
            values = state[f"{name}_selected"].double().reshape(-1)
            torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)
            whole = before[name].clone().reshape(-1)
            whole[places.flat] = values.float()
            torch.testing.assert_close(state[name].reshape(-1), whole, rtol=drift, atol=0)
        assert not torch.equal(final[name], following.trained[name])
    for name in untrained(before, module.tuner):
        torch.testing.assert_close(final[name], before[name], rtol=drift, atol=0)
    assert_delta_of_the_backbone(module.tuner, backbone, final, drifted=drift > 0)
    module.tuner.detach(keep=False)
    for name in before:
        torch.testing.assert_close(model.state_dict()[name], before[name], rtol=drift, atol=0)
