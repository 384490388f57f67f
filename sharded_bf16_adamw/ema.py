"""An exponential moving average (EMA) of the true weights, in the optimizer's own numerics.

The average of a parameter is the entry ``"ema"`` of its optimizer state. So it is sharded, saved,
loaded and resharded like the moments.

A bfloat16 average is rounded stochastically: round-to-nearest would lose almost every update
``(1 - decay) * (w - ema)``. The random bits are a hash of the element's stored bits and the
number of updates, as in :mod:`.kernels.reference`, so they do not depend on sharding or device.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .kernels import is_capturing
from .kernels.reference import _pattern, lowbias32, step_key
from .optimizer import AdamW_BF16
from .sharding.dtensor import to_local
from .torch_types import is_dtensor, is_fsdp1, is_fsdp2

CPU_CHUNK = 1 << 16  # elements: smaller chunks add call overhead, larger ones leave the cache
DEVICE_CHUNK = 1 << 20  # elements: enough to saturate a GPU

UPDATES = "ema_updates"  # key in param_groups of the number of updates
HASH_MULTIPLIER = 0x2C1B3C6D  # odd; multiplies the average's bits
INSIDE_SWAPPED_ERROR = (
    "the model's weights are its average inside ema.swapped(), so the optimizer cannot be stepped, "
    "saved or loaded; leave the with block first, or restart from a checkpoint if ema.swapped() "
    "itself has raised"
)

# Optimizer -> weak reference to its EMA.
_ema_of: weakref.WeakKeyDictionary[AdamW_BF16, weakref.ref[EMA]] = weakref.WeakKeyDictionary()


class EMA:
    """Exponential moving average of the true weights ``p + correction``, for evaluation.

    The average takes 2 bytes per element of a bfloat16 parameter and 4 of a float32 one. It is part
    of the optimizer's state, as ``optimizer.state[param]["ema"]``, and sharded like the moments.
    :func:`save`, :func:`load` and ``optimizer.state_dict()`` include it. Build the EMA before you
    load a checkpoint that contains an average. A new average starts at the model's current weights.
    Buffers are not averaged.

    ``decay`` may be changed at any time, for a warm-up of the average.

    Args:
        model: the module, wrapped or not.
        optimizer: the optimizer of its parameters.
        decay: weight of the old average in an update, from 0 to 1.

    Raises:
        TypeError: the optimizer is not an :class:`AdamW_BF16`.
        ValueError: ``decay`` is out of range.
        RuntimeError: the optimizer has another EMA.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import EMA, AdamW_BF16
        >>> model = torch.nn.Linear(4, 2, bias=False).bfloat16()
        >>> optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
        >>> ema = EMA(model, optimizer, decay=0.999)
        >>> for _ in range(3):
        ...     model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        ...     optimizer.step(zero_grad=True)
        ...     ema.update()
        >>> with ema.swapped():
        ...     loss = model(torch.ones(1, 4, dtype=torch.bfloat16)).sum()
    """

    def __init__(self, model: nn.Module, optimizer: AdamW_BF16, decay: float = 0.999) -> None:
        if not isinstance(optimizer, AdamW_BF16):
            raise TypeError(
                f"EMA averages the weights of an AdamW_BF16, but the optimizer is of type "
                f"{type(optimizer).__name__}; use torch.optim.swa_utils.AveragedModel with float32 "
                "weights"
            )
        _check_decay(decay)
        other = _ema_of.get(optimizer)
        if other is not None and other() is not None:
            raise RuntimeError(
                "the optimizer has an EMA already, and its state holds one average for each "
                "parameter; use that EMA, or delete it before you build another"
            )
        self._model = model
        self._optimizer = optimizer
        self._is_swapped = False
        self._decay = decay
        optimizer.init_state()
        for _, state, weight in self._states():
            state.setdefault("ema", weight.clone())
        _ema_of[optimizer] = weakref.ref(self)  # nothing above may fail after it

    @property
    def decay(self) -> float:
        """Weight of the old average in an update."""
        return self._decay

    @decay.setter
    def decay(self, decay: float) -> None:
        _check_decay(decay)
        self._decay = decay

    @torch._disable_dynamo
    @torch.no_grad()
    def update(self) -> None:
        """Move the average to ``decay * ema + (1 - decay) * weight``. Call it after each step.

        Needs no communication and does not wait for the device. A parameter whose state has no
        average, such as one added later, starts it at its current weight.

        Raises:
            RuntimeError: the weights are swapped, ``step_in_backward`` is in the middle of a step,
                or a CUDA graph captures the call, which would replay the same random bits.
        """
        self._check_not_swapped("ema.update()")
        self._optimizer._check_between_steps("ema.update()")
        states = list(self._states())
        if any(map(is_capturing, {shard.device for _, _, shard in states})):
            raise RuntimeError(
                "a CUDA graph captures ema.update(), whose random bits depend on a count on "
                "the host; call it outside of the graph, after each replay"
            )
        groups = self._optimizer.param_groups
        count = max((group.get(UPDATES, 0) for group in groups), default=0) + 1
        for group in groups:
            group[UPDATES] = count
        key, weight = step_key(count), float(np.float32(1.0 - self.decay))
        for _, state, shard in states:
            if "ema" not in state:
                state["ema"] = shard.clone()
                continue
            local = [to_local(x) for x in (state["ema"], shard, state.get("correction", shard))]
            for e, p, c in _chunks(local):
                _update_chunk_(e, p, c, weight=weight, key=key)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Use the average as the model's weights within a ``with`` block.

        On exit, even after an error, all weights and corrections are restored bit for bit. The swap
        temporarily allocates a copy of the largest local shard, or with ZeRO of the largest
        parameter. Collective with FSDP1 and ZeRO: every rank calls it. In the context
        ``model.state_dict()`` and ``optimizer.true_weights()`` return the average, and the
        optimizer cannot be stepped, saved or loaded. If the all-gather of ZeRO fails, that stays
        so after the context.

        Raises:
            RuntimeError: the weights are swapped already, or ``step_in_backward`` is in the middle
                of a step.
        """
        self._check_not_swapped("ema.swapped()")
        optimizer = self._optimizer
        optimizer._check_between_steps("ema.swapped()")
        optimizer.wait()  # a ZeRO all-gather in flight would overwrite the average

        def refuse(*_: Any) -> None:
            raise RuntimeError(INSIDE_SWAPPED_ERROR)

        swapped = [(param, state) for param, state, _ in self._states() if "ema" in state]
        states = [dict(state) for _, state in swapped]
        pairs = [(param, state["ema"]) for param, state in swapped]
        self._swap_shards(pairs)
        self._is_swapped = True
        hooks = [
            optimizer.register_step_pre_hook(refuse),
            optimizer.register_state_dict_pre_hook(refuse),
            optimizer.register_load_state_dict_pre_hook(refuse),
        ]
        if optimizer._in_backward is not None:
            optimizer._in_backward.refusal = INSIDE_SWAPPED_ERROR
        # Hide the correction and the average, which belong to the original weights.
        for _, state in swapped:
            state.pop("correction", None)
            del state["ema"]
        self._all_gather(pairs)
        try:
            yield
        finally:
            self._swap_shards(pairs)
            for (_, state), original in zip(swapped, states, strict=True):
                state.clear()
                state.update(original)
            self._all_gather(pairs)
            self._is_swapped = False
            if optimizer._in_backward is not None:
                optimizer._in_backward.refusal = None
            for hook in hooks:
                hook.remove()

    def _states(self) -> Iterator[tuple[Tensor, dict[str, Any], Tensor]]:
        """Yield each parameter that has a state, with the state and the shard of its weight."""
        for param in self._optimizer._all_params():
            state = self._optimizer.state.get(param)
            if state:
                yield param, state, self._optimizer._sharding.shard(param).detach()

    @torch.no_grad()
    def _swap_shards(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Swap all local shards with their averages. On an error, undo the swap and raise."""
        self._reshard_modules()
        for index, pair in enumerate(pairs):
            try:
                self._exchange(*pair)
            except BaseException:  # such as out of memory
                for done in pairs[:index]:
                    self._exchange(*done)
                raise

    def _exchange(self, param: Tensor, average: Tensor) -> None:
        weight = to_local(self._optimizer._sharding.shard(param).detach())
        local = to_local(average)
        kept = weight.clone()
        weight.copy_(local)
        local.copy_(kept)

    @torch.no_grad()
    def _all_gather(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """All-gather the swapped shards of ZeRO.

        An error is not undone: that would take all-gathers, and this rank may have failed alone.
        """
        for param, _ in pairs:
            shard = self._optimizer._sharding.shard(param).detach()
            if is_dtensor(shard) and not is_dtensor(param):  # ZeRO
                param.copy_(shard.full_tensor())

    def _reshard_modules(self) -> None:
        """Reshard FSDP's modules: the root may still be unsharded after an evaluation."""
        for module in self._model.modules():
            if is_fsdp2(module):
                module.reshard()
            elif is_fsdp1(module):
                from torch.distributed.fsdp._runtime_utils import _reshard

                handle, has_run = module._handle, module._is_root is not None
                if handle is not None and handle.uses_sharded_strategy and has_run:
                    _reshard(module, handle, free_unsharded_flat_param=True)

    def _check_not_swapped(self, what: str) -> None:
        if self._is_swapped:
            raise RuntimeError(f"{what} is called inside ema.swapped(); call it outside")


def _check_decay(decay: float) -> None:
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"Invalid decay: {decay}; it must be from 0 to 1")


