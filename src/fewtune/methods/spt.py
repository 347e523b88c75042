"""SPT (He et al. 2023): sensitivity says where a budget of trained parameters goes.

The sensitivity of a parameter is how much one step of gradient descent on it alone lowers the loss; to first order
|g * delta| with delta = -lr * g, hence g^2, summed over batches of training images. Of the tau most sensitive
parameters of all blocks, those of one matrix are trained themselves ("unstructured"), unless they are so many that a
branch of the whole matrix is trained instead ("structured"): low-rank (SPT-LoRA), or a bottleneck behind it
(SPT-Adapter). That is from a tenth of the branch's own parameters on, the ratio of SPT's published runs on VTAB-1k. A
bias or norm is trained whole where a fifth of it is sensitive. tau is the one that brings the total nearest to the
budget. The class token is always trained, as in SPT's code.

Of SPT's code this differs in three points: a layer that makes queries, keys and values together is one matrix and not
three; a vector of which less than a fifth is sensitive stays frozen, where there its few entries are trained; and the
branches have no drop path of their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from fewtune.errors import ModelError, TuningError
from fewtune.files import Json, read_tensors, write_tensors
from fewtune.methods.adapter import ATTRIBUTE as ADAPTER
from fewtune.methods.adapter import Bottleneck, adapted
from fewtune.methods.inserted import Added, Modules, place
from fewtune.neurons import Anatomy, Places, Role
from fewtune.selection import Selection

LOW_RANK = "fewtune_low_rank"
Structure = Literal["lora", "adapter"]


class LowRank(nn.Module):
    """B A x, with B zero at the start."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        change: Tensor = self.up(self.down(x))
        return change


def beside(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The forward hook: the layer's output and its low-rank branch's."""
    change: Tensor = getattr(layer, LOW_RANK)(inputs[0])
    return output + change


@dataclass(frozen=True, eq=False)
class SPT(Modules):
    """Where the budget went.

    structure: what replaces the tuning of single connections where these would be many. rank: its inner width.
    structured: names of the linear layers that have it. whole: parameters trained whole. places: of other weights, the
    sensitive connections, flat in [neurons, fan_in], increasing.
    """

    structure: Structure
    rank: int
    structured: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    places: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:  # type: ignore[override]
        """spt-lora or spt-adapter."""
        return f"spt-{self.structure}"

    def settings(self) -> Json:
        """All but the places."""
        return {"rank": self.rank, "structured": list(self.structured), "whole": list(self.whole)}

    def arrays(self) -> dict[str, Tensor]:
        """The places."""
        return dict(self.places)

    @classmethod
    def from_settings(cls, name: str, settings: Json, arrays: Mapping[str, Tensor]) -> SPT:
        """The inverse of `name`, `settings` and `arrays`."""
        structure: Structure = "lora" if name == "spt-lora" else "adapter"
        return cls(structure, settings["rank"], tuple(settings["structured"]), tuple(settings["whole"]), dict(arrays))

    def save(self, path: Path) -> None:
        """Writes where the budget went, so that a resumed run need not find it again."""
        write_tensors(path, self.places, {"fewtune": json.dumps({"name": self.name, **self.settings()})})

    @classmethod
    def load(cls, path: Path) -> SPT:
        """Reads what `save` wrote. TuningError where it is something else."""
        arrays, header = read_tensors(path, TuningError)
        try:
            said = json.loads(header["fewtune"])
            return cls.from_settings(said.pop("name"), said, arrays)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise TuningError(f"{path} does not say where SPT's budget went ({error})") from error

    def base(self, anatomy: Anatomy) -> Selection:
        """The head, the parameters trained whole, and the single connections."""
        for name in (*self.whole, *self.places):
            if name not in anatomy.shapes:
                raise ModelError(f"{self.name} was planned for another model: this one has no parameter {name}")
        views = anatomy.views
        places = {n: Places(views[n].neurons, views[n].fan_in, flat.long()) for n, flat in self.places.items()}
        dense = {role: tuple(n for n in self.whole if anatomy.roles.get(n) is role) for role in Role}
        return Selection(anatomy, places, {role: names for role, names in dense.items() if names})

    def insert(self, model: nn.Module, anatomy: Anatomy) -> Added:
        """The branch of every structured layer."""
        added: dict[str, nn.Module] = {}
        for name in self.structured:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            if self.structure == "lora":
                branch = LowRank(layer.in_features, layer.out_features, self.rank)
                added |= place(layer, name, LOW_RANK, branch, beside, like=layer)
            else:
                bottleneck = Bottleneck(layer.out_features, self.rank)
                added |= place(layer, name, ADAPTER, bottleneck, adapted, like=layer)
        return Added(added)

    def fold(self, model: nn.Module, anatomy: Anatomy, plain: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """W + B A; None for SPT-Adapter with any adapter in it."""
        if self.structure == "adapter":
            return None if self.structured else {}
        folded = {}
        for name in self.structured:
            branch = getattr(model.get_submodule(name), LOW_RANK)
            folded[f"{name}.weight"] = plain[f"{name}.weight"] + branch.up.weight.detach() @ branch.down.weight.detach()
        return folded
