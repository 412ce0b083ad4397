"""What must hold for a random model on a backend, from the float model to a kernel called in another thread.

Each check gives sentences about what it found wrong; none means that all is right. A guard that refuses another batch
is right: the forward decides by it. An exception that isn't one of qcore's on purpose is a finding like any other.
"""

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import qcore
from qcore import ops
from qcore.errors import GuardError, NothingToQuantizeError
from qcore.fx.calls import as_written
from qcore.fx.graph_module import QGraphModule, computed
from qcore.fx.record import record_of
from random_graphs.generate import BATCHES, RandomGraph

#: Relative to the largest output, where batch norms are folded or products rewritten; and to how large inputs are, as
#: a sine of large numbers shows every rounding.
FOLDED = 1e-4
#: Results that are smaller may be small differences of larger numbers.
SMALL = 0.01


@dataclass(frozen=True)
class Finding:
    """Something that doesn't hold.

    Attributes:
        seed: of the random model.
        backend: the backend's name.
        check: which check found it.
        what: in words.
    """

    seed: int
    backend: str
    check: str
    what: str


def check(graph: RandomGraph, backend: str) -> list[Finding]:
    """All that doesn't hold for a random model on a backend."""
    case = _Case(graph, backend)
    findings: list[Finding] = []
    for name in CHECKS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                findings += [Finding(graph.seed, backend, name, what) for what in getattr(case, name)()]
        except NothingToQuantizeError:
            return findings
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            findings.append(Finding(graph.seed, backend, name, f"{type(error).__name__}: {reason}"))
        if findings:
            break  # What comes after would only show it once more.
    return findings


