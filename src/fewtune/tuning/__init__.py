"""A model and a selection -> compact trainable values (Eq. 5-6)."""

from fewtune.tuning.attach import attach
from fewtune.tuning.matmul import MatrixLibrary, matrix_library
from fewtune.tuning.noise import add_noise
from fewtune.tuning.tuner import Tuner
from fewtune.tuning.units import column_rms

__all__ = ["MatrixLibrary", "Tuner", "add_noise", "attach", "column_rms", "matrix_library"]
