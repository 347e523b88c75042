"""What an importance function gives: scores of connections by weight, and the model's anatomy with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewtune.errors import ImportanceError
from fewtune.files import read_versioned, write_versioned
from fewtune.neurons import Anatomy, HeadSpec, Role, describe, require_tunable
from fewtune.sharded import is_sharded, reshard

FORMAT = "fewtune-scores"
VERSION = 1


class Scores(Mapping[str, Tensor]):
    """Scores of connections: parameter name -> non-negative tensor of the weight's shape.

    Weights of modules that were left out have none. ``anatomy`` carries the role of every other parameter, so that
    `select` needs no model.

    Raises:
        ImportanceError: scores of a weight that are not finite, negative or all zero; the message names the weights.
    """

    def __init__(self, scores: Mapping[str, Tensor], anatomy: Anatomy) -> None:
        if not scores:
            raise ImportanceError("the model has no weight to select from outside its head")
        broken = [name for name, score in scores.items() if not bool(score.isfinite().all())]
        if broken:
            raise ImportanceError(
                f"scores are not finite in {_names(broken)}; look for NaN in the images or a learning objective that "
                "overflows in half precision (importance may be computed in float32)"
            )
        negative = [name for name, score in scores.items() if bool((score < 0).any())]
        if negative:
            raise ImportanceError(f"scores are negative in {_names(negative)}; expected a modulus")
        zero = [name for name, score in scores.items() if not bool(score.any())]
        if zero:
            raise ImportanceError(
                f"all scores are zero in {_names(zero)}: nothing tells its connections apart. If no batch held two "
                "images of one class, use a larger batch or two views; if the objective does not reach the layer, "
                "leave it out with roles={'pattern of its parameter names': 'other'}"
            )
        self._scores = dict(scores)
        self.anatomy = anatomy

    def __getitem__(self, name: str) -> Tensor:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def save(self, path: str | Path, **metadata: str) -> None:
        """Writes the scores as one safetensors file, atomically; ``metadata``: words by name to keep with them."""
        header: dict[str, Any] = {"anatomy": self.anatomy.to_json(), "metadata": metadata}
        if len(self) < len(self.anatomy.views):
            header["weights"] = list(self)
        write_versioned(Path(path), (FORMAT, VERSION), header, self._scores)

    @classmethod
    def load(cls, path: str | Path) -> tuple[Scores, dict[str, str]]:
        """Reads what `save` wrote: the scores, and their metadata.

        Raises:
            ImportanceError: the file is missing, damaged, of another kind, or of a newer version.
        """
        header, tensors = read_versioned(Path(path), (FORMAT, VERSION), ImportanceError)
        try:
            anatomy = Anatomy.from_json(header["anatomy"])
            metadata = {str(key): str(value) for key, value in header["metadata"].items()}
            names = [str(name) for name in header.get("weights", anatomy.views)]
            if tensors.keys() != set(names):
                raise ValueError("the scores are of other weights than the anatomy's")
            if wrong := [n for n, t in tensors.items() if tuple(t.shape) != anatomy.views[n].shape]:
                raise ValueError(f"the scores of {wrong[0]} have another shape than the weight")
            if wrong := [n for n, t in tensors.items() if not t.is_floating_point()]:
                raise ValueError(f"the scores of {wrong[0]} are of {tensors[wrong[0]].dtype}")
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ImportanceError(f"{path} is not a scores file, or it is damaged ({error})") from error
        return cls({name: tensors[name] for name in names}, anatomy), metadata


def require_whole(weights: Mapping[str, Tensor], criterion: str) -> None:
    """ImportanceError where FSDP has shared the weights out, for a criterion that needs them whole."""
    if any(is_sharded(weight) for weight in weights.values()):
        raise ImportanceError(
            f"{criterion} needs whole weights, and those of the model are distributed: score first, then shard "
            "(fully_shard), or take gradient_importance or magnitude_importance"
        )


def _names(names: list[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def scored_weights(
    model: nn.Module, head: HeadSpec, roles: Mapping[str, str | Role] | None
) -> tuple[Anatomy, dict[str, Tensor]]:
    """A model's anatomy and its neurons' weights; arguments as in `fewtune.neurons.describe`.

    Raises:
        ImportanceError: a weight is quantised in a way that is not known.
    """
    reshard(model)
    anatomy, named = describe(model, head, roles), dict(model.named_parameters())
    weights: dict[str, Tensor] = {name: named[name] for name in anatomy.views}
    require_tunable(weights, ImportanceError)
    return anatomy, weights