class _Case:
    """One model on its way through the stages; each check takes it a step on."""

    def __init__(self, graph: RandomGraph, backend: str) -> None:
        self.graph = graph
        self.backend = backend
        self.model = graph.build()
        self.prepared = self.reference = self.converted = nn.Module()

    def prepare(self, model: nn.Module, calibration: int) -> nn.Module:
        mapping = qcore.get_default_qconfig_mapping(self.backend)
        if self.graph.seed % 3 == 0:  # Sums and products asked for by name are quantized between floats.
            for function in (torch.add, torch.mul):
                mapping.set_object_type(function, mapping.global_qconfig)
        return qcore.prepare_fx(model, mapping, self.graph.inputs(), backend=self.backend, on_unsupported="ignore")

    def preparing(self) -> Iterator[str]:
        """The user's model and inputs are left alone, and what is prepared computes the same."""
        before = pickle.dumps(self.model)
        self.prepared = self.prepare(self.model, 0)
        if pickle.dumps(self.model) != before:
            yield "prepare_fx changed the model"
        exact = self.graph.is_exact
        yield from self.compared(copy.deepcopy(self.prepared), self.model, exact, "prepared")

    def compared(self, found: nn.Module, model: nn.Module, exact: bool, name: str) -> Iterator[str]:
        """Calls of a prepared model beside the float one, both from the state that they are in."""
        model = copy.deepcopy(model)
        for batch, unit in ((2, 1.0), (2, 100.0), (1, 1.0), (5, 1.0)):
            inputs = self.graph.inputs(batch, 7, unit)
            theirs = [x.clone() for x in inputs]
            state = copy.deepcopy(model.state_dict())
            with torch.no_grad():
                wanted = model(*inputs)
                try:
                    given = found(*theirs)
                except GuardError:
                    model.load_state_dict(state)
                    continue
            where = f"{name}, batch {batch}, inputs times {unit:g}"
            allowed = 0.0 if exact else FOLDED * unit
            yield from (f"{where}: {text}" for text in _differences(wanted, given, allowed))
            yield from (f"{where}, the inputs afterwards: {text}" for text in _differences(inputs, theirs, allowed))

    def converting(self) -> Iterator[str]:
        """Converted twice, it is the same; and it may be called in every batch."""
        with torch.no_grad():
            for seed in range(2):
                self.prepared(*self.graph.inputs(2, seed))
        kept = copy.deepcopy(self.prepared)
        self.reference = qcore.convert_to_reference_fx(self.prepared)
        self.converted = qcore.convert_fx(self.prepared)
        again = qcore.convert_fx(pickle.loads(pickle.dumps(kept)))
        yield from self.same_bits(again, "converted from the pickled prepared model")

    def results(self, model: nn.Module, calls: int = 1) -> list[Any]:
        """What a copy of a model gives, batch after batch."""
        found = []
        model = copy.deepcopy(model)
        with torch.no_grad():
            for batch in BATCHES:
                for _ in range(calls):
                    try:
                        found.append(model(*self.graph.inputs(batch, 3)))
                    except GuardError:
                        found.append("guard")
        return found

    def same_bits(self, other: nn.Module, name: str, source: nn.Module | None = None) -> Iterator[str]:
        """Whether another model computes the same as the converted one, in every batch."""
        wanted = self.results(self.converted if source is None else source)
        yield from (f"{name}: {text}" for text in _differences(wanted, self.results(other)))

    def copying(self) -> Iterator[str]:
        """Copies and pickles, of the reference model too, compute the same bits."""
        yield from self.same_bits(copy.deepcopy(self.converted), "deepcopy")
        yield from self.same_bits(pickle.loads(pickle.dumps(self.converted)), "pickle")
        reference = pickle.loads(pickle.dumps(self.reference))
        yield from self.same_bits(reference, "pickled reference", self.reference)

    def loading(self) -> Iterator[str]:
        """A state_dict loaded into a twin with other weights, calibrated otherwise, gives the same bits."""
        twin = self.graph.build(1)
        prepared = self.prepare(twin, 1)
        with torch.no_grad():
            prepared(*[x * 7 + 2 for x in self.graph.inputs(2, 5)])
        for name, source, convert in (
            ("reference", self.reference, qcore.convert_to_reference_fx),
            ("converted", self.converted, qcore.convert_fx),
        ):
            other = convert(prepared)
            if _kernels(other) != _kernels(source):
                continue  # Another state has other tensors where a kernel declines the scales of one of them.
            if name == "converted":
                with torch.no_grad():  # What it has packed and recorded must go.
                    for _ in range(4):
                        other(*self.graph.inputs(2, 3))
            file = io.BytesIO()
            torch.save(source.state_dict(), file)
            file.seek(0)
            other.load_state_dict(torch.load(file, weights_only=True))
            yield from self.same_bits(other, f"{name}, loaded into a twin", source)

    def calling(self) -> Iterator[str]:
        """Replayed, from Python, and in another thread: the same bits."""
        wanted = self.results(self.converted, 5)
        with as_written():
            yield from (f"from Python: {text}" for text in _differences(wanted, self.results(self.converted, 5)))
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(self.results(self.converted, 5)))
        thread.start()
        thread.join()
        yield from (f"another thread: {text}" for text in _differences(wanted, found))

    def lowering(self) -> Iterator[str]:
        """Every kernel gives what the reference gives on the same integers, within one step."""
        for path, reference in _graphs(self.reference).items():
            lowered = _graphs(self.converted).get(path)
            if isinstance(lowered, QGraphModule) and isinstance(reference, QGraphModule):
                for batch in BATCHES:
                    yield from _kernels_apart(self, path, reference, lowered, batch)


#: The checks, in the order of the stages.
CHECKS = ("preparing", "converting", "copying", "loading", "calling", "lowering")


def _kernels(model: nn.Module) -> list[str]:
    return [decision.kernel for decision in qcore.explain(model).quantized]


def _graphs(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QGraphModule)}


