"""Random models: a class written line by line, each line tried on real tensors before it is taken.

The source of a model is its identity: the same seed gives the same text, and a failure prints it. A value that is
written into, a view of it, a module called twice: all are as good as any other for the next line, and what the float
model computes then is what every later stage has to compute.
"""

import linecache
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from random_graphs import blocks
from random_graphs.forms import FORMS, OTHERS, WRITES

#: Elements of a value at most, and lines of a forward at most.
MAX_SIZE, MAX_LINES = 6_000, 12
#: Batches that a model must run with: those of the examples, and others.
BATCHES = (2, 1, 3, 5)
_SPACE = {"torch": torch, "nn": nn, "F": F, "blocks": blocks}


@dataclass(frozen=True)
class Live:
    """A value of the forward that is being written.

    Attributes:
        name: of the variable.
        shape: with a batch of 2.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(torch.Size(self.shape).numel())


class RandomModel(nn.Module):
    """Base of the generated classes: copies and pickles by its source."""

    source = ""

    def __reduce__(self) -> Any:
        return _empty, (self.source,), vars(self)


def _empty(source: str) -> RandomModel:
    made = RandomModel.__new__(model_class(source))
    nn.Module.__init__(made)
    return made


@cache
def model_class(source: str) -> type[RandomModel]:
    """The class that a source text defines."""
    name = f"random_graph_{zlib.crc32(source.encode())}.py"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # For tracebacks.
    space: dict[str, Any] = {**_SPACE, "RandomModel": RandomModel, "__name__": "random_graphs.made"}
    exec(compile(source, name, "exec"), space)
    made: type[RandomModel] = space["Made"]
    made.source = source
    return made


@dataclass(frozen=True)
class RandomGraph:
    """One random model.

    Attributes:
        seed: that it was made from.
        source: of its class.
        shapes: of its inputs, with a batch of 2.
        unit: how large its inputs are.
        used: the forms in it, as ``forms.FORMS`` calls them.
        is_exact: whether no rewrite of qcore's changes its arithmetic, such as the folding of a batch norm.
    """

    seed: int
    source: str
    shapes: tuple[tuple[int, ...], ...]
    unit: float
    used: frozenset[tuple[str, str]]
    is_exact: bool

    def build(self, seed: int = 0) -> RandomModel:
        """A model in evaluation mode; its weights and statistics depend on ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1000 + seed)
            model = model_class(self.source)().eval()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                        if tensor is not None:
                            tensor.data.uniform_(0.5, 1.5)
            return model

    def inputs(self, batch: int = 2, seed: int = 0, unit: float = 1.0) -> tuple[Tensor, ...]:
        """Inputs of a batch."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + 100 * seed + batch)
        return tuple(torch.randn((batch, *shape[1:]), generator=generator) * self.unit * unit for shape in self.shapes)


class Generator:
    """Writes one model.

    Args:
        seed: of all choices.
        attempt: the number of earlier models of this seed that came to nothing.
    """

    def __init__(self, seed: int, attempt: int) -> None:
        self.seed = seed
        self.random = random.Random(f"{seed}, {attempt}")
        self.modules: list[tuple[str, str]] = []
        self.tensors: list[str] = []
        self.lines: list[str] = []
        self.values: list[Live] = []
        self.used: set[tuple[str, str]] = set()
        self.root = nn.Module()
        self.space: dict[str, Any] = {**_SPACE, "self": self.root}
        self.pending: list[str] = []
        self.init: list[str] = []
        #: Every second model writes into nothing and keeps no state, so that it is one graph and gets deep.
        self.is_tame = self.random.random() < 0.5

    def choose(self, of: Sequence[Any]) -> Any:
        """One of several."""
        return self.random.choice(of)

    def width(self) -> int:
        """Outputs of a linear layer."""
        return int(self.choose([1, 3, 4, 4, 6, 8]))

    def module(self, constructor: str) -> str:
        """The source of a module made by ``constructor``, called some name of its own."""
        name = f"m{len(self.modules)}"
        self.modules.append((name, constructor))
        self._define(f"self.{name} = {constructor}")
        return f"self.{name}"

    def parameter(self, *shape: int) -> str:
        """The source of a parameter."""
        name = f"p{len(self.tensors)}"
        self.tensors.append(name)
        self._define(f"self.{name} = nn.Parameter(torch.randn({', '.join(map(str, shape))}) * 0.5)")
        return f"self.{name}"

    def buffer(self, text: str) -> str:
        """The source of a buffer."""
        name = f"b{len(self.tensors)}"
        self.tensors.append(name)
        self._define(f"self.register_buffer({name!r}, {text})")
        return f"self.{name}"

    def _define(self, line: str) -> None:
        self.pending.append(line)
        exec(line, self.space)
        self.root.eval()

    def partner(self, v: Live) -> str:
        """Another operand for a sum: of the same shape, one that broadcasts, a parameter, or the value itself."""
        same = [o.name for o in self.values if o.shape == v.shape]
        if v.rank == 4:
            same += [o.name for o in self.values if o.shape == (*v.shape[:2], 1, 1)]
            same.append(f"{v.name}.mean((2, 3), keepdim=True)")
        if self.choose([True] + 4 * [False]):
            same.append(self.parameter(*v.shape[1:]))
        return str(self.choose(same))

    def write(self) -> RandomGraph | None:
        """The model, or ``None`` if it came to nothing."""
        shapes = [self._shape()]
        if self.choose([True, False, False]):
            shapes.append(shapes[0])
        unit = float(self.choose([1.0, 1.0, 1.0, 30.0, 0.01]))
        for number, shape in enumerate(shapes):
            self._add(f"x{number}", torch.randn(shape))
        for _ in range(self.choose(range(3, MAX_LINES + 1))):
            self._line()
        if not self.lines or (not self.modules and not self.tensors):
            return None
        return self._finished(tuple(shapes), unit)

    def _shape(self) -> tuple[int, ...]:
        sizes = lambda n: tuple(self.choose([4, 5, 6, 7]) for _ in range(n))  # noqa: E731
        channels = self.choose([1, 2, 3, 4, 8, 16])
        return (2, channels, *sizes(self.choose([0, 1, 1, 2, 2, 2, 2, 3])))

    def _add(self, name: str, value: Tensor) -> None:
        self.space[name] = value
        self.values = [live for live in self.values if live.name != name]
        self.values.append(Live(name, tuple(value.shape)))

    def _line(self) -> None:
        """Try lines until one runs."""
        for _ in range(30):
            before = len(self.modules), len(self.tensors)
            self.pending = []
            # The last value is likelier, so that models get deep; older ones make residuals and views.
            v = self.values[-1] if self.random.random() < 0.7 else self.choose(self.values)
            kind, key, text = self.random.random(), None, None
            if kind < 0.05:
                text = None if self.is_tame else self.choose(WRITES).replace("{x}", v.name)
            elif kind < 0.17:
                text = self._expression(self.choose(OTHERS), v)
            else:
                key = self.choose(_WEIGHTED if kind < 0.45 or len(self.lines) < 2 else _BALANCED)
                text = None if self._is_wild(key, v) else self._expression(self.choose(FORMS[key]), v)
            if text is not None and self.is_tame and any(word in text for word in _WILD):
                text = None
            if text is not None and self._runs(text, v):
                self.used |= {key} if key else set()
                self.init += self.pending
                return
            for name, _ in self.modules[before[0] :]:
                delattr(self.root, name)
            for name in self.tensors[before[1] :]:
                delattr(self.root, name)
            del self.modules[before[0] :], self.tensors[before[1] :]

    def _is_wild(self, key: tuple[str, str], v: Live) -> bool:
        """Whether a form would write into what a tame model leaves alone."""
        return key[1] == "inplace" and self.is_tame and (v.name.startswith("x") or key[0] in ("add", "mul"))

    def _expression(self, form: Any, v: Live) -> str | None:
        try:
            found: str | None = form(self, v)
        except Exception:
            return None
        return found

    @staticmethod
    def _is_statement(text: str) -> bool:
        try:
            compile(text, "", "eval")
        except SyntaxError:
            return True
        return False

    def _runs(self, text: str, v: Live) -> bool:
        """Run the line; on copies of all tensors first, since it may write before it fails."""
        if not all(self._attempt(text, trial) for trial in (True, False)):
            return False
        if self._is_statement(text):
            self.lines.append(text)
            return True
        result = self.space.pop("_result")
        if not isinstance(result, Tensor) or result.dim() < 2 or result.shape[0] != 2 or result.numel() > MAX_SIZE:
            return False
        if not result.is_floating_point() or not bool(torch.isfinite(result).all()) or not result.numel():
            return False
        name = f"v{len(self.lines)}"
        self._add(name, result)
        self.lines.append(f"{name} = {text}")
        return True

    def _attempt(self, text: str, trial: bool) -> bool:
        space = self.space
        if trial:  # Aliases stay aliases.
            memo: dict[int, Any] = {}
            names = {live.name for live in self.values}
            space = {**space, **{name: _copied(space[name], memo) for name in names}}
        try:
            with torch.no_grad():
                exec(text if self._is_statement(text) else f"_result = {text}", space)
        except Exception:
            return False
        return True

    def _finished(self, shapes: tuple[tuple[int, ...], ...], unit: float) -> RandomGraph | None:
        text = "\n".join(self.lines)
        made = [live.name for live in self.values[len(shapes) :]] or [self.values[-1].name]
        # What no line reads is a result, so that nothing is computed for nobody.
        results = [name for name in made if not re.search(rf"\b{name}\b(?! = )", text)][-4:] or made[-1:]
        last = results[-1] if len(results) == 1 else f"({', '.join(results)})"
        given = {
            1: last,
            2: "{" + ", ".join(f"{name!r}: {name}" for name in results) + "}",
            3: f"({last}, [{', '.join(results)}])",
        }[self.choose([1, 1, 1, 2, 3])]
        names = ", ".join(f"x{number}" for number in range(len(shapes)))
        text = "\n".join(
            [
                "class Made(RandomModel):",
                "    def __init__(self):",
                "        super().__init__()",
                *(f"        {line}" for line in self.init),
                "",
                f"    def forward(self, {names}):",
                *(f"        {line}" for line in self.lines),
                f"        return {given}",
                "",
            ]
        )
        inexact = ("BatchNorm", "batch_norm", "@ self.p", "matmul", "addmm", "Attention", "Residual")
        graph = RandomGraph(
            self.seed, text, shapes, unit, frozenset(self.used), not any(word in text for word in inexact)
        )
        return graph if _is_usable(graph) else None


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """A copy of a tensor on a copy of its storage, one for all its views."""
    storage = tensor.untyped_storage()
    if storage._cdata not in memo:
        memo[storage._cdata] = storage.clone()
    return torch.empty(0, dtype=tensor.dtype).set_(
        memo[storage._cdata], tensor.storage_offset(), tensor.shape, tensor.stride()
    )


#: Every form as often as any other, whatever number of texts it has; and those with weights once more.
_BALANCED = sorted(FORMS)
_WEIGHTED = [key for key in _BALANCED if key[0].startswith(("conv", "linear"))]
#: What keeps a model from being one graph.
_WILD = ("ByData", "Counting", "BySize", "detach")


def _is_usable(graph: RandomGraph) -> bool:
    """Whether it runs in every batch, on large data, too, and gives finite numbers that depend on what it reads."""
    model = graph.build()
    try:
        with torch.no_grad():
            for batch in BATCHES:
                for leaf in torch.utils._pytree.tree_leaves(model(*graph.inputs(batch))):
                    if leaf.shape[0] != batch or not bool(torch.isfinite(leaf).all()):
                        return False
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


def random_graph(seed: int) -> RandomGraph:
    """The random model of a seed: the first that comes to something."""
    attempt = 0
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = Generator(seed, attempt).write()
        if made is not None:
            return made
        attempt += 1
