"""A call that compilers leave alone: it runs as it is, and a whole graph is refused with the reason."""

import os

import pytest
import torch

pytestmark = pytest.mark.skipif(
    bool(os.environ.get("QCORE_TESTS_BLOCK_TORCH_AO")), reason="torch's compiler imports torch.ao"
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def run(x, *, by):
    SEEN.append(type(x))
    return x * by if x.sum() > 0 else x


SEEN = []


def around(x):
    from qcore.fx.apart import apart

    return apart(run, x + 1, by=3.0) - 1


def test_what_is_called_apart_is_called_with_tensors_and_all_else_is_compiled():
    SEEN.clear()
    graphs = []

    def backend(module, _):
        graphs.append([node.target for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    compiled = torch.compile(around, backend=backend)
    for x in (torch.ones(2), -torch.ones(2)):
        assert torch.equal(compiled(x), around(x))
    assert set(SEEN) == {torch.Tensor}
    called = [target.__name__ for graph in graphs for target in graph]
    assert "add" in called and "sub" in called and "mul" not in called


def test_the_reason_tells_what_to_compile_instead():
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"qcore\.convert_to_reference_fx\(prepared\)"):
        torch.compile(around, backend="eager", fullgraph=True)(torch.ones(2))