def _differences(wanted: Any, found: Any, allowed: float = 0.0) -> Iterator[str]:
    """In words, what is different between two nested results, beyond what is allowed relative to the largest number."""
    first, second = tree_leaves(wanted), tree_leaves(found)
    if len(first) != len(second):
        yield f"{len(second)} results, not {len(first)}"
        return
    for a, b in zip(first, second, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if type(a) is not type(b) or a != b:
                yield f"{b!r} instead of {a!r}"
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            yield f"{b.dtype} {tuple(b.shape)} instead of {a.dtype} {tuple(a.shape)}"
        elif not torch.allclose(a, b, rtol=0, atol=0, equal_nan=True):
            apart = float((a - b).abs().nan_to_num(torch.inf).max())
            largest = float(a.abs().nan_to_num(0).max())
            if apart > allowed * max(largest, SMALL):
                yield f"off by {apart:.3g} where results reach {largest:.3g}"


def _recorded(module: fx.GraphModule, name: str, into: list[tuple[Any, Any]]) -> Callable[[], None]:
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: into.append((args, kwargs)), with_kwargs=True)
    return handle.remove


def _kernels_apart(case: _Case, path: str, reference: QGraphModule, lowered: QGraphModule, batch: int) -> Iterator[str]:
    """Run both graphs side by side; each kernel gets the reference's integers, so that no difference adds up."""
    calls: list[tuple[Any, Any]] = []
    stop = _recorded(reference, path, calls)
    try:
        with torch.no_grad():
            case.reference(*case.graph.inputs(batch, 11))
    except GuardError:
        return
    finally:
        stop()
    if not calls:
        return
    args, kwargs = calls[0]
    signature = getattr(reference.graph._codegen, "signature", None)
    given = list(args) if signature is None else signature.bind(args, kwargs)
    values = _values(reference, given, {})
    plan = record_of(lowered).report()
    wanted: dict[str, tuple[Tensor, float]] = {}
    by_name = {node.name: node for node in reference.graph.nodes}
    for decision in plan.quantized:
        # A clamp that the quantize absorbs need not be in the graph.
        last = next(by_name[name] for name in reversed(decision.nodes) if name in by_name)
        quantize = next((user for user in last.users if user.target is ops.quantize_per_tensor), None)
        if not isinstance(values[last.name], Tensor) or not decision.kernel:
            continue
        if quantize is not None:
            wanted[decision.nodes[0]] = values[quantize.name], 1.0
        elif all(user.target is not ops.dequantize_per_tensor for user in last.users):
            size = float(values[last.name].abs().nan_to_num(0).max()) if values[last.name].numel() else 0.0
            wanted[decision.nodes[0]] = values[last.name], 1e-4 * size + 1e-30
    found = _values(lowered, given, wanted)
    for name, (tensor, step) in wanted.items():
        if f"{name}!" in found:
            apart = (found[f"{name}!"].double() - tensor.double()).abs().max().item() if tensor.numel() else 0.0
            if apart > step:
                kernel = next(d.kernel for d in plan.quantized if d.nodes[0] == name)
                kind = "steps" if step == 1.0 else "(float)"
                yield f"{path or 'whole'}, batch {batch}, {name} ({kernel}): {apart:g} {kind} off"


def _values(module: QGraphModule, given: list[Any], forced: dict[str, tuple[Tensor, float]]) -> dict[str, Any]:
    """The value of every node; a kernel in ``forced`` hands on what it is told, and its own stands under ``name!``."""
    values: dict[str, Any] = {}
    inputs = iter([x.clone() if isinstance(x, Tensor) else x for x in given])
    with torch.no_grad():
        for node in module.graph.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n.name])
            if node.op == "placeholder":
                values[node.name] = next(inputs)
            elif node.op != "output":
                value = computed(node, args, kwargs, module)
                if node.name in forced and node.op == "call_module":
                    target = forced[node.name][0]
                    integers = value.int_repr() if value.is_quantized else value
                    values[f"{node.name}!"] = integers.clone()
                    value = _like(value, target)
                values[node.name] = value.clone() if isinstance(value, Tensor) and not forced else value
    return values


def _like(value: Tensor, integers: Tensor) -> Tensor:
    """The reference's numbers in the form of a kernel's result."""
    if not value.is_quantized:
        return integers.to(value.dtype).contiguous(
            memory_format=torch.channels_last if value.dim() == 4 else torch.contiguous_format
        )
    made = torch._make_per_tensor_quantized_tensor(integers.contiguous(), value.q_scale(), value.q_zero_point())
    return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made
