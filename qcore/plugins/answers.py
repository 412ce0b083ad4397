"""What the answer of each hook must be: one check for each, as data; a check gives a problem, or nothing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qcore import ops
from qcore.backend_config import BackendConfig
from qcore.errors import PluginError
from qcore.fx.fuse import FusionPattern
from qcore.fx.graph_module import QGraphModule, get_attribute
from qcore.fx.patterns import config_problems, pattern_problems
from qcore.fx.record import record_of
from qcore.fx.shapes import copied
from qcore.fx.signature import SignatureCodeGen
from qcore.lowering.lowered import Lowered
from qcore.observer import ObserverBase
from qcore.plugins.hookspecs import Availability, BackendInfo
from qcore.qconfig_mapping import QConfigMapping

#: How far a lowered model's results may lie from the reference's, relative to those: far more than roundings come to,
#: far less than any other model's.
LARGEST_ERROR = 0.5


def _info(answer: Any) -> str:
    problem = _record(answer, BackendInfo, name=str, api_version=int, description=str, priority=int)
    if problem:
        return problem
    versions = answer.mapping_versions
    if not isinstance(versions, tuple) or not versions or not all(type(version) is int for version in versions):
        return f"returned mapping_versions={versions!r}, not a tuple of at least one integer"
    return ""


def _availability(answer: Any) -> str:
    return _record(answer, Availability, ok=bool, reason=str, isa=str)


def _config(answer: Any) -> str:
    problem = _no_instance(answer, BackendConfig)
    problems = [] if problem else config_problems(answer)
    return f"returned what can't be meant so: {'; '.join(problems)}" if problems else problem


def _fusions(answer: Any) -> str:
    if not isinstance(answer, Sequence) or isinstance(answer, str):
        return f"returned {_found(answer)}, not a sequence of FusionPattern"
    for pattern in answer:
        if not isinstance(pattern, FusionPattern):
            return f"returned a sequence that holds {_found(pattern)}, not only FusionPattern"
        problems = pattern_problems(pattern.pattern)
        if not callable(pattern.rewrite):
            problems.append(f"its rewrite is {_found(pattern.rewrite)}, no function")
        if problems:
            return f"returned a FusionPattern of {pattern.pattern!r}: {'; '.join(problems)}"
    return ""


def _observers(answer: Any) -> str:
    if not isinstance(answer, Mapping):
        return f"returned {_found(answer)}, not a mapping of observer classes"
    for core, own in answer.items():
        if not _is_class(core, ObserverBase):
            return f"gave the key {core!r}, which is no observer class"
        if not _is_class(own, core):
            return f"gave {own!r} for {core.__name__}, which is no subclass of it"
    return ""


def _mapping(answer: Any) -> str:
    problem = _no_instance(answer, QConfigMapping)
    if not problem:
        answer.traits()  # Builds every observer; what can't be built raises.
    return problem


def _lowered(answer: Any) -> str:
    problem = _no_instance(answer, Lowered)
    if problem:
        return f"{problem}; give Lowered(module)" if isinstance(answer, nn.Module) else problem
    problem = _record(answer, Lowered, module=nn.Module, kernels=Mapping, declined=Mapping)
    for name in () if problem else ("kernels", "declined"):
        for item in getattr(answer, name).items():
            if not all(isinstance(part, str) for part in item):
                return f"returned Lowered({name}={{{item[0]!r}: {item[1]!r}}}), which doesn't map names to names"
    return problem


#: The check of each hook's answer.
ANSWERS: Mapping[str, Callable[[Any], str]] = {
    "qcore_backend_info": _info,
    "qcore_probe": _availability,
    "qcore_backend_config": _config,
    "qcore_fusion_patterns": _fusions,
    "qcore_observers": _observers,
    "qcore_default_qconfig_mapping": _mapping,
    "qcore_lower": _lowered,
}


def snapshot(model: QGraphModule) -> tuple[list[Any], ...]:
    """What a hook that is given a model must leave as it is: its graph, its modules, and its tensors' contents."""
    nodes: list[Any] = list(model.graph.nodes)
    modules: list[nn.Module] = [model]
    tensors: list[Tensor | None] = []
    seen: set[nn.Module | None] = {None, model}
    for module in modules:  # ``modules()`` and the like take ten times as long.
        tensors += [*module._parameters.values(), *module._buffers.values()]
        for inner in module._modules.values():
            if inner not in seen:
                seen.add(inner)
                modules.append(inner)  # type: ignore[arg-type]
    versions = [None if t is None or t.is_inference() else t._version for t in tensors]
    return nodes, [n.target for n in nodes], [n.args for n in nodes], [*map(id, modules), *map(id, tensors)], versions


