"""What the tests of attach share: small models, and a dense-mask reference to train beside an attached model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fewtune
from fewtune.selection import Selection
from fewtune.tuning import Tuner, attach
from fewtune.tuning.reference import DenseMask

Step = Callable[[nn.Module, int], None]
MakeOptimizer = Callable[[Sequence[Tensor]], torch.optim.Optimizer]

CLASSES = 3
EXACT = 1e-10
"""Relative difference to the dense mask after a few steps in float64."""


def small_vit(**options: Any) -> nn.Module:
    """A vision transformer of two blocks with layer scale, images of 16 x 16."""
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 0.1}
    torch.manual_seed(0)
    model = VisionTransformer(**(sizes | {"num_classes": CLASSES, "weight_init": ""} | options))
    for parameter in model.parameters():  # timm begins with biases and a head of zero
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


class SmallConvNet(nn.Module):
    """Patchifying, 3x3, depthwise and 1x1 convolutions with batch normalisation, images of 16 x 16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.norm1 = nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, CLASSES)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.stem(x)))
        x = F.gelu(self.norm2(self.middle(x)))
        x = F.gelu(self.pointwise(self.depthwise(x)))
        return self.head(x.mean((2, 3)))


def small_convnet() -> nn.Module:
    """A `SmallConvNet` whose running statistics are not the initial ones."""
    torch.manual_seed(0)
    model = SmallConvNet()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 16, 16))
    return model


def timm_vit(num_classes: int = CLASSES) -> nn.Module:
    """timm's smallest vision transformer by name, made smaller: what a strict load of a plain state is tried on."""
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=num_classes, img_size=32, embed_dim=24, depth=2, num_heads=3
    )


def batch(step: int = 0, size: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images [size, 3, 16, 16] and labels [size], other ones in every step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(CLASSES, (size,), generator=generator)


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def choose(model: nn.Module, k: float = 2, seed: int = 0, **options: Any) -> Selection:
    """Random connections: the laws of attach hold for any."""
    return fewtune.select(fewtune.random_importance(model, seed, head=options.pop("head", "head")), k=k, **options)


def cross_entropy_step(model: nn.Module, step: int) -> None:
    """One forward and one backward pass."""
    images, labels = batch(step, dtype=dtype_of(model))
    F.cross_entropy(model(images).float(), labels).backward()


def sgd(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def train_both(
    model: nn.Module,
    selection: Selection,
    step: Step = cross_entropy_step,
    optimizer: MakeOptimizer = sgd,
    steps: int = 3,
) -> tuple[Tuner, nn.Module]:
    """Trains ``model`` attached and a copy of it with a dense mask (Eq. 5-6), by the same steps.

    Returns: the tuner (attached still), and the copy.
    """
    reference = copy.deepcopy(model)
    dense = DenseMask(reference, selection)
    reference.train(model.training)
    tuner = attach(model, selection)
    ours, theirs = optimizer(tuner.parameters()), optimizer(dense.parameters())
    for number in range(steps):
        ours.zero_grad()
        step(model, number)
        ours.step()
        theirs.zero_grad()
        step(reference, number)
        dense.mask_gradients()
        theirs.step()
        dense.restore_unselected()
    return tuner, reference


def largest_difference(model: nn.Module, reference: nn.Module) -> float:
    """The largest difference of any parameter, relative to the largest entry of that parameter."""
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()
    differences = [(ours[n] - p).abs().max() / p.abs().max().clamp(min=1e-3) for n, p in theirs.items()]
    return float(torch.stack([d.detach().double() for d in differences]).max())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states have the same names, dtypes and bits."""
    return state.keys() == other.keys() and all(
        t.dtype == other[n].dtype and t.shape == other[n].shape and torch.equal(t, other[n]) for n, t in state.items()
    )


def assert_trains_alike(
    model: nn.Module, step: Step = cross_entropy_step, head: str | None = "head", **options
) -> None:
    """Training moves the selected weights, and by what the dense mask moves them."""
    selection = choose(model, head=head)
    before = state_of(model)
    tuner, reference = train_both(model, selection, step, **options)
    tuner.detach(keep=True)
    assert largest_difference(model, reference) < EXACT
    for name, places in selection.places.items():
        moved = selection.anatomy.views[name].matrix(model.get_parameter(name) != before[name]).reshape(-1)
        assert moved[places.flat].any(), f"nothing of {name} was trained"
        moved[places.flat] = False
        assert not moved.any(), f"unselected weights of {name} moved"
