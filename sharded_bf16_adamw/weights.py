"""An optimizer's weights and states between two steps: converted, read, reset, compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .conversion import to_bf16_
from .serialization import SerializableOptimizer
from .sharding.dtensor import to_local
from .sharding.replicas import check_replicas
from .sharding.zero.config import ZeRO
from .state import collect_replicas, new_state

_Optimizer = TypeVar("_Optimizer", bound="WeightAccess")


class WeightAccess(SerializableOptimizer):
    """An optimizer of weights ``p + correction``, for code that needs them outside of a step."""

    @classmethod
    @torch.no_grad()
    def from_fp32(
        cls: type[_Optimizer],
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        keep_fp32: str | None = None,
        **options: Any,
    ) -> _Optimizer:
        r"""Convert a float32 model to bfloat16 in place, and return an optimizer for it.

        ``model.bfloat16()`` drops the rounding error of each weight. This method keeps it as the
        ``correction``, so that ``p + correction`` is the float32 weight up to 2^-17 of it. All
        floating-point parameters and buffers become bfloat16; parameters stay the same objects, and
        gradients are dropped. A parameter that is frozen or not in ``params`` is rounded without a
        correction.

        Args:
            model: the module, plain or sharded by ``fully_shard`` or tensor parallelism, before its
                first forward pass. Call this before DistributedDataParallel.
            params: as in the constructor; None for ``model.parameters()``.
            keep_fp32: regular expression; parameters and buffers whose name :func:`re.search`
                matches keep their dtype.
            options: arguments of the constructor, by keyword.

        Raises:
            ValueError: the model cannot be converted, ``keep_fp32`` matches nothing, or ZeRO has
                ``broadcast_initial``. Nothing is changed.
            ValueError, TypeError: as in the constructor. The model is converted by then.

        Examples:
            >>> import torch
            >>> from sharded_bf16_adamw import AdamW_BF16
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
            >>> weight = model[0].weight.detach().clone()
            >>> optimizer = AdamW_BF16.from_fp32(model, keep_fp32=r"^1\.", lr=1e-3)
            >>> model[0].weight.dtype, model[1].weight.dtype
            (torch.bfloat16, torch.float32)
            >>> true_weight = dict(optimizer.true_weights())[model[0].weight]
            >>> bool(((true_weight - weight).abs() <= 2**-17 * weight.abs()).all())
            True
        """
        zero = options.get("sharding")
        if isinstance(zero, ZeRO) and zero.broadcast_initial:
            raise ValueError(
                "ZeRO(broadcast_initial=True) copies the weights of the first rank but not their "
                "corrections; build the same float32 model on every rank, or broadcast it before "
                "from_fp32()"
            )
        corrections = to_bf16_(model, keep_fp32)
        optimizer = cls(model.parameters() if params is None else params, **options)
        optimizer.init_state()
        for param, correction in corrections.items():
            if param in optimizer.state:
                shard = optimizer._sharding.shard_state(param, correction, "the correction")
                to_local(optimizer.state[param]["correction"]).copy_(to_local(shard))
        return optimizer

    def wait(self) -> None:
        """Wait until the weights that the last :meth:`step` has updated are in the parameters.

        Does nothing without ``ZeRO(overlap_gather=True)``. With it, call this after a step before
        code outside the model's forward pass reads or writes weights. Forward passes,
        ``state_dict``, ``load_state_dict`` and this package's functions wait by themselves.
        Collective: every rank calls it or runs the next forward pass.

        Raises:
            RuntimeError: another rank has died or hangs, or a weight was changed meanwhile. This
                rank's weights are then partly old ones: load a checkpoint.
        """
        self._sharding.wait_for_params()

    @torch.no_grad()
    def true_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(parameter, weight)`` for every parameter, frozen or not.

        ``weight`` is ``p + correction``, a new float32 tensor, sharded like the parameter, or with
        ZeRO like its state. Use it for averages of weights, export and evaluation.
        """
        self._check_between_steps("true_weights()")
        self.wait()
        for param in self._all_params():
            weight = self._sharding.shard(param).detach().to(torch.float32, copy=True)
            correction = self.state[param].get("correction") if param in self.state else None
            yield param, weight if correction is None else weight + correction.float()

    @torch.no_grad()
    def reset_correction(self, params: Iterable[Tensor] | None = None) -> None:
        """Zero the correction of ``params`` (default: all) after other code set the weights."""
        for param in self._all_params() if params is None else params:
            if param in self.state and "correction" in self.state[param]:
                to_local(self.state[param]["correction"]).zero_()

    @torch.no_grad()
    def check_replicas(self) -> None:
        """Compare weights and states with their replicas on other ranks, to find silent corruption.

        Equal gradients give equal bits, so replicas differ only through a hardware fault or code
        that changes a single rank. Compares 64-bit checksums: reads all of this rank's weights and
        states once and exchanges 16 bytes per tensor. Call it every few hundred steps. Collective:
        every rank calls it at the same step.

        It compares

        * DTensors over the mesh dimensions that replicate them (HSDP, tensor parallelism);
        * FSDP1's parameters under ``HYBRID_SHARD`` and ``NO_SHARD``;
        * with ZeRO, weights over all ranks and states over the mesh's replicate dimension;
        * plain parameters over ``ModelParallel(dp=...)`` and experts over ``edp``, or both over all
          ranks without ``model_parallel``.

        If several models share a job, give each a ``ModelParallel(dp=...)``.

        Raises:
            RuntimeError: replicas differ; raised on every rank, with a tensor's name and the ranks.
        """
        self._check_between_steps("check_replicas()")
        self.wait()
        check_replicas(*collect_replicas(self, self._sharding, self.model_parallel))

    def init_state(self, params: Iterable[Tensor] | None = None) -> None:
        """Create missing states, at step 0, without waiting for the first gradient.

        Args:
            params: the parameters; None for every trainable one.
        """
        if params is None:
            params = [param for param in self._all_params() if param.requires_grad]
        for param in params:
            if not self.state.get(param):
                self.state[param] = new_state(param, self._sharding)
