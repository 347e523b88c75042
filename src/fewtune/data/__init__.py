"""Data sets by name or folder, their transforms, their checks."""

from fewtune.data.images import open_image
from fewtune.data.load import load_data
from fewtune.data.split import ImageData, Split
from fewtune.data.transforms import eval_transform, train_transform, two_views

__all__ = ["ImageData", "Split", "eval_transform", "load_data", "open_image", "train_transform", "two_views"]
