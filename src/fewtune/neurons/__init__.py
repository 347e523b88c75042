"""Which tensors of a model are neurons, and the role of every other parameter.

The only room that knows layer kinds. A neuron is one output channel, a connection one of its input weights. Both are
told by the class of the module that owns a parameter, never by the name of a parameter in a particular network.
"""

from fewtune.neurons.anatomy import Anatomy, Owner, describe, owners, require_float, require_tunable
from fewtune.neurons.excluding import excluded
from fewtune.neurons.layers import ASK_MODEL, LAYERS, AskModel, HeadSpec, find_head, has_running_statistics
from fewtune.neurons.places import Places
from fewtune.neurons.roles import ROLES, Role
from fewtune.neurons.views import LARGEST, View, sizes

__all__ = [
    "ASK_MODEL",
    "LARGEST",
    "LAYERS",
    "ROLES",
    "Anatomy",
    "AskModel",
    "HeadSpec",
    "Owner",
    "Places",
    "Role",
    "View",
    "describe",
    "excluded",
    "find_head",
    "has_running_statistics",
    "owners",
    "require_float",
    "require_tunable",
    "sizes",
]
