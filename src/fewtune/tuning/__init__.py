"""A model and a selection -> compact trainable values (Eq. 5-6)."""

from fewtune.tuning.sparse import Tuner, attach

__all__ = ["Tuner", "attach"]
