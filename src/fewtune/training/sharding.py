"""FSDP2 as Lightning's strategy: every process holds its rows of the weights, checkpoints are as those of one process.

What is trained is small, so checkpoints hold it whole: one file, written by the main process. A run resumes on another
number of processes, or with another strategy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from fewtune.methods.blocks import known_blocks

T = TypeVar("T")
Checkpointed = dict[str, Any]
"""What Lightning saves: tensors, dicts, lists and numbers, of which ours lie under "fewtune"."""
ReadOnly = Mapping[str, Any]
"""The same, to be read."""


class FullySharded(ModelParallelStrategy):
    """`strategy=fsdp2`: data parallel over all processes of all nodes, a unit of sharding a block of the model."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Connect the processes; all of them share the data."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, model: nn.Module) -> None:
        """Shard a model in place, one block on its device at a time.

        A tuner is attached before, since FSDP shards values beside the rows of their weight.
        """
        mesh = self.device_mesh["data_parallel"]
        for module in (*(block.module for block in known_blocks(model)), model):
            module.to(self.root_device)
            fully_shard(module, mesh=mesh, reshard_after_forward=True)  # of the outermost too: values are read then

    # -- checkpoints: by the module and the optimisers themselves, as in one process

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimisers are restored from the checkpoint that the main process wrote."""
        return True

    def lightning_module_state_dict(self) -> Checkpointed:
        """What is trained, whole, in every process."""
        assert self.lightning_module is not None
        return whole(self.lightning_module.state_dict())

    def load_model_state_dict(self, checkpoint: ReadOnly, strict: bool = True) -> None:
        """Each process takes its rows."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> Checkpointed:
        """An optimiser's state, whole, in every process."""
        state: Checkpointed = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return whole(state)

    def load_optimizer_state_dict(self, checkpoint: ReadOnly) -> None:
        """Each process takes the state of its rows."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            rows = {
                index: {key: _like(value, parameters[index]) for key, value in of_one.items()}
                for index, of_one in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": rows})

    def save_checkpoint(self, checkpoint: Checkpointed, filepath: str | Path, storage_options: object = None) -> None:
        """One file, by the main process."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> Checkpointed:
        """The whole file, in every process."""
        checkpoint: Checkpointed = self.checkpoint_io.load_checkpoint(Path(checkpoint_path), weights_only=True)
        return checkpoint


def whole(state: T) -> T:
    """A state of nested dicts, lists and tensors in which every tensor is whole: all processes must ask for it."""
    result: Any = state
    if isinstance(state, DTensor):
        result = state.full_tensor()
    elif isinstance(state, Mapping):
        result = {key: whole(value) for key, value in state.items()}
    elif isinstance(state, list):
        result = [whole(value) for value in state]
    return cast("T", result)


def shared_out(state: T, like: object) -> T:
    """A whole state in which every tensor lies as it does in `like`, another state of the same names."""
    result: Any = state
    if isinstance(state, Tensor):
        result = _like(state, like)
    elif isinstance(state, Mapping):
        present = like if isinstance(like, Mapping) else {}
        result = {key: shared_out(value, present.get(key)) for key, value in state.items()}
    elif isinstance(state, list):
        assert isinstance(like, list)
        result = [shared_out(value, tensor) for value, tensor in zip(state, like, strict=True)]
    return cast("T", result)


def _like(value: Any, tensor: Any) -> Any:
    """A whole tensor, as its process holds it where `tensor` of the same shape is distributed; else as it is."""
    if isinstance(tensor, DTensor) and isinstance(value, Tensor) and value.shape == tensor.shape:
        on_device = value.to(tensor.device)
        return distribute_tensor(on_device, tensor.device_mesh, tensor.placements)
    return value


StrategyRegistry.register("fsdp2", FullySharded, description=FullySharded.__doc__ or "")
