"""The methods to compare with: each says what of a model is trained, and how where that is its own way.

`tuner_for` leads from a recipe to a tuner, `load_task_file` from a file back to a model.
"""

from fewtune.methods.adapter import Adapter
from fewtune.methods.choosing import tuner_for
from fewtune.methods.inserted import Inserted
from fewtune.methods.lora import LoRA
from fewtune.methods.placing import Method
from fewtune.methods.spt import SPT
from fewtune.methods.ssf import SSF
from fewtune.methods.taskfile import MethodFile, load_method_file, load_task_file
from fewtune.methods.vpt import VPT

__all__ = [
    "SPT",
    "SSF",
    "VPT",
    "Adapter",
    "Inserted",
    "LoRA",
    "Method",
    "MethodFile",
    "load_method_file",
    "load_task_file",
    "tuner_for",
]
