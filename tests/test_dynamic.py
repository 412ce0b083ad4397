"""Activations whose range is taken at run time, and weights that are quantized alone."""

import pytest
import torch
from torch import nn

import qcore
from qcore import QConfigMapping, default_dynamic_qconfig, default_weight_only_qconfig


def converted(model, qconfig, x, backend, **rules):
    mapping = QConfigMapping().set_global(qconfig)
    prepared = qcore.prepare_fx(model.eval(), mapping, (x,), backend=backend)
    assert not qcore.explain(prepared).observations
    return qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4)])
def test_a_dynamic_linear_layer_takes_each_range_as_it_comes(installed_backend, shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    reference, kernels = converted(model, default_dynamic_qconfig, torch.randn(2, 4), installed_backend)
    for size in (1.0, 1e4, 1e-6):  # No calibration, and no range that any of these is out of.
        x = torch.randn(shape) * size
        expected = model(x)
        for found in (reference(x), kernels(x)):
            assert found.shape == expected.shape and found.dtype == torch.float32
            assert (found - expected).norm() <= 0.05 * expected.norm()
        assert torch.allclose(kernels(x), reference(x), atol=0.02 * float(expected.abs().max()) if x.numel() else 1)
    assert all(d.operators[0] == "linear" for d in qcore.explain(kernels).quantized)
    if installed_backend != "reference":
        assert all("range at run time" in d.kernel for d in qcore.explain(kernels).quantized)


@torch.no_grad()
def test_weights_alone(installed_backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
    x = torch.randn(2, 3, 6, 6)
    reference, kernels = converted(model, default_weight_only_qconfig, x, installed_backend)
    expected = model(x)
    assert (kernels(x) - expected).norm() <= 0.02 * expected.norm()
    assert torch.equal(kernels(x), reference(x))
    weights = {name: t.dtype for name, t in kernels.state_dict().items() if name.endswith("weight")}
    assert list(weights.values()) == [torch.int8, torch.int8]
    assert qcore.explain(kernels).weight_share == 1.0


@torch.no_grad()
def test_one_layer_dynamic_among_static_ones(installed_backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 3)).eval()
    mapping = qcore.get_default_qconfig_mapping(installed_backend).set_module_name("2", default_dynamic_qconfig)
    x = torch.randn(64, 4)
    prepared = qcore.prepare_fx(model, mapping, (x,))
    prepared(x)
    plan = qcore.explain(prepared)
    kinds = [d.dtype_config.is_dynamic for d in plan.quantized if d.weights]
    assert [bool(kind) for kind in kinds] == [False, True, False]
    expected = model(x)
    assert (qcore.convert_fx(prepared)(x) - expected).norm() <= 0.05 * expected.norm()


def test_a_chain_that_does_not_take_a_qconfig_leaves_its_operator_to_the_pattern_that_does():
    static = qcore.DTypeConfig(torch.uint8, torch.uint8, torch.int8, torch.float32)
    dynamic = qcore.DTypeConfig(torch.uint8, torch.float32, torch.int8, torch.float32, is_dynamic=True)
    config = qcore.BackendConfig("fusing").set_backend_pattern_configs(
        [
            qcore.BackendPatternConfig((nn.Linear, nn.GELU)).add_dtype_config(static),
            qcore.BackendPatternConfig(nn.Linear).set_dtype_configs([static, dynamic]),
        ]
    )
    model, x = nn.Sequential(nn.Linear(4, 8), nn.GELU()).eval(), torch.randn(2, 4)
    mapping = QConfigMapping().set_global(default_dynamic_qconfig)
    plan = qcore.explain(qcore.prepare_fx(model, mapping, (x,), backend_config=config))
    assert [(d.operators, d.quantized) for d in plan.decisions] == [(("linear",), True), (("gelu",), False)]
    mapping = qcore.get_default_qconfig_mapping("reference")
    plan = qcore.explain(qcore.prepare_fx(model, mapping, (x,), backend_config=config))
    assert [d.operators for d in plan.decisions] == [("linear", "gelu")]


def test_a_backend_that_offers_neither_says_so():
    config = qcore.BackendConfig("static").set_backend_pattern_config(
        qcore.BackendPatternConfig(nn.Linear).add_dtype_config(
            qcore.DTypeConfig(torch.uint8, torch.uint8, torch.int8, torch.float32)
        )
    )
    for qconfig, reason in (
        (default_dynamic_qconfig, "it offers no dynamic quantization here"),
        (default_weight_only_qconfig, "a placeholder observer of float32 gives no static qparams"),
    ):
        mapping = QConfigMapping().set_global(qconfig)
        with pytest.warns(qcore.errors.UnsupportedQConfigWarning, match=reason):
            qcore.prepare_fx(
                nn.Sequential(nn.Linear(4, 4)).eval(), mapping, (torch.randn(2, 4),), backend_config=config
            )


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1.0, 1e6])
def test_a_range_at_run_time_may_be_of_any_size(installed_backend, size):
    mapping = qcore.QConfigMapping().set_object_type(nn.Linear, qcore.default_dynamic_qconfig)
    model, x = nn.Sequential(nn.Linear(32, 16, bias=False)).eval(), torch.randn(5, 32)
    prepared = qcore.prepare_fx(model, mapping, (x,), backend=installed_backend)
    converted = qcore.convert_fx(prepared)
    with torch.no_grad():
        error = (converted(x * size) - model(x * size)).abs().max() / model(x * size).abs().max()
    assert error < 0.02
