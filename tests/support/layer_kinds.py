"""Small models, one for every kind of layer that has neurons, for the law suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 3


class Net(nn.Module):
    """A body, a mean over all but batch and channel, a head."""

    def __init__(self, body: nn.Module, width: int, channels_last: bool = False) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, CLASSES)
        self.channels_last = channels_last

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if x.ndim > 2:
            x = x.mean(1) if self.channels_last else x.flatten(2).mean(2)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Attention(nn.Module):
    """Self-attention by torch's module, with one packed projection or three of their own."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.narrow = None if packed else nn.Linear(8, 4)
        others = {} if packed else {"kdim": 4, "vdim": 4}
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **others)

    def forward(self, x: Tensor) -> Tensor:
        memory = x if self.narrow is None else self.narrow(x)
        return x + self.attention(x, memory, memory, need_weights=False)[0]


class Recurrent(nn.Module):
    """A recurrent layer, read at its last step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=False):  # oneDNN has no LSTM of these sizes on some processors
            return self.layer(x)[0]


class Cell(nn.Module):
    """A recurrent cell, run twice."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x, self.cell(x))


class Experts(nn.Module):
    """Experts of transformers, all their weights in a stack, each token sent to two of three."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        from transformers import GptOssConfig, MixtralConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        sizes = {"hidden_size": 6, "intermediate_size": 5, "num_local_experts": 3, "experts_implementation": "eager"}
        self.experts = GptOssExperts(GptOssConfig(**sizes)) if transposed else MixtralExperts(MixtralConfig(**sizes))
        for p in self.experts.parameters():
            nn.init.normal_(p, std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        index = torch.arange(2 * len(tokens)).view(-1, 2) % 3
        weights = torch.full(index.shape, 0.5, dtype=x.dtype, device=x.device)
        return x + self.experts(tokens, index.to(x.device), weights).view(x.shape)


class Functional(nn.Module):
    """Uses its layer's weight without calling the layer, as several vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.qkv.weight) + F.linear(x.flip(1), weight=self.qkv.weight))


class Reentered(nn.Module):
    """One module, run three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + torch.tanh(self.layer(x))
        return x


class Tied(nn.Module):
    """Two modules, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(5, 5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, torch.tanh(x))


class Branch(nn.Module):
    """Normalisation, a hidden layer, layer scale, residual sum: a transformer's block without attention."""

    def __init__(self) -> None:
        super().__init__()
        from timm.layers import LayerScale

        self.norm = nn.LayerNorm(6)
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)
        self.scale = LayerScale(6, init_values=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(self.fc2(F.gelu(self.fc1(self.norm(x)))))


@dataclass(frozen=True)
class LayerKind:
    """``build`` makes the body; its output has ``width`` channels and ``shape`` is one input's."""

    build: Callable[[], nn.Module]
    width: int
    shape: tuple[int, ...]
    channels_last: bool = False
    half: bool = True
    """Whether torch computes it in half precision on a CPU."""
    quantised: bool = False
    """Whether torchao's int8 weights take the place of its linear layers' weights, the head's aside."""

    def net(self, dtype: torch.dtype, seed: int, dense: bool = False) -> Net:
        """``dense``: with the float numbers that quantised weights stand for in their place."""
        torch.manual_seed(seed)
        net = Net(self.build(), self.width, self.channels_last)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.05 * torch.randn_like(p))
        net.to(dtype).eval()
        if self.quantised:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(net.body, Int8WeightOnlyConfig(set_inductor_config=False))
            for layer in (module for module in net.body.modules() if isinstance(module, nn.Linear)):
                layer.weight = nn.Parameter(layer.weight.dequantize() if dense else layer.weight)
        return net


def _conv1d(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv1d(4, 6, 3, **options), nn.ReLU(), nn.Conv1d(6, 6, 1))


def _conv2d(kernel: int = 3, inputs: int = 4, outputs: int = 6, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(inputs, outputs, kernel, **options), nn.GELU(), nn.Conv2d(outputs, 6, 1))


def _conv1d_of_transformers() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(9, 5), nn.Tanh(), Conv1D(6, 9))


def _standardised(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm.layers

        return nn.Sequential(getattr(timm.layers, name)(4, 6, 3), nn.Tanh())

    return build


def _normed(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(wrap(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 6))


def _batch_normed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3))


