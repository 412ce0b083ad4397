"""calibrate: whatever a data loader gives, its inputs reach the model, and nothing else does in silence."""

import pickle
from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qcore
from qcore import MinMaxObserver, PerChannelMinMaxObserver, QConfig, QConfigMapping, QScheme, errors

INT8 = QConfig(MinMaxObserver, MinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_tensor_symmetric))
X, MASK, TARGET = torch.full((2, 4), 3.0), torch.full((2, 4), 0.5), torch.full((2,), 100)


class One(nn.Module):
    """Notes what it is called with, unless it is traced."""

    def __init__(self, python=False):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.python = python

    def forward(self, x):
        if self.python and x.sum() > 1e9:
            return x
        return self.linear(x)


class Masked(One):
    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask)


class Two(One):
    def forward(self, x, mask):
        return super().forward(x * mask)


class Lists(One):
    def forward(self, images):
        return [super(Lists, self).forward(image) for image in images]


def prepare(model, *args, **kwargs):
    inputs = (args, kwargs) if kwargs else args
    mapping = QConfigMapping().set_global(INT8)
    return qcore.prepare_fx(model.eval(), mapping, inputs, backend="reference", on_unsupported="ignore")


def largest(prepared):
    """The largest value that reached the linear layer."""
    observers = [m for m in prepared.modules() if isinstance(m, qcore.ObserverBase)]
    return observers[0].max_val.item()


Named, Other = namedtuple("Named", "x y"), namedtuple("Other", "image label")


@pytest.mark.parametrize("python", [False, True], ids=["graph", "Python"])
@pytest.mark.parametrize(
    "batch",
    [
        X, (X,), [X], {"x": X}, UserDict(x=X), OrderedDict(x=X),
        (X, TARGET), [X, TARGET], (X, "cat"), Other(X, TARGET), Named(X, TARGET),
        ((X,), TARGET), [[X], [TARGET]], ({"x": X}, TARGET), [UserDict(x=X), TARGET],
    ],
    ids=repr,
)  # fmt: skip
def test_the_inputs_of_a_batch_reach_a_model_with_one(batch, python):
    prepared = prepare(One(python), torch.ones(2, 4))
    for model in (prepared, pickle.loads(pickle.dumps(prepared))):
        qcore.calibrate(model, [batch])
        assert largest(model) == 3.0


def test_a_data_loader_of_inputs_and_targets():
    loader = DataLoader(TensorDataset(torch.arange(40.0).reshape(10, 4), torch.arange(10)), batch_size=3)
    prepared = prepare(One(), torch.ones(2, 4))
    qcore.calibrate(prepared, loader)
    assert largest(prepared) == 39.0


@pytest.mark.parametrize("python", [False, True], ids=["graph", "Python"])
@pytest.mark.parametrize(
    "batch",
    [
        (X, MASK), {"mask": MASK, "x": X}, (X, MASK, TARGET), ((X, MASK), TARGET), ({"x": X, "mask": MASK}, TARGET),
        namedtuple("Swapped", "mask x")(MASK, X),
    ],
    ids=repr,
)  # fmt: skip
def test_the_inputs_of_a_batch_reach_a_model_with_two(batch, python):
    prepared = prepare(Two(python), torch.ones(2, 4), torch.ones(2, 4))
    qcore.calibrate(prepared, [batch])
    assert largest(prepared) == 1.5
    by_name = prepare(Two(python), x=torch.ones(2, 4), mask=torch.ones(2, 4))
    qcore.calibrate(by_name, [batch])
    assert largest(by_name) == 1.5


@pytest.mark.parametrize("python", [False, True], ids=["graph", "Python"])
def test_an_entry_that_may_be_an_input_or_a_target_is_never_guessed(python):
    prepared = prepare(Masked(python), torch.ones(2, 4))
    message = r"list of 2, .* prepared with 1 arguments and its forward takes 2: .* inputs=lambda batch: batch\[0\]"
    with pytest.raises(errors.ConfigError, match=message):
        qcore.calibrate(prepared, [[X, MASK]])
    qcore.calibrate(prepared, [[X, MASK]], inputs=lambda batch: batch[0])
    assert largest(prepared) == 3.0
    both = prepare(Masked(python), torch.ones(2, 4), torch.ones(2, 4))
    qcore.calibrate(both, [[X, MASK], [X, MASK, TARGET]])
    assert largest(both) == 1.5


