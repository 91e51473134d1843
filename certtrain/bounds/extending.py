"""`register_operation`: another operation, from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from certtrain.bounds import interval
from certtrain.bounds.linear import free_slopes, relaxations
from certtrain.bounds.operations.record import Bind, Operation, define
from certtrain.bounds.rounding import table as sound
from certtrain.errors import UsageError


def register_operation(
    function: Callable[..., Any],
    bind: Bind,
    *,
    interval_rule: interval.Rule | None = None,
    relaxation: relaxations.Relaxation | None = None,
    sound_rule: sound.Rule | None = None,
    **traits: Any,
) -> Operation:
    """Teach certtrain an operation, or another rule for one; for this process, before networks that use it are bounded.

    Args:
        function: canonical; (x, *settings), all by position, differentiable by autograd.
        bind: takes the arguments as the function is called in networks, returns (x, *settings).
        interval_rule: (Box, *settings) -> Box of all results. Needed where traits do not say it: `increasing`,
            `decreasing`, `minimum` or a piecewise linear `curve` do.
        relaxation: (Box, *settings) -> LinearRelaxation, of an elementwise function whose `curve` does not give it.
            An operation that has neither, and is not affine, is refused by CROWN by name.
        sound_rule: (Arithmetic, OutwardBox, *settings) -> OutwardBox, which covers rounding too. Without it, bounds in
            a floating-point arithmetic are refused by name. Of a new operation linear bounds that cover rounding stay
            refused.
        traits: of `Operation`: modules, methods, functions, writes, require, ...

    Returns:
        The record, which replaces one that `function` had.

    Raises:
        UsageError: no interval rule, given or from traits; a trait that does not exist.

    docs/extending.md has a worked example.
    """
    try:
        operation = Operation(function, bind, **traits)
    except TypeError as error:
        raise UsageError(f"register_operation: {str(error).partition(') ')[2] or error}") from error
    rules: dict[str, tuple[dict[Callable[..., Any], Any], Callable[..., Any] | None]] = {
        "interval": (interval.RULES, interval_rule or interval.rule_from_traits(operation)),
        "linear": (relaxations.RELAXATIONS, relaxation or relaxations.relaxation_from_traits(operation)),
        "free slopes": (free_slopes.FREE_SLOPES, free_slopes.free_slopes_from_traits(operation)),
        "sound": (sound.RULES, sound_rule),
    }
    if rules["interval"][1] is None:
        raise UsageError(
            f"register_operation: {operation.name} needs an interval_rule, or a trait that gives one: increasing, "
            "decreasing, minimum, or a piecewise linear curve"
        )
    define(function, bind, **traits)
    for table, rule in rules.values():
        table.pop(function, None)
        if rule is not None:
            table[function] = rule
    return operation
