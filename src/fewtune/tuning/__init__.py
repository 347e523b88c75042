"""A model and a selection -> compact trainable values (Eq. 5-6)."""

from fewtune.tuning.attach import attach
from fewtune.tuning.tuner import Tuner

__all__ = ["Tuner", "attach"]
