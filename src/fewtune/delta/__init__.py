"""What a task changed: taken from a tuned model, saved as a small exact file, applied, reverted and swapped."""

from fewtune.delta.delta import Delta, applied, load_delta, swap
from fewtune.delta.take import frozen_buffers, take

__all__ = ["Delta", "applied", "frozen_buffers", "load_delta", "swap", "take"]
