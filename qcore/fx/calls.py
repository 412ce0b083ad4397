"""What stands around the calls of the modules that qcore's verbs return."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling, is_exporting

from qcore import ops
from qcore.errors import DtypeError, GuardError, NotSupportedError, QcoreError
from qcore.fx.signature import SignatureCodeGen

if TYPE_CHECKING:
    from qcore.fx.graph_module import QGraphModule


def wrap_calls(module: "QGraphModule") -> None:
    """Let a module run as its stage wants it, wherever that gives the same.

    A converted one runs without Python between its operators, and no compiler looks into it. The gradient of a
    reference model passes its roundings. Where torch fails on an argument of another kind than the model was prepared
    with, the error names it.

    Args:
        module: has its code, and knows its preparation.
    """
    assert module.preparation is not None
    forward = type(module).forward
    if forward is vars(module).get("_wrapped"):
        return
    wrap = _converted if module.preparation.stage == "converted" else _in_float
    type(module).forward = vars(module)["_wrapped"] = wrap(module, forward)


def call_of_raw() -> Callable[..., Any]:
    """``__call__`` of a module that has no code yet: it is made outside of what a compiler traces."""

    def call(self: "QGraphModule", *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            from qcore.replay.apart import apart

            return apart(self, *args, **kwargs)
        self.finish()
        return self(*args, **kwargs)

    return _with_own_code(call)


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiler keeps what it made with the code that it was made of, and gives up after some variants."""
    assert isinstance(function, types.FunctionType)
    function.__code__ = function.__code__.replace()
    return function


def _converted(module: "QGraphModule", forward: Callable[..., Any]) -> Callable[..., Any]:
    # Here, as whoever converts nothing needn't wait for it.
    from qcore.fx.gradients import refusing
    from qcore.replay.executor import NOTHING, Executor

    # The class is kept until Python looks for cycles, so it must hold no tensors, and thus no executor.
    vars(module)["_executor"] = Executor(module, forward, refusing)
    call = type(module).__call__

    @_with_own_code
    def replayed(self: "QGraphModule", *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            from qcore.replay.apart import apart

            return apart(self.forward, *args, **kwargs)
        try:
            return self.__dict__["_executor"](*args, **kwargs)
        except Exception as error:
            _explain(error, self, forward, args, kwargs)
            raise

    @_with_own_code
    def called(self: "QGraphModule", *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            from qcore.replay.apart import apart

            return apart(self, *args, **kwargs)
        if "forward" in self.__dict__ or type(self).forward is not wrapped:
            return call(self, *args, **kwargs)
        # The way through torch's own call takes as long as all that is looked at before a replay.
        found = self.__dict__["_executor"].replay(args, kwargs)
        return call(self, *args, **kwargs) if found is NOTHING else found

    wrapped = functools.wraps(forward)(replayed)  # Whoever asks for the signature, or traces the code, finds that.
    type(module).__call__ = called  # type: ignore[method-assign]
    return wrapped


def _in_float(module: "QGraphModule", forward: Callable[..., Any]) -> Callable[..., Any]:
    assert module.preparation is not None
    is_reference = module.preparation.stage == "reference"
    vars(module).pop("_straight", None)  # Made of another graph.

    @functools.wraps(forward)
    def checked(self: "QGraphModule", *args: Any, **kwargs: Any) -> Any:
        has_derivatives = (torch.is_grad_enabled() or ops.in_forward_mode()) and not is_exporting()
        run = _straight(self) if is_reference and has_derivatives else forward
        if is_dynamo_compiling():
            return run(self, *args, **kwargs)
        try:
            return run(self, *args, **kwargs)
        except Exception as error:
            _explain(error, self, forward, args, kwargs)
            raise

    return checked


def _straight(module: "QGraphModule") -> Callable[..., Any]:
    """The forward for calls that need gradients, made when there is the first such call."""
    found: Callable[..., Any] | None = module.__dict__.get("_straight")
    if found is not None:
        return found
    if is_dynamo_compiling():
        from qcore.replay.apart import apart

        return apart(_straight, module)  # type: ignore[no-any-return]
    from qcore.fx.gradients import straight_through

    made = module.__dict__["_straight"] = straight_through(module)
    return made


def _explain(
    error: Exception,
    module: "QGraphModule",
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Raise an error that names the argument, if one is of another kind than the model was prepared with."""
    if isinstance(error, QcoreError) and not isinstance(error, DtypeError):
        return
    assert module.preparation is not None
    codegen = module.graph._codegen
    try:
        if isinstance(codegen, SignatureCodeGen):
            values = codegen.signature.bind(args, kwargs)
        else:
            bound = inspect.signature(forward).bind(module, *args, **kwargs)
            bound.apply_defaults()
            values = list(bound.arguments.values())[1:]
    except TypeError:
        return  # Python's own error for a missing argument, or one too many.
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    for (name, dtype), value in zip(module.preparation.inputs, values, strict=False):
        found, wanted = _kind(value), f"a tensor of {dtype}"
        if found == wanted and devices and value.device not in devices:
            found, wanted = f"{found} on {value.device}", f"the model is on {', '.join(map(str, devices))}"
        elif found == wanted:
            continue
        else:
            wanted = f"the model was prepared with {wanted}"
        raise GuardError(
            f"argument {name} of {module.preparation.owner}: {found}; {wanted}. It failed with: {error}"
        ) from error
    if torch.device("meta") in devices:
        raise NotSupportedError(
            f"{module.preparation.owner} is on the meta device, so it has no data to compute with. Give it some: "
            "load_state_dict(state, assign=True)"
        ) from error


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "None" if value is None else f"a {type(value).__name__}"
    layout = "" if value.layout is torch.strided else f" with the layout {value.layout}"
    return f"a tensor of {value.dtype}{layout}"
