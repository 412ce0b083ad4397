"""Recordings of calls: that they give the same, and that whatever they can't know sends a call back to the model."""

import copy
import inspect
import io
import os
import platform
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore_torch_kernels.graph import replayed_kinds
from qcore_torch_kernels.kernel import KernelModule
from qcore_torch_kernels.replay import executor as executor_module
from qcore_torch_kernels.replay import torchscript
from qcore_torch_kernels.replay.executor import MAX_KINDS, Executor, look_again
from qcore_torch_kernels.replay.recording import NotReplayableError, Recording, record, show
from qcore_torch_kernels.replay.straight_line import as_function
from qcore_torch_kernels.replay.torchscript import as_torchscript
from qcore_torch_kernels.shells import DTYPE, as_plain, as_quantized, bounded
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from qcore.errors import NotSupportedError
from qcore.fx.calls import as_written

WAYS = pytest.mark.parametrize("way", [as_torchscript, as_function])


class Scale(KernelModule):
    """A kernel with state, that counts how often Python ran it."""

    factor: Tensor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))
        self.runs: list[int] = []

    def pack(self) -> Callable[[Tensor], Tensor]:
        factor, runs = float(self.factor), self.runs

        def run(x: Tensor) -> Tensor:
            runs.append(1)
            return x * factor

        return run


