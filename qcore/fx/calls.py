"""What stands around the calls of the modules that qcore's verbs return."""

import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling, is_exporting
from torch.utils._pytree import tree_leaves

from qcore import ops
from qcore.errors import DtypeError, GuardError, NotSupportedError, QcoreError
from qcore.fx.callers import needing_gradient, outside, watched
from qcore.fx.graph_module import QGraphModule
from qcore.fx.record import Record, record_of
from qcore.fx.signature import SignatureCodeGen

#: What a runner gives for a call that isn't done at once.
NOTHING = object()

#: Threads that run models as they are written. (A set: to ask for an attribute of a thread takes ten times as long.)
threads_as_written: set[int] = set()


@contextmanager
def as_written() -> Iterator[None]:
    """Within this, converted models of this thread run operator by operator from Python: to debug, or to compare."""
    thread = threading.get_ident()
    is_outermost = thread not in threads_as_written
    threads_as_written.add(thread)
    try:
        yield
    finally:
        if is_outermost:
            threads_as_written.remove(thread)


def _record(module: QGraphModule) -> Record:
    record = record_of(module)
    assert record is not None
    return record


def wrap_calls(module: QGraphModule) -> None:
    """Let a module run as its stage wants it, wherever that gives the same.

    No compiler looks into a converted one, and no gradient passes its kernels. The gradient of a reference model passes
    its roundings. Where torch fails on an argument of another kind than in the example call, the error names it.

    Args:
        module: has its code, and its record.
    """
    forward = type(module).forward
    if forward is vars(module).get("_wrapped"):
        return
    wrap = _converted if _record(module).stage == "converted" else _in_float
    type(module).forward = vars(module)["_wrapped"] = wrap(module, forward)


def call_of_raw() -> Callable[..., Any]:
    """``__call__`` of a module that has no code yet: it is made outside of what a compiler traces."""

    def call(self: QGraphModule, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return outside()(self, *args, **kwargs)
        self.finish()
        return self(*args, **kwargs)

    return _with_own_code(call)


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiler keeps what it made with the code that it was made of, and gives up after some variants."""
    assert isinstance(function, types.FunctionType)
    function.__code__ = function.__code__.replace()
    return function


class Runner:
    """Runs a converted graph, kernel by kernel.

    Args:
        module: the graph.
        forward: the forward that its code defines; takes the module first.
    """

    def __init__(self, module: QGraphModule, forward: Callable[..., Any]) -> None:
        self._module = weakref.ref(module)  # The module holds this, and both are to go when nobody holds the module.
        self.forward = forward
        self.forward_with_gradients: Callable[..., Any] | None = None

    @property
    def module(self) -> QGraphModule:
        """The graph."""
        module = self._module()
        assert module is not None
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The graph's result, if whoever calls can be told the truth."""
        return watched(self.module, self.run, args, kwargs)

    def at_once(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The graph's result without a call of the module, or ``NOTHING``."""
        return NOTHING

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The graph's result as it is written."""
        forward = self.forward
        if self.needs_gradients(args, kwargs):
            from qcore.fx.gradients import refusing

            forward = self.forward_with_gradients = self.forward_with_gradients or refusing(self.module)
        return forward(self.module, *args, **kwargs)

    def needs_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether autograd has to know of a call."""
        if not torch.is_grad_enabled():
            return False
        return needing_gradient(*self.module.parameters(), *tree_leaves((args, kwargs))) is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Runner":
        return self  # A copy of the module makes one of its own.


def _converted(module: QGraphModule, forward: Callable[..., Any]) -> Callable[..., Any]:
    # The class is kept until Python looks for cycles, so it must hold no tensors, and thus no runner.
    vars(module)["_runner"] = (module._runner_class or Runner)(module, forward)
    call = type(module).__call__

    @_with_own_code
    def run(self: QGraphModule, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return outside()(self.forward, *args, **kwargs)
        try:
            return self.__dict__["_runner"](*args, **kwargs)
        except Exception as error:
            _explain(error, self, forward, args, kwargs)
            raise

    @_with_own_code
    def called(self: QGraphModule, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return outside()(self, *args, **kwargs)
        if "forward" in self.__dict__ or type(self).forward is not wrapped:
            return call(self, *args, **kwargs)
        # The way through torch's own call takes as long as all that is looked at before a replay.
        found = self.__dict__["_runner"].at_once(args, kwargs)
        return call(self, *args, **kwargs) if found is NOTHING else found

    wrapped = functools.wraps(forward)(run)  # Whoever asks for the signature, or traces the code, finds that.
    type(module).__call__ = called  # type: ignore[method-assign]
    return wrapped


def _in_float(module: QGraphModule, forward: Callable[..., Any]) -> Callable[..., Any]:
    is_reference = _record(module).stage == "reference"
    vars(module).pop("_straight", None)  # Made of another graph.

    @functools.wraps(forward)
    def checked(self: QGraphModule, *args: Any, **kwargs: Any) -> Any:
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


def _straight(module: QGraphModule) -> Callable[..., Any]:
    """The forward for calls that need gradients, made when there is the first such call."""
    found: Callable[..., Any] | None = module.__dict__.get("_straight")
    if found is not None:
        return found
    if is_dynamo_compiling():
        return outside()(_straight, module)  # type: ignore[no-any-return]
    from qcore.fx.gradients import straight_through

    made = module.__dict__["_straight"] = straight_through(module)
    return made


def _explain(
    error: Exception,
    module: QGraphModule,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Raise an error that names the argument, if one is of another kind than the model was prepared with."""
    if isinstance(error, QcoreError) and not isinstance(error, DtypeError):
        return
    record, codegen = _record(module), module.graph._codegen
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
    for (name, dtype), value in zip(record.inputs, values, strict=False):
        found, wanted = _kind(value), f"a tensor of {dtype}"
        if found == wanted and devices and value.device not in devices:
            found, wanted = f"{found} on {value.device}", f"the model is on {', '.join(map(str, devices))}"
        elif found == wanted:
            continue
        else:
            wanted = f"the model was prepared with {wanted}"
        raise GuardError(f"argument {name} of {record.owner}: {found}; {wanted}. It failed with: {error}") from error
    if torch.device("meta") in devices:
        raise NotSupportedError(
            f"{record.owner} is on the meta device, so it has no data to compute with. Give it some: "
            "load_state_dict(state, assign=True)"
        ) from error


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "None" if value is None else f"a {type(value).__name__}"
    layout = "" if value.layout is torch.strided else f" with the layout {value.layout}"
    return f"a tensor of {value.dtype}{layout}"
