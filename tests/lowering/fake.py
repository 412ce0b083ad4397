"""The fake backend for tests of lowering: what rules were asked, and a model before and after."""

import torch
from torch import nn

import qcore
from qcore.testing import FakeBackend, plugged_in


class Recording(FakeBackend):
    """Keeps each call that a rule was asked to compute."""

    def __init__(self):
        self.calls = []

    def kernel(self, call):
        self.calls.append(call)
        return super().kernel(call)

    def without(self, *patterns):
        """The backend with no rule for these."""
        every = self.rules()
        self.rules = lambda: [rule for rule in every if rule.pattern not in patterns]
        return self

    def named(self, operator):
        """The one call that begins with an operator."""
        (found,) = [call for call in self.calls if call.nodes[0].name == operator]
        return found


def claiming(*patterns, base=Recording):
    """A backend that has kernels for more patterns."""
    return type("Claiming", (base,), {"patterns": (*base.patterns, *patterns)})()


def default_qconfig(backend=None):
    """The qconfig of the default mapping."""
    return (backend or FakeBackend()).mapping(0).global_qconfig


def lowered(backend, model, *inputs, rules=None, **arguments):
    """The reference model and the converted one.

    Args:
        backend: a FakeBackend.
        model: of floats.
        inputs: to prepare and calibrate it with.
        rules: qconfigs by the module's name, beside the default mapping.
    """
    with plugged_in(backend.name, backend.plugin()):
        mapping = qcore.get_default_qconfig_mapping(backend.name)
        for name, qconfig in (rules or {}).items():
            mapping.set_module_name(name, qconfig)
        prepared = qcore.prepare_fx(model.eval(), mapping, inputs, backend=backend.name, **arguments)
        with torch.no_grad():
            prepared(*inputs)
        return qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)


def kernels(model):
    """What ``explain`` says: for each quantized decision its operators, and its kernel or why it has none."""
    return {" + ".join(d.operators): d.kernel or d.reason for d in qcore.explain(model).quantized}


def targets(model, op="call_function"):
    """What a graph calls."""
    return [node.target for node in model.graph.nodes if node.op == op]


def same(reference, converted, *inputs):
    """Whether both give the same bits."""
    with torch.no_grad():
        return torch.equal(reference(*inputs), converted(*inputs))


class Calling(nn.Module):
    """A function of the module itself and its inputs, with the layers that it uses."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs):
        return self.function(self, *inputs)
