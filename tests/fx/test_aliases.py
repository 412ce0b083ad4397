"""Writes: a graph computes what a forward does that overwrites tensors, its inputs or its state, or it isn't made."""

import copy
import pickle
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore import errors
from qcore.fx.graph_module import QGraphModule
from qcore.fx.shapes import difference
from qcore.fx.signature import CallSignature
from qcore.fx.tracer import trace


class Model(nn.Module):
    """Two convolutions and whatever else a forward may need."""

    def __init__(self, body):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.lstm = nn.GroupNorm(2, 8), nn.LSTM(8, 8, batch_first=True)
        self.relu, self.mish = nn.ReLU(inplace=True), nn.Mish(inplace=True)
        self.threshold = nn.Threshold(0.1, 0.5, inplace=True)
        self.register_buffer("state", torch.ones(8, 1, 1))
        self.count, self.kept, self.states = 0, [], [torch.zeros(8, 1, 1)]
        self.body = body

    def forward(self, *args, **kwargs):
        return self.body(self, *args, **kwargs)


def prepared_for(body, *inputs):
    torch.manual_seed(0)
    model = Model(body).eval()
    mapping = qcore.get_default_qconfig_mapping("reference")
    prepared = qcore.prepare_fx(
        copy.deepcopy(model), mapping, inputs or (torch.randn(2, 3, 4, 4),), backend="reference"
    )
    return model, prepared


def lines(source):
    """A forward of ``y``, a convolution's result, and ``x``, the input."""
    space = {"torch": torch, "F": F, "nn": nn, "copy": copy}
    exec("def body(m, x):\n    y = m.a(x)\n    " + source.replace("\n", "\n    "), space)
    return space["body"]