def executed(model: nn.Module) -> tuple[Executor, fx.GraphModule]:
    """An executor of a model whose kernels stay whole."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
            return isinstance(m, KernelModule) or super().is_leaf_module(m, qualified_name)

    module = fx.GraphModule(model, Tracer().trace(model))
    executor = Executor(module, type(module).forward)
    vars(executor)["held"] = module  # An executor doesn't hold its module.
    return executor, module


def python_runs(executor: Executor, kernel: Scale, *args: Any) -> int:
    """How often a call ran the kernel from Python."""
    before = len(kernel.runs)
    executor(*args)
    return len(kernel.runs) - before


@pytest.fixture
def scaled() -> tuple[Executor, Scale]:
    executor, module = executed(nn.Sequential(Scale(2.0), nn.Linear(3, 3)).eval())
    kernel = module.get_submodule("0")
    assert isinstance(kernel, Scale)
    return executor, kernel


def several(x: Tensor, y: Tensor) -> dict[str, Any]:
    first, second = (x @ y).split([1, 2], 1)
    normed, *_ = torch.native_layer_norm(second, [2], None, None, 1e-5)
    z = F.pad(first, (0, 1)).relu_().contiguous(memory_format=torch.contiguous_format)
    z = z[:, torch.tensor([1, 0])] + torch.cat([normed, second], 0)[: len(x)].to(torch.float64)
    return {"sum": z.sum(0), "pair": (x, [second]), "rows": x.shape[0], "name": "n", "index": z.argmax(1)}


@WAYS
def test_a_recording_gives_what_the_function_gives_on_other_data(way: Any) -> None:
    result, recording = record(lambda: several(*first), first := (torch.randn(2, 3), torch.randn(3, 3)))
    second = (torch.randn(2, 3), torch.randn(3, 3))
    for arguments in (first, second):
        found, wanted = recording.result(way(recording)(*arguments)), several(*arguments)
        assert torch.utils._pytree.tree_structure(found) == torch.utils._pytree.tree_structure(result)
        assert found["pair"][0] is arguments[0]
        assert found["rows"] == 2 and found["name"] == "n"
        for key in ("sum", "index"):
            assert torch.equal(found[key], wanted[key])
        assert torch.equal(found["pair"][1][0], wanted["pair"][1][0])


@WAYS
@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 40), width=st.integers(1, 5), calls=st.integers(1, 9))
def test_graphs_of_any_length_give_the_same_in_stretches(way: Any, length: int, width: int, calls: int) -> None:
    bias = torch.randn(width)

    def chain(x: Tensor) -> list[Tensor]:
        values = [x, bias]
        for number in range(length):
            values.append(torch.sin(values[-1] + values[number // 2]))
        return [values[length // 2], bias, values[-1], x]

    before, torchscript.MAX_STEPS = torchscript.MAX_STEPS, calls
    try:
        _, recording = record(lambda: chain(x), [x := torch.randn(4, width)])
        run = way(recording)
    finally:
        torchscript.MAX_STEPS = before
    other = torch.randn(4, width)
    assert all(torch.equal(a, b) for a, b in zip(run(other), chain(other), strict=True))


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "it reads a number out of a tensor": lambda x: x * float(x.sum()),
    "it decides by data": lambda x: x if x.sum() > 0 else -x,
    "it compares": lambda x: x if torch.equal(x, x) else -x,
    "it draws random numbers": lambda x: F.dropout(x, training=True),
    "it attends with dropout": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "its sizes depend on data": lambda x: x.nonzero(),
    "it picks by a mask": lambda x: x[x > 0],
    "it writes into its input": lambda x: x.relu_(),
    "it writes into a view of its input": lambda x: x[:1].add_(1),
    "it gives an object": lambda x: (x, object()),
    "it takes memory of its own": lambda x: torch.empty(0).set_(torch.UntypedStorage(8), 0, (2,), (1,)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_other_data_could_change_is_refused(why: str) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(NotReplayableError):
        record(lambda: REFUSED[why](x), [x])


def _as_integers(x: Tensor) -> Tensor:
    return show(torch.empty(0, dtype=torch.int32), x)


def _as_floats(x: Tensor) -> Tensor:
    return show(torch.empty(0), x)


def names(recording: Recording) -> list[str]:
    return [step.operator.name() for step in recording.steps]


@WAYS
def test_a_shell_around_memory_of_another_tensor_is_one_around_the_replayed_one(way: Any) -> None:
    for shape, place in (((3, 2), 0), ((4, 5), 1)):

        def shell(x: Tensor, place: int = place) -> Tensor:
            return _as_integers((x + 1).t()[place:])

        _, recording = record(lambda: shell(x), [x := torch.randn(shape)])
        other = torch.randn(shape)
        assert torch.equal(way(recording)(other)[0], (other + 1).t()[place:].view(torch.int32))


@WAYS
def test_what_is_unwrapped_and_wrapped_again_is_the_same_value(way: Any) -> None:
    def several(x: Tensor) -> Tensor:
        y = x + 1
        for _ in range(3):
            y = _as_floats(_as_integers(y)) * 2
        return y

    _, recording = record(lambda: several(x), [x := torch.randn(3, 2)])
    assert names(recording) == ["aten::add.Tensor", *["aten::mul.Tensor"] * 3]
    assert torch.equal(way(recording)(other := torch.randn(3, 2))[0], several(other))


@WAYS
def test_other_qparams_are_another_shell_of_the_first_value(way: Any) -> None:
    def several(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.quantize_per_tensor(x, 0.5, 3, DTYPE)
        same, other = as_quantized(as_plain(y), 0.5, 3), as_quantized(as_plain(y), 0.25, 3)
        return same.dequantize(), other.dequantize()

    _, recording = record(lambda: several(x), [x := torch.randn(3, 2)])
    assert [name for name in names(recording) if "dequantize" not in name] == [
        "aten::quantize_per_tensor",
        "aten::_empty_affine_quantized",
        "aten::set_.source_Tensor_storage_offset",
    ]
    given = torch.randn(3, 2)
    assert all(map(torch.equal, way(recording)(given), several(given)))


@WAYS
@pytest.mark.parametrize(
    "write",
    [
        lambda y, plain: plain.clamp_(2, 4),
        lambda y, plain: plain[1:].fill_(9),
        lambda y, plain: torch.ops.quantized.add.out(y, y, y),
    ],
    ids=["the shell", "a view of it", "what it is around"],
)
def test_what_is_written_into_a_shells_memory_is_seen_by_all_that_show_it_later(way: Any, write: Any) -> None:
    def several(x: Tensor) -> tuple[Tensor, ...]:
        y = torch.quantize_per_tensor(x, 0.5, 3, DTYPE)
        plain = as_plain(y)
        before = as_quantized(plain, 0.5, 3).dequantize()
        write(y, plain)
        return before, as_quantized(plain, 0.5, 3).dequantize(), as_plain(y) + 1

    _, recording = record(lambda: several(x), [x := torch.randn(3, 2)])
    given = torch.randn(3, 2)
    assert all(map(torch.equal, as_function(recording)(given), several(given)))
    if way is as_torchscript:  # It may take a write for one that nobody reads, where the proof finds it out.
        again = way(recording)(given)
        assert torch.equal(again[0], several(given)[0])


def test_a_clamp_of_a_kernels_result_is_never_lost() -> None:
    kernel = bounded(lambda x: torch.quantize_per_tensor(x, 0.5, 3, DTYPE), (2, 4))
    executor, _ = executed(nn.Sequential(nn.Linear(2, 2)))
    executor.forward = lambda module, x: as_plain(kernel(x))
    with torch.no_grad():
        for _ in range(5):
            x = 5 * torch.randn(3, 2)
            assert torch.equal(executor(x), as_plain(kernel(x)))
    assert executor.replayed_kinds == 1
    # The first proof, by the form that needs no Python, holds.
    _, recording = record(lambda: kernel(x).dequantize(), [x])
    assert torch.equal(as_torchscript(recording)(other := 5 * torch.randn(3, 2))[0], kernel(other).dequantize())


@WAYS
def test_bytes_seen_as_another_dtype_are_shown_by_a_shell(way: Any) -> None:
    def several(x: torch.Tensor) -> torch.Tensor:
        return (x + 1)[1:].view(torch.int16).to(torch.int32).view(torch.uint8) * 2

    _, recording = record(lambda: several(x), [x := torch.randn(3, 4)])
    assert torch.equal(way(recording)(other := torch.randn(3, 4))[0], several(other))


def test_a_change_of_shape_in_place_is_refused_on_a_tensor_that_stands_for_two() -> None:
    def change(x: Tensor) -> Tensor:
        y = x + 1
        _as_floats(_as_integers(y)).t_()
        return y

    with pytest.raises(NotReplayableError, match="stands for two"):
        record(lambda: change(x), [x := torch.randn(3, 2)])


@pytest.mark.parametrize("where", ["kept from before", "used before"])
def test_a_shell_that_is_not_a_new_one_is_refused(where: str) -> None:
    kept = torch.empty(0, dtype=torch.int32)

    def change(x: Tensor) -> Tensor:
        shell = kept if where == "kept from before" else _as_integers(x + 1)
        return show(shell, x + 2)

    with pytest.raises(NotReplayableError, match="shows other memory than before"):
        record(lambda: change(x), [x := torch.randn(3, 2)])


def test_memory_that_is_taken_unsaid_is_refused() -> None:
    def shell(x: Tensor) -> Tensor:
        y = x + 1
        return torch.empty(0).set_(y.untyped_storage(), 0, (3,), (2,))

    with pytest.raises(NotReplayableError, match="takes a UntypedStorage"):
        record(lambda: shell(x), [x := torch.randn(3, 2)])


def test_each_thread_records_its_own_shells() -> None:
    def several(x: Tensor) -> Tensor:
        y = x + 1
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: _as_floats(_as_integers(torch.ones(3, 2)))).result()
        return _as_floats(_as_integers(y)) * 2

    _, recording = record(lambda: several(x), [x := torch.randn(3, 2)])
    assert names(recording) == ["aten::add.Tensor", "aten::mul.Tensor"]


def test_results_that_nobody_reads_are_not_computed_but_writes_are_done() -> None:
    def several(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        _ = (y * 3).exp()
        y[0].fill_(2.0)
        return y

    _, recording = record(lambda: several(x), [x := torch.randn(3, 2)])
    assert names(recording) == [
        "aten::add.Tensor",
        "aten::select.int",
        "aten::fill_.Scalar",
    ]


def test_what_is_refused_leaves_the_input_alone() -> None:
    x = torch.full((2,), -1.0)
    with pytest.raises(NotReplayableError):
        record(lambda: x.relu_(), [x])
    assert x.tolist() == [-1.0, -1.0]


def test_a_function_that_writes_into_its_constants_is_refused() -> None:
    total = torch.zeros(2)
    with pytest.raises(NotReplayableError):
        record(lambda: total.add_(x), [x := torch.ones(2)])


@torch.no_grad()
def test_the_third_call_of_a_form_needs_no_python(scaled: tuple[Executor, Scale]) -> None:
    executor, kernel = scaled
    x = torch.randn(2, 3)
    # The second is recorded, and held against a run on other data.
    assert [python_runs(executor, kernel, x) for _ in range(4)] == [1, 2, 0, 0]
    assert [python_runs(executor, kernel, torch.randn(5, 3)) for _ in range(3)] == [1, 2, 0]
    assert python_runs(executor, kernel, x) == 0
    other = torch.randn(2, 3)
    assert torch.equal(executor(other), executor.forward(executor.module, other))


@torch.no_grad()
def test_strides_and_dtypes_are_part_of_a_form(scaled: tuple[Executor, Scale]) -> None:
    executor, kernel = scaled
    x = torch.randn(3, 3)
    for _ in range(3):
        executor(x)
    assert python_runs(executor, kernel, x.t()) == 1
    executor.module.double()
    assert python_runs(executor, kernel, x.double()) == 1


@torch.no_grad()
def test_ever_new_forms_are_not_recorded_for_ever(scaled: tuple[Executor, Scale]) -> None:
    executor, _ = scaled
    for size in range(1, MAX_KINDS + 5):
        for _ in range(3):
            x = torch.randn(size, 3)
            assert torch.equal(executor(x), executor.forward(executor.module, x))
    assert len(executor.programs) == MAX_KINDS


def without_effect(executor: Executor, kernel: Scale) -> None:
    """Record a form and check that it is replayed."""
    x = torch.randn(2, 3)
    with torch.no_grad():
        for _ in range(2):
            executor(x)
        assert python_runs(executor, kernel, x) == 0


def test_a_hook_is_called_although_there_is_a_recording(scaled: tuple[Executor, Scale]) -> None:
    without_effect(*scaled)
    seen: list[Tensor] = []
    handle = scaled[1].register_forward_hook(lambda module, args, output: seen.append(output))
    scaled[0](torch.ones(2, 3))
    assert len(seen) == 1
    handle.remove()
    with torch.no_grad():
        assert python_runs(*scaled, torch.ones(2, 3)) == 0


def test_a_hook_before_a_kernel_changes_its_input(scaled: tuple[Executor, Scale]) -> None:
    without_effect(*scaled)
    executor, kernel = scaled
    x = torch.randn(2, 3)
    with torch.no_grad():
        wanted = executor(x * 2)
        with kernel.register_forward_pre_hook(lambda module, args: (args[0] * 2,)):
            assert torch.allclose(executor(x), wanted)
        assert python_runs(executor, kernel, x) == 0


@torch.no_grad()
def test_weights_with_equal_values_are_not_one() -> None:
    """TorchScript makes one of its constants with equal values; weights of float modules aren't such."""
    executor, module = executed(nn.Sequential(nn.Linear(3, 3), Scale(1.0), nn.Linear(3, 3)).requires_grad_(False))
    first, second = module.get_submodule("0"), module.get_submodule("2")
    second.load_state_dict(first.state_dict())
    without_effect(executor, module.get_submodule("1"))
    second.weight.add_(1)
    x = torch.randn(2, 3)
    assert torch.allclose(executor(x), second(first(x)))
    assert executor.replayed_kinds == 1


