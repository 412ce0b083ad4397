"""How a forward is called: which of its arguments are tensors, and which are constants that a graph was traced for.

A graph takes tensors and nothing else. Whatever else a call brings (``None``, numbers, strings, the shape of nested
containers) is settled when the graph is traced, and compared at every later call: a call that differs is an error
rather than a wrong result.
"""

import enum
import inspect
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qcore.errors import GuardError

_CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes, enum.Enum, slice, type(...),
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip
#: What the code of a graph calls the signature of its call, and the structure of its result.
GLOBALS = ("_call_signature", "_result_structure")
_CONTAINERS = (tuple, list, dict, OrderedDict)
_ANYTHING = inspect.signature(lambda *args, **kwargs: None)


class NotConstantError(Exception):
    """An argument that is neither a tensor nor a constant, such as a cache that a forward changes."""


@dataclass(frozen=True, eq=False)
class Leaf:
    """One value of a call, after all containers are opened.

    Attributes:
        name: such as ``mask`` or ``states[0]``.
        is_tensor: whether the graph takes it as an input.
        constant: otherwise, its value when the graph was traced.
    """

    name: str
    is_tensor: bool
    constant: Any = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Leaf):
            return NotImplemented
        return (self.name, self.is_tensor) == (other.name, other.is_tensor) and same(self.constant, other.constant)

    def __hash__(self) -> int:
        return hash((self.name, self.is_tensor))


