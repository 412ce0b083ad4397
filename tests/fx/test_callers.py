"""Compilers, exporters, tracers and torch.func meet a converted model: the right bits, or an error that says why."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import qcore
from qcore.errors import NotSupportedError
from tests.native import kernels_of

#: In the environment without torch.ao; torch's own inductor and ``jit.trace`` import it.
TORCH_AO_IS_BLOCKED = bool(os.environ.get("QCORE_TESTS_BLOCK_TORCH_AO"))

REFERENCE = r"Take\s.*the reference model.*convert_to_reference_fx"


class Image(nn.Module):
    """A residual network in small; for x86 an image of three channels is the case of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return y + self.second(y)


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(self.norm(x))))


class Python(nn.Module):
    """What decides by data can't be a graph; what it calls can."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Rows() for _ in range(parts))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
            if x.sum() > 1e9:
                return x
        return x


INPUTS: dict[type[nn.Module], Callable[[], Tensor]] = {
    Image: lambda: torch.randn(2, 3, 8, 8),
    Rows: lambda: torch.randn(32, 16),
}


def prepared(model: nn.Module, x: Tensor, backend: str, custom: Any = None) -> nn.Module:
    mapping = qcore.get_default_qconfig_mapping(backend)
    made = qcore.prepare_fx(model.eval(), mapping, (x,), custom)
    qcore.calibrate(made, [(x,)])
    return made


@pytest.fixture(params=INPUTS)
def converted(request: pytest.FixtureRequest, installed_backend: str) -> tuple[nn.Module, Tensor]:
    if installed_backend == "reference":
        pytest.skip("it has no kernels")
    x = INPUTS[request.param]()
    return qcore.convert_fx(prepared(request.param(), x, installed_backend)), x


def rows(backend: str, model: nn.Module | None = None, custom: Any = None) -> tuple[nn.Module, Tensor]:
    if backend == "reference":
        pytest.skip("it has no kernels")
    x = torch.randn(32, 16)
    return qcore.convert_fx(prepared(model or Rows(), x, backend, custom)), x


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def is_quiet(caplog: pytest.LogCaptureFixture) -> bool:
    return not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR", "CRITICAL")]


@pytest.mark.parametrize("is_called_before", [True, False])
@pytest.mark.parametrize(
    ("compiler", "how"), [("eager", "compile()"), ("aot_eager", "torch.compile"), ("aot_eager", "dynamic")]
)
@torch.no_grad()
def test_a_compiled_model_gives_the_same_bits(
    converted: tuple[nn.Module, Tensor], compiler: str, is_called_before: bool, how: str, caplog: Any
) -> None:
    model, x = converted
    others = [x, torch.randn_like(x), x[:1], torch.cat([x, x]), x]
    wanted = [copy.deepcopy(model)(other) for other in others]
    for _ in range(3 * is_called_before):
        model(x)
    if how == "compile()":
        model.compile(backend=compiler)
        compiled = model
    else:
        compiled = torch.compile(model, backend=compiler, dynamic=how == "dynamic" or None)
    for other, result in zip(others, wanted, strict=True):
        assert torch.equal(compiled(other), result)
    assert is_quiet(caplog)


class Host(nn.Module):
    """A model of Python that holds others."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)

    def forward(self, x: Tensor) -> Tensor:
        for model in self.inner:
            x = model(torch.sin(x)) * 2
        return x


@pytest.mark.parametrize("is_called_before", [True, False])
@torch.no_grad()
def test_a_larger_model_is_compiled_around_any_number_of_them(
    installed_backend: str, is_called_before: bool, caplog: Any
) -> None:
    model, x = rows(installed_backend)
    host = Host(*[copy.deepcopy(model) for _ in range(10)])  # More than a compiler makes variants of one function.
    wanted = copy.deepcopy(host)(x)
    if is_called_before:
        host(x)
    compiled = torch.compile(host, backend="aot_eager")
    for _ in range(3):
        assert torch.equal(compiled(x), wanted)
    assert torch.equal(compiled(x[:5]), host(x[:5]))
    assert is_quiet(caplog)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.skipif(TORCH_AO_IS_BLOCKED, reason="torch's inductor imports torch.ao")
@torch.no_grad()
def test_inductor_gives_the_same_bits(converted: tuple[nn.Module, Tensor]) -> None:
    model, x = converted
    wanted = model(torch.relu(x))
    compiled = torch.compile(lambda x: model(torch.relu(x)))
    for _ in range(3):
        assert torch.equal(compiled(x), wanted)


@pytest.mark.parametrize("kind", ["parts", "float beside"])
@torch.no_grad()
def test_a_model_in_parts_or_with_a_float_one_beside_it_is_compiled_around_its_graphs(
    installed_backend: str, kind: str
) -> None:
    custom = qcore.PrepareCustomConfig().set_guard_failure("float") if kind == "float beside" else None
    model, x = rows(installed_backend, Python(9) if kind == "parts" else None, custom)
    wanted = copy.deepcopy(model)(x)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        assert torch.equal(compiled(x), wanted)


@torch.no_grad()
def test_a_kernel_by_itself_is_not_compiled_either(converted: tuple[nn.Module, Tensor]) -> None:
    model, x = converted
    kernels = kernels_of(model)
    given: dict[nn.Module, Any] = {}
    for kernel in kernels:  # Some write their result over an input.
        kernel.register_forward_pre_hook(lambda module, args: given.update({module: [x.clone() for x in args]}))
    model(x)
    for kernel in kernels:
        kernel._forward_pre_hooks.clear()
        wanted = copy.deepcopy(kernel)(*[x.clone() for x in given[kernel]])
        for _ in range(2):
            found = torch.compile(kernel, backend="aot_eager")(*[x.clone() for x in given[kernel]])
            assert torch.equal(*(t.int_repr() if t.is_quantized else t for t in (found, wanted)))


