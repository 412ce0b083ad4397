"""The errors that qcore raises, and the warnings that it gives.

    QcoreError
    ├── ConfigError (ValueError)          a request that can't be honoured; lists every problem at once
    │   └── UnsupportedQConfigError       on_unsupported="error": a qconfig that the backend doesn't accept
    ├── NotSupportedError                 an argument that qcore knows and doesn't implement (yet)
    ├── ModelError
    │   ├── TrainingModeError             post-training quantization of a model in training mode
    │   ├── ExampleInputsError            the model doesn't run on the example inputs
    │   ├── TraceError                    the model can't be traced; names the submodule and the source line
    │   ├── NothingToQuantizeError        no operator of the model can be quantized as asked
    │   ├── GuardError                    a call with other constants or containers than the traced one
    │   ├── ShapeError (RuntimeError)     an input of another rank or width than a kernel takes
    │   └── DtypeError (TypeError)        a tensor of another dtype than a quantize takes
    ├── CalibrationError                  an observer that saw no data
    ├── GraphError                        a pass left a graph that isn't sound: a fault of qcore's or of a plugin's
    └── BackendError
        ├── BackendNotFoundError          no installed plugin has that name
        ├── PluginError                   a plugin is installed and can't be loaded, or a hook of it fails
        │   └── LoweringError             a backend's lowering failed, or gave what can't stand for the model
        └── BackendUnavailableError       the plugin works, this machine lacks what it needs

    QcoreWarning (UserWarning)
    ├── UnsupportedQConfigWarning         on_unsupported="warn": what stays float, and why
    └── CalibrationWarning                NaN or infinity reached an observer

Each message says what was asked, what was found and what to do next.
"""

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """A question for a message about a name that isn't known: ``"did you mean 'x'?"``; empty if none is like it."""
    plain = {other.lower().replace("-", "_"): other for other in known}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), plain, n=most)
    return f"did you mean {' or '.join(repr(plain[other]) for other in close)}?" if close else ""


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the line, outside of qcore, that asked for what is warned of."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "qcore":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


class QcoreError(Exception):
    """Base of every error that qcore raises on purpose."""


class ConfigError(QcoreError, ValueError):
    """A configuration that can't be honoured.

    Attributes:
        problems: one sentence for each fault; all of them, not only the first.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            lines = "\n".join(f"  - {problem}" for problem in self.problems)
            super().__init__(f"{len(self.problems)} problems in the configuration:\n{lines}")


class Problems(list[str]):
    """Sentences that one ConfigError will hold."""

    def expect(self, name: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> bool:
        """Note that an argument has a wrong type; returns whether it is right."""
        if isinstance(value, kind):
            return True
        found = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        module = type(value).__module__
        if wanted.startswith("a qcore.") and not module.startswith(("qcore", "builtins")):
            found = f"{module}.{found}; import it from qcore"
        self.append(f"{name}: expected {wanted}, found {found}")
        return False

    def of(self, function: Callable[..., T], *arguments: Any, prefix: str = "") -> T | None:
        """What a function gives; ``None``, and its problems noted, if it raises a ConfigError."""
        try:
            return function(*arguments)
        except ConfigError as error:
            self.extend(prefix + problem for problem in error.problems)
            return None

    def raise_any(self) -> None:
        """Raise the error that lists them."""
        if self:
            raise ConfigError(self)


class UnsupportedQConfigError(ConfigError):
    """A qconfig that no dtype config of the backend accepts, with ``on_unsupported="error"``."""


class NotSupportedError(QcoreError, NotImplementedError):
    """An argument that has a meaning and that this version of qcore doesn't implement."""


class ModelError(QcoreError):
    """The model itself stands in the way."""


class TrainingModeError(ModelError):
    """Post-training quantization was asked for a model in training mode."""


class ExampleInputsError(ModelError):
    """The model doesn't run on the example inputs; the model's own error is chained."""


class TraceError(ModelError):
    """The model can't be traced.

    Attributes:
        module_path: path of the submodule whose forward failed (``""`` is the model itself).
        location: ``file:line`` of the user's code that failed, or ``None``.
        reason: what failed there, in a few words.
    """

    def __init__(self, message: str, module_path: str = "", location: str | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.module_path = module_path
        self.location = location
        self.reason = reason or message


class NothingToQuantizeError(ModelError):
    """A mapping asks for quantization, and nothing in the model can be quantized as it asks."""


class GuardError(ModelError):
    """A call with other constants, containers or sizes than those that the model was prepared for."""


class ShapeError(ModelError, RuntimeError):
    """A kernel is given a tensor of another rank, or with another number of channels, than its weight is for."""


class DtypeError(ModelError, TypeError):
    """A quantize is given a tensor that isn't float32, and that can't be cast to it without loss."""


class CalibrationError(QcoreError):
    """Observers that saw no data.

    Attributes:
        observers: their names in the prepared model.
    """

    def __init__(self, message: str, observers: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.observers = tuple(observers)


class GraphError(QcoreError):
    """A pass left a graph that isn't sound, or that isn't what the plan says. The user can't mend that.

    Attributes:
        after: the pass.
        node: the node at which it was found.
        problem: what was found there, and what was expected.
    """

    def __init__(self, after: str, node: str, problem: str) -> None:
        super().__init__(
            f"after {after}, node {node!r} {problem}. This is a fault of qcore, or of the backend's plugin, and not of "
            "the model; please report it"
        )
        self.after = after
        self.node = node
        self.problem = problem

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.after, self.node, self.problem)


class BackendError(QcoreError):
    """Something about a backend or its plugin."""


class BackendNotFoundError(BackendError, LookupError):
    """No installed distribution provides a backend of that name."""


class PluginError(BackendError):
    """A plugin is installed and can't be used, or a hook of it failed or gave what it must not; the cause is chained.

    Attributes:
        backend: the backend's name; empty where only a part of a plugin is known to have failed.
        distribution: the distribution that brings it, with its version.
        hook: the hook that failed; empty if the plugin couldn't be loaded.
    """

    def __init__(self, message: str, backend: str = "", distribution: str = "", hook: str = "") -> None:
        super().__init__(message)
        self.backend = backend
        self.distribution = distribution
        self.hook = hook


class BackendUnavailableError(BackendError):
    """The plugin is sound, but this machine lacks what its kernels need."""


class LoweringError(PluginError):
    """A backend's lowering failed, changed what it was given, or returned what can't stand for the model."""


class QcoreWarning(UserWarning):
    """Base of the warnings that qcore gives."""


class UnsupportedQConfigWarning(QcoreWarning):
    """A qconfig that no dtype config of the backend accepts: the operator stays float."""


class CalibrationWarning(QcoreWarning):
    """NaN or infinity reached an observer during calibration."""