KINDS: dict[str, LayerKind] = {
    "linear": LayerKind(lambda: nn.Sequential(nn.Linear(5, 11), nn.GELU(), nn.Linear(11, 6)), 6, (5,)),
    "linear, tokens": LayerKind(lambda: nn.Sequential(nn.Linear(5, 11), nn.ReLU(), nn.Linear(11, 6)), 6, (3, 5), True),
    "linear, int8": LayerKind(
        lambda: nn.Sequential(nn.Linear(5, 11), nn.GELU(), nn.Linear(11, 6)), 6, (3, 5), True, quantised=True
    ),
    "linear, int8, used by function": LayerKind(Functional, 9, (3, 6), True, quantised=True),
    "linear without bias": LayerKind(lambda: nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh()), 6, (5,)),
    "conv1d": LayerKind(_conv1d(padding=1), 6, (4, 7)),
    "conv1d, grouped, dilated": LayerKind(_conv1d(groups=2, dilation=2), 6, (4, 9)),
    "conv2d": LayerKind(_conv2d(padding=1), 6, (4, 6, 5)),
    "conv2d, strided, dilated": LayerKind(_conv2d(stride=2, dilation=2, padding=2), 6, (4, 7, 6)),
    "conv2d, patchifying": LayerKind(_conv2d(kernel=2, stride=2), 6, (4, 6, 4)),
    "conv2d, grouped": LayerKind(_conv2d(groups=2), 6, (4, 5, 5)),
    "conv2d, depthwise": LayerKind(_conv2d(inputs=6, groups=6, padding=1), 6, (6, 5, 4)),
    "conv2d, padding by word": LayerKind(_conv2d(padding="same"), 6, (4, 5, 4)),
    "conv2d, reflected": LayerKind(_conv2d(padding=1, padding_mode="reflect"), 6, (4, 5, 4)),
    "conv3d": LayerKind(lambda: nn.Conv3d(2, 5, (2, 3, 1), groups=1), 5, (2, 3, 4, 2)),
    "transposed conv1d": LayerKind(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), 6, (4, 5)),
    "transposed conv2d, grouped": LayerKind(lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), 6, (4, 4, 3)),
    "transposed conv3d": LayerKind(lambda: nn.ConvTranspose3d(2, 4, 2), 4, (2, 2, 3, 2), half=False),
    "attention, packed": LayerKind(lambda: Attention(True), 8, (4, 8), True),
    "attention, separate": LayerKind(lambda: Attention(False), 8, (4, 8), True),
    "Conv1D of transformers": LayerKind(_conv1d_of_transformers, 6, (3, 5), True),
    "LSTM": LayerKind(lambda: Recurrent(nn.LSTM(5, 6, 2, batch_first=True)), 6, (3, 5), True),
    "LSTM, projected": LayerKind(lambda: Recurrent(nn.LSTM(5, 7, proj_size=6, batch_first=True)), 6, (3, 5), True),
    "GRU, both ways": LayerKind(lambda: Recurrent(nn.GRU(5, 3, bidirectional=True, batch_first=True)), 6, (3, 5), True),
    "GRU cell": LayerKind(lambda: Cell(nn.GRUCell(6, 6)), 6, (6,)),
    "experts": LayerKind(lambda: Experts(False), 6, (4, 6), True),
    "experts, transposed": LayerKind(lambda: Experts(True), 6, (4, 6), True),
    "bilinear": LayerKind(Pair, 6, (5,), half=False),
    "weight norm": LayerKind(_normed(nn.utils.parametrizations.weight_norm), 6, (5,)),
    "weight norm by hook": LayerKind(_normed(nn.utils.weight_norm), 6, (5,)),
    "spectral norm": LayerKind(_normed(nn.utils.parametrizations.spectral_norm), 6, (5,), half=False),
    "StdConv2d": LayerKind(_standardised("StdConv2d"), 6, (4, 5, 4)),
    "ScaledStdConv2d": LayerKind(_standardised("ScaledStdConv2d"), 6, (4, 5, 4)),
    "batch normalisation": LayerKind(_batch_normed, 6, (4, 7, 6)),
    "weight used by function": LayerKind(Functional, 9, (3, 6), True),
    "re-entered": LayerKind(Reentered, 7, (7,)),
    "tied": LayerKind(Tied, 5, (5,)),
    "block with layer scale": LayerKind(Branch, 6, (3, 6), True),
}

if find_spec("torchao") is None:  # it asks for a newer torch than fewtune does
    KINDS = {name: kind for name, kind in KINDS.items() if not kind.quantised}
