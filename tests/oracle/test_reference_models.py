"""Converted reference models: the same qparams, integers and outputs as torch.ao's, where nothing departs.

Development only: of the whole project, only the tests in this directory may import torch.ao.quantization.
"""

import both_sides as sides
import pytest
import small_models as models
import torch
from both_sides import MIN_MAX, MOVING_AVERAGE, PER_TENSOR
from small_models import IMAGE, ROWS

import qcore

MODELS = {
    "conv_bn_relu": (models.conv_bn_relu, IMAGE),
    "depthwise": (models.depthwise, IMAGE),
    "conv_transpose": (models.conv_transpose, IMAGE),
    "conv1d": (models.conv1d, (2, 3, 9)),
    "linear_relu": (models.linear_relu, ROWS),
    "residual": (models.residual, IMAGE),
    "residual_relu_module": (models.residual_relu_module, IMAGE),
    "functional_chain": (models.functional_chain, IMAGE),
    "called_twice": (models.called_twice, ROWS),
    "multiplied": (models.multiplied, IMAGE),
    "hardswish": (models.hardswish, IMAGE),
    "leaky": (models.leaky, IMAGE),
    "gated": (models.gated, IMAGE),
    "fixed_chain": (models.fixed_chain, ROWS),
    "float_island": (models.float_island, ROWS),
    "functional_island": (models.functional_island, ROWS),
    "matmul": (models.matmul, (2, 4, 8)),
    "nested": (models.Nested, ROWS),
}
RECIPES = {"per_channel": MIN_MAX, "per_tensor": PER_TENSOR, "moving_average": MOVING_AVERAGE}
CASES = [
    pytest.param(name, recipe, id=f"{name}-{recipe}")
    for name in MODELS
    for recipe in RECIPES
    if name != "conv_transpose" or recipe == "per_tensor"  # torch.ao takes no weights per channel there.
]


@pytest.fixture(scope="module")
def converted(request):
    name, recipe = request.param
    make, shape = MODELS[name]
    theirs, ours = sides.prepare_both(make(), (torch.randn(shape),), [("set_global", RECIPES[recipe])])
    with torch.no_grad():
        for number in range(3):
            batch = torch.randn(shape) * (number + 1)
            # The prepared models compute the same to the last bit: batch norms are folded in the same arithmetic.
            assert torch.equal(theirs(batch), ours(batch))
    return (*sides.convert_both(theirs, ours), shape)


def all_cases(function):
    return pytest.mark.parametrize("converted", [c.values for c in CASES], indirect=True, ids=[c.id for c in CASES])(
        function
    )


@all_cases
def test_qparams_of_activations_are_equal(converted):
    theirs, ours, _ = converted
    found = sides.our_qparams(ours)
    assert found == sides.their_qparams(theirs)
    assert len(found) >= 3


@all_cases
def test_integers_of_weights_are_equal(converted):
    theirs, ours, _ = converted
    found, expected = sides.our_weights(ours), sides.their_weights(theirs)
    # torch.ao keeps the weights of functions as a subgraph that quantizes them at run time.
    assert {name for name in found if name in expected} == set(expected)
    for name, integers in expected.items():
        assert torch.equal(found[name], integers), name


@all_cases
def test_outputs_are_equal(converted):
    """Within 1e-6; no quantization step of tolerance is needed (on x86 they are equal to the last bit)."""
    theirs, ours, shape = converted
    with torch.no_grad():
        for _ in range(3):
            batch = torch.randn(shape) * 2
            expected, found = theirs(batch), ours(batch)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["residual", "linear_relu"])
def test_converting_a_model_with_tiny_values_is_a_departure(name):
    """Tensors below 1e-7 are flushed to zero by torch.ao and not by qcore."""
    make, shape = MODELS[name]
    model, batch = make().eval(), torch.randn(shape) * 1e-9
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    theirs, ours = sides.prepare_both(model, (batch,))
    with torch.no_grad():
        theirs(batch), ours(batch)
        theirs, ours = sides.convert_both(theirs, ours)
        expected = model(batch)
        assert not theirs(batch).any()
        error = (ours(batch) - expected).abs().max() / expected.abs().max()
    assert float(error) < 0.05
    assert qcore.explain(ours).quantized
