"""The role of every parameter that is no neuron's weight: by table, by behaviour, through parametrisations."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewtune.errors import ModelError
from fewtune.neurons import Role, describe, has_running_statistics
from fewtune.neurons.roles import ROLES, behaves_like_norm, listed_role


def views_and_roles(module: nn.Module) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    anatomy = describe(module, head=None)
    return {n: (v.neurons, v.fan_in) for n, v in anatomy.views.items()}, dict(anatomy.roles)


def test_weight_norm_selects_on_the_direction_and_its_gain_is_a_scale() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 5))
    views, roles = views_and_roles(module)
    assert views == {"parametrizations.weight.original1": (5, 3)}
    assert roles == {"parametrizations.weight.original0": "scale", "bias": "bias"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_by_hook_selects_on_the_direction_and_its_gain_is_a_scale() -> None:
    views, roles = views_and_roles(nn.utils.weight_norm(nn.Conv2d(2, 4, 3)))
    assert views == {"weight_v": (4, 18)}
    assert roles == {"weight_g": "scale", "bias": "bias"}


def test_spectral_norm_selects_on_the_stored_weight_and_is_not_advanced() -> None:
    module = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 5)).train()
    before = copy.deepcopy(module.state_dict())
    views, roles = views_and_roles(module)
    assert views == {"parametrizations.weight.original": (5, 3)}
    assert roles == {"bias": "bias"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(m.training for m in module.modules())


def test_a_parametrised_bias_keeps_its_role() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    module = nn.Linear(3, 5)
    nn.utils.parametrize.register_parametrization(module, "bias", Doubled())
    views, roles = views_and_roles(module)
    assert views == {"weight": (5, 3)}
    assert roles == {"parametrizations.bias.original": "bias"}


@pytest.mark.parametrize(("name", "gain"), [("StdConv2d", {}), ("ScaledStdConv2d", {"gain": "scale"})])
def test_standardised_convolutions(name: str, gain: dict[str, str]) -> None:
    import timm.layers

    views, roles = views_and_roles(getattr(timm.layers, name)(4, 6, 3, bias=True))
    assert views == {"weight": (6, 36)}
    assert roles == gain | {"bias": "bias"}


def test_lazy_modules_have_no_shape_yet() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ModelError, match=r"LazyLinear has no shape yet; run one batch"):
        describe(model, head=None)
    model(torch.zeros(2, 3))
    assert views_and_roles(model)[0] == {"0.weight": (4, 3)}


def test_norms_embeddings_and_unknown_parameters() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    modules = [nn.LayerNorm(4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.RMSNorm(4)]
    _, roles = views_and_roles(nn.Sequential(*modules, nn.Embedding(3, 4), Own()))
    assert {name: role for name, role in roles.items() if role != "norm"} == {
        "5.weight": "embedding",
        "6.weight": "other",
    }
    assert len(roles) == 9 + 2


def test_a_subclass_has_its_base_classs_roles_and_its_own_ones_first() -> None:
    class Quiet(nn.Linear):
        pass

    assert views_and_roles(Quiet(3, 2)) == ({"weight": (2, 3)}, {"bias": "bias"})
    name = f"{Quiet.__module__}.{Quiet.__qualname__}"
    ROLES[name] = {"bias": Role.OTHER}
    try:
        assert listed_role(Quiet(3, 2), "bias") is Role.OTHER
    finally:
        del ROLES[name]


class OwnRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.gain) * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class OwnChannelNorm(nn.Module):
    """Over the channels of images, with a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt()
        return self.a.view(-1, 1, 1) * x + self.b.view(-1, 1, 1)


class OwnScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


class OwnSquash(OwnScale):
    """Bounded, but not invariant."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.gain * x)


class OwnPair(OwnScale):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return F.normalize(x + y) * self.gain


@pytest.mark.parametrize("build", [OwnRMSNorm, OwnChannelNorm])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_own_norms_are_told_by_what_they_do(build: Callable[[int], nn.Module], device: str, dtype: torch.dtype) -> None:
    module = build(6).to(device, dtype)
    assert behaves_like_norm(module)
    assert set(views_and_roles(module)[1].values()) == {"norm"}


@pytest.mark.parametrize("build", [OwnScale, OwnSquash, OwnPair])
def test_what_is_no_norm_is_unknown(build: Callable[[int], nn.Module]) -> None:
    module = build(6)
    assert not behaves_like_norm(module)
    assert views_and_roles(module)[1] == {"gain": "other"}


def test_asking_a_norm_changes_nothing() -> None:
    module = OwnRMSNorm(6)
    before = copy.deepcopy(module.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    behaves_like_norm(module)
    assert torch.equal(module.gain, before["gain"])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_what_updates_state_in_training_mode() -> None:
    assert has_running_statistics(nn.BatchNorm1d(2))
    assert any(map(has_running_statistics, nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)).modules()))
    assert not has_running_statistics(nn.BatchNorm1d(2, track_running_stats=False))
    assert not has_running_statistics(nn.InstanceNorm2d(2))
    assert not has_running_statistics(nn.LayerNorm(2))
