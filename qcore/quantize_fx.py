"""The verbs: prepare_fx, convert_fx, convert_to_reference_fx, fuse_fx, explain, and the default mappings."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import fx, nn

from qcore.arguments import check_mode, checked_convert_config, checked_request
from qcore.backend_config import BackendConfig
from qcore.errors import (
    CalibrationError,
    ConfigError,
    NothingToQuantizeError,
    NotSupportedError,
    Problems,
    QcoreWarning,
    TraceError,
    UnsupportedQConfigError,
    UnsupportedQConfigWarning,
)
from qcore.fx.batches import InputConvention
from qcore.fx.convert import convert_to_reference
from qcore.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from qcore.fx.fuse import BATCH_NORM_FUSIONS, fuse
from qcore.fx.graph_module import QGraphModule, submodule
from qcore.fx.hooks import compute_weights, makers_of_weights
from qcore.fx.names import hidden_attributes
from qcore.fx.parts import Parts, find_parts, keep_to_operators, why_unsuitable
from qcore.fx.patterns import config_problems, module_classes
from qcore.fx.plan import Refusal
from qcore.fx.prepare import Preparer, garbage_left_alone
from qcore.fx.record import (
    RECORD,
    FloatFallback,
    Record,
    Settings,
    Stage,
    host_of,
    plan_of,
    record_of,
    records,
)
from qcore.fx.resolve import Resolver
from qcore.fx.runs import comparable
from qcore.fx.tracer import trace
from qcore.fx.twin import shared, twin_of, uncompiled
from qcore.fx.verify import lint
from qcore.migration import explain_missing
from qcore.plugins.backend import Backend
from qcore.plugins.manager import REFERENCE, best_backend, canonical_backend_name, get_available_backend
from qcore.qconfig_mapping import QConfigMapping
from qcore.quantization_plan import Decision, PythonModule, QuantizationPlan

OnUnsupported = Literal["error", "warn", "ignore"]


def prepare_fx(
    model: nn.Module,
    qconfig_mapping: QConfigMapping | dict[str, Any],
    example_inputs: tuple[Any, ...] | dict[str, Any],
    prepare_custom_config: PrepareCustomConfig | dict[str, Any] | None = None,
    _equalization_config: QConfigMapping | None = None,
    backend_config: BackendConfig | None = None,
    *,
    backend: str | None = None,
    on_unsupported: OnUnsupported = "warn",
    concrete_args: dict[str, Any] | None = None,
    tracer: fx.Tracer | None = None,
) -> nn.Module:
    """Make a copy of a float model with observers in it, ready for calibration.

    Args:
        model: in evaluation mode; it isn't changed.
        qconfig_mapping: which qconfig goes to which operator.
        example_inputs: a tuple on which ``model(*example_inputs)`` runs, a dictionary on which
            ``model(**example_inputs)`` runs, or both: ``(tuple, dict)``. Shapes and dtypes are read from that run.
        prepare_custom_config: exceptions.
        _equalization_config: not supported yet.
        backend_config: a capability of your own, for the reference backend; or one that narrows ``backend``.
        backend: name of the backend to prepare for. By default: the reference backend if ``backend_config`` is given;
            else the backend whose default mapping this is; else the best installed one that this machine supports.
        on_unsupported: what to do about a qconfig that the backend doesn't accept, and about a model in which nothing
            can be quantized: raise, warn, or say so only in ``explain(prepared)``. What isn't accepted stays float.
        concrete_args: arguments by name to settle, as ``fx.Tracer.trace`` takes them; whatever isn't a tensor among the
            example inputs is settled anyway.
        tracer: traces the model in the place of qcore's own tracer; what it keeps whole stays whole.

    Returns:
        A model that computes what ``model`` does, and watches: a GraphModule if the model could be traced whole, else
        a copy of the model, of its own class, with GraphModules in the place of the largest submodules that could be.
        ``explain`` tells which, and why not the others.

    Raises:
        ConfigError: names in the mapping that match nothing, observers that can't be built, wrong types; all at once.
        UnsupportedQConfigError: with ``on_unsupported="error"``.
        TrainingModeError: the model is in training mode.
        NothingToQuantizeError: nothing in the model can be quantized as the mapping asks, with
            ``on_unsupported="error"``; else the plan is empty.
        ExampleInputsError: the model doesn't run on the example inputs.
        BackendError: the backend isn't installed, can't be loaded, or can't run on this machine.
        NotSupportedError: an argument that has no effect yet.

    Example:
        >>> mapping = get_default_qconfig_mapping("reference")
        >>> prepared = prepare_fx(nn.Sequential(nn.Linear(4, 2), nn.ReLU()).eval(), mapping, (torch.randn(3, 4),))
        >>> _ = prepared(torch.randn(8, 4))
        >>> convert_fx(prepared)(torch.randn(3, 4)).shape
        torch.Size([3, 2])
    """
    options = {
        "backend": backend, "backend_config": backend_config, "on_unsupported": on_unsupported,
        "concrete_args": concrete_args, "tracer": tracer,
    }  # fmt: skip
    request = checked_request(model, qconfig_mapping, example_inputs, prepare_custom_config, options)
    if _equalization_config is not None:
        raise NotSupportedError("_equalization_config isn't supported yet; leave it out")
    mapping, resolver, custom = request.mapping, request.resolver, request.custom
    model = uncompiled(model)
    chosen = _choose_backend(backend, backend_config, mapping)
    config = backend_config if backend_config is not None else chosen.backend_config()

    args, kwargs = _call(example_inputs)
    settings = Settings(
        chosen.name, config, backend_config is not None and backend is None, InputConvention.of(model, args, kwargs)
    )
    kwargs = {**kwargs, **(concrete_args or {})}
    if tracer is not None:
        model = _traced_by(tracer, model, concrete_args)
        kwargs = {name: value for name, value in kwargs.items() if name not in (concrete_args or {})}
    its_own = ("qcore_fusion_patterns", *(("qcore_backend_config",) if backend_config is None else ()))
    leaf_classes = (*custom.non_traceable_module_classes, *module_classes(config))
    with garbage_left_alone(), chosen.answers_for(*its_own):
        with comparable():
            found = find_parts(
                model, args, kwargs, custom.non_traceable_module_names, leaf_classes, custom.preserved_attributes
            )
        preparer = Preparer(
            resolver, request.traits, settings, chosen.fusion_patterns(), chosen.observers(), found.copies
        )
        prepared = {path: preparer.prepare(part) for path, part in found.parts.items()}
        found.copies.make_as_new()
    unmatched = resolver.unmatched_orders(found.calls)
    if unmatched:
        raise ConfigError(unmatched)
    around = preparer.plan_around(model, found)
    _report(preparer.broken_requests(), on_unsupported)
    _warn_of_unmatched_types(resolver, model, found, on_unsupported)
    is_empty = not (preparer.quantizes_anything or preparer.broken_requests())
    if is_empty and mapping.asks_for_quantization:
        decisions = [d for plan in (around, *preparer.plans.values()) for d in plan.decisions]
        _report_empty(model, found.python, decisions, on_unsupported)
    idle = preparer.idle(found)
    graphs = {id(found.parts[path].module): graph for path, graph in prepared.items() if path not in idle}
    result = twin_of(model, found.copies, dict[int, Any](graphs))
    if record_of(result) is None:
        keep_to_operators(result)
        vars(result)[RECORD] = Record("prepared", settings, around)
    for part in found.parts.values():
        part.forget()
    found.copies.forget()
    if custom.guard_failure == "float":
        result = FloatFallback(result, twin_of(model))
    return result


def convert_fx(
    graph_module: nn.Module,
    convert_custom_config: ConvertCustomConfig | None = None,
    _remove_qconfig: bool = True,
    qconfig_mapping: QConfigMapping | None = None,
    backend_config: BackendConfig | None = None,
    keep_original_weights: bool = False,
) -> nn.Module:
    """Turn a calibrated model into one that computes on integers, on the kernels of the backend it was prepared for.

    Args:
        graph_module: what ``prepare_fx`` gave, after calibration; it isn't changed and can be converted again.
        convert_custom_config: attributes to carry over.
        _remove_qconfig: there is nothing to remove: no module carries a qconfig.
        qconfig_mapping: not supported yet.
        backend_config: may be given again; it must be the one that the model was prepared with.
        keep_original_weights: not supported yet.

    Raises:
        ConfigError: the model wasn't made by ``prepare_fx``, or another ``backend_config`` is given.
        CalibrationError: some observers saw no data.
        BackendError: the backend can't be loaded or fails.
    """
    if keep_original_weights:
        raise NotSupportedError(
            "convert_fx(keep_original_weights=True) isn't supported yet; the prepared model keeps them"
        )
    with garbage_left_alone():
        references, memo = _references(
            graph_module, convert_custom_config, _remove_qconfig, qconfig_mapping, backend_config
        )
        converted = {prepared: _lowered(reference) for prepared, reference in references.items()}
        return _with_graphs(graph_module, converted, "converted", memo)


def convert_to_reference_fx(
    graph_module: nn.Module,
    convert_custom_config: ConvertCustomConfig | None = None,
    _remove_qconfig: bool = True,
    qconfig_mapping: QConfigMapping | None = None,
    backend_config: BackendConfig | None = None,
) -> nn.Module:
    """Turn a calibrated model into a reference model: float operators between quantize and dequantize.

    It runs on every machine, exports, and defines what the backends' kernels must compute. Gradients are straight
    through each rounding. Compiled, it rounds as the compiler's float operators do, which may move a value to the next
    step. Arguments and errors are those of :func:`convert_fx`.
    """
    with garbage_left_alone():
        references, memo = _references(
            graph_module, convert_custom_config, _remove_qconfig, qconfig_mapping, backend_config
        )
        return _with_graphs(graph_module, references, "reference", memo)


def fuse_fx(
    model: nn.Module,
    fuse_custom_config: Any = None,
    backend_config: BackendConfig | None = None,
    *,
    backend: str | None = None,
) -> QGraphModule:
    """Make a copy of a float model with its batch norms folded, and whatever else the backend fuses.

    Args:
        model: in evaluation mode; it isn't changed.
        fuse_custom_config: not supported yet.
        backend_config: has no say in it: rewrites come from the backend's ``qcore_fusion_patterns``.
        backend: whose rewrites to use; by default only the folding of batch norms.

    Raises:
        TrainingModeError: the model is in training mode.
        TraceError: the model can't be traced.
        NotSupportedError: an argument that has no effect.
    """
    problems = Problems()
    problems.expect("model", model, nn.Module, "a torch.nn.Module")
    if backend is not None:
        problems.expect("backend", backend, str, "the name of a backend")
    problems.raise_any()
    if fuse_custom_config is not None or backend_config is not None:
        raise NotSupportedError("fuse_fx takes no fuse_custom_config and no backend_config; name a backend=... instead")
    if unsuitable := why_unsuitable(model):
        raise ConfigError(unsuitable)
    check_mode(model)
    model = uncompiled(model)
    if any(makers_of_weights(module) for module in model.modules()):  # As a call would, which fuse_fx makes none of.
        model = twin_of(model)
        compute_weights(model)
    traced = trace(model)
    if backend is None:
        fused = fuse(traced, BATCH_NORM_FUSIONS)
    else:
        chosen = get_available_backend(backend)
        with chosen.answers_for("qcore_fusion_patterns"):
            fused = fuse(traced, chosen.fusion_patterns())
    lint(fused, "fuse")
    fused.train(model.training)
    fused.finish()
    return fused


def get_default_qconfig_mapping(backend: str | None = None, version: int = 0) -> QConfigMapping:
    """The mapping that works best on a backend.

    Args:
        backend: its name; by default the best installed one that this machine supports.
        version: of the mapping; a released version doesn't change.

    Raises:
        BackendError: the backend isn't installed, can't be loaded, or can't run on this machine.
    """
    chosen = best_backend() if backend is None else get_available_backend(backend)
    return chosen.default_qconfig_mapping(version)


def explain(model: nn.Module) -> QuantizationPlan:
    """The plan of a prepared, reference or converted model; printing it shows a table.

    Raises:
        ConfigError: the model wasn't made by qcore.
    """
    found = records(model)
    if not found:
        raise ConfigError(f"explain needs a model that prepare_fx or convert_fx returned, found {type(model).__name__}")
    return plan_of(found)


def _lowered(reference: QGraphModule) -> nn.Module:
    record = record_of(reference)
    assert record is not None
    if record.settings.is_custom_config:
        return reference
    return get_available_backend(record.settings.backend).lower(reference)


def _with_graphs(
    model: nn.Module, new: Mapping[QGraphModule, nn.Module], stage: Stage, memo: dict[int, Any]
) -> nn.Module:
    """A copy of a prepared model with other modules in the place of its graphs; what is replaced isn't copied."""
    memo.update({id(graph): module for graph, module in new.items()})
    result = twin_of(model, memo=memo)
    host = host_of(result)
    record = record_of(host)
    if record is not None and record.stage == "prepared":
        vars(host)[RECORD] = replace(record, stage=stage)
    return result


