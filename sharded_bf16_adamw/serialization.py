"""The state dict, the pickled form and the ``repr`` of the optimizer."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .kernels import backend_for
from .param_log import logger
from .sharding.base import Sharding
from .sharding.build import build_sharding
from .sharding.dtensor import to_local
from .sharding.model_parallel import ModelParallel
from .sharding.zero.config import ZeRO
from .state import complete_state, hide_ungrouped_states
from .step_in_backward.optimizer_methods import SteppedInBackward
from .step_in_backward.step import StepInBackward
from .validation import param_name


class SerializableOptimizer(SteppedInBackward):
    """A torch optimizer whose sharding strategy also shards the states that it loads."""

    _PICKLED: tuple[str, ...] = ()  # attributes to pickle beside torch's
    _is_built = False
    _sharding: Sharding
    _zero: ZeRO | None = None
    model_parallel: ModelParallel | None
    backend: str | None

    def _init_caches(self) -> None:
        """Create the attributes that are neither pickled nor loaded, for ``self._sharding``."""
        raise NotImplementedError

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def __repr__(self) -> str:
        """Return torch's repr, plus the backend, the sharding and this rank's bytes of state.

        Never raises or waits for a device: wrappers and debuggers call it at any time.
        """
        try:
            return self._describe()
        except Exception:  # half built, or changed by another thread meanwhile
            return object.__repr__(self)

    def _describe(self) -> str:
        states = [state for state in self.state.values() if isinstance(state, dict)]
        values = chain.from_iterable(state.values() for state in states)
        nbytes = sum(to_local(value).nbytes for value in values if isinstance(value, Tensor))
        backends = {backend_for(param.device, self.backend) for param in self._all_params()}
        zero = self._zero
        sharding = (
            "torch" if zero is None else f"ZeRO(stage={zero.stage}, mesh={tuple(zero.mesh.shape)})"
        )
        text = f"{type(self).__name__} (\n"
        text += f"backend: {', '.join(sorted(backends))}\n"
        text += f"sharding: {sharding}\n"
        text += f"state: {nbytes:,} bytes on this rank\n"
        for index, group in enumerate(self.param_groups):
            text += f"\nParameter Group {index}\n"
            for key in sorted(group.keys() - {"params"}, key=str):
                value = group[key]
                if isinstance(value, Tensor) and value.device.type != "cpu":
                    value = f"<{value.dtype} on {value.device}>"  # its value would cost a sync
                if key == "param_names":
                    value = f"<{len(value)} names>"
                text += f"    {key}: {value}\n"
        return text + ")"

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle and deepcopy. Raise TypeError if it needs process groups."""
        self._check_between_steps("a copy of the optimizer")
        self._sharding.check_picklable()
        if self.model_parallel is not None:
            raise TypeError(
                "an optimizer with model_parallel=ModelParallel(...) belongs to its process groups "
                "and cannot be pickled or deep-copied; save its state with sharded_bf16_adamw.save "
                "or its state_dict()"
            )
        own = {name: getattr(self, name) for name in self._PICKLED}
        own["in_backward"] = None if self._in_backward is None else (self._in_backward.clip,)
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore an unpickled or loaded state, also one of torch.optim.AdamW."""
        if "_sharding" not in self.__dict__:  # unpickled: neither ZeRO nor model_parallel
            self._sharding, self.model_parallel = build_sharding(None, None), None
            self._init_caches()
            self._is_built = True
        complete_loaded(state, self._sharding)
        in_backward = state.pop("in_backward", None)
        super().__setstate__(state)
        if in_backward is not None:
            self._in_backward = StepInBackward(self, *in_backward)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of AdamW_BF16, torch.optim.AdamW or adamw_bfloat16, copying its tensors.

        The correction of a torch.optim.AdamW state is zero. The schedule stays this optimizer's own
        and continues at the loaded position.

        Raises:
            ValueError: groups or shapes do not match this optimizer's; nothing is changed.
        """
        self._check_between_steps("load_state_dict()")
        follows_schedule = [group["scheduled_lr"] is not None for group in self.param_groups]
        super().load_state_dict(from_adamw_bfloat16(state_dict, self.param_groups))
        for group, follows in zip(self.param_groups, follows_schedule, strict=True):
            group["scheduled_lr"] = group["lr"] if follows else None
        for key, entry in self.state.items():  # torch keeps references to the given tensors
            self.state[key] = clone_tensors(entry)

    def state_dict(self) -> dict[str, Any]:
        """Return the state and groups; see :meth:`torch.optim.Optimizer.state_dict`.

        The states of tensors in no group are left out, since they have no index.
        """
        self._check_between_steps("state_dict()")
        with hide_ungrouped_states(self):
            return super().state_dict()


def from_adamw_bfloat16(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Convert a state dict of the ``adamw_bfloat16`` library; return any other unchanged.

    Its ``shift`` is the correction. Its groups have no ``lr``, so they get the ``lr`` of
    ``groups``. ``accumulated_decay`` (decay not yet applied to the weight) is dropped: it starts at
    a random value and is at most half a percent of the weight.
    """
    loaded = state_dict["param_groups"]
    if not loaded or not all("lr_function" in group and "lr" not in group for group in loaded):
        return state_dict
    state = {}
    for key, entry in state_dict["state"].items():
        state[key] = {k: v for k, v in entry.items() if k not in ("shift", "accumulated_decay")}
        if "shift" in entry:
            state[key]["correction"] = entry["shift"]
    loaded = [{k: v for k, v in group.items() if k != "lr_function"} for group in loaded]
    for group, own in zip(loaded, groups, strict=False):  # torch compares the numbers of groups
        group["lr"] = own["lr"]
    return {**state_dict, "state": state, "param_groups": loaded}


def complete_loaded(loaded: dict[str, Any], sharding: Sharding) -> None:
    """Complete a loaded state and its groups in place, also those of torch.optim.AdamW.

    Args:
        loaded: ``"state"`` by parameter and ``"param_groups"``.
        sharding: the optimizer's sharding strategy.

    Raises:
        ValueError: see :func:`complete_state`.
    """
    schedule_step = 0
    if any("schedule_step" not in group for group in loaded["param_groups"]):
        # A state of torch.optim.AdamW: continue the schedule at its step count.
        states = [state for key, state in loaded["state"].items() if isinstance(key, Tensor)]
        schedule_step = max((int(state.get("step", 0)) for state in states), default=0)
    dropped = 0
    for group in loaded["param_groups"]:
        group.setdefault("maximize", False)
        group.setdefault("capturable", False)
        group.setdefault("decouple_lr", False)
        group.setdefault("max_lr", None)
        group.setdefault("schedule_step", schedule_step)
        group.setdefault("scheduled_lr", None)
        for index, param in enumerate(group["params"]):
            if state := loaded["state"].get(param):
                dropped += "correction" in state and param.dtype == torch.float32
                complete_state(state, param, param_name(group, index), sharding)
    if dropped:
        logger.warning(
            "%d loaded states of AdamW_BF16 had a correction that was dropped, because their "
            "parameters are float32 now; to keep these bits of the weights, load into the bfloat16 "
            "model, or import the weights that sharded_bf16_adamw.export_fp32 writes",
            dropped,
        )


def clone_tensors(value: Any) -> Any:
    """Return ``value`` with the tensors in it, and in nested dicts, cloned."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: clone_tensors(item) for key, item in value.items()}
    return value