@torch.no_grad()
def test_what_is_made_of_constants_is_made_at_each_call() -> None:
    """Else the caller would write into the next call's result."""
    table = torch.ones(3)
    executor, _ = executed(nn.Sequential(nn.Linear(3, 3)))
    executor.forward = lambda module, x: (x * table, torch.zeros(3) + table, table * 2)
    x = torch.randn(2, 3)
    for _ in range(5):
        found = executor(x)
        assert [part.tolist() for part in found[1:]] == [[1, 1, 1], [2, 2, 2]]
        for part in found:
            part.add_(1)
    assert executor.replayed_kinds == 1


def test_gradients_flow(scaled: tuple[Executor, Scale]) -> None:
    without_effect(*scaled)
    executor, _ = scaled
    for _ in range(3):
        result = executor(torch.ones(2, 3))
        assert result.requires_grad
        result.sum().backward()
    x = torch.ones(2, 3, requires_grad=True)
    for _ in range(3):
        executor(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@torch.no_grad()
def test_a_kernel_that_is_packed_anew_is_recorded_anew(scaled: tuple[Executor, Scale]) -> None:
    without_effect(*scaled)
    executor, kernel = scaled
    kernel.load_state_dict({"factor": torch.tensor(-3.0)})
    x = torch.randn(2, 3)
    wanted = executor.module.get_submodule("1")(x * -3.0)
    for _ in range(4):
        assert torch.allclose(executor(x), wanted)


@torch.no_grad()
@pytest.mark.parametrize("how", ["replaced", "loaded", "assigned"])
def test_other_float_weights_count_at_once(scaled: tuple[Executor, Scale], how: str) -> None:
    without_effect(*scaled)
    executor, _ = scaled
    linear = executor.module.get_submodule("1")
    new = nn.Linear(3, 3)
    if how == "replaced":
        linear.weight, linear.bias = new.weight, new.bias
    else:
        linear.load_state_dict(new.state_dict(), assign=how == "assigned")
    x = torch.randn(2, 3)
    for _ in range(4):
        assert torch.allclose(executor(x), new(2 * x))


@torch.no_grad()
def test_training_mode_counts_at_once() -> None:
    executor, module = executed(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).eval())
    x = torch.randn(4, 8)
    for _ in range(3):
        executor(x)
    module.train()
    assert any((executor(x) == 0).any() for _ in range(5))


