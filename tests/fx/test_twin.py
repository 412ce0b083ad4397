"""The user's model is never changed: what is run, traced and prepared are copies, and each starts as the model is."""

import copy
import functools
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore


def prepared_for(model, *inputs, custom=None):
    mapping = qcore.get_default_qconfig_mapping("reference")
    return qcore.prepare_fx(model.eval(), mapping, inputs, custom, backend="reference")


class Part(nn.Module):
    """A forward of our choice around two layers."""

    def __init__(self, forward, **attributes):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("n", torch.zeros(1))
        self.run, self.calls, self.log, self.seen = forward, 0, [], {}
        self.unregistered = [torch.zeros(2)]
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.run(self, x)


def count(m, x):
    m.n.add_(1)
    return m.b(m.a(x))


def count_in_python(m, x):
    m.calls += 1
    return m.b(m.a(x))


def cache(m, x):
    m.cache = m.a(x)
    m.log.append(m.cache)
    m.seen["last"] = m.cache
    return m.b(m.cache)


def write_into_a_list(m, x):
    m.unregistered[0].add_(1)
    return m.b(m.a(x))


def add_a_module(m, x):
    m.late = nn.ReLU()
    m.register_buffer("late_buffer", torch.ones(4))
    return m.b(m.late(m.a(x)) + m.late_buffer)


def limit_a_weight(m, x):
    m.a.weight.data = torch.renorm(m.a.weight.data, 2, 0, 0.1)
    return m.b(m.a(x))


def shrink_a_weight(m, x):
    m.a.weight.mul_(0.5)
    return m.b(m.a(x))


def shrink_by_data(m, x):
    (m.a.weight.data * 1 if x.sum() > 1e9 else m.a.weight.data)[0].mul_(0.5)
    return m.b(m.a(x))


def decide(m, x):
    m.calls += 1
    m.n += 1
    return m.b(m.a(x)) if x.sum() > -1e9 else x


def state_of(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    python = {name: copy.copy(value) for name, value in vars(model).items() if not name.startswith("_")}
    return tensors, python, [tensor.clone() for tensor in model.unregistered], list(dict(model.named_modules()))


FORWARDS = [
    count, count_in_python, cache, write_into_a_list, add_a_module, limit_a_weight, shrink_a_weight,
    shrink_by_data, decide,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_a_forward_that_writes_writes_into_no_model_but_its_own(forward):
    torch.manual_seed(0)
    model, x = Part(forward).eval(), torch.randn(3, 4)
    twin = copy.deepcopy(model)
    tensors, python, unregistered, modules = state_of(model)
    prepared = prepared_for(model, x)
    found = state_of(model)
    assert all(torch.equal(found[0][name], tensor) for name, tensor in tensors.items()) and len(found[0]) == len(
        tensors
    )
    assert found[1].keys() == python.keys() and found[3] == modules
    assert (model.calls, model.log, model.seen) == (0, [], {})
    assert torch.equal(found[2][0], unregistered[0])
    # The prepared model starts as the model is, too: its first call is the model's first.
    assert torch.allclose(prepared(x), twin(x), atol=1e-6)


def test_hooks_see_the_copy_and_not_the_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.register_buffer("calls", torch.zeros(1))

    def hook(module, args, output):
        model.calls.add_(1)  # By a closure.
        model.last = output
        return output * 2

    model[0].register_forward_hook(hook)
    model.register_forward_pre_hook(functools.partial(lambda owner, module, args: owner.calls.add_(1) and None, model))
    x = torch.randn(2, 4)
    prepared = prepared_for(model, x)
    assert float(model.calls) == 0 and not hasattr(model, "last")
    with torch.no_grad():
        assert torch.allclose(prepared(x), model[1](2 * F.linear(x, model[0].weight, model[0].bias)), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("forward", [count_in_python, decide], ids=["whole", "in parts"])
def test_a_model_that_cannot_be_copied_is_prepared_and_shares_what_cannot(forward, tmp_path):
    with open(tmp_path / "log", "w") as file:
        model = Part(forward, lock=threading.Lock(), file=file, lines=(line for line in "ab"))
        with pytest.raises(TypeError):
            copy.deepcopy(model)
        x = torch.randn(2, 4)
        prepared = prepared_for(model, x)
        assert model.calls == 0 and next(model.lines) == "a"
        prepared(x)
        converted = qcore.convert_fx(prepared)
        assert (converted(x) - model(x)).norm() < 0.1


def test_copies_refer_to_each_other_as_the_modules_do():
    model = Part(lambda m, x: m.head(m.b(m.a(x))) if x.sum() > -1e9 else x)
    model.head = nn.Linear(4, 4)
    model.head.weight = model.a.weight
    model.owner, model.bound, model.generator = weakref.ref(model.head), model.head.extra_repr, torch.Generator()
    model.table = {model.a: [model.b]}
    prepared = prepared_for(model, torch.randn(2, 4))
    assert type(prepared) is Part and prepared.owner() is not model.head
    assert prepared.generator is not model.generator
    assert not set(map(id, prepared.parameters())) & set(map(id, model.parameters()))
    names = {id(tensor): name for name, tensor in prepared.named_parameters(remove_duplicate=False)}
    assert len(names) < len(list(prepared.named_parameters(remove_duplicate=False)))  # The tied ones still are.


def test_a_generator_of_the_models_own_stays_where_it_is():
    generator = torch.Generator().manual_seed(3)
    model = Part(lambda m, x: m.b(m.a(x) + torch.rand(4, generator=m.generator)), generator=generator)
    before = generator.get_state()
    prepared_for(model, torch.randn(2, 4))
    assert torch.equal(generator.get_state(), before)


def test_tensors_that_are_no_parameters_and_no_buffers_are_copied_too():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.plain, self.listed = torch.ones(4), [torch.ones(4)]

        def forward(self, x):
            return self.linear(x + self.plain + self.listed[0])

    model = Holds()
    prepared = prepared_for(model, torch.randn(2, 4))
    theirs = {tensor.data_ptr() for tensor in (model.plain, model.listed[0], *model.parameters())}
    mine = {tensor.data_ptr() for tensor in (*prepared.parameters(), *prepared.buffers())}
    assert len(mine) > 3 and not mine & theirs