def test_a_batch_with_more_than_a_target():
    prepared = prepare(One(), torch.ones(2, 4))
    with pytest.raises(errors.ConfigError, match="tuple of 3"):
        qcore.calibrate(prepared, [(X, TARGET, TARGET)])
    with pytest.raises(errors.ConfigError, match=r"holds 'labels', .* takes x; .*batch\[name\] for name in \['x'\]"):
        qcore.calibrate(prepared, [{"x": X, "labels": TARGET}])
    qcore.calibrate(prepared, [{"x": X, "labels": TARGET}], inputs=lambda batch: {"x": batch["x"]})
    qcore.calibrate(prepared, [{"image": X}], inputs=lambda batch: batch["image"])
    qcore.calibrate(prepared, [(TARGET, X)], inputs=lambda batch: (batch[1],))
    assert largest(prepared) == 3.0


def test_a_model_that_takes_a_list():
    prepared = prepare(Lists(), [torch.ones(2, 4), torch.ones(2, 4)])
    qcore.calibrate(prepared, [([X, X],), ([X, X], TARGET)])
    assert largest(prepared) == 3.0
    with pytest.raises(errors.ConfigError, match="can't be told"):
        qcore.calibrate(prepared, [[X, X]])


def test_a_model_within_another_takes_what_it_is_given():
    qcore.calibrate(nn.Sequential(prepare(One(), torch.ones(2, 4))), [X, (X,), {"input": X}])


def test_a_float_model_beside_it_changes_nothing():
    custom = qcore.PrepareCustomConfig().set_guard_failure("float")
    for python in (False, True):
        prepared = qcore.prepare_fx(
            One(python).eval(), QConfigMapping().set_global(INT8), (X,), custom, backend="reference"
        )
        qcore.calibrate(prepared, [(X, TARGET)])
        assert largest(prepared) == 3.0


@pytest.mark.parametrize(
    "batches", [[], (), iter([]), (batch for batch in ())], ids=["list", "tuple", "iter", "generator"]
)
def test_no_batches(batches):
    with pytest.raises(errors.CalibrationError, match="calibrate got no batches: the .* is empty, or a generator"):
        qcore.calibrate(prepare(One(), X), batches)


@pytest.mark.parametrize("batches", [X, {"x": X}, "text", None, 3])
def test_what_are_no_batches(batches):
    with pytest.raises(
        errors.ConfigError, match=r"batches: expected an iterable of batches, found .*; write \[batch\]"
    ):
        qcore.calibrate(prepare(One(), X), batches)


@pytest.mark.parametrize("python", [False, True], ids=["graph", "Python"])
def test_only_a_prepared_model_can_be_calibrated(python):
    prepared = prepare(One(python), X)
    qcore.calibrate(prepared, [X])
    for wrong, found in (
        (One().eval(), "One, which isn't one"), (qcore.fuse_fx(One().eval()), "GraphModule"), ("model", "str"),
        (qcore.convert_fx(prepared), "a (reference|converted) model"),
        (qcore.convert_to_reference_fx(prepared), "a reference model"),
    ):  # fmt: skip
        with pytest.raises(errors.ConfigError, match=f"calibrate needs what prepare_fx returned, found {found}"):
            qcore.calibrate(wrong, [X])


def test_wrong_arguments_come_at_once():
    with pytest.raises(errors.ConfigError) as caught:
        qcore.calibrate(One(), X, inputs=0, progress="yes")
    assert len(caught.value.problems) == 4


def test_data_that_is_never_finite_is_told_from_no_data():
    prepared = prepare(One(), X)
    qcore.calibrate(prepared, [torch.full((2, 4), float("nan"))])
    with pytest.raises(errors.CalibrationError, match="saw no finite data: .* met 8 values, all NaN or infinite"):
        qcore.convert_fx(prepared)


WEIGHT = PerChannelMinMaxObserver.with_args(dtype=torch.int8, qscheme=QScheme.per_channel_symmetric)


MAPPING = QConfigMapping().set_global(QConfig(MinMaxObserver, WEIGHT))


def test_calibrate_takes_tensors_tuples_and_dictionaries_and_shows_progress():
    prepared = qcore.prepare_fx(
        nn.Sequential(nn.Linear(4, 4)).eval(), MAPPING, (torch.randn(2, 4),), backend="reference"
    )
    shown = []

    def progress(batches):
        for batch in batches:
            shown.append(type(batch))
            yield batch

    x = torch.randn(2, 4)
    qcore.calibrate(prepared, [x, (x,), {"input": 9 * x}], progress=progress)
    assert shown == [torch.Tensor, tuple, dict]
    assert prepared.activation_post_process_0.max_val == max(9 * x.max(), x.max())
