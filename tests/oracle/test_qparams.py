"""Scales and zero points: bit for bit those of torch.ao, but for the departures that are written down here.

Development only: of the whole project, only the tests in this directory may import torch.ao.quantization.
"""

import pytest
import torch
import torch.ao.quantization as ao
from hypothesis import given, settings
from hypothesis import strategies as st

import qcore

EPS = torch.finfo(torch.float32).eps
PER_TENSOR = ["MinMaxObserver", "MovingAverageMinMaxObserver"]
PER_CHANNEL = ["PerChannelMinMaxObserver", "MovingAveragePerChannelMinMaxObserver"]
PLAIN = {torch.quint8: torch.uint8, torch.qint8: torch.int8}

#: Arguments that both sides take alike.
RANGES = {
    torch.quint8: [{}, {"reduce_range": True}, {"quant_min": 0, "quant_max": 100}, {"quant_min": 0, "quant_max": 15}],
    torch.qint8: [
        {},
        {"reduce_range": True},
        {"quant_min": -127, "quant_max": 127},
        {"quant_min": -100, "quant_max": 90},
    ],
}
CASES = [
    pytest.param(name, dtype, scheme, arguments, id=f"{name}-{dtype}-{scheme}-{arguments}")
    for name in PER_TENSOR + PER_CHANNEL
    for dtype in PLAIN
    for scheme in ("affine", "symmetric")
    for arguments in RANGES[dtype]
    # torch.ao refuses to reduce a symmetric unsigned range; see the test below.
    if (dtype, scheme, arguments) != (torch.quint8, "symmetric", {"reduce_range": True})
]


def pair(name, dtype, scheme, **arguments):
    """The same observer of both sides."""
    qscheme = getattr(torch, f"{'per_channel' if name in PER_CHANNEL else 'per_tensor'}_{scheme}")
    theirs = getattr(ao.observer, name)(dtype=dtype, qscheme=qscheme, **arguments)
    return theirs, getattr(qcore, name)(dtype=PLAIN[dtype], qscheme=qscheme, **arguments)


def run(observers, batches):
    for batch in batches:
        for observer in observers:
            observer(batch)
    (their_scale, their_zero), (our_scale, our_zero) = (observer.calculate_qparams() for observer in observers)
    return their_scale.reshape(-1), their_zero.reshape(-1), our_scale.reshape(-1), our_zero.reshape(-1)


def departs(dtype, scheme, arguments):
    """For symmetric unsigned ranges other than 0..255 the zero points may differ; see the test below."""
    return dtype is torch.quint8 and scheme == "symmetric" and bool(arguments)