def test_a_tensor_that_is_given_twice_is_no_pair() -> None:
    class Minus(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    executor, _ = executed(Minus())
    x, y = torch.ones(2), torch.zeros(2)
    for _ in range(4):
        assert executor(x, x).tolist() == [0, 0]
    for _ in range(4):
        assert executor(x, y).tolist() == [1, 1]


def test_a_recording_that_holds_for_one_input_only_is_not_used() -> None:
    class Last(nn.Module):
        """Reads data in a way that no operator shows."""

        def forward(self, x: Tensor) -> Tensor:
            return x * x.untyped_storage()[-1]

    module = fx.GraphModule(nn.Module(), fx.Graph())
    executor = Executor(module, lambda _, x: Last()(x))
    executor.is_replayable, executor.generation = True, -1
    for value in (1, 1, 1, 3, 5):
        x = torch.tensor([2, value], dtype=torch.uint8)
        assert executor(x).tolist() == [2 * value, value * value]


def test_what_is_no_tensor_is_part_of_the_form() -> None:
    class Shift(nn.Module):
        def forward(self, pair: dict[str, Tensor], by: Any = 1) -> tuple[Tensor, ...]:
            return pair["a"] + by, pair["b"]

    module = fx.symbolic_trace(Shift())
    executor = Executor(module, type(module).forward)
    pair = {"a": torch.zeros(1), "b": torch.ones(1)}
    for by in (1, 2, True, 1.0, 2.5):
        for _ in range(3):
            found = executor(pair, by=by)
            assert found[0].item() == by and found[0].dtype == torch.float32
    assert len(executor.programs) == 5


def test_kernels_that_decide_by_data_run_from_python() -> None:
    class Sign(Scale):
        replayable = False

    executor, module = executed(nn.Sequential(Sign(1.0)))
    kernel = module.get_submodule("0")
    assert isinstance(kernel, Scale)
    assert [python_runs(executor, kernel, torch.ones(1)) for _ in range(4)] == [1, 1, 1, 1]


def test_unknown_modules_run_from_python() -> None:
    class Leaf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy() * 2)

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
            return True

    model = nn.Sequential(Leaf())
    module = fx.GraphModule(model, Tracer().trace(model))
    executor = Executor(module, type(module).forward)
    for value in range(5):
        assert executor(torch.full((1,), float(value))).item() == 2 * value


