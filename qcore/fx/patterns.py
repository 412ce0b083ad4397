"""What is wrong with the patterns of a BackendConfig, a fusion pattern or a lowering rule, before they are used.

An element of a pattern that can't be anything in a graph would match nothing, and nobody would hear of it.
"""

import functools
from collections.abc import Hashable, Sequence

import torch
from torch import nn

from qcore.backend_config import BackendConfig, BackendPatternConfig, Condition, DTypeConfig, ObservationType, Pattern
from qcore.errors import did_you_mean
from qcore.fx.operators import FORMS, MODULES, Operator, is_listed


def pattern_problems(pattern: Pattern) -> list[str]:
    """One sentence for each element of a pattern that no graph can hold."""
    elements = pattern if isinstance(pattern, tuple) else (pattern,)
    problems = [problem for element in elements if (problem := _problem(element))]
    return problems if elements else ["a pattern without operators"]


def config_problems(config: BackendConfig) -> list[str]:
    """One sentence for everything in a BackendConfig that can't be meant so."""
    problems = []
    for pattern in config.configs:
        found = [*pattern_problems(pattern.pattern), *_wrong_parts(pattern)]
        problems += [f"BackendConfig {config.name!r}, pattern {pattern.pattern!r}: {problem}" for problem in found]
    return problems


def module_classes(config: BackendConfig) -> list[type[nn.Module]]:
    """The module classes that a config names as operators of their own: such modules are kept whole."""
    elements = [
        element
        for pattern in config.configs
        for element in (pattern.pattern if isinstance(pattern.pattern, tuple) else (pattern.pattern,))
    ]
    return [e for e in elements if isinstance(e, type) and issubclass(e, nn.Module) and e not in MODULES]


def _problem(element: object) -> str:
    """What is wrong with one element; empty if nothing is."""
    if isinstance(element, (tuple, list)):
        return f"{element!r} within a chain; a chain is one flat tuple in the order of execution"
    if isinstance(element, Operator):
        return "" if is_listed(element) else f"{element.name!r} is an operator that qcore's table doesn't list"
    if isinstance(element, Hashable) and (element in FORMS or element in MODULES):
        return ""
    if isinstance(element, str):
        if callable(getattr(torch.Tensor, element, None)):
            return ""
        question = did_you_mean(element, [*(form for form in FORMS if isinstance(form, str)), *dir(torch.Tensor)])
        return f"tensors have no method {element!r}; {question or 'name a method, a function or a module class'}"
    if isinstance(element, type):
        return "" if issubclass(element, nn.Module) else f"the class {element.__name__} is no nn.Module"
    if isinstance(element, nn.Module):
        return f"{type(element).__name__}(...) is a module; give its class"
    if isinstance(element, functools.partial) or getattr(element, "__name__", "") == "<lambda>":
        return f"{element!r} is no function that a model can call by itself"
    if getattr(torch.Tensor, getattr(element, "__name__", ""), "") is element:
        return f"{element!r} is a method; give its name as a string"
    return "" if callable(element) else f"{element!r} is no operator, function, method name or module class"


def _wrong_parts(pattern: BackendPatternConfig) -> list[str]:
    parts: Sequence[tuple[object, type]] = (
        (pattern.observation_type, ObservationType),
        *((config, DTypeConfig) for config in pattern.dtype_configs),
        *([] if pattern.condition is None else [(pattern.condition, Condition)]),
    )
    return [
        f"expected a qcore {wanted.__name__}, found a {type(part).__module__}.{type(part).__name__}"
        for part, wanted in parts
        if not isinstance(part, wanted)
    ]
