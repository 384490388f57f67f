"""Wrong update rules, each one edit away from the package, with the checks that must fail."""

from __future__ import annotations

import inspect
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from sharded_bf16_adamw.kernels import backend, reference

from .rule_checks import Update
from .tables import table_of, take_step


class Mutant(NamedTuple):
    """One wrong rule.

    name: a description.
    edits: ``(old, new)`` source fragments; each ``old`` occurs exactly once in the module.
    caught_by: names of the checks that must fail.
    module: the module to edit.
    """

    name: str
    edits: tuple[tuple[str, str], ...]
    caught_by: tuple[str, ...]
    module: ModuleType = reference


V_ROUNDED = "stochastic_round(vn, rv)"
M_ROUNDED = "stochastic_round(mn, rm)"
C_ROUNDED = "stochastic_round(cn, rc)"
STEP_IN_HASH = "step_key(s.step)"
FOLD = "y = (product ^ product >> 16 ^ x) & 0xFFFF"
SPLIT = """    d = c32 - (s.lr_weight_decay * (p32 + c32) + upd)
    pn = (p32 + d).bfloat16()
    cn = (p32 - pn.float()) + d
"""
SUM_FIRST = """    w = p32 + c32
    w = w - s.lr_weight_decay * w - upd
    pn = w.bfloat16()
    cn = w - pn.float()
"""
ROUND_UP = "((bits & 0xFFFF) > r)"
NAN_GUARD = "return torch.where(x.isnan(), torch.nan, rounded)"

