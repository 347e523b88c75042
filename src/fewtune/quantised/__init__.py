"""Quantised weights: what numbers one stands for, how it is quantised, and float numbers over some of its places.

A weight is told by what its tensor has, so that no library that quantises is imported here but to quantise.
"""

from fewtune.quantised.holders import Overlaid, overlaid, seen_dequantised
from fewtune.quantised.overlay import Overlay, dequantised, dequantised_state, scheme
from fewtune.quantised.quantiser import SCHEMES, quantise, requantised
from fewtune.quantised.schemes import is_quantised, logical_shape

__all__ = [
    "SCHEMES",
    "Overlaid",
    "Overlay",
    "dequantised",
    "dequantised_state",
    "is_quantised",
    "logical_shape",
    "overlaid",
    "quantise",
    "requantised",
    "scheme",
    "seen_dequantised",
]
