"""Which tensors of a model are neurons, and the role of every other parameter.

The only room that knows layer kinds. A neuron is one output channel, a connection one of its input weights. Both are
told by the class of the module that owns a parameter, never by the name of a parameter in a particular network.
"""

from fewtune.neurons.anatomy import (
    ASK_MODEL,
    Anatomy,
    AskModel,
    HeadSpec,
    Owner,
    describe,
    find_head,
    has_running_statistics,
    nearest,
    owners,
    require_floating,
)
from fewtune.neurons.roles import Role
from fewtune.neurons.views import LARGEST, Places, View, sizes

__all__ = [
    "ASK_MODEL",
    "LARGEST",
    "Anatomy",
    "AskModel",
    "HeadSpec",
    "Owner",
    "Places",
    "Role",
    "View",
    "describe",
    "find_head",
    "has_running_statistics",
    "nearest",
    "owners",
    "require_floating",
    "sizes",
]
