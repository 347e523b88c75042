"""The methods, each a value: what of a model is trained, how that is found, and how it is put into the model.

`METHODS` maps the names of recipes to them; `load_task_file` leads from a task file of any method back to a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors import SafetensorError
from torch import Tensor

from fewtune.delta import Delta, load_delta
from fewtune.errors import DeltaError, FewtuneError
from fewtune.files import Json
from fewtune.hub import resolve
from fewtune.methods.adapter import ADAPTER, Adapter
from fewtune.methods.base import Insertion, Method, Run, Settings, TaskFile, Tuner
from fewtune.methods.bias import BIAS
from fewtune.methods.criteria import CRITERIA, Criterion
from fewtune.methods.file import FORMAT, MethodFile, put_in, read_method_file, require_in_place
from fewtune.methods.full import FULL
from fewtune.methods.gps import GPS
from fewtune.methods.inserted import Inserted, Modules
from fewtune.methods.linear import LINEAR
from fewtune.methods.lora import LORA, LoRA
from fewtune.methods.spt import SPT
from fewtune.methods.spt_plan import SPT_ADAPTER, SPT_LORA
from fewtune.methods.ssf import SSF, SSF_METHOD
from fewtune.methods.vpt import VPT, VPT_DEEP, VPT_SHALLOW
from fewtune.plugins import Table

__all__ = [
    "CRITERIA",
    "METHODS",
    "SPT",
    "SSF",
    "VPT",
    "Adapter",
    "Criterion",
    "Inserted",
    "LoRA",
    "Method",
    "MethodFile",
    "Modules",
    "Run",
    "Settings",
    "TaskFile",
    "Tuner",
    "load_method_file",
    "load_task_file",
    "put_in",
    "require_in_place",
]

METHODS: Table[Method] = Table(
    "fewtune.methods",
    "method",
    {
        method.name: method
        for method in (
            *(GPS, FULL, LINEAR, BIAS),
            *(ADAPTER, LORA, VPT_SHALLOW, VPT_DEEP, SSF_METHOD, SPT_ADAPTER, SPT_LORA),
        )
    },
)
"""Method by the name that recipes and task files say; installed packages add theirs as entry points."""


def load_method_file(path: str | Path) -> MethodFile:
    """Reads a task file of a method that adds modules.

    Raises:
        DeltaError: the file is missing, of another kind, of a newer version or an unknown method, truncated or altered.
    """
    return read_method_file(resolve(path).path, _modules)


def load_task_file(path: str | Path) -> Delta | MethodFile:
    """Reads a task file of any method, local, of the hub (``hf://org/name[@revision][/file]``) or of a store (``s3://…``).

    Raises:
        DeltaError: it is none, or it is damaged.
    """
    path = resolve(path).path
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            kind = json.loads((file.metadata() or {}).get("fewtune", "{}")).get("format")
    except (OSError, SafetensorError, ValueError, RecursionError, AttributeError, FewtuneError):
        kind = None  # said better by what follows
    return load_method_file(path) if kind == FORMAT else load_delta(path)


def _modules(name: str, settings: Json, arrays: Mapping[str, Tensor]) -> Insertion:
    if name not in METHODS or (read := METHODS[name].read) is None:
        raise DeltaError(
            f"the task file is of the method {name!r}, which this fewtune does not know: update fewtune, or install "
            "the package that offers the method"
        )
    return read(settings, arrays)
