"""How many input columns a gradient selection touches in each kind of layer of a pretrained ViT-S, and how unevenly.

Writes `hot_columns.json`, from which the benchmarks draw selections like real ones on models of any size:

    python benchmarks/speed/hot_columns.py FOLDER_OF_CLASS_FOLDERS … [--images 600]

For each kind of layer (mean over blocks and data sets) and K: `share`, the share of the columns that some neuron
selects (the hot ones); and `usage`, in 21 steps from the most to the least used hot column, the number of neurons
that select it, as a share of all neurons.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

import fewtune
from fewtune.data.load import load_data
from fewtune.data.transforms import two_views
from fewtune.models import load_backbone

KS = (1, 2, 5, 10, 20)
STEPS = np.linspace(0, 1, 21)


def kind_of(name: str) -> str:
    """Of a weight's name, what its layer is called: qkv, proj, fc1, fc2; the patch convolution is "other"."""
    return "other" if "patch_embed" in name else name.split(".")[-2]


def measured(folder: Path, images: int, batch: int) -> Iterator[tuple[int, str, np.ndarray]]:
    """(K, kind of layer, for each hot column the share of the neurons that select it, descending)."""
    backbone = load_backbone("demo:vit-small", num_classes=10, image_size=98)
    torch.manual_seed(0)
    train = load_data(folder, val_fraction=0, limit_train=images).train.with_transform(two_views(backbone))
    loader = DataLoader(train, batch_size=batch, shuffle=True)
    scores = fewtune.gradient_importance(backbone.model, loader, fewtune.SupCon(), head=backbone.head)
    for k in KS:
        for name, places in fewtune.select(scores, k=k).places.items():
            counts = torch.bincount(places.columns, minlength=places.fan_in).numpy()
            yield k, kind_of(name), np.sort(counts[counts > 0])[::-1] / places.neurons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    hot, usage = defaultdict(list), defaultdict(list)
    for folder in arguments.folders:
        for k, kind, shares in measured(folder, arguments.images, arguments.batch):
            hot[k, kind].append(len(shares))
            usage[k, kind].append(np.interp(STEPS, np.linspace(0, 1, len(shares)), shares))
    fan_in = {"qkv": 384, "proj": 384, "fc1": 384, "fc2": 1536, "other": 588}
    table = {
        str(k): {
            kind: {
                "hot": round(float(np.mean(hot[k, kind])), 1),
                "share": round(float(np.mean(hot[k, kind])) / fan_in[kind], 4),
                "usage": [float(f"{share:.3g}") for share in np.mean(usage[k, kind], 0)],
            }
            for kind in fan_in
        }
        for k in KS
    }
    how = {
        "model": "demo:vit-small (ViT-S/14) at 98 px",
        "data": sorted(folder.name for folder in arguments.folders),
        "images": arguments.images,
        "importance": "supervised contrastive, two views",
    }
    text = json.dumps({"measured": how, "k": table})
    text = text.replace('], "', '],\n      "').replace('}, "', '},\n   "')
    Path(__file__).with_name("hot_columns.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
