"""Where the selected connections lie, how selections of tasks and seeds overlap, how far two scores agree."""

from fewtune.analysis.agreement import RankCorrelation, rank_correlation
from fewtune.analysis.location import Located, located
from fewtune.analysis.sharing import Shared, chosen_by, sharing, sharing_by_layer

__all__ = [
    "Located",
    "RankCorrelation",
    "Shared",
    "chosen_by",
    "located",
    "rank_correlation",
    "sharing",
    "sharing_by_layer",
]
