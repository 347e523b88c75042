"""A small model, quantised by the libraries that do it, as their users would."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewtune
from fewtune.quantised import dequantised, is_quantised
from layer_kinds import CLASSES, Net

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
WEIGHTS = ("body.0.weight", "body.2.weight")
SCHEMES = {"int8": "int8, one scale a row", "nf4": "nf4, one scale for 64 connections"}


def plain(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 8)), 8).eval()


def quantised(word: str, seed: int = 0) -> Net:
    """By torchao, or with bitsandbytes' layers; skips where the library is not installed."""
    net = plain(seed)
    if word == "int8":
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        torchao.quantize_(net.body, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
        return net
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for i in (0, 2):
        old = net.body[i]
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, quant_type="nf4", compress_statistics=False)
        new.load_state_dict(old.state_dict())
        net.body[i] = new.to("cpu")
    return net


def dense(word: str) -> Net:
    """The plain model with the float numbers that the quantised weights stand for."""
    source, net = quantised(word), plain()
    for name, weight in source.named_parameters():
        if is_quantised(weight):
            net.get_parameter(name).data.copy_(dequantised(weight))
    return net


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(step)), LABELS


def scored(net: nn.Module) -> fewtune.importance.Scores:
    return fewtune.gradient_importance(net, [batch(0), batch(1)], fewtune.CrossEntropy())


def tuned(net: Net, steps: int = 3, k: int = 2) -> fewtune.Tuner:
    """Attached by its own gradients and trained a little."""
    tuner = fewtune.attach(net, fewtune.select(scored(net), k=k))
    optimizer = torch.optim.Adam(tuner.parameters(), lr=0.01)
    for step in range(steps):
        inputs, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    return tuner


assert len(LABELS.unique()) == CLASSES
