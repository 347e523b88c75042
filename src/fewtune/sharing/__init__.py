"""Many tasks on one backbone that share a part of what is trained: the library side of `fewtune fit-many`."""

from fewtune.sharing.many import Outcome, fit_many
from fewtune.sharing.tasks import ManyTasks, read_tasks

__all__ = ["ManyTasks", "Outcome", "fit_many", "read_tasks"]