def unlike(reference: QGraphModule, answer: Lowered) -> str:
    """How a lowered model differs from the reference model it is to stand for; empty if it doesn't.

    One that was made decision by decision, as ``lower_with_rules`` does, has accounted for each. Any other is run once,
    beside the reference, on values like those that the model was calibrated with.

    Raises:
        PluginError: it can't be run.
    """
    record, lowered = record_of(reference), answer.module
    known = {decision.node for decision in record.plan.decisions} if record is not None else set()
    strange = sorted({*answer.kernels, *answer.declined} - known)
    if strange:
        return f"named kernels for {', '.join(map(repr, strange))}, which no decision of the plan is about"
    if lowered is reference or answer.reference is reference:
        return ""
    tensors = [_like_example(reference, node) for node in reference.graph.nodes if node.op == "placeholder"]
    if any(tensor is None for tensor in tensors):
        return ""
    codegen = reference.graph._codegen
    signature = codegen.signature if isinstance(codegen, SignatureCodeGen) else None
    args, kwargs = (tensors, {}) if signature is None else signature.arguments(tensors)
    with torch.no_grad():
        try:
            expected = reference(*copied(args), **copied(kwargs))
        except Exception:
            return ""  # Such values tell nothing about this model.
        try:
            found = lowered(*copied(args), **copied(kwargs))
        except Exception as error:
            raise PluginError(
                f"the model doesn't run where the reference does: {type(error).__name__}: {error}", hook="qcore_lower"
            ) from error
    return _apart(expected, found)


def _like_example(reference: QGraphModule, node: fx.Node) -> Tensor | None:
    """A tensor for an input of a reference model: floats within the range that was observed, other types all alike."""
    example = node.meta.get("example")
    if example is None or not example.dtype.is_floating_point:
        return None if example is None else torch.full(example.shape, example.dtype == torch.bool, dtype=example.dtype)
    low, high = -1.0, 1.0
    for user in node.users:
        if user.target is ops.quantize_per_tensor:
            _, scale, zero_point, *bounds = user.args[:5]
            scale, zero_point = (get_attribute(reference, str(getattr(n, "target", ""))) for n in (scale, zero_point))
            low, high = (float((bound - zero_point) * scale) for bound in bounds)
    values = torch.rand(example.shape, generator=torch.Generator().manual_seed(0))
    return (values * (high - low) + low).to(example.dtype)


def _apart(expected: Any, found: Any) -> str:
    wanted, spec = pytree.tree_flatten(expected)
    given, other = pytree.tree_flatten(found)
    problem = "returned a model that isn't the one it was given: "
    if spec != other:
        return f"{problem}its result is built otherwise"
    for want, have in zip(wanted, given, strict=True):
        if not isinstance(want, Tensor):
            continue
        if not isinstance(have, Tensor) or (want.shape, want.dtype) != (have.shape, have.dtype):
            return f"{problem}it gives {_described(have)} where the reference gives {_described(want)}"
        if want.is_floating_point() and want.isfinite().all():
            error, size = float((have - want).double().norm()), float(want.double().norm())
            if not error <= LARGEST_ERROR * size:
                return f"{problem}its results differ from the reference's by {error:.3g}, where those are {size:.3g}"
    return ""


def _described(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else _found(value)


def _found(value: Any) -> str:
    kind = type(value)
    return "None" if value is None else f"a {kind.__module__}.{kind.__qualname__}".replace("builtins.", "")


def _no_instance(answer: Any, wanted: type) -> str:
    name = f"{wanted.__module__}.{wanted.__name__}"
    return "" if isinstance(answer, wanted) else f"returned {_found(answer)}, not a {name}"


def _record(answer: Any, wanted: type, **fields: type) -> str:
    problem = _no_instance(answer, wanted)
    for name, kind in {} if problem else fields.items():
        value = getattr(answer, name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            return f"returned {wanted.__name__}({name}={value!r}), which is no {kind.__name__}"
    return problem


def _is_class(value: Any, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base)