MUTANTS = (
    # the four mistakes that the design of the rule avoids
    Mutant(
        "v to nearest",
        ((V_ROUNDED, "vn.bfloat16()"),),
        (
            "check_one_step_unbiased",
            "check_v_gaussian",
            "check_v_long_memory",
            "check_v_zero_gradient",
            "check_oracle",
        ),
    ),
    Mutant(
        "hash without the step",
        ((STEP_IN_HASH, "step_key(0)"),),
        ("check_v_constant_gradient", "check_uncorrelated", "check_oracle"),
    ),
    Mutant(
        "p + c formed before decay and split",
        ((SPLIT, SUM_FIRST),),
        ("check_displacement", "check_oracle"),
    ),
    Mutant(
        "correction dropped",
        (("cn = (p32 - pn.float()) + d", "cn = torch.zeros_like(d)"),),
        ("check_displacement", "check_tracks_float64", "check_oracle"),
    ),
    # rounding
    Mutant("m to nearest", ((M_ROUNDED, "mn.bfloat16()"),), ("check_one_step_unbiased",)),
    Mutant(
        "c to nearest",
        ((C_ROUNDED, "cn.bfloat16()"),),
        ("check_one_step_unbiased", "check_displacement"),
    ),
    Mutant(
        "p rounded stochastically",
        (("(p32 + d).bfloat16()", "stochastic_round(p32 + d, rv)"),),
        ("check_oracle",),
    ),
    Mutant(
        "15 random bits for v",
        ((V_ROUNDED, "stochastic_round(vn, rv & 0x7FFF)"),),
        ("check_one_step_unbiased",),
    ),
    Mutant(
        "8 random bits for m",
        ((M_ROUNDED, "stochastic_round(mn, rm >> 8)"),),
        ("check_one_step_unbiased",),
    ),
    Mutant(
        "random bits shifted too far for c",
        ((C_ROUNDED, "stochastic_round(cn, rc >> 4)"),),
        ("check_one_step_unbiased",),
    ),
    Mutant(
        "always rounded up", ((ROUND_UP, "((bits & 0xFFFF) > 0)"),), ("check_one_step_unbiased",)
    ),
    Mutant(
        "rounded up at equality, too",
        ((ROUND_UP, "((bits & 0xFFFF) >= r)"),),
        ("check_nonfinite", "check_oracle"),
    ),
    Mutant(
        "NaN guard dropped", ((NAN_GUARD, "return rounded"),), ("check_nonfinite", "check_oracle")
    ),
    Mutant(
        "infinity rounds to NaN",
        ((NAN_GUARD, "return torch.where(x.isfinite(), rounded, torch.nan)"),),
        ("check_nonfinite",),
    ),
    # the hash
    Mutant("product not folded", ((FOLD, "y = (product ^ x) & 0xFFFF"),), ("check_oracle",)),
    Mutant(
        "no product",
        (("product = x * w", "product = x ^ w"),),
        ("check_each_input_mixes", "check_oracle"),
    ),
    Mutant("xorshift dropped", (("y ^ y >> 8 ^ high", "y ^ high"),), ("check_oracle",)),
    Mutant(
        "shifted bits not masked", ((FOLD, "y = product ^ product >> 16 ^ x"),), ("check_oracle",)
    ),
    Mutant(
        "hash without p",
        (("_pattern(p) ^ ", ""),),
        ("check_v_zero_gradient", "check_each_input_mixes"),
    ),
    Mutant("hash without g", (("_pattern(g) ^ ", ""),), ("check_oracle",)),
    Mutant("hash without m", ((" ^ _pattern(m) * SPREAD_M", ""),), ("check_oracle",)),
    Mutant("hash without v", ((" ^ _pattern(v) * SPREAD_V", ""),), ("check_oracle",)),
    Mutant("hash without c", ((" ^ _pattern(c) * SPREAD_C", ""),), ("check_oracle",)),
    Mutant(
        "hash with the index",
        ((" ^ low) & 0xFFFF", " ^ low ^ torch.arange(p.numel(), dtype=torch.int32)) & 0xFFFF"),),
        ("check_layout_free",),
    ),
    Mutant(
        "hash of the scaled gradient",
        (("_random_bits(g, p", "_random_bits((g.float() * scale).to(g.dtype), p"),),
        ("check_scaled",),
    ),
    Mutant(
        "low half of a float32 gradient not hashed",
        (("(bits >> 16 ^ bits) & 0xFFFF", "bits >> 16 & 0xFFFF"),),
        ("check_float32_gradient_folds", "check_oracle"),
    ),
    Mutant(
        "high half of a float32 gradient not hashed",
        (("bits >> 16 ^ bits", "bits"),),
        ("check_float32_gradient_folds",),
    ),
    # the moments and the step
    Mutant(
        "update from rounded moments",
        (
            (
                "upd = s.step_size * mn / (_sqrt(vn)",
                "upd = s.step_size * mn.bfloat16().float() / (_sqrt(vn.bfloat16().float())",
            ),
        ),
        ("check_oracle",),
    ),
    Mutant(
        "m by interpolation",
        (("s.beta1 * m + s.one_minus_beta1 * g", "m + s.one_minus_beta1 * (g - m)"),),
        ("check_oracle",),
    ),
    Mutant(
        "eps dropped",
        (("* s.inv_sqrt_bias_correction2 + s.eps)", "* s.inv_sqrt_bias_correction2)"),),
        ("check_oracle",),
    ),
    Mutant(
        "no bias correction",
        (("f32(lr / (1.0 - power(beta1, step)))", "f32(lr)"),),
        ("check_oracle", "check_tracks_float64"),
    ),
    Mutant(
        "steps counted twice",
        (("        step += 1\n", "        step += 2\n"),),
        ("check_oracle", "check_many_tensors"),
    ),
    Mutant(
        "one step for all",
        (("t = int(step.item())", "t = int(self._rows[0][0][4].item())"),),
        ("check_many_tensors",),
    ),
    Mutant(
        "float32 parameters without decay",
        (("p.sub_(s.lr_weight_decay * p + upd)", "p.sub_(upd)"),),
        ("check_float32_parameters",),
    ),
    # the switches
    Mutant(
        "maximize ignored",
        (("-scale if hypers[group].maximize else scale", "scale"),),
        ("check_scaled", "check_float32_parameters"),
    ),
    Mutant("grad_scale ignored", (("float(grad_scale)", "1.0"),), ("check_scaled",)),
    Mutant("found_inf ignored", (("found_inf.item() != 0", "False"),), ("check_found_inf",)),
    Mutant(
        "found_inf inverted",
        (("found_inf.item() != 0", "found_inf.item() == 0"),),
        ("check_found_inf",),
    ),
    Mutant(
        "scaled gradient stored",
        (("_moments(g.float() * scale, m.float(), v", "_moments(g.mul_(2).float(), m.float(), v"),),
        ("check_gradient_only_read",),
    ),
    Mutant(
        "one-element tensors skipped",
        (("if p.numel() == 0:", "if p.numel() <= 1:"),),
        ("check_shapes",),
    ),
    # the dispatch
    Mutant(
        "different strides taken for equal ones",
        (
            (
                "all(x is None or x.stride() == p.stride() for x in tensors) and _is_dense(p)",
                "_is_dense(p)",
            ),
        ),
        ("check_layouts",),
        backend,
    ),
    Mutant(
        "gaps between elements updated",
        ((" for x in tensors) and _is_dense(p)", " for x in tensors)"),),
        ("check_outside_views",),
        backend,
    ),
    Mutant(
        "only the parameter's layout checked",
        (("if all(x is None or x.is_contiguous() for x in tensors):", "if p.is_contiguous():"),),
        ("check_layouts",),
        backend,
    ),
    Mutant(
        "the gradient's layout not checked",
        (("    if grad.stride() == param.stride() or (grad", "    if True or (grad"),),
        ("check_layouts", "check_expanded_gradient"),
        backend,
    ),
    Mutant(
        "copies not written back", (("original.copy_(copy)", "pass"),), ("check_layouts",), backend
    ),
    Mutant(
        "found_inf not passed on",
        (
            (
                "            self._table.update_(args)\n        else",
                "            self._table.update_(args._replace(found_inf=None))\n        else",
            ),
        ),
        ("check_found_inf",),
        backend,
    ),
    Mutant(
        "found_inf not passed on for other strides",
        (
            (
                "self._update_any_strides(args)",
                "self._update_any_strides(args._replace(found_inf=None))",
            ),
        ),
        ("check_skipped_in_any_layout",),
        backend,
    ),
)


def mutated(mutant: Mutant) -> Update:
    """Return the update function of a copy of the mutant's module with its edits."""
    source = inspect.getsource(mutant.module)
    for old, new in mutant.edits:
        assert source.count(old) == 1, (
            f"mutant {mutant.name!r} is out of date: {old!r} occurs {source.count(old)} times in "
            "its module"
        )
        source = source.replace(old, new)
    # under the true name, so that relative imports work; it is registered nowhere
    module = ModuleType(mutant.module.__name__)
    module.__package__ = mutant.module.__package__
    exec(compile(source, f"<mutant: {mutant.name}>", "exec"), module.__dict__)
    if mutant.module is backend:
        return partial(module.adamw_bf16_, backend="reference")

    def update(
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        corrections: list[Tensor | None],
        steps: list[Tensor],
        **kwargs: Any,
    ) -> None:
        take_step(
            table_of(module, params, exp_avgs, exp_avg_sqs, corrections, steps), grads, **kwargs
        )

    return update