SEEN = {
    "a view after a write": "v = y[:, :1]; y.clamp_(-6, 6); return m.b(y) + v",
    "a base after a write to its view": "v = y[:, :1]; v.clamp_(0, 1); return m.b(y)",
    "chunks": "p, q = y.chunk(2, 1); p.relu_(); q.mul_(2); return m.b(y) + torch.cat([p, q], 1)",
    "parts of a split": "p, q = torch.split(y, 4, 1); y.add_(1); return m.b(y) + torch.cat([p, q], 1)",
    "all slices": "for i, v in enumerate(y.unbind(1)): v.mul_(i)\nreturn m.b(y)",
    "a view of other sizes": "v = y.view(y.size(0), -1); v.relu_(); return m.b(y)",
    "its base": "v = y.view(y.size(0), -1); y.relu_(); return m.b(y).flatten(1) + v",
    "transposed": "v = y.transpose(1, 2); v[:, 0] += 3; return m.b(y) + v.transpose(1, 2)",
    "expanded": "y = y.mean((2, 3), keepdim=True); v = y.expand(-1, -1, 4, 4); y.mul_(3); return m.b(v)",
    "squeezed": "y = y[:, :, :1, :1]; v = y.squeeze(-1).squeeze(-1); v.relu_(); return m.b(y)",
    "detached": "v = y.detach(); v.relu_(); return m.b(y)",
    "data": "y.data.clamp_(0, 1); return m.b(y)",
    "mT": "y.mT.relu_(); return m.b(y)",
    "a diagonal": "y.diagonal(dim1=2, dim2=3).zero_(); return m.b(y)",
    "windows": "u = y.unfold(2, 2, 2); y.relu_(); return m.b(y) + u.mean()",
    "a view of a view": "v = y[:, 2:6][:, 1:3].transpose(0, 1)[0]; v.fill_(7); return m.b(y) + v.mean()",
    "views that overlap": "u = y[:, 2:6]; v = u[:, 1:3]; w = y[:, :5]; v.zero_(); w.add_(1); return y, u + 0, v * 2, w",
    "views among results": "v = y[:, :1]; m.b(y); y.relu_(); return y, v, (v, y)",
    "an item": "v = y[:, 0]; y[:, 0] = 4; return m.b(y) + v.mean()",
    "items by a mask": "v = y[:, 0]; y[y < 0] = 4; return m.b(y) + v.mean()",
    "items of a view": "v = y[:, :3]; v[v < 0] = 4; return m.b(y)",
    "an item that is added to": "v = y[:, :2]; y[:, 0] += 1; y[:, 1:3] *= y[:, 2:4].clone(); return m.b(y) + v.mean()",
    "masked_fill_": "v = y[:, :1]; y.masked_fill_(y < 0, 2.0); return m.b(y) + v",
    "index_add_": "v = y[:, :1]; y.index_add_(1, torch.tensor([0]), torch.ones(x.size(0), 1, 4, 4)); return m.b(y) + v",
    "scatter_": "v = y[:, :1]; y.scatter_(1, y[:, :1].argmin(1, True), 9.0); return m.b(y) + v",
    "copy_": "z = m.b(y); z[:, :4].copy_(y[:, 4:]); return z",
    "a method without a plain form": "y = y.mean((2, 3)); v = y[0]; y.fill_diagonal_(1.0); return y + v",
    "a module": "v = y[:, :2]; m.relu(y); return m.b(y) + v.mean()",
    "a module that is kept whole": "v = y[:, :2]; m.threshold(y); m.mish(v); return m.b(y) + v.mean()",
    "after a module that is kept whole": "z = m.norm(y); z.relu_(); return m.b(z) + y",
    "tuples of a module": "o, (h, c) = m.lstm(y.flatten(2).mT); o *= 2; h.add_(1); return o + (h + c)[0][:, None]",
    "an item of a tuple of a module": "r = m.lstm(y.flatten(2).mT); r[0].add_(1); return r[0] * 2",
    "a function with inplace=True": "v = y[:, :1]; F.silu(y, inplace=True); F.celu(v, 1.0, True); return m.b(y) + v",
    "containers": "l = [y, y[:, :2]]; l[0].relu_(); d = {'k': l[1]}; d['k'] *= 2; return m.b(l[0]) + l[1].mean()",
    "another name": "i = y; y.relu_(); z = m.b(y); z += i; return z",
    "a residual": "i = y; z = m.relu(m.b(y)); z += i; return m.relu(z)",
    "dropout gives its input": "z = F.dropout(y, training=False); z.relu_(); return m.b(y)",
    "a copy": "z = copy.deepcopy(y); y.relu_(); return m.b(y) + z",
    "a copy that replaces its original": "y = y.mT.contiguous(); y.relu_(); return m.b(y)",
    "without gradients": "with torch.no_grad(): y[:, :1].relu_()\nreturn m.b(y)",
    "turned in place": "y.unsqueeze_(0); n = y.size(0); y.squeeze_(0); y.transpose_(2, 3); v = y[:, 0]; y.relu_()\n"
    "return m.b(y) * n + v.mean() * y.shape[2]",
    "sizes of what can't be read": "v = y.flatten(1); y.relu_(); return m.b(y) * v.size(0) + v.shape[1]",
    "numbers are no tensors": "n = k = x.size(0); n += 1; t = u = y.sum().item(); t += 1; return m.b(y) * n + k + t",
    "tuples are no tensors": "p = y.chunk(2, 1); q = p; p += (y[:, :1],); return m.b(torch.cat(q, 1)) + p[2]",
    "integers": "i = torch.arange(x.size(0)); i += 1; i.mul_(2); return m.b(y) * i[:, None, None, None]",
    "a constant between two uses": "t = torch.ones(8, 1, 1); y = y + t; t.add_(1); return m.b(y + t)",
    "many constants": "for i in range(40): y = y + torch.full((8, 1, 1), float(i))\nreturn m.b(y)",
    "items of a constant": "t = torch.zeros(8, 1, 1); t[:2] = y[0, :2, :1, :1]; return m.b(y) + (y * 0 + t), t",
    "an input": "x.sub_(1).div_(2); return m.b(m.a(x))",
    "an input that is read before": "x.sub_(1); return m.b(y) + m.a(x)",
    "a view of an input": "x[:, :1].add_(5); return m.b(m.a(x))",
    "an item of an input": "x[:, 0] = 3; x[:, 1] += 2; return m.b(m.a(x))",
    "an input as a result": "x += 1; return m.b(m.a(x)), x, x[:, :1]",
    "a copy of an input": "z = x.permute(0, 2, 3, 1).contiguous(); z.sub_(1); return m.b(m.a(z.permute(0, 3, 1, 2)))",
    "an input by a module": "return m.b(m.a(m.relu(x)))",
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", SEEN)
def test_a_graph_sees_writes_as_the_forward_does(name):
    model, prepared = prepared_for(lines(SEEN[name]))
    assert isinstance(prepared, QGraphModule), qcore.explain(prepared).python
    for batch, factor in ((2, 1), (2, 100), (5, 100), (3, 1)):
        x = torch.randn(batch, 3, 4, 4) * factor
        given, expected_left = x.clone(), x.clone()
        expected = model(expected_left)
        assert difference(expected, prepared(given)) == ""
        assert torch.equal(given, expected_left)


@torch.no_grad()
@pytest.mark.parametrize("name", SEEN)
def test_so_does_a_converted_one(name):
    model, prepared = prepared_for(lines(SEEN[name]))
    batches = [torch.randn(2, 3, 4, 4) for _ in range(4)]
    for x in batches:
        prepared(x.clone())
    converted = pickle.loads(pickle.dumps(copy.deepcopy(qcore.convert_fx(prepared))))
    for x in batches * 2:  # The first calls of a form run as they are written, later ones are replayed.
        given, expected_left = x.clone(), x.clone()
        expected = torch.utils._pytree.tree_leaves(model(expected_left))
        found = torch.utils._pytree.tree_leaves(converted(given))
        for a, b in zip(expected, found, strict=True):
            assert (a - b).abs().mean() <= 0.02 * (1 + a.abs().max())
        assert (given - expected_left).abs().max() <= 1e-6 * (1 + expected_left.abs().max())


UNSURE = {
    "reshape": ("v = y.reshape(y.size(0), -1); v.relu_(); return m.b(y)", "reshape may give a view"),
    "contiguous": ("v = y.mT.contiguous(); v.relu_(); return m.b(y) + v", "contiguous may give a view"),
    "to": ("v = y.to(torch.float32); y.relu_(); return m.b(y) + v", "to may give a view"),
    "einsum": ("v = torch.einsum('bchw->bhwc', y); v.relu_(); return m.b(y)", "einsum may give a view"),
    "an input by contiguous": ("x = x.contiguous(); x.sub_(1); return m.b(m.a(x))", "into args_0 through contiguous"),
    "out=": ("z = torch.empty_like(y); torch.add(y, y, out=z); return m.b(z)", "out="),
    "resize_": ("y.resize_(1, 8, 2, 2); return m.b(y)", "it calls resize_"),
    "data": ("z = m.b(y); y.data = z; return m.b(y)", "assigns to .data"),
    "several at once": ("z = m.b(y); torch._foreach_add_([y, z], 1.0); return y + z", "it calls _foreach_add_"),
    "another dtype": ("z = y.half(); z += y; return m.b(z.float())", "written into a tensor of another dtype"),
    "a constant that is read as it was": ("t = torch.zeros(8); t[0] = y.mean(); return m.b(y) + t.sum()", "it made"),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", UNSURE)
def test_what_isn_t_sure_stays_python(name):
    source, reason = UNSURE[name]
    model, prepared = prepared_for(lines(source))
    assert type(prepared) is Model and qcore.explain(prepared).parts
    (python,) = [module for module in qcore.explain(prepared).python if module.path == ""]
    assert re.search(reason, python.reason), python.reason
    for batch in (2, 5):
        x = torch.randn(batch, 3, 4, 4) * 100
        given, expected_left = x.clone(), x.clone()
        assert difference(model(expected_left), prepared(given)) == ""
        assert torch.equal(given, expected_left)


STATE = {
    "a buffer": "m.state.copy_(y[0, :, :1, :1]); return m.b(y) + m.state",
    "an item of a buffer": "m.state[0] = y.mean(); return m.b(y) + m.state",
    "a view of a buffer": "m.state[:2].mul_(2); return m.b(y)",
    "an assigned buffer": "m.state = m.state + 1; return m.b(y)",
    "a weight": "m.b.weight[:1].mul_(2); return m.b(y)",
    "a tensor in a list": "m.states[0].add_(1); return m.b(y) + m.states[0]",
    "a tensor in a list, from data": "m.states[0].copy_(y[0, :, :1, :1]); return m.b(y)",
    "an item of it": "m.states[0][0] = y.mean(); return m.b(y)",
    "a list": "m.kept.append(y); return m.b(y)",
    "a number": "m.count += 1; return m.b(y)",
}


@pytest.mark.parametrize("name", STATE)
def test_a_forward_that_writes_its_state_is_no_graph(name):
    torch.manual_seed(0)
    model, x = Model(lines(STATE[name])).eval(), torch.randn(2, 3, 4, 4)
    state = copy.deepcopy(model.state_dict())
    signature = CallSignature.of(model, (x,), {}, "Model")
    with torch.no_grad(), pytest.raises(errors.TraceError, match="keeps|kept") as caught:
        trace(model, signature=signature, examples=[x])
    assert caught.value.reason
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())  # Tracing wrote nothing.
    assert (model.count, model.kept, model.states[0].any().item()) == (0, [], False)


@pytest.mark.parametrize("source", ["c['y'] = y", "c['l'].append(y)", "c['l'][0] = y", "c.pop('n')", "c['l'].clear()"])
def test_a_container_that_the_caller_passed_isn_t_changed_by_a_graph(source):
    space = {}
    exec(f"def body(m, c):\n    y = m.a(c['l'][0])\n    {source}\n    return m.b(y)", space)
    torch.manual_seed(0)
    model, c = Model(space["body"]).eval(), {"l": [torch.randn(2, 3, 4, 4)], "n": 1}
    signature = CallSignature.of(model, (c,), {}, "Model")
    with torch.no_grad(), pytest.raises(errors.TraceError, match="changes a container among its arguments"):
        trace(model, signature=signature, examples=signature.bind((c,), {}))


@torch.no_grad()
def test_a_write_of_which_nothing_is_known_is_found_by_the_replay():
    torch.library.define("qcore_test::scribble", "(Tensor(a!) x) -> Tensor")

    @torch.library.impl("qcore_test::scribble", "CompositeExplicitAutograd")
    def scribble(x):
        return x.mul_(2).clone()

    model, prepared = prepared_for(lines("v = y[:, :1]; z = torch.ops.qcore_test.scribble(y); return m.b(z), v, y"))
    assert type(prepared) is Model
    (python,) = [module for module in qcore.explain(prepared).python if module.path == ""]
    assert "gives is written, in a way that qcore doesn't know" in python.reason
    x = torch.randn(2, 3, 4, 4)
    assert difference(model(x), prepared(x)) == ""


@torch.no_grad()
def test_writes_in_a_loop_take_linear_time_and_nodes():
    def nodes(count):
        def body(model, x):
            y = model.a(x)
            for v in [y[:, i % 8] for i in range(count)]:
                v.add_(1)
            return model.b(y)

        return len(prepared_for(body)[1].graph.nodes)

    assert nodes(60) - nodes(40) == nodes(40) - nodes(20)


def test_a_tensor_that_a_forward_makes_is_a_new_one_at_each_call():
    _, prepared = prepared_for(lines("return m.b(y), torch.ones(3)"))
    x = torch.randn(2, 3, 4, 4)
    prepared(x)[1].zero_()
    assert torch.equal(prepared(x)[1], torch.ones(3))


@pytest.mark.parametrize("after", [nn.Identity(), nn.ReLU(inplace=True), nn.Mish(inplace=True)])
def test_tracing_keeps_no_more_values_than_the_forward(after):
    alive = []

    class Watched(nn.Module):
        def forward(self, x):
            alive[:] = [entry for entry in alive if entry() is not None]
            result = x + 1
            alive.append(weakref.ref(result))
            counts.append(len(alive))
            return result

    counts = []
    model = nn.Sequential(*[nn.Sequential(Watched(), after) for _ in range(20)], nn.Flatten(), SizeReader()).eval()
    signature, x = CallSignature.of(model, (torch.ones(2, 3),), {}, "Sequential"), torch.ones(2, 3)
    graph = trace(model, leaf_classes=[Watched], signature=signature, examples=[x])
    assert max(counts) <= 3 and len(counts) == 20
    assert graph(x).shape == (2, 3)


class SizeReader(nn.Module):
    def forward(self, x):
        return x.view(x.shape[0], -1)
