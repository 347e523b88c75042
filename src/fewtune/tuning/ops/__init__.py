"""The gradient of the selected connections of one layer, without the gradient of the others.

`linear_keep` and `conv_keep` say what a layer's forward pass saves for backward (the columns that some neuron
selected, where that is less than the whole input); `linear_selected_gradient` and `conv_selected_gradient` turn it
into the values' gradient. `fused_keep` and `fused_gradients` are the same for a linear layer on a CPU, the bias's
gradient with it. `reference.py` holds the slow, obvious form of all.
"""

from fewtune.tuning.ops.conv import ConvShape, Form, conv_form, conv_keep, conv_selected_gradient
from fewtune.tuning.ops.fused import fused_gradients, fused_keep, fusible
from fewtune.tuning.ops.linear import linear_keep, linear_selected_gradient
from fewtune.tuning.ops.patches import channels_last
from fewtune.tuning.ops.places import SelectedPlaces

__all__ = [
    "ConvShape",
    "Form",
    "SelectedPlaces",
    "channels_last",
    "conv_form",
    "conv_keep",
    "conv_selected_gradient",
    "fused_gradients",
    "fused_keep",
    "fusible",
    "linear_keep",
    "linear_selected_gradient",
]
