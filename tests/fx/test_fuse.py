"""Folding of batch norms: the fused model computes what the model did, and only what may be folded is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore.fx.fuse import BATCH_NORM_FUSIONS, fuse
from qcore.fx.operators import operator_of
from qcore.fx.tracer import trace


class Calls(nn.Module):
    """A model with a few parts whose forward is given."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def norm(channels, dimensions=2, affine=True):
    """A batch norm with statistics that aren't those of a new one."""
    made = getattr(nn, f"BatchNorm{dimensions}d")(channels, affine=affine)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(made.weight)
        nn.init.normal_(made.bias)
    return made


def fused(model):
    made = fuse(trace(model.eval()), BATCH_NORM_FUSIONS)
    made.graph.lint()
    made.recompile()
    return made


def operators(module):
    return [operator_of(n).name for n in module.graph.nodes if operator_of(n)]


def outputs(value):
    return value if isinstance(value, tuple) else (value,)


def assert_same(model, x):
    made = fused(model)
    with torch.no_grad():
        for expected, found in zip(outputs(model(x)), outputs(made(x)), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    return made


LAYERS = {
    "conv1d": (lambda bias: nn.Conv1d(4, 6, 3, bias=bias), 1, (2, 4, 9)),
    "conv2d, grouped": (lambda bias: nn.Conv2d(4, 6, 3, groups=2, bias=bias), 2, (2, 4, 7, 7)),
    "conv3d": (lambda bias: nn.Conv3d(4, 6, 3, bias=bias), 3, (2, 4, 5, 5, 5)),
    "linear": (lambda bias: nn.Linear(4, 6, bias=bias), 1, (5, 4)),
    "conv_transpose1d": (lambda bias: nn.ConvTranspose1d(4, 6, 3, bias=bias), 1, (2, 4, 5)),
    "conv_transpose2d, grouped": (lambda bias: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=bias), 2, (2, 4, 5, 5)),
    "conv_transpose3d, grouped": (lambda bias: nn.ConvTranspose3d(4, 8, 2, groups=4, bias=bias), 3, (1, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_norm_is_folded_into_the_layer_before_it(name, bias, affine):
    build, dimensions, shape = LAYERS[name]
    channels = 8 if "3d, grouped" in name else 6
    made = assert_same(nn.Sequential(build(bias), norm(channels, dimensions, affine)), torch.randn(shape))
    assert operators(made) == [name.partition(",")[0]]
    assert set(made.state_dict()) == {"0.weight", "0.bias"}


def test_functional_layers_and_norms_are_folded_too():
    def forward(m, x):
        return F.batch_norm(F.linear(x, m.w), m.n.running_mean, m.n.running_var, m.n.weight, m.n.bias)

    model = Calls(forward, w=nn.Parameter(torch.randn(6, 4)), n=norm(6, 1))
    assert operators(assert_same(model, torch.randn(3, 4))) == ["linear"]


def test_dropout_and_identity_between_do_not_keep_a_norm_from_being_folded():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Identity(), norm(6, 1))
    assert operators(assert_same(model, torch.randn(3, 4))) == ["linear"]


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_under_two_norms_gets_weight_and_bias_for_each(bias):
    def forward(m, x):
        return m.a(m.conv(x)), m.b(m.conv(x))

    model = Calls(forward, conv=nn.Conv2d(2, 3, 1, bias=bias), a=norm(3), b=norm(3))
    assert operators(assert_same(model, torch.randn(2, 2, 3, 3))) == ["conv2d", "conv2d"]


def test_a_convolution_that_is_also_called_without_its_norm_keeps_its_own_weights():
    model = Calls(lambda m, x: (m.n(m.conv(x)), m.conv(x)), conv=nn.Conv2d(2, 3, 1), n=norm(3))
    made = assert_same(model, torch.randn(2, 2, 3, 3))
    assert operators(made) == ["conv2d", "conv2d"]
    assert torch.equal(made.get_parameter("conv.weight"), model.conv.weight)


def test_one_norm_after_two_convolutions_is_folded_into_both():
    def forward(m, x):
        return m.n(m.a(x)), m.n(m.b(x))

    model = Calls(forward, a=nn.Conv2d(2, 3, 1), b=nn.Conv2d(2, 3, 1, bias=False), n=norm(3))
    assert operators(assert_same(model, torch.randn(2, 2, 3, 3))) == ["conv2d", "conv2d"]


def test_a_bias_made_by_folding_does_not_overwrite_another_parameter_of_that_name():
    parts = {"weight": nn.Parameter(torch.randn(4, 4)), "bias": nn.Parameter(torch.randn(4)), "n": norm(4, 1)}
    model = Calls(lambda m, x: m.n(F.linear(x, m.weight)) + m.bias, **parts)
    assert operators(assert_same(model, torch.randn(3, 4))) == ["linear", "add"]


@pytest.mark.parametrize(
    "forward",
    [lambda m, x: (lambda y: m.n(y) + y)(m.conv(x)), lambda m, x: (lambda y: (m.n(y), y))(m.conv(x))],
    ids=["read by an addition", "returned"],
)
def test_a_convolution_whose_output_is_used_elsewhere_keeps_its_norm(forward):
    model = Calls(forward, conv=nn.Conv2d(2, 2, 1), n=norm(2))
    assert "batch_norm" in operators(assert_same(model, torch.randn(2, 2, 3, 3)))


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(norm(2), nn.Conv2d(2, 2, 1)),
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), norm(2)),
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.MaxPool2d(2), norm(2)),
    ],
    ids=["before", "after a relu", "after a pool"],
)
def test_a_norm_that_does_not_follow_a_convolution_stays(build):
    assert "batch_norm" in operators(assert_same(build(), torch.randn(1, 2, 4, 4)))