def _choose_backend(name: str | None, backend_config: BackendConfig | None, mapping: QConfigMapping) -> Backend:
    problems = config_problems(backend_config) if backend_config is not None else []
    if problems:
        raise ConfigError(problems)
    if name is not None:
        if mapping.backend is not None and canonical_backend_name(name) != mapping.backend:
            warnings.warn(
                f"the mapping is the default of backend {mapping.backend!r}, and the model is prepared for {name!r}; "
                f"get_default_qconfig_mapping({name!r}) gives that backend's own",
                UnsupportedQConfigWarning,
                stacklevel=3,
            )
        return get_available_backend(name)
    if backend_config is not None:
        return get_available_backend(REFERENCE)
    if mapping.backend is not None:
        return get_available_backend(mapping.backend)
    return best_backend()


def _report(refusals: Iterable[Refusal], on_unsupported: OnUnsupported) -> None:
    lines = [
        f"{' + '.join(r.decision.operators)} at {r.decision.path or r.decision.node} (rule {r.decision.rule}): "
        f"{r.decision.reason}"
        for r in refusals
    ]
    if not lines or on_unsupported == "ignore":
        return
    if on_unsupported == "error":
        raise UnsupportedQConfigError(lines)
    listed = "\n".join(f"  - {line}" for line in lines)
    warnings.warn(
        f"these operators stay float, although a rule asks for a qconfig:\n{listed}",
        UnsupportedQConfigWarning,
        stacklevel=3,
    )


