"""What a task changed: taken from a tuned model, saved as a small exact file, applied, reverted and swapped."""

from fewtune.delta.applying import applied
from fewtune.delta.format import load_delta
from fewtune.delta.taking import frozen_buffers, take
from fewtune.delta.task import Delta, swap

__all__ = ["Delta", "applied", "frozen_buffers", "load_delta", "swap", "take"]