def _chunks(tensors: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching chunks of same-shaped tensors, as views, to keep temporaries small."""
    if all(map(Tensor.is_contiguous, tensors)):
        size = CPU_CHUNK if tensors[0].device.type == "cpu" else DEVICE_CHUNK
        yield from zip(*[x.view(-1).split(size) for x in tensors], strict=True)
    else:  # such as a shard of columns
        yield tuple(tensors)


def _update_chunk_(e: Tensor, p: Tensor, c: Tensor, weight: float, key: int) -> None:
    """Update a chunk of an average in place: ``e += weight * (p + c - e)``.

    Each fp32 operation is rounded separately (no fused multiply-add), so all devices give the same
    bits.

    Args:
        e: the average, bfloat16 or float32.
        p: the weights, like ``e``.
        c: the corrections, bfloat16; not read if ``e`` is float32.
        weight: ``1 - decay``, exact in float32.
        key: 32 random bits of this update.
    """
    if e.dtype == torch.float32:
        e.add_((p - e) * weight)
        return
    old = e.float()
    delta = ((p.float() + c.float()) - old) * weight
    pattern = _pattern(p) << 16 | _pattern(c)
    signed_key = key - (1 << 32) if key >> 31 else key
    bits = lowbias32(pattern ^ _pattern(e) * HASH_MULTIPLIER ^ signed_key)
    e.copy_(stochastic_sum(old, delta, bits))


def stochastic_sum(x: Tensor, delta: Tensor, r: Tensor) -> Tensor:
    """Return ``x + delta`` rounded stochastically to bfloat16.

    The fp32 sum loses a ``delta`` below 2^-17 of a bfloat16 ulp, common with a decay near 1. So the
    rounding also uses the error of that sum, and compares with 32 random bits.

    Args:
        x: float32, any shape; holds bfloat16 values.
        delta: float32 of the same shape.
        r: int32 of the same shape, uniform on all 32 bits.

    Returns:
        bfloat16. Infinity stays infinity and NaN stays NaN.
    """
    total = x + delta
    error = delta - (total - x)
    # Round the fp32 sum toward zero, so that the remainder to round is never negative.
    bits = total.view(torch.int32) - (error * total.sign() < 0).to(torch.int32)
    error = delta - (bits.view(torch.float32) - x)
    ulp = (bits & 0x7F800000).view(torch.float32) * 2.0**-23
    high, low = r >> 16 & 0xFFFF, r & 0xFFFF
    surplus = ((bits & 0xFFFF) - high).float() + error.abs() / ulp
    rounds_up = surplus > (low.float() + 0.5) * 2.0**-16
    rounded = ((bits >> 16) + rounds_up).to(torch.int16).view(torch.bfloat16)
    return torch.where(total.isnan(), math.nan, rounded)