FAULTS = """
import resource, torch
from qcore_torch_kernels.replay.memory import keep_freed_memory
{first}
def use():
    blocks = [torch.ones(10 << 20, dtype=torch.uint8) for _ in range(4)]
for _ in range(3):
    use()
faults = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[2])  # As a heap happens to lie, its top may be given back once.
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
def test_freed_memory_is_kept_for_the_next_call() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    faults = [
        int(subprocess.run([sys.executable, "-c", FAULTS.format(first=first)], env=environment, capture_output=True,
                           text=True, check=True).stdout)
        for first in ("", "keep_freed_memory()")
    ]  # fmt: skip
    if faults[0] < 1000:  # 40 MiB are 10,240 pages.
        pytest.skip("this C library keeps it by itself")
    assert faults[1] < 100


@torch.no_grad()
def test_memory_is_kept_from_the_first_recording_on(
    scaled: tuple[Executor, Scale], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(executor_module, "keep_freed_memory", lambda: kept.append(True))
    executor, _ = scaled
    x = torch.randn(2, 3)
    executor(x)
    assert not kept
    executor(x)
    assert kept and executor.replayed_kinds == 1


@torch.no_grad()
def test_a_call_is_recorded_only_when_the_first_of_its_form_is_over() -> None:
    """Before that, kernels may still be packing, which can't be recorded."""
    entered, may_go_on = threading.Event(), threading.Event()

    class Slow(Scale):
        def pack(self) -> Callable[[Tensor], Tensor]:
            run = super().pack()

            def first_waits(x: Tensor) -> Tensor:
                if not self.runs:
                    self.runs.append(1)
                    entered.set()
                    may_go_on.wait(10)
                return run(x)

            return first_waits

    executor, _ = executed(nn.Sequential(Slow(2.0)))
    x = torch.randn(3)
    thread = threading.Thread(target=executor, args=(x,))
    thread.start()
    assert entered.wait(10)
    executor(x)
    assert not executor.programs
    may_go_on.set()
    thread.join()
    assert torch.equal(executor(x), 2 * x) and executor.replayed_kinds == 1


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:FutureWarning")
def test_whoever_watches_operators_sees_them(scaled: tuple[Executor, Scale]) -> None:
    without_effect(*scaled)
    executor, kernel = scaled
    x = torch.randn(2, 3)
    with as_written():
        assert python_runs(executor, kernel, x) == 1
    with FlopCounterMode(display=False) as counter:
        executor(x)
    assert counter.get_total_flops() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert executor(x).dtype == torch.bfloat16
    rows = torch.func.vmap(lambda row: executor(row[None])[0])(x)
    assert torch.equal(rows, torch.cat([executor(row[None]) for row in x]))
    with pytest.raises(NotSupportedError, match=r"torch\.jit\.trace can't look into"):
        torch.jit.trace(lambda y: executor(y), x)