@torch.no_grad()
def test_the_whole_as_one_graph_is_refused_with_the_reason(converted: tuple[nn.Module, Tensor]) -> None:
    model, x = converted
    for whole in (model, Host(model)):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"backend's kernels(.|\n)*convert_to_reference_fx"):
            torch.compile(whole, backend="eager", fullgraph=True)(x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"backend's kernels(.|\n)*convert_to_reference_fx"):
        torch.export.export(model, (x,), strict=True)


def faked(model: nn.Module, x: Tensor) -> Any:
    with FakeTensorMode() as mode:
        return model(mode.from_tensor(x))


def faked_outside(model: nn.Module, x: Tensor) -> Any:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    return model(fake)


def real_under_fake_mode(model: nn.Module, x: Tensor) -> Any:
    with FakeTensorMode():
        return model(x)


def dual(model: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return model(forward_ad.make_dual(x, x))


REFUSED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "torch.export": lambda model, x: torch.export.export(model, (x,)),
    "torch.jit.script": lambda model, x: torch.jit.script(model),
    "make_fx": lambda model, x: make_fx(model)(x),
    "make_fx, fake": lambda model, x: make_fx(model, tracing_mode="fake")(x),
    "make_fx, symbolic": lambda model, x: make_fx(model, tracing_mode="symbolic")(x),
    "a tensor without data": faked,
    "a tensor without data, later": faked_outside,
    "a mode for tensors without data": real_under_fake_mode,
    "functionalize": lambda model, x: torch.func.functionalize(model)(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "forward-mode differentiation": dual,
    "the meta device": lambda model, x: copy.deepcopy(model).to("meta")(x.to("meta")),
}
if not TORCH_AO_IS_BLOCKED:
    REFUSED["torch.jit.trace"] = lambda model, x: torch.jit.trace(model, x)


@pytest.mark.filterwarnings("ignore:.torch.jit.(trace|script). is deprecated:FutureWarning")
@pytest.mark.parametrize("who", REFUSED)
@pytest.mark.parametrize("is_called_before", [True, False])
@torch.no_grad()
def test_who_would_see_something_else_than_the_model_does_is_refused(
    installed_backend: str, who: str, is_called_before: bool
) -> None:
    model, x = rows(installed_backend)
    for _ in range(3 * is_called_before):
        model(x)
    for called in (model, nn.Sequential(model)):
        with pytest.raises(
            NotSupportedError, match=REFERENCE if who != "the meta device" else "no data to compute with"
        ):
            REFUSED[who](called, x)
    assert torch.equal(model(x), copy.deepcopy(model)(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.(trace|script). is deprecated:FutureWarning")
@pytest.mark.parametrize("who", [who for who in REFUSED if who != "the meta device"])
@torch.no_grad()
def test_a_kernel_by_itself_refuses_them_as_well(installed_backend: str, who: str) -> None:
    model, x = rows(installed_backend)
    kernel = next((kernel for kernel in kernels_of(model) if kernel.kernel_name == "quantize"), None)
    with pytest.raises(NotSupportedError, match="backend's kernels"):
        REFUSED[who](kernel, x)


@torch.no_grad()
def test_vmap_is_a_call_for_each_row(converted: tuple[nn.Module, Tensor]) -> None:
    model, x = converted
    wanted = torch.cat([model(row[None]) for row in x])
    assert torch.equal(torch.vmap(lambda row: model(row[None])[0])(x), wanted)
    assert torch.equal(torch.vmap(lambda row: model(row[None])[0], in_dims=1)(x.movedim(0, 1)), wanted)
    halves = x.unflatten(0, (2, -1))
    nested = torch.vmap(torch.vmap(lambda row: model(row[None])[0]))(halves)
    assert torch.equal(nested.flatten(0, 1), wanted)
    for _ in range(3):
        assert torch.equal(torch.vmap(lambda scale: model(x) * scale)(torch.ones(2))[1], model(x))


@torch.no_grad()
def test_a_reference_model_compiles_as_one_graph_and_exports(installed_backend: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    reference = qcore.convert_to_reference_fx(prepared(Image(), x, installed_backend))
    wanted = copy.deepcopy(reference)(x)
    for compiler in ("eager", "aot_eager"):
        for dynamic in (None, True):
            compiled = torch.compile(copy.deepcopy(reference), backend=compiler, fullgraph=True, dynamic=dynamic)
            assert torch.equal(compiled(x), wanted)
    for has_gradients in (True, False):
        for strict in (True, False):
            with torch.set_grad_enabled(has_gradients):
                program = torch.export.export(copy.deepcopy(reference), (x,), strict=strict)
            assert torch.equal(program.module()(x), wanted)
            names = [node.target.name() for node in program.graph.nodes if node.op == "call_function"]
            assert not [name for name in names if name.startswith("aten::where")]  # Nothing of gradients.
            assert names.count("qcore::quantize_per_tensor") == names.count("qcore::dequantize_per_tensor") > 0


def test_a_model_that_was_converted_and_called_needed_no_compiler() -> None:
    code = (
        "import sys, torch, qcore; from torch import nn; x = torch.randn(2, 4);"
        "model = qcore.prepare_fx(nn.Sequential(nn.Linear(4, 4)).eval(), qcore.get_default_qconfig_mapping(), (x,));"
        "model(x); made = qcore.convert_fx(model); [made(x) for _ in range(4)]; print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