@dataclass(frozen=True)
class Structure:
    """How tensors and constants make up nested arguments or results.

    Attributes:
        spec: how the leaves make up the whole.
        leaves: tensors, of which only the place is known, and constants.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Leaf, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        # A TreeSpec warns when it is unpickled; containers of numbers say the same.
        return _structure_of, (_numbered(self.spec), self.leaves)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Structure":
        return self

    def filled(self, tensors: Sequence[Any]) -> Any:
        """The whole with these values as its tensors."""
        given = iter(tensors)
        values = [next(given) if leaf.is_tensor else leaf.constant for leaf in self.leaves]
        return pytree.tree_unflatten(values, self.spec)

    @property
    def is_plain(self) -> bool:
        """Whether fx writes such a result by itself: a tensor, or tuples, lists and dictionaries of tensors."""
        return all(leaf.is_tensor for leaf in self.leaves) and _is_plain(self.spec)


@dataclass(frozen=True)
class CallSignature:
    """How a forward is called.

    What is passed on is what was given, as it was given: a forward may be wrapped by a function to which a default that
    is given, or by position, isn't the same.

    Attributes:
        owner: whose forward it is, for messages.
        parameters: of the forward, without ``self`` and annotations.
        structure: of the arguments by name.
        positional: how many arguments were given by position.
        given: the names of all that were given; the others are defaults.
    """

    owner: str
    parameters: inspect.Signature
    structure: Structure
    positional: int
    given: tuple[str, ...]

    @staticmethod
    def of(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], owner: str) -> "CallSignature":
        """The signature of ``module(*args, **kwargs)``.

        Raises:
            NotConstantError: an argument can't be an input of a graph.
            TypeError: the forward takes no such arguments.
        """
        parameters, arguments, given = _bound(_parameters(module), args, kwargs)
        values, spec = _flatten(arguments)
        leaves = []
        for name, value in zip(_names(spec), values, strict=True):
            if not isinstance(value, (Tensor, *_CONSTANTS)):
                raise NotConstantError(f"its argument {name} is a {type(value).__name__}, no tensor and no constant")
            leaves.append(Leaf(name, True) if isinstance(value, Tensor) else Leaf(name, False, value))
        return CallSignature(owner, parameters, Structure(spec, tuple(leaves)), len(args), given)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CallSignature":
        return self

    @property
    def tensor_names(self) -> list[str]:
        """The names of the tensors among the arguments."""
        return [leaf.name for leaf in self.structure.leaves if leaf.is_tensor]

    @property
    def is_plain(self) -> bool:
        """Whether every parameter is a tensor that can be given by position."""
        kinds = {parameter.kind for parameter in self.parameters.parameters.values()}
        named = kinds <= {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
        return named and self.tensor_names == list(self.parameters.parameters)

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors of a call, after its constants were compared.

        Raises:
            GuardError: the call has another structure, or other constants, than the one that was traced.
        """
        _, arguments, _ = _bound(self.parameters, args, kwargs)
        values, spec = _flatten(arguments)
        if spec != self.structure.spec:
            raise GuardError(self._message("its arguments", _outline(self.structure.spec), _outline(spec)))
        tensors = []
        for leaf, value in zip(self.structure.leaves, values, strict=True):
            if leaf.is_tensor is not isinstance(value, Tensor) or not (leaf.is_tensor or same(leaf.constant, value)):
                was = "a tensor" if leaf.is_tensor else repr(leaf.constant)
                now = "a tensor" if isinstance(value, Tensor) else repr(value)
                raise GuardError(self._message(f"argument {leaf.name}", was, now))
            if leaf.is_tensor:
                tensors.append(value)
        return tensors

    def arguments(self, tensors: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The call with these values as its tensors: positional and keyword arguments."""
        named = self.structure.filled(tensors)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name in self.given:
            kind = self.parameters.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                args.extend(named[name])
            elif kind is inspect.Parameter.VAR_KEYWORD:
                kwargs.update(named[name])
            elif len(args) < self.positional:
                args.append(named[name])
            else:
                kwargs[name] = named[name]
        return args, kwargs

    def _message(self, what: str, was: str, now: str) -> str:
        return (
            f"{self.owner} was prepared for one form of call and is called in another: {what} was {was} at preparation "
            f"and is {now} now. Prepare it with example inputs of this form, or keep a float model beside it for such "
            'calls with PrepareCustomConfig().set_guard_failure("float")'
        )


class SignatureCodeGen(fx.graph.CodeGen):
    """Code of a graph whose forward takes what the traced forward took and returns what that returned.

    Args:
        signature: of the arguments.
        structure: of the result.
    """

    def __init__(self, signature: CallSignature, structure: Structure) -> None:
        super().__init__()
        self.signature = signature
        self.structure = structure

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_options: Any) -> str:
        """The head of the forward: takes any arguments, and checks and opens them."""
        names = [name.split(":")[0].split("=")[0].split("#")[0].strip() for name in free_vars]
        target = f"{', '.join(names)}, = " if names else ""
        return f"def {self._func_name}(self, *args, **kwargs):\n    {target}{GLOBALS[0]}.bind(args, kwargs)"

    def generate_output(self, output_args: Any, **_options: Any) -> str:
        """The last line of the forward."""
        return f"return {GLOBALS[1]}.filled({output_args!r})"

    def additional_globals(self) -> list[tuple[str, Any]]:
        """What the generated code calls."""
        return list(zip(GLOBALS, (self.signature, self.structure), strict=True))

    def process_inputs(self, *args: Any) -> Any:
        """For fx.Interpreter: the tensors."""
        return self.signature.bind(args, {})

    def process_outputs(self, outputs: Any) -> Any:
        """For fx.Interpreter: the result."""
        return self.structure.filled(outputs)


def check_size(value: Any, expected: Any, what: str) -> None:
    """A node of the graph: compares what was read from sizes when the graph was traced with what it is now.

    Raises:
        GuardError: it differs.
    """
    # What a compiler puts in the place of a size is no int, but compares as one.
    is_symbolic = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
    if value != expected if is_symbolic else not same(expected, value):
        raise GuardError(
            f"the graph was traced for {what} = {expected}, and now it is {value}. The forward decides by it, so the "
            "graph doesn't hold for this input: prepare with example inputs of this size"
        )


class _Unknown:
    """Stands for a default that a call can't be compared with."""

    def __reduce__(self) -> str:
        return "_UNKNOWN"


_UNKNOWN = _Unknown()


def _parameters(module: nn.Module) -> inspect.Signature:
    forward = type(module).forward
    kept = list(inspect.signature(forward).parameters.values())[1:]
    # To a function around the forward, a default that is given may be another call than one that isn't.
    is_wrapped = inspect.unwrap(forward, stop=lambda function: not _is_torchs(function)) is not inspect.unwrap(forward)

    def known(default: Any) -> Any:
        if default is inspect.Parameter.empty:
            return default
        is_constant = all(isinstance(leaf, _CONSTANTS) for leaf in _flatten(default)[0])
        return default if is_constant and not is_wrapped else _UNKNOWN

    empty = inspect.Parameter.empty
    return inspect.Signature(
        [parameter.replace(annotation=empty, default=known(parameter.default)) for parameter in kept]
    )


def _is_torchs(function: Any) -> bool:
    """Whether a function comes from torch, such as what ``torch.no_grad`` makes of a forward."""
    return str(getattr(function, "__globals__", {}).get("__name__", "")).partition(".")[0] == "torch"


def _bound(
    parameters: inspect.Signature, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[inspect.Signature, dict[str, Any], tuple[str, ...]]:
    """The parameters, the arguments by name with defaults that are known, and the names of those that were given."""
    try:
        bound = parameters.bind(*args, **kwargs)
    except TypeError:
        # A decorator may take what the forward that it wraps doesn't name.
        parameters = _ANYTHING
        bound = parameters.bind(*args, **kwargs)
    given = tuple(bound.arguments)
    bound.apply_defaults()
    for name, parameter in parameters.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = dict(sorted(bound.arguments[name].items()))
    arguments = {name: value for name, value in bound.arguments.items() if value is not _UNKNOWN}
    return parameters, arguments, given


def _flatten(arguments: Any) -> tuple[list[Any], pytree.TreeSpec]:
    # Other containers may change during the call, which a graph wouldn't.
    return pytree.tree_flatten(arguments, is_leaf=lambda value: type(value) not in _CONTAINERS and not _is_named(value))


def _is_named(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _numbered(spec: pytree.TreeSpec) -> Any:
    return pytree.tree_unflatten(list(range(spec.num_leaves)), spec)


def _structure_of(numbered: Any, leaves: tuple[Leaf, ...]) -> Structure:
    return Structure(pytree.tree_structure(numbered), leaves)


def _names(spec: pytree.TreeSpec) -> list[str]:
    named = pytree.tree_flatten_with_path(_numbered(spec))[0]
    names = [""] * spec.num_leaves
    for path, number in named:
        names[number] = str(getattr(path[0], "key", "")) + pytree.keystr(path[1:])
    return names


def same(constant: Any, value: Any) -> bool:
    """Whether two constants are the same to every operator: of one type, and floats bit for bit (``-0.0``, NaN)."""
    if constant is value:
        return True
    if type(constant) is not type(value):
        return False
    if isinstance(constant, float):
        return struct.pack("d", constant) == struct.pack("d", value)
    if isinstance(constant, complex):
        return same(constant.real, value.real) and same(constant.imag, value.imag)
    if isinstance(constant, slice):
        return all(same(getattr(constant, name), getattr(value, name)) for name in ("start", "stop", "step"))
    if isinstance(constant, (tuple, list)):
        return len(constant) == len(value) and all(map(same, constant, value))
    return bool(constant == value)


def _outline(spec: pytree.TreeSpec) -> str:
    return f"({', '.join(_names(spec))})"


def _is_plain(spec: pytree.TreeSpec) -> bool:
    if spec.is_leaf():
        return True
    return spec.type in (tuple, list, dict) and all(_is_plain(child) for child in spec.children())