def test_a_norm_without_statistics_stays():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)).eval()
    made, x = fused(model), torch.randn(3, 2, 4, 4)
    assert torch.equal(made(x), model(x))


def test_a_computed_weight_keeps_its_norm():
    model = Calls(lambda m, x: m.n(F.linear(x, m.w * 2)), w=nn.Parameter(torch.randn(4, 4)), n=norm(4, 1))
    assert "batch_norm" in operators(assert_same(model, torch.randn(3, 4)))


def test_fusing_leaves_the_user_s_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), norm(3)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def prepared_for(model, x):
    mapping = qcore.get_default_qconfig_mapping("reference")
    return qcore.prepare_fx(model.eval(), mapping, (x,), backend="reference")


class Channels(nn.Module):
    def __init__(self, layer, norm):
        super().__init__()
        self.layer, self.norm, self.head = layer, norm, nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.norm(self.layer(x)))


class FunctionalNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.n = norm(channels)

    def forward(self, x):
        return F.batch_norm(x, self.n.running_mean, self.n.running_var, self.n.weight, self.n.bias)


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "make_norm", "shape", "folds"),
    [
        (lambda: nn.Linear(16, 16), lambda: norm(16, 1), (5, 16), True),
        (lambda: nn.Linear(16, 16), lambda: norm(16, 1), (2, 16, 16), False),
        (lambda: nn.Linear(16, 16), lambda: norm(10, 1), (2, 10, 16), False),
        (lambda: nn.Linear(16, 16), lambda: norm(10, 2), (2, 10, 3, 16), False),
        (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: norm(6, 1), (2, 4, 16), True),
        (lambda: nn.Conv1d(4, 16, 3, padding=1), lambda: norm(16, 1), (4, 16), False),
        (lambda: nn.Conv2d(4, 6, 1), lambda: FunctionalNorm(16), (4, 16, 16), False),
        (lambda: nn.Conv2d(4, 6, 1), lambda: FunctionalNorm(6), (2, 4, 3, 16), True),
        (lambda: nn.ConvTranspose1d(4, 16, 3, padding=1), lambda: norm(16, 1), (4, 16), False),
    ],
)
def test_a_norm_is_folded_only_where_it_goes_by_the_layer_s_channels(layer, make_norm, shape, folds):
    torch.manual_seed(0)
    model = Channels(layer(), make_norm()).eval()
    for scale in (1, 100):
        x = scale * torch.randn(shape)
        prepared, expected = prepared_for(model, x), model(x)
        assert ("batch_norm" not in operators(prepared)) == folds
        assert (prepared(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_a_folded_norm_is_not_given_what_it_would_go_by_another_axis_of():
    model = nn.Sequential(nn.Linear(16, 16), norm(16, 1), nn.Linear(16, 3))
    prepared = prepared_for(model, torch.randn(4, 16))
    prepared(torch.randn(7, 16))
    converted = qcore.convert_fx(prepared)
    for made in (prepared, converted, qcore.fuse_fx(model)):
        assert made(torch.randn(5, 16)).shape == (5, 3)
        with pytest.raises(qcore.errors.GuardError, match=r"dim\(\) = 2, and now it is 3"):
            made(torch.randn(2, 16, 16))


@torch.no_grad()
def test_a_norm_over_the_middle_of_a_product_is_not_folded():
    """The product becomes a linear layer just before, and has no example of its own yet."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 4))
            self.norm = nn.BatchNorm1d(3)
            self.norm.running_mean.uniform_(0.5, 1.5)

        def forward(self, x):
            return self.norm(x @ self.matrix)

    model, x = Product().eval(), torch.randn(2, 3, 4)
    prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping("reference"), (x,))
    assert torch.allclose(prepared(x), model(x), atol=1e-5)


FUSABLE = {
    "conv1d": (lambda: [nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6)], (2, 4, 9)),
    "conv2d": (lambda: [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)], (2, 4, 9, 9)),
    "conv3d": (lambda: [nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6, affine=False)], (2, 4, 5, 5, 5)),
    "linear": (lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6)], (2, 4)),
    "transposed": (lambda: [nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)], (2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", FUSABLE)
def test_a_batch_norm_is_folded(name):
    build, shape = FUSABLE[name]
    model = nn.Sequential(*build())
    norm = model[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if norm.affine:
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    model.eval()
    fused = fuse(trace(model), BATCH_NORM_FUSIONS)
    fused.recompile()
    assert "batch_norm" not in [operator_of(n).name for n in fused.graph.nodes if operator_of(n)]
    x = torch.randn(shape)
    assert torch.allclose(fused(x), model(x), atol=1e-5)
    assert not [key for key in fused.state_dict() if "running" in key]


def test_a_convolution_with_two_batch_norms_gets_two_weights():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)
            self.a, self.b = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
            self.b.running_var.fill_(4)

        def forward(self, x):
            return self.a(self.conv(x)) + self.b(self.conv(x))

    model, x = Two().eval(), torch.randn(1, 2, 3, 3)
    fused = fuse(trace(model), BATCH_NORM_FUSIONS)
    fused.recompile()
    assert torch.allclose(fused(x), model(x), atol=1e-5)


def test_a_convolution_that_others_read_keeps_its_batch_norm():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    fused = fuse(trace(Read().eval()), BATCH_NORM_FUSIONS)
    assert "batch_norm" in [operator_of(n).name for n in fused.graph.nodes if operator_of(n)]
