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
from qcore.fx.twin import Copies, cloned, shared, twin_of, uncompiled, with_shared_parameters


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


def test_what_the_twin_has_for_a_tensor_is_up_to_its_maker():
    model = nn.Sequential(nn.BatchNorm1d(2))
    for counterpart, parameter, buffer in (
        (cloned, False, False),
        (shared, True, True),
        (with_shared_parameters, True, False),
    ):
        twin = twin_of(model, counterpart)
        assert twin is not model and twin[0] is not model[0]
        assert (twin[0].weight.data_ptr() == model[0].weight.data_ptr()) is parameter
        assert (twin[0].running_mean.data_ptr() == model[0].running_mean.data_ptr()) is buffer
        assert isinstance(twin[0].weight, nn.Parameter) and twin[0].weight is not model[0].weight
        assert torch.equal(twin[0].running_var, model[0].running_var)


def test_a_tensor_on_the_same_numbers_has_gradients_of_its_own():
    parameter = nn.Parameter(torch.ones(2), requires_grad=False)
    parameter.note = "kept"
    alias = shared(parameter)
    assert isinstance(alias, nn.Parameter) and not alias.requires_grad and alias.note == "kept"
    leaf = torch.ones(2, requires_grad=True)
    (shared(leaf) * 2).sum().backward()
    assert leaf.grad is None and shared(leaf).requires_grad
    computed = leaf * 2
    assert not cloned(computed).requires_grad and torch.equal(cloned(computed), computed)


def test_one_tensor_has_one_copy_and_what_was_written_into_it_is_undone():
    copies, tensor = Copies(), torch.ones(2)
    made = copies(tensor)
    assert copies(tensor) is made is not tensor
    made.add_(1)
    copies.make_as_new()
    assert torch.equal(made, torch.ones(2)) and copies(tensor) is made
    copies.forget()
    assert copies(tensor) is not made


def test_functions_and_references_of_a_model_refer_to_its_twin():
    model = nn.Sequential(nn.Linear(2, 2))
    kept = {"outside": 1}

    def patched(x, scale=2, *, shift=1):
        return model[0](x) * scale + shift + kept["outside"]

    model.patched, model.bound = patched, model[0].forward
    model.partial = functools.partial(patched, scale=3)
    model.owner, model.lock = weakref.ref(model[0]), threading.Lock()
    model.plain = len
    twin = twin_of(model)
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.zero_()
    x = torch.ones(1, 2)
    assert torch.equal(twin.patched(x), torch.full((1, 2), 2.0)) and torch.equal(twin.bound(x), torch.zeros(1, 2))
    assert torch.equal(twin.partial(x), torch.full((1, 2), 2.0))
    assert twin.owner() is twin[0] and twin.lock is model.lock and twin.plain is len
    assert not torch.equal(model.patched(x), twin.patched(x)) and model.owner() is model[0]
    kept["outside"] = 5  # What else a function knows is no part of the model.
    assert torch.equal(twin.patched(x), torch.full((1, 2), 6.0))


def test_containers_are_copied_and_what_is_in_two_of_them_is_one():
    model = nn.Module()
    inner = [1]
    model.a, model.b, model.c = {"inner": inner}, (inner, {3}), [inner]
    model.c.append(model.c)  # Which holds itself.
    twin = twin_of(model)
    assert twin.a["inner"] is twin.b[0] is twin.c[0] is not inner and twin.c[1] is twin.c
    twin.a["inner"].append(2)
    twin.b[1].add(4)
    assert inner == [1] and model.b[1] == {3}


def test_a_model_that_nothing_compiled_is_itself():
    model = nn.Sequential(nn.Linear(2, 2))
    assert uncompiled(model) is model
