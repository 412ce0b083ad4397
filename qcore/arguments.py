"""What the verbs are given, looked at before anything is done: every problem of a call is found at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx, nn

from qcore.backend_config import BackendConfig
from qcore.errors import Problems, TrainingModeError
from qcore.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from qcore.fx.graph_module import modules_of
from qcore.fx.names import hidden_attributes
from qcore.fx.parts import why_unsuitable
from qcore.fx.resolve import Resolver
from qcore.qconfig import ObserverConstructor, ObserverTraits
from qcore.qconfig_mapping import QConfigMapping

Config = TypeVar("Config", QConfigMapping, PrepareCustomConfig, ConvertCustomConfig)


@dataclass(frozen=True)
class Request:
    """What a call of ``prepare_fx`` asks for, after it was found sound.

    Attributes:
        mapping: which qconfig goes to which operator.
        resolver: the same, ready to be asked.
        traits: of every observer constructor in it.
        custom: exceptions.
    """

    mapping: QConfigMapping
    resolver: Resolver
    traits: dict[ObserverConstructor, ObserverTraits]
    custom: PrepareCustomConfig


def checked_request(
    model: Any, qconfig_mapping: Any, example_inputs: Any, prepare_custom_config: Any, options: Mapping[str, Any]
) -> Request:
    """The request of a call of ``prepare_fx``.

    Args:
        model: as the user gave it, like all others.
        qconfig_mapping: likewise.
        example_inputs: likewise.
        prepare_custom_config: likewise.
        options: the other arguments, by name.

    Raises:
        ConfigError: some are wrong; names all of them.
        TrainingModeError: the model is in training mode.
    """
    problems = Problems()
    is_module = problems.expect("model", model, nn.Module, "a torch.nn.Module")
    if isinstance(example_inputs, torch.Tensor) or not isinstance(example_inputs, (tuple, list, Mapping)):
        problems.append(
            "example_inputs: expected a tuple of positional arguments, a dictionary of keyword arguments or both in a "
            f"tuple, found {type(example_inputs).__name__}; write (x,) for one input"
        )
    _check_options(problems, options)
    mapping = _config(problems, "qconfig_mapping", qconfig_mapping, QConfigMapping)
    if prepare_custom_config is None:
        prepare_custom_config = PrepareCustomConfig()
    custom = _config(problems, "prepare_custom_config", prepare_custom_config, PrepareCustomConfig)
    traits = problems.of(mapping.traits) or {}
    resolver = Resolver(mapping)
    if is_module:
        problems += why_unsuitable(model)
        paths = [path for path, _ in model.named_modules()]
        problems += resolver.unmatched_names(paths)
        problems += _unmatched(custom, model, paths)
    problems.raise_any()
    check_mode(model)
    return Request(mapping, resolver, traits, custom)


def _config(problems: Problems, name: str, value: Any, kind: type[Config]) -> Config:
    """A config, for which torch.ao's dictionary will do; an empty one if there are problems with it."""
    if isinstance(value, dict):
        return problems.of(kind.from_dict, value) or kind()
    return value if problems.expect(name, value, kind, f"a qcore.{kind.__name__}") else kind()


def _check_options(problems: Problems, options: Mapping[str, Any]) -> None:
    kinds: dict[str, tuple[type, str]] = {
        "backend": (str, "the name of a backend"),
        "backend_config": (BackendConfig, "a qcore.BackendConfig"),
        "concrete_args": (dict, "a dictionary of arguments by name"),
        "tracer": (fx.Tracer, "a torch.fx.Tracer"),
    }
    for name, (kind, wanted) in kinds.items():
        if options[name] is not None:
            problems.expect(name, options[name], kind, wanted)
    if options["on_unsupported"] not in ("error", "warn", "ignore"):
        problems.append(f'on_unsupported: expected "error", "warn" or "ignore", found {options["on_unsupported"]!r}')


def _unmatched(custom: PrepareCustomConfig, model: nn.Module, paths: Sequence[str]) -> list[str]:
    unknown = [name for name in custom.non_traceable_module_names if name not in set(paths)]
    gone = [name for name in custom.preserved_attributes if not hasattr(model, name)]
    problems = [f"set_non_traceable_module_names: {name!r} is no module of the model" for name in unknown]
    problems += [f"set_preserved_attributes: the model has no attribute {name!r}" for name in gone]
    return problems + hidden_attributes(custom.preserved_attributes)


def check_mode(model: nn.Module) -> None:
    """Refuse a model in training mode.

    Raises:
        TrainingModeError: names the modules.
    """
    if any(module.training for module in modules_of(model)):
        training = [path or "the model itself" for path, module in model.named_modules() if module.training]
        listed = ", ".join(training[:5]) + (f" and {len(training) - 5} more" if len(training) > 5 else "")
        raise TrainingModeError(
            f"post-training quantization needs a model in evaluation mode; in training mode are: {listed}. "
            "Call model.eval() first"
        )


def checked_convert_config(config: Any) -> ConvertCustomConfig | None:
    """The ``convert_custom_config`` of a call.

    Raises:
        ConfigError: it is none.
    """
    problems = Problems()
    checked = None if config is None else _config(problems, "convert_custom_config", config, ConvertCustomConfig)
    problems.raise_any()
    return checked
