"""Where the selected connections lie, how selections overlap, how far two scores agree, what features become."""

from fewtune.analysis.agreement import RankCorrelation, rank_correlation
from fewtune.analysis.features import image_features, in_the_plane, neighbours_alike
from fewtune.analysis.location import Located, located
from fewtune.analysis.sharing import Shared, chosen_by, sharing, sharing_by_layer

__all__ = [
    "Located",
    "RankCorrelation",
    "Shared",
    "chosen_by",
    "image_features",
    "in_the_plane",
    "located",
    "neighbours_alike",
    "rank_correlation",
    "sharing",
    "sharing_by_layer",
]