def _references(
    prepared: Any,
    custom: ConvertCustomConfig | None,
    remove_qconfig: bool,
    mapping: QConfigMapping | None,
    backend_config: BackendConfig | None,
) -> tuple[dict[QGraphModule, QGraphModule], dict[int, Any]]:
    """The reference model of every prepared graph, and the memo of what was copied for them."""
    custom = checked_convert_config(custom)
    found = records(prepared)
    other = next((record.stage for record in found.values() if record.stage != "prepared"), None)
    if other is not None or not found:
        stage = f"a {other} model" if other else type(prepared).__name__
        raise ConfigError(f"convert_fx needs what prepare_fx returned, found {stage}")
    if not remove_qconfig:
        raise NotSupportedError("_remove_qconfig=False: no module of a prepared model carries a qconfig; see explain()")
    if mapping is not None:
        raise NotSupportedError("convert_fx(qconfig_mapping=...) isn't supported yet; give the mapping to prepare_fx")
    host = host_of(prepared)
    wanted = custom.preserved_attributes if custom is not None else []
    if missing := [name for name in wanted if not hasattr(host, name)]:
        raise ConfigError(f"ConvertCustomConfig preserves {missing}, which the prepared model doesn't have")
    references, memo = {}, dict[int, Any]()
    empty: list[CalibrationError] = []
    for path, record in found.items():
        own = record.settings
        if backend_config is not None and backend_config != own.backend_config:
            raise ConfigError(
                f"convert_fx got another backend_config ({backend_config!r}) than prepare_fx "
                f"({own.backend_config!r}); leave it out: the model remembers the one it was prepared with"
            )
        graph = submodule(host, path)
        if not isinstance(graph, QGraphModule):
            continue  # A host has all its attributes.
        if graph is host:
            if hidden := hidden_attributes(wanted):
                raise ConfigError(hidden)
            record = replace(record, preserved=tuple(dict.fromkeys((*record.preserved, *wanted))))
        try:
            stand_ins = get_available_backend(own.backend).observers()
            references[graph] = convert_to_reference(graph, record, stand_ins, memo)
        except CalibrationError as error:
            empty.append(error)
    if empty:
        raise _joined_calibration_error(empty, len(references) + len(empty))
    return references, memo


