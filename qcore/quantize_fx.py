"""The verbs: prepare_fx, convert_fx, convert_to_reference_fx, fuse_fx, explain, and the default mappings."""

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from qcore.backend_config import BackendConfig
from qcore.errors import (
    ConfigError,
    NotSupportedError,
    TrainingModeError,
    UnsupportedQConfigError,
    UnsupportedQConfigWarning,
)
from qcore.fx.convert import convert_to_reference
from qcore.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from qcore.fx.fuse import BATCH_NORM_FUSIONS, fuse
from qcore.fx.graph_module import Preparation, QGraphModule
from qcore.fx.observe import observe
from qcore.fx.plan import Refusal, make_plan
from qcore.fx.resolve import Resolver
from qcore.fx.shapes import propagate_examples
from qcore.fx.tracer import trace
from qcore.plugins.manager import REFERENCE, Backend, best_backend, canonical_backend_name, get_available_backend
from qcore.qconfig_mapping import QConfigMapping
from qcore.quantization_plan import QuantizationPlan

OnUnsupported = Literal["error", "warn", "ignore"]


def prepare_fx(
    model: nn.Module,
    qconfig_mapping: QConfigMapping | dict[str, Any],
    example_inputs: tuple[Any, ...],
    prepare_custom_config: PrepareCustomConfig | dict[str, Any] | None = None,
    _equalization_config: QConfigMapping | None = None,
    backend_config: BackendConfig | None = None,
    *,
    backend: str | None = None,
    on_unsupported: OnUnsupported = "warn",
) -> QGraphModule:
    """Make a copy of a float model with observers in it, ready for calibration.

    Args:
        model: in evaluation mode; it isn't changed.
        qconfig_mapping: which qconfig goes to which operator.
        example_inputs: a tuple on which ``model(*example_inputs)`` runs; shapes and dtypes are read from that run.
        prepare_custom_config: exceptions.
        _equalization_config: not supported yet.
        backend_config: a capability of your own, for the reference backend; or one that narrows ``backend``.
        backend: name of the backend to prepare for. By default: the reference backend if ``backend_config`` is given;
            else the backend whose default mapping this is; else the best installed one that this machine supports.
        on_unsupported: what to do about a qconfig that the backend doesn't accept: raise, warn, or say so only in
            ``explain(prepared)``. The operator stays float.

    Returns:
        A GraphModule that computes what ``model`` does, and watches.

    Raises:
        ConfigError: names in the mapping that match nothing, observers that can't be built, wrong types; all at once.
        UnsupportedQConfigError: with ``on_unsupported="error"``.
        TrainingModeError: the model is in training mode.
        TraceError: the model can't be traced.
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
    mapping = _as_mapping(qconfig_mapping)
    custom = _as_custom_config(prepare_custom_config)
    _check_arguments(model, example_inputs, _equalization_config, on_unsupported)
    traits = mapping.traits()
    chosen = _choose_backend(backend, backend_config, mapping)
    config = backend_config if backend_config is not None else chosen.backend_config()
    resolver = Resolver(mapping)
    paths = [path for path, _ in model.named_modules()]
    problems = resolver.unmatched_names(paths) + _unmatched_leaves(custom, paths) + _missing_attributes(model, custom)
    if problems:
        raise ConfigError(problems)

    traced = trace(model, custom.non_traceable_module_names, custom.non_traceable_module_classes)
    fuse(traced, chosen.fusion_patterns())
    propagate_examples(traced, model, example_inputs)
    plan, refusals = make_plan(traced, resolver, traits, chosen.name, config)
    if resolver.unmatched_orders():
        raise ConfigError(resolver.unmatched_orders())
    _report(refusals, on_unsupported)
    plan = observe(traced, plan, chosen.observers())
    for name in custom.preserved_attributes:
        setattr(traced, name, copy.deepcopy(getattr(model, name)))
    traced.train(model.training)
    preserved = tuple(custom.preserved_attributes)
    is_custom = backend_config is not None and backend is None
    return traced.with_preparation(Preparation("prepared", plan, chosen.name, config, is_custom, preserved))


def convert_fx(
    graph_module: QGraphModule,
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
    reference = _reference(graph_module, convert_custom_config, _remove_qconfig, qconfig_mapping, backend_config)
    if keep_original_weights:
        raise NotSupportedError(
            "convert_fx(keep_original_weights=True) isn't supported yet; the prepared model keeps them"
        )
    preparation = reference.preparation
    assert preparation is not None
    if preparation.is_custom_config:
        return reference
    return get_available_backend(preparation.backend).lower(reference)


def convert_to_reference_fx(
    graph_module: QGraphModule,
    convert_custom_config: ConvertCustomConfig | None = None,
    _remove_qconfig: bool = True,
    qconfig_mapping: QConfigMapping | None = None,
    backend_config: BackendConfig | None = None,
) -> QGraphModule:
    """Turn a calibrated model into a reference model: float operators between quantize and dequantize.

    It runs on every machine, exports, and defines what the backends' kernels must compute. Arguments and errors are
    those of :func:`convert_fx`.
    """
    return _reference(graph_module, convert_custom_config, _remove_qconfig, qconfig_mapping, backend_config)


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
    if fuse_custom_config is not None or backend_config is not None:
        raise NotSupportedError("fuse_fx takes no fuse_custom_config and no backend_config; name a backend=... instead")
    _check_mode(model)
    patterns = BATCH_NORM_FUSIONS if backend is None else get_available_backend(backend).fusion_patterns()
    fused = fuse(trace(model), patterns)
    fused.recompile()
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
    preparation = model.preparation if isinstance(model, QGraphModule) else None
    if preparation is None:
        raise ConfigError(f"explain needs a model that prepare_fx or convert_fx returned, found {type(model).__name__}")
    return preparation.plan


def _as_mapping(mapping: QConfigMapping | dict[str, Any]) -> QConfigMapping:
    if isinstance(mapping, dict):
        return QConfigMapping.from_dict(mapping)
    if not isinstance(mapping, QConfigMapping):
        found = f"{type(mapping).__module__}.{type(mapping).__name__}"
        raise ConfigError(f"qconfig_mapping: expected a qcore.QConfigMapping, found {found}; import it from qcore")
    return mapping


def _as_custom_config(config: PrepareCustomConfig | dict[str, Any] | None) -> PrepareCustomConfig:
    if isinstance(config, dict):
        return PrepareCustomConfig.from_dict(config)
    if config is not None and not isinstance(config, PrepareCustomConfig):
        raise ConfigError(f"prepare_custom_config: expected a qcore.PrepareCustomConfig, found {type(config).__name__}")
    return config or PrepareCustomConfig()


def _check_arguments(model: Any, example_inputs: Any, equalization: Any, on_unsupported: str) -> None:
    problems = []
    if not isinstance(model, nn.Module):
        problems.append(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    if isinstance(example_inputs, torch.Tensor) or not isinstance(example_inputs, (tuple, list)):
        problems.append(
            f"example_inputs: expected a tuple of positional arguments, found {type(example_inputs).__name__}; "
            "write (x,) for one input"
        )
    if on_unsupported not in ("error", "warn", "ignore"):
        problems.append(f'on_unsupported: expected "error", "warn" or "ignore", found {on_unsupported!r}')
    if problems:
        raise ConfigError(problems)
    if equalization is not None:
        raise NotSupportedError("_equalization_config isn't supported yet; leave it out")
    _check_mode(model)


def _check_mode(model: nn.Module) -> None:
    training = [path or "the model itself" for path, module in model.named_modules() if module.training]
    if training:
        listed = ", ".join(training[:5]) + (f" and {len(training) - 5} more" if len(training) > 5 else "")
        raise TrainingModeError(
            f"post-training quantization needs a model in evaluation mode; in training mode are: {listed}. "
            "Call model.eval() first"
        )


def _choose_backend(name: str | None, backend_config: BackendConfig | None, mapping: QConfigMapping) -> Backend:
    if backend_config is not None and not isinstance(backend_config, BackendConfig):
        found = f"{type(backend_config).__module__}.{type(backend_config).__name__}"
        raise ConfigError(f"backend_config: expected a qcore.BackendConfig, found {found}; import it from qcore")
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


def _unmatched_leaves(custom: PrepareCustomConfig, paths: Sequence[str]) -> list[str]:
    return [
        f"set_non_traceable_module_names: {name!r} is no module of the model"
        for name in custom.non_traceable_module_names
        if name not in paths
    ]


def _missing_attributes(model: nn.Module, custom: PrepareCustomConfig) -> list[str]:
    return [
        f"set_preserved_attributes: the model has no attribute {name!r}"
        for name in custom.preserved_attributes
        if not hasattr(model, name)
    ]


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


def _reference(
    prepared: Any,
    custom: ConvertCustomConfig | None,
    remove_qconfig: bool,
    mapping: QConfigMapping | None,
    backend_config: BackendConfig | None,
) -> QGraphModule:
    preparation = prepared.preparation if isinstance(prepared, QGraphModule) else None
    if preparation is None or preparation.stage != "prepared":
        stage = f"a {preparation.stage} model" if preparation else type(prepared).__name__
        raise ConfigError(f"convert_fx needs what prepare_fx returned, found {stage}")
    if not remove_qconfig:
        raise NotSupportedError("_remove_qconfig=False: no module of a prepared model carries a qconfig; see explain()")
    if mapping is not None:
        raise NotSupportedError("convert_fx(qconfig_mapping=...) isn't supported yet; give the mapping to prepare_fx")
    if backend_config is not None and backend_config != preparation.backend_config:
        raise ConfigError(
            f"convert_fx got another backend_config ({backend_config!r}) than prepare_fx "
            f"({preparation.backend_config!r}); leave it out: the model remembers the one it was prepared with"
        )
    kernels = get_available_backend(preparation.backend).observers()
    if custom is not None:
        names = tuple(dict.fromkeys((*preparation.preserved, *custom.preserved_attributes)))
        missing = [name for name in names if not hasattr(prepared, name)]
        if missing:
            raise ConfigError(f"ConvertCustomConfig preserves {missing}, which the prepared model doesn't have")
        preparation = replace(preparation, preserved=names)
    return convert_to_reference(prepared, preparation, kernels)
