"""The page that the project began from, with only its imports changed, and its slips mended.

The page's classes don't call ``super().__init__()``, its loop has no body, and its example input doesn't fit its own
linear layers; a model that rejects its example inputs is an error here, so the input has five features.
"""

import torch

from qcore import (
    BackendConfig,
    BackendPatternConfig,
    DTypeConfig,
    MinMaxObserver,
    ObservationType,
    QConfig,
    QConfigMapping,
    convert_fx,
    explain,
    get_default_qconfig_mapping,
    prepare_fx,
)


class Submodule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(5, 5)

    def forward(self, x):
        x = self.linear(x)
        return x


class M(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(5, 5)
        self.sub = Submodule()

    def forward(self, x):
        x = self.linear(x)
        x = self.sub(x) + x
        return x


def calibrate(model, data_loader):
    with torch.no_grad():
        for image, _target in data_loader:
            model(image)


def sample_inference_data():
    return [(torch.randn(4, 5), None) for _ in range(4)]


def run(float_model, prepared_model):
    calibrate(prepared_model, sample_inference_data())
    quantized = convert_fx(prepared_model)
    x = torch.randn(16, 5)
    error = float_model(x) - quantized(x)
    assert error.norm() < 0.1 * float_model(x).norm()
    return explain(quantized)


def test_default_mapping(installed_backend):
    float_model = M().eval()
    qconfig_mapping = get_default_qconfig_mapping(installed_backend)
    example_inputs = (torch.randn(1, 5),)
    prepared_model = prepare_fx(float_model, qconfig_mapping, example_inputs)
    plan = run(float_model, prepared_model)
    assert plan.backend == installed_backend
    assert [d.operators for d in plan.quantized] == [("linear",), ("linear",), ("add",)]


def test_customised_qconfig_and_backend_config():
    float_model = M().eval()
    qconfig = QConfig(
        activation=MinMaxObserver.with_args(dtype=torch.qint8), weight=MinMaxObserver.with_args(dtype=torch.qint8)
    )
    qconfig_mapping = (
        QConfigMapping()
        .set_global(qconfig)
        .set_module_name("linear", qconfig)
        .set_object_type(torch.nn.Linear, qconfig)
    )
    weighted_int8_dtype_config = DTypeConfig(
        input_dtype=torch.qint8, output_dtype=torch.qint8, weight_dtype=torch.qint8, bias_dtype=torch.float
    )
    linear_pattern_config = (
        BackendPatternConfig(torch.nn.Linear)
        .set_observation_type(ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT)
        .add_dtype_config(weighted_int8_dtype_config)
    )
    backend_config = BackendConfig("page").set_backend_pattern_config(linear_pattern_config)
    prepared_model = prepare_fx(float_model, qconfig_mapping, (torch.randn(1, 5),), backend_config=backend_config)
    plan = run(float_model, prepared_model)
    assert [(d.path, d.rule) for d in plan.quantized] == [
        ("linear", "module_name 'linear'"),
        ("sub.linear", "object_type Linear"),
    ]
    assert [(d.operators, d.reason) for d in plan.floating] == [(("add",), "page has no pattern for it")]
