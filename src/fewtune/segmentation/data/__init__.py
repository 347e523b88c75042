"""Images with masks: where they lie, how a mask is read, what is done to both together."""

from fewtune.segmentation.data.load import load_masks
from fewtune.segmentation.data.masks import open_mask
from fewtune.segmentation.data.split import MaskData, MaskSplit

__all__ = ["MaskData", "MaskSplit", "load_masks", "open_mask"]
