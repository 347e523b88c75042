"""Many tasks on one backbone, answered together: the bank, and thin adapters to the engines that serve it."""

from fewtune.serving.bank import Prediction, TaskBank
from fewtune.serving.folder import TaskFolder

__all__ = ["Prediction", "TaskBank", "TaskFolder"]
