"""Features of images before and after tuning, laid out in the plane by t-SNE (the paper's Sec. 8.3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewtune.errors import DataError
from fewtune.neurons import ASK_MODEL, HeadSpec
from fewtune.objectives import pooled_features


@torch.inference_mode()
def image_features(
    model: nn.Module, batches: Iterable[Sequence[Any]], head: HeadSpec = ASK_MODEL, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Pooled features [N, width] (float32, on the CPU) and labels [N] of batches (images, labels, ...); eval mode."""
    model.eval().to(device)
    pairs = [(pooled_features(model, batch[0].to(device), head).float().cpu(), batch[1]) for batch in batches]
    if not pairs:
        raise DataError("there are no images to take features of")
    features, labels = zip(*pairs, strict=True)
    return torch.cat(features), torch.cat(labels)


def in_the_plane(features: Tensor, *, perplexity: float = 30.0, seed: int = 0) -> np.ndarray:
    """Positions [N, 2] of features [N, width]: t-SNE of cosine distances, begun from their principal components.

    van der Maaten and Hinton (2008). Near images stay near; distances between far groups mean nothing.

    Raises:
        DataError: not more images than the perplexity.
    """
    from sklearn.manifold import TSNE

    if len(features) <= perplexity:
        raise DataError(f"t-SNE with perplexity {perplexity:g} needs more images than that, got {len(features)}")
    unit = F.normalize(features.double(), dim=1).numpy()
    layout = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(unit)
    return np.asarray(layout)


def neighbours_alike(features: Tensor, labels: Tensor) -> float:
    """Share of the images whose nearest other image, by cosine, is of their class: what t-SNE shows, as a number."""
    unit = F.normalize(features.float(), dim=1)
    similar = unit @ unit.T
    similar.fill_diagonal_(-torch.inf)
    return float((labels[similar.argmax(dim=1)] == labels).double().mean())
