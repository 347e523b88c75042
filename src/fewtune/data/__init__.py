"""Data sets by name or folder, their transforms, their checks."""

from fewtune.data.images import open_image
from fewtune.data.load import load_data
from fewtune.data.mask_sets import load_class_masks, load_masks
from fewtune.data.masks import MaskData, MaskSplit, open_mask
from fewtune.data.split import ImageData, Split
from fewtune.data.transforms import eval_transform, train_transform, two_views

__all__ = [
    "ImageData", "MaskData", "MaskSplit", "Split", "eval_transform", "load_class_masks", "load_data", "load_masks",
    "open_image", "open_mask", "train_transform", "two_views",
]  # fmt: skip