def _joined_calibration_error(errors: list[CalibrationError], graphs: int) -> CalibrationError:
    if len(errors) == 1:
        return errors[0]
    messages = "\n".join(f"  - {error}" for error in errors[:5])
    return CalibrationError(
        f"{len(errors)} of the model's {graphs} parts weren't calibrated:\n{messages}",
        [name for error in errors for name in error.observers],
    )


def _call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    inputs = tuple(example_inputs)
    if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        return inputs
    return inputs, {}


def _traced_by(tracer: fx.Tracer, model: nn.Module, concrete_args: dict[str, Any] | None) -> fx.GraphModule:
    model = twin_of(model, shared)
    try:
        graph = tracer.trace(model, concrete_args)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TraceError(
            f"{type(tracer).__name__} can't trace {type(model).__name__}: {reason}. Leave tracer=... out: qcore's own "
            "traces more, and prepares in parts what can't be traced",
            "", None, reason,
        ) from error  # fmt: skip
    made = fx.GraphModule(model, graph)
    made.train(model.training)
    return made


def _report_empty(
    model: nn.Module, python: Sequence[PythonModule], decisions: Sequence[Decision], on_unsupported: OnUnsupported
) -> None:
    if on_unsupported == "ignore":
        return
    reasons = [str(module) for module in python[:3]]
    reasons += [f"{' + '.join(d.operators)} at {d.path or d.node}: {d.reason}" for d in decisions]
    reasons = list(dict.fromkeys(reasons))
    more = f"\n  - and {len(reasons) - 9} more; explain(prepared) lists all" if len(reasons) > 9 else ""
    listed = "".join(f"\n  - {reason}" for reason in reasons[:9]) + more or " it has no operators"
    message = (
        f"nothing in {type(model).__name__} can be quantized as the mapping asks, it stays float:{listed}\n"
        "Ask for other operators in the QConfigMapping"
    )
    if on_unsupported == "error":
        raise NothingToQuantizeError(f'{message}, or take the float model with on_unsupported="warn" or "ignore"')
    warnings.warn(message, UnsupportedQConfigWarning, stacklevel=3)


def _warn_of_unmatched_types(resolver: Resolver, model: nn.Module, found: Parts, on_unsupported: OnUnsupported) -> None:
    """Warn of types in the mapping of which the model has none: a rule for a family of models is no error."""
    classes = {type(module) for module in model.modules()}
    stay = {type(submodule(model, module.path)) for module in found.python}
    problem = resolver.unmatched_types({kind for _, kind in found.calls} | stay, classes)
    if problem and on_unsupported != "ignore":
        where = "; functions that what stays Python calls aren't seen" if found.python else ""
        warnings.warn(f"{problem}{where}", QcoreWarning, stacklevel=3)


explain_missing(__name__)
