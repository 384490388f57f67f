"""Rank-local experts in a model that ZeRO shards."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .base import Caller, Sharding
from .model_parallel import ModelParallel
from .torch_managed import TorchManaged


class RankLocalExperts:
    """ZeRO for all parameters but the experts, which are unsharded and whose gradients are local.

    Args:
        dense: the ZeRO stage for the other parameters.
        model_parallel: declares the experts.
    """

    def __init__(self, dense: Sharding, model_parallel: ModelParallel) -> None:
        self.dense = dense
        self._experts = TorchManaged()
        self._model_parallel = model_parallel
        self._expert_ids: set[int] = set()

    def add_params(self, params: list[Tensor], names: list[str]) -> None:
        self._expert_ids = {id(param) for param in self._model_parallel.expert_params()}
        named = zip(params, names, strict=True)
        dense = [(param, name) for param, name in named if id(param) not in self._expert_ids]
        self.dense.add_params([param for param, _ in dense], [name for _, name in dense])

    def reduce_grads(self, caller: Caller = Caller.STEP) -> None:
        self.dense.reduce_grads(caller)

    def grads(self, params: list[Tensor]) -> list[Any]:
        return self._merged(params, "grads")

    def local_grads(self, params: list[Tensor]) -> list[Tensor]:
        return self._merged(params, "local_grads")

    def all_gather_params(self) -> None:
        self.dense.all_gather_params()

    def wait_for_params(self) -> None:
        self.dense.wait_for_params()

    def clear_grads(self) -> None:
        self.dense.clear_grads()

    def shard(self, param: Tensor) -> Tensor:
        return self._sharding_of(param).shard(param)

    def shard_state(self, param: Tensor, value: Tensor, what: str) -> Tensor:
        return self._sharding_of(param).shard_state(param, value, what)

    def shard_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        return self._sharding_of(param).shard_groups(param)

    def replica_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        return self._sharding_of(param).replica_groups(param)

    def weight_replica_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        return self._sharding_of(param).weight_replica_groups(param)

    def no_sync(self) -> AbstractContextManager[None]:
        return self.dense.no_sync()

    def check_picklable(self) -> None:
        self.dense.check_picklable()

    def _sharding_of(self, param: Tensor) -> Sharding:
        return self._experts if id(param) in self._expert_ids else self.dense

    def _merged(self, params: list[Tensor], method: str) -> list[Any]:
        """Call ``method`` of each strategy for its parameters, and merge the results in order."""
        result: list[Any] = [None] * len(params)
        for sharding in (self.dense, self._experts):
            indices = [
                index for index, param in enumerate(params) if self._sharding_of(param) is sharding
            ]
            values = getattr(sharding, method)([params[index] for index in indices])
            for index, value in zip(indices, values, strict=True):
                result[index] = value
        return result
