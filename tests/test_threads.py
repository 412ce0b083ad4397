"""Preparing is a matter of its own thread: whoever serves, draws random numbers or prepares beside it sees nothing."""

import gc
import math
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore


def in_another_thread(function):
    """What a function gives in a thread of its own, while this one waits."""
    found = []

    def run():
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert found, "the other thread never ends"
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


class Meets(nn.Module):
    """In the middle of its forward, something happens in another thread."""

    def __init__(self, meanwhile, weights=True):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.meanwhile = staticmethod(meanwhile)
        self.draws = not weights

    def forward(self, x):
        y = self.first(x)
        MET.append((type(x), in_another_thread(self.meanwhile)))
        if self.draws:
            y = y + torch.rand(4)
        return self.second(y) * math.sqrt(x.size(-1))


MET = []


@pytest.fixture(autouse=True)
def _nobody_met():
    MET.clear()


class Served(nn.Module):
    """Uses all that a tracer replaces."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        assert isinstance(x, torch.Tensor) and not isinstance(x, nn.Module)
        y = self.linear(x) * self.scale + torch.arange(4) + torch.zeros(x.shape[0], 4) + torch.full((4,), 1.0)
        return F.relu(y) * math.sqrt(4) if isinstance(y, torch.Tensor) else y


def prepared_for(model, *inputs):
    return qcore.prepare_fx(model.eval(), qcore.get_default_qconfig_mapping("reference"), inputs, backend="reference")


def converted_for(model, *inputs):
    prepared = prepared_for(model, *inputs)
    prepared(*inputs)
    return qcore.convert_fx(prepared)


@torch.no_grad()
def test_a_thread_that_serves_models_does_not_see_that_another_one_traces():
    x = torch.randn(2, 4)
    served = Served().eval()
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    tokens = torch.randn(2, 3, 8)
    models = [(served, x), (converted_for(served, x), x), (torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 2))), x)]
    models.append((attention, tokens))
    expected = [model(given) for model, given in models]

    def serve():
        with torch.no_grad():
            return [model(given) for model, given in models], torch.backends.mha.get_fastpath_enabled()

    prepared = prepared_for(Meets(serve), x)
    assert isinstance(prepared, torch.fx.GraphModule)
    assert {issubclass(kind, torch.fx.Proxy) for kind, _ in MET} == {True, False}  # While it was traced, and run.
    for _, (results, fast) in MET:
        assert fast
        assert all(torch.equal(found, wanted) for found, wanted in zip(results, expected, strict=True))


def test_what_tracing_replaces_is_put_back():
    places = [(nn.Module, "__call__"), (nn.Module, "__getattr__"), (torch, "zeros"), (math, "sqrt")]
    places.append((torch.backends.mha, "get_fastpath_enabled"))
    before = [getattr(owner, name) for owner, name in places]
    prepared_for(Served(), torch.randn(2, 4))
    with pytest.raises(qcore.errors.ExampleInputsError):
        prepared_for(Served(), torch.randn(2, 5))
    assert all(getattr(owner, name) is wanted for (owner, name), wanted in zip(places, before, strict=True))
    assert "isinstance" not in globals() and not torch.fx._symbolic_trace.is_fx_tracing()


def test_what_was_replaced_by_others_meanwhile_is_left_to_them():
    original = nn.Module.__call__

    def counting(module, *args, **kwargs):
        return replaced(module, *args, **kwargs)

    def replace():
        nonlocal replaced
        if nn.Module.__call__ is not counting:
            replaced = nn.Module.__call__
            nn.Module.__call__ = counting

    replaced = None
    try:
        prepared_for(Meets(replace), torch.randn(2, 4))
        assert nn.Module.__call__ is counting
        assert nn.Linear(4, 4)(torch.randn(2, 4)).shape == (2, 4)
    finally:
        nn.Module.__call__ = original


@torch.no_grad()
def test_another_thread_prepares_and_converts_meanwhile():
    x = torch.randn(2, 4)
    served = Served().eval()
    expected = converted_for(served, x)(x)
    prepared_for(Meets(lambda: converted_for(served, x)(x)), x)
    assert len(MET) >= 2 and all(torch.equal(found, expected) for _, found in MET)


@pytest.mark.parametrize("draws", [False, True], ids=["draws none", "draws some itself"])
def test_random_numbers_of_another_thread_are_those_without(draws):
    model = Meets(lambda: torch.rand(3), weights=not draws)
    torch.manual_seed(5)
    prepared_for(model, torch.zeros(2, 4))
    assert len(MET) >= 2
    torch.manual_seed(5)
    for _, found in MET:
        assert torch.equal(found, torch.rand(3))


class Noise(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.draw = draw

    def forward(self, x):
        return self.linear(x + self.draw())


@torch.no_grad()
@pytest.mark.parametrize(
    ("draw", "is_graph"),
    [
        (lambda: torch.rand(4), True),
        (lambda: torch.randint(0, 9, (4,)).float(), True),
        (lambda: torch.empty(4).uniform_(), False),
        (lambda: F.dropout(torch.ones(4)), False),
        (lambda: torch.normal(0.0, 1.0, (4,)), False),
    ],
    ids=["rand", "randint", "uniform_", "dropout", "normal"],
)
def test_noise_that_a_forward_draws_is_drawn_at_each_call(draw, is_graph):
    model, x = Noise(draw), torch.zeros(2, 4)
    before = torch.random.get_rng_state()
    prepared = prepared_for(model, x)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert isinstance(prepared, torch.fx.GraphModule) == is_graph
    assert not torch.equal(prepared(x), prepared(x))
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.allclose(prepared(x), expected, atol=1e-6)


def test_preparing_does_not_import_torch_s_compiler():
    code = (
        "import sys, torch, qcore; x = torch.zeros(1, 2); m = torch.nn.Sequential(torch.nn.Linear(2, 2)).eval();"
        "p = qcore.prepare_fx(m, qcore.get_default_qconfig_mapping('reference'), (x,)); p(x); c = qcore.convert_fx(p);"
        "[c(x) for _ in range(4)]; assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@torch.no_grad()
def test_threads_that_prepare_convert_and_serve_at_once():
    torch.manual_seed(0)
    x, tokens = torch.randn(2, 4), torch.randn(2, 3, 8)
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    served = Served().eval()
    converted = converted_for(served, x)
    prepared = prepared_for(attention, tokens)
    prepared(tokens)
    jobs = [
        lambda: served(x),
        lambda: converted(x),
        lambda: attention(tokens),
        lambda: converted_for(served, x)(x),
        lambda: prepared_for(attention, tokens)(tokens),
        lambda: qcore.convert_fx(prepared)(tokens),
    ]
    expected = [job() for job in jobs]
    problems, counts = [], [0] * len(jobs)
    end = time.monotonic() + 3

    def work(number):
        with torch.no_grad():
            try:
                while time.monotonic() < end:
                    if not torch.equal(jobs[number](), expected[number]):
                        problems.append(f"{number} differs")
                    counts[number] += 1
            except BaseException as error:
                problems.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == [] and min(counts) >= 2
    assert gc.isenabled() and torch.backends.mha.get_fastpath_enabled()