@torch.no_grad()
def test_what_is_written_into_a_result_is_not_in_the_next() -> None:
    class Shape(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, torch.tensor([x.shape[0], 7])

    executor, _ = executed(nn.Sequential(nn.Linear(2, 2)))
    executor.forward = lambda module, x: Shape()(x)
    x = torch.randn(3, 2)
    for _ in range(5):
        first, second = executor(x)
        assert second.tolist() == [3, 7]
        first.add_(1)
        second.add_(100)
    assert executor.replayed_kinds == 1


@torch.no_grad()
def test_another_model_that_is_packed_anew_takes_no_recording_away(scaled: tuple[Executor, Scale]) -> None:
    without_effect(*scaled)
    for _ in range(3):
        Scale(1.0).to("cpu")
        assert python_runs(*scaled, torch.randn(2, 3)) == 0


@torch.no_grad()
def test_replaced_modules_and_changed_attributes_count_at_once() -> None:
    executor, module = executed(nn.Sequential(Scale(2.0), nn.LeakyReLU(0.5)))
    x = -torch.ones(2)
    for _ in range(3):
        assert executor(x).tolist() == [-1, -1]
    module.get_submodule("1").negative_slope = 0.25
    assert executor(x).tolist() == [-0.5, -0.5]
    for _ in range(3):
        executor(x)
    module.get_submodule("1").forward = lambda x: x + 1
    assert executor(x).tolist() == [-1, -1]
    for _ in range(3):
        executor(x)
    setattr(module, "0", Scale(10.0))
    assert executor(x).tolist() == [-9, -9]


@torch.no_grad()
def test_a_recording_that_was_overtaken_is_dropped(
    scaled: tuple[Executor, Scale], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, kernel = scaled
    x = torch.randn(2, 3)
    executor(x)

    def slow(recording: Any, *others: Any) -> Any:
        monkeypatch.undo()
        program = executor_module._proven(recording, *others)
        kernel.load_state_dict({"factor": torch.tensor(5.0)})  # As another thread might.
        executor(x)
        return program

    monkeypatch.setattr(executor_module, "_proven", slow)
    executor(x)
    for _ in range(3):
        assert torch.equal(executor(x), executor.module.get_submodule("1")(x * 5.0))


@torch.no_grad()
@pytest.mark.parametrize("x", [torch.ones(2, 4), torch.zeros(1), torch.ones(3, dtype=torch.int64)])
def test_what_is_read_past_the_operators_is_found_out_on_constant_data_too(x: Tensor) -> None:
    executor, _ = executed(nn.Sequential(nn.Linear(2, 2)))
    executor.forward = lambda module, x: x * 2 + torch.tensor([x.sum(), x.max()]).sum()
    for _ in range(3):
        executor(x)
    other = torch.arange(float(x.numel())).reshape(x.shape).to(x.dtype)
    assert torch.equal(executor(other), executor.forward(None, other))


@torch.no_grad()
def test_a_place_in_memory_is_no_part_of_a_form() -> None:
    executor, _ = executed(nn.Sequential(nn.Linear(2, 2)))
    executor.forward = lambda module, x: x + x.as_strided((2, 4), (4, 1), x.storage_offset())
    for _ in range(3):
        executor(torch.randn(2, 4))
    part = torch.randn(5, 4)[3:5]
    assert torch.equal(executor(part), 2 * part)


@torch.no_grad()
def test_running_statistics_are_updated_once_a_call() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    executor, _ = executed(nn.Sequential(nn.Linear(2, 2)))
    executor.forward = lambda module, x: F.batch_norm(x, mean, var, training=True, momentum=0.5)
    for number in range(1, 5):
        executor(torch.ones(4, 3))
        assert torch.allclose(mean, torch.full((3,), 1 - 0.5**number))


@torch.no_grad()
def test_an_interrupted_recording_is_made_at_the_next_call(scaled: tuple[Executor, Scale]) -> None:
    executor, kernel = scaled
    x = torch.randn(2, 3)
    executor(x)
    forward = executor.forward

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    executor.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        executor(x)
    executor.forward = forward
    assert [python_runs(executor, kernel, x) for _ in range(3)] == [2, 0, 0]


def test_threads_may_call_at_once(scaled: tuple[Executor, Scale]) -> None:
    executor, _ = scaled
    wrong: list[int] = []

    def work(seed: int) -> None:
        x = torch.randn(2 + seed % 3, 3, generator=torch.Generator().manual_seed(seed))
        wanted = executor.forward(executor.module, x)
        for _ in range(20):
            with torch.no_grad():
                found = executor(x)
            if not torch.equal(found, wanted):
                wrong.append(seed)
            if seed == 0:
                look_again()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_executors_are_not_copied() -> None:
    executor, _ = executed(nn.Sequential(nn.Linear(2, 2)))
    assert copy.deepcopy(executor) is executor


def test_recording_needs_no_compiler() -> None:
    """Torch imports its compiler when a dispatch mode of the usual kind is used; that takes seconds."""
    import subprocess
    import sys

    code = (
        "import sys, torch; from qcore_torch_kernels.replay.recording import record; x = torch.ones(2);"
        "record(lambda: x + 1, [x]); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_converted_model_replays_and_survives_copies(tmp_path: Any) -> None:
    """Through the public verbs, on whichever backend is the best here."""
    import qcore

    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping(), (x,))
    qcore.calibrate(prepared, [x])
    converted = qcore.convert_fx(prepared)
    with torch.no_grad(), as_written():
        wanted = converted(x)
    assert list(inspect.signature(converted.forward).parameters) == ["input"]
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    buffer.seek(0)
    for model in (converted, copy.deepcopy(converted), torch.load(buffer, weights_only=False)):
        with torch.no_grad():
            for _ in range(4):
                assert torch.equal(model(x), wanted)


def never_called() -> tuple[nn.Module, Tensor]:
    """A converted model, and an input for it."""
    import qcore

    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping(), (x,))
    qcore.calibrate(prepared, [x])
    return qcore.convert_fx(prepared), x


@pytest.fixture
def converted() -> tuple[nn.Module, Tensor, Tensor]:
    """A converted model with a recording for an input, that input, and the result."""
    found, x = never_called()
    with torch.no_grad():
        for _ in range(3):
            result = found(x)
    assert replayed_kinds(found) == 1
    return found, x, result


@torch.no_grad()
def test_a_replayed_model_is_a_module_like_any_other(converted: tuple[nn.Module, Tensor, Tensor]) -> None:
    """A replay doesn't go through ``nn.Module.__call__``; whatever that would do still happens."""
    model, x, result = converted
    with model.register_forward_hook(lambda module, args, output: output + 1):
        assert torch.equal(model(x), result + 1)
    with model.register_forward_pre_hook(lambda module, args: (args[0] * 0,)):
        assert torch.equal(model(x), model.forward(x * 0))
    seen: list[nn.Module] = []
    with register_module_forward_hook(lambda module, args, output: seen.append(module)):
        model(x)
    assert model in seen and len(seen) > 1
    assert torch.equal(model(input=x), result)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        model()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            inner: Tensor = self.inner(x)
            return inner

    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    assert [node.target for node in Leaves().trace(Outer()).nodes] == ["x", "inner", "output"]


@torch.no_grad()
@pytest.mark.parametrize("how", ["attribute", "method", "class", "of the dictionary"])
def test_a_patched_forward_is_heard_at_once(converted: tuple[nn.Module, Tensor, Tensor], how: str) -> None:
    model, x, result = converted
    before = model.forward

    def patched(self: nn.Module, x: Tensor) -> Tensor:
        return before(x) + 1  # type: ignore[no-any-return]

    kind = type(model)
    if how == "attribute":
        model.forward = lambda x: patched(model, x)
    elif how == "method":
        model.forward = types.MethodType(patched, model)
    elif how == "class":
        original, kind.forward = kind.forward, patched
    else:
        vars(model)["forward"] = types.MethodType(patched, model)
    for _ in range(4):
        assert torch.equal(model(x), result + 1)
    if how == "class":
        kind.forward = original
    else:
        del model.forward
    for _ in range(3):
        assert torch.equal(model(x), result)


@torch.no_grad()
def test_a_patched_forward_of_a_kernel_is_heard_at_once(converted: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, result = converted
    kernels = [module for module in model.modules() if isinstance(module, KernelModule)]
    calls: list[nn.Module] = []
    for kernel in kernels:
        before = kernel.forward

        def patched(*inputs: Tensor, kernel: nn.Module = kernel, before: Any = before) -> Any:
            calls.append(kernel)
            return before(*inputs)

        kernel.forward = patched
        for number in range(1, 4):
            assert torch.equal(model(x), result)
            assert calls.count(kernel) == number
    for kernel in kernels:
        del kernel.forward
    calls.clear()
    for _ in range(3):
        assert torch.equal(model(x), result)
    assert not calls


@torch.no_grad()
def test_a_wrapper_around_the_call_of_any_module_sees_all_of_them(
    converted: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, result = converted
    seen: list[nn.Module] = []
    call = nn.Module.__call__

    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return call(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__call__", wrapper)
        for _ in range(3):
            seen.clear()
            assert torch.equal(model(x), result)
            assert set(seen) >= {model, *(module for module in model.modules() if isinstance(module, KernelModule))}
    seen.clear()
    assert torch.equal(model(x), result) and not seen


@torch.no_grad()
def test_a_float_module_that_is_pruned_or_parametrized_counts_at_once(scaled: tuple[Executor, Scale]) -> None:
    without_effect(*scaled)
    executor, _ = scaled
    linear = executor.module.get_submodule("1")
    x = torch.randn(2, 3)
    prune.l1_unstructured(linear, "weight", amount=4)
    for _ in range(4):
        assert torch.allclose(executor(x), F.linear(2 * x, linear.weight_orig * linear.weight_mask, linear.bias))
    prune.remove(linear, "weight")
    parametrize.register_parametrization(linear, "weight", nn.ReLU())
    weight = linear.parametrizations.weight.original
    for _ in range(4):
        assert torch.allclose(executor(x), F.linear(2 * x, weight.relu(), linear.bias))
    weight.neg_()
    assert torch.allclose(executor(x), F.linear(2 * x, weight.relu(), linear.bias))


@torch.no_grad()
@pytest.mark.parametrize("first_calls", [0, 1, 2])
def test_what_is_loaded_while_another_thread_calls_counts_from_then_on(first_calls: int) -> None:
    """Whatever that thread was doing: packing, recording or replaying."""
    for seed in range(5):
        model, x = never_called()
        torch.manual_seed(seed)
        state = {
            name: value.flip(0) if value.dim() and not value.is_floating_point() else value
            for name, value in model.state_dict().items()
        }
        wanted = copy.deepcopy(model)
        wanted.load_state_dict(state)
        result = wanted(x)
        assert not torch.equal(result, copy.deepcopy(model)(x))
        for _ in range(first_calls):
            model(x)
        is_over = threading.Event()

        def call(model: nn.Module = model, x: Tensor = x, is_over: threading.Event = is_over) -> None:
            while not is_over.is_set():
                with torch.no_grad():
                    model(x)

        thread = threading.Thread(target=call)
        thread.start()
        model.load_state_dict(state)
        assert all(torch.equal(model(x), result) for _ in range(4))
        is_over.set()
        thread.join()
        assert all(torch.equal(model(x), result) for _ in range(4))


@torch.no_grad()
@pytest.mark.parametrize("is_called_before", [True, False])
def test_a_functional_call_has_the_weights_that_it_is_given_and_the_next_call_its_own(is_called_before: bool) -> None:
    model, x = never_called()
    state = model.state_dict()
    weight = next(name for name, value in state.items() if value.dtype == torch.int8 and value.dim() > 1)
    given = {weight: state[weight].flip(0)}
    other = copy.deepcopy(model)
    other.load_state_dict({**state, **given})
    result, wanted = copy.deepcopy(model)(x), other(x)
    assert not torch.equal(result, wanted)
    for _ in range(3 * is_called_before):
        model(x)
    for _ in range(3):
        assert torch.equal(torch.func.functional_call(model, given, x), wanted)
        for _ in range(3):
            assert torch.equal(model(x), result)


def test_each_thread_runs_models_as_it_wants(scaled: tuple[Executor, Scale]) -> None:
    without_effect(*scaled)
    executor, kernel = scaled
    x = torch.randn(2, 3)

    def runs() -> int:
        with torch.no_grad():
            return python_runs(executor, kernel, x)

    with as_written(), ThreadPoolExecutor(1) as pool:
        with as_written():
            assert pool.submit(runs).result() == 0
        assert runs() == 1
    assert runs() == 0


@torch.no_grad()
def test_a_packed_weight_that_meets_nothing_of_the_call_is_passed_to_the_graph() -> None:
    """Its type tells TorchScript which operator is meant."""
    weight = torch.quantize_per_tensor(torch.randn(4, 3), 0.1, 0, torch.qint8)
    table, packed = torch.randn(2, 3), torch.ops.quantized.linear_prepack(weight, None)
    function = lambda: x + torch.ops.quantized.linear_dynamic.default(table, packed)  # noqa: E731
    x = torch.randn(2, 4)
    result, recording = record(function, [x])
    run = as_torchscript(recording)
    for _ in range(4):
        assert torch.equal(run(x)[0], result)