def batches_of(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    shift, spread = (float(torch.randn((), generator=generator)) * 3, 10 ** (seed % 7 - 3.0))
    for number in range(count):
        batch = (torch.randn(5, 6, 7, generator=generator) + shift) * spread * (number + 1)
        yield batch.abs() if seed % 3 == 0 else batch


@pytest.mark.parametrize(("name", "dtype", "scheme", "arguments"), CASES)
@pytest.mark.parametrize("seed", range(8))
def test_qparams_are_equal(name, dtype, scheme, arguments, seed):
    theirs, their_zero, ours, our_zero = run(pair(name, dtype, scheme, **arguments), batches_of(seed))
    assert bool((theirs > EPS).all())
    assert torch.equal(theirs, ours)
    if not departs(dtype, scheme, arguments):
        assert torch.equal(their_zero.long(), our_zero)


VALUES = st.floats(-(2.0**60), 2.0**60, width=32).filter(lambda value: value == 0 or abs(value) > 1e-3)


@settings(max_examples=300, deadline=None)
@given(
    case=st.sampled_from([case.values for case in CASES]),
    rows=st.lists(st.lists(VALUES, min_size=4, max_size=4), min_size=1, max_size=4),
)
def test_qparams_are_equal_for_any_data(case, rows):
    name, dtype, scheme, arguments = case
    batches = [torch.tensor(row).reshape(2, 2) for row in rows]
    observers = pair(name, dtype, scheme, eps=EPS, **arguments)
    theirs, their_zero, ours, our_zero = run(observers, batches)
    assert torch.equal(theirs, ours)
    if not departs(dtype, scheme, arguments):
        assert torch.equal(their_zero.long(), our_zero)


@pytest.mark.parametrize("name", PER_CHANNEL)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_qparams_are_equal_along_any_axis(name, axis):
    observers = pair(name, torch.qint8, "symmetric", ch_axis=axis)
    theirs, their_zero, ours, our_zero = run(observers, batches_of(1))
    assert torch.equal(theirs, ours)
    assert torch.equal(their_zero.long(), our_zero)


@pytest.mark.parametrize("constant", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("name", ["MovingAverageMinMaxObserver", "MovingAveragePerChannelMinMaxObserver"])
def test_moving_averages_are_equal(name, constant):
    observers = pair(name, torch.quint8, "affine", averaging_constant=constant)
    theirs, their_zero, ours, our_zero = run(observers, batches_of(2, 20))
    assert torch.equal(theirs, ours)
    assert torch.equal(their_zero.long(), our_zero)


@pytest.mark.parametrize("quant_max", [15, 99, 100, 127])
@pytest.mark.parametrize("name", PER_TENSOR + PER_CHANNEL)
def test_zero_points_of_symmetric_unsigned_ranges_are_equal(name, quant_max):
    """Both round the middle of a custom range down, and that of 0..255 up."""
    observers = pair(name, torch.quint8, "symmetric", quant_min=0, quant_max=quant_max)
    _, theirs, _, ours = run(observers, batches_of(1))
    assert set(theirs.tolist()) == {quant_max // 2}
    assert torch.equal(ours, theirs.long())


@pytest.mark.parametrize("name", PER_TENSOR + PER_CHANNEL)
def test_departure_symmetric_unsigned_ranges_can_be_reduced(name):
    with pytest.raises(NotImplementedError, match="Cannot reduce range"):
        pair(name, torch.quint8, "symmetric", reduce_range=True)
    kind = "per_channel" if name in PER_CHANNEL else "per_tensor"
    ours = getattr(qcore, name)(dtype=torch.uint8, qscheme=f"{kind}_symmetric", reduce_range=True)
    ours(next(batches_of(1)))
    assert (ours.quant_min, ours.quant_max) == (0, 127)
    assert set(ours.calculate_qparams()[1].reshape(-1).tolist()) == {63}


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize("name", PER_TENSOR + PER_CHANNEL)
def test_departure_tiny_values_are_not_flushed_to_zero(name, scheme):
    """torch.ao keeps every scale above float32's eps; qcore has no floor, unless it is told."""
    batch = torch.randn(4, 16) * 1e-8
    theirs, _, ours, our_zero = run(pair(name, torch.qint8, scheme), [batch])
    assert set(theirs.tolist()) == {EPS}
    larger = run(pair(name, torch.qint8, scheme), [batch * 2.0**30])
    # A power of two moves the exponents and nothing else.
    assert torch.equal(ours * 2.0**30, larger[0])
    assert torch.equal(our_zero, larger[1].long())
    theirs, their_zero, ours, our_zero = run(pair(name, torch.qint8, scheme, eps=EPS), [batch])
    assert torch.equal(theirs, ours)
    assert torch.equal(their_zero.long(), our_zero)


def test_departure_a_channel_of_zeros_takes_its_neighbours_scale():
    batch = torch.tensor([[0.0, 0.0], [-1.0, 2.0], [0.5, 0.25]])
    theirs, _, ours, _ = run(pair("PerChannelMinMaxObserver", torch.qint8, "symmetric"), [batch])
    assert float(theirs[0]) == EPS
    assert float(ours[0]) == float(ours.max()) == float(theirs[1])
    theirs, _, ours, _ = run(pair("MinMaxObserver", torch.qint8, "symmetric"), [torch.zeros(4)])
    assert (float(theirs), float(ours)) == (EPS, 1.0)


@pytest.mark.parametrize("dtype", PLAIN)
def test_departure_nan_and_infinity_are_left_out(dtype):
    batch = torch.tensor([1.0, float("nan"), -2.0, float("inf")])
    theirs, ours = pair("MinMaxObserver", dtype, "affine")
    theirs(batch)
    ours(batch)
    assert not torch.isfinite(theirs.min_val + theirs.max_val)
    assert (float(ours.min_val), float(ours.max_val), ours.nonfinite_count) == (-2.0, 1.0, 2)
