"""Errors: one tree as it is drawn, every problem at once, and all that they know survives a pickle."""

import inspect
import pickle
import re
import warnings

import pytest
import torch
from torch import nn

import qcore
from qcore import errors

KINDS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, (errors.QcoreError, errors.QcoreWarning))
]


def drawn():
    """The name of each class, with those of its bases, as the tree at the top of the module has them."""
    found, above = {}, []
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ([│├└─ ]*)(\w+(?:Error|Warning))(?: \((\w+)\))?", line)
        if match:
            depth = len(match[1]) // 4
            above[depth:] = [match[2]]
            found[match[2]] = {*above[-2:-1], *([match[3]] if match[3] else [])}
    return found


def test_the_tree_is_as_it_is_drawn():
    tree = drawn()
    assert set(tree) == {kind.__name__ for kind in KINDS}
    for kind in KINDS:
        wanted = tree[kind.__name__]
        bases = {base.__name__ for base in kind.__mro__[1:]}
        assert wanted <= bases, kind
        drawn_above = {name for name in tree if name in bases}
        assert all(name in wanted or any(name in ancestors(tree, w) for w in wanted) for name in drawn_above), kind


def ancestors(tree, name):
    direct = tree.get(name, set())
    return direct | {further for base in direct for further in ancestors(tree, base)}


@pytest.mark.parametrize(
    "error",
    [
        errors.ConfigError(["first", "second"]), errors.TraceError("message", "a.b", "file.py:3", "why"),
        errors.CalibrationError("message", ["o1"]), errors.GraphError("plan", "node", "is gone"),
        errors.PluginError("message", "toy", "qcore-toy 1", "qcore_probe"), errors.LoweringError("m", "toy", "d", "h"),
        errors.UnsupportedQConfigError("one"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_pickle_keeps_all_that_an_error_knows(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)


def test_one_problem_is_the_message_and_several_are_a_list():
    one, two = errors.ConfigError("the only one"), errors.ConfigError(["first", "second"])
    assert str(one) == "the only one" and one.problems == ("the only one",)
    assert str(two) == "2 problems in the configuration:\n  - first\n  - second" and isinstance(two, ValueError)


def test_problems_are_gathered_and_raised_together_or_not_at_all():
    problems = errors.Problems()
    problems.raise_any()
    assert problems.expect("model", nn.Identity(), nn.Module, "a torch.nn.Module") and not problems
    assert not problems.expect("model", nn.Linear, nn.Module, "a torch.nn.Module")
    assert not problems.expect("config", torch.nn.Identity(), qcore.QConfig, "a qcore.QConfig")

    def fails():
        raise errors.ConfigError(["a", "b"])

    assert problems.of(fails, prefix="rule 1: ") is None and problems.of(abs, -3) == 3
    assert problems == [
        "model: expected a torch.nn.Module, found the class Linear",
        "config: expected a qcore.QConfig, found torch.nn.modules.linear.Identity; import it from qcore",
        "rule 1: a", "rule 1: b",
    ]  # fmt: skip
    with pytest.raises(errors.ConfigError) as caught:
        problems.raise_any()
    assert caught.value.problems == tuple(problems)
    with pytest.raises(KeyError):  # A fault of another kind isn't the user's.
        problems.of({}.__getitem__, 1)


@pytest.mark.parametrize(
    ("name", "known", "most", "question"),
    [
        ("X86-OneDNN", ["x86_onednn", "fbgemm"], 1, "did you mean 'x86_onednn'?"),
        ("rleu", ["relu", "Relu6", "add"], 2, "did you mean 'relu' or 'Relu6'?"),
        ("zzz", ["relu"], 1, ""), ("relu", [], 1, ""),
    ],
)  # fmt: skip
def test_a_question_names_what_is_like_it(name, known, most, question):
    assert errors.did_you_mean(name, known, most) == question


def test_a_warning_points_at_the_line_outside_of_qcore():
    def asks():
        # As qcore's own functions would be, however many lie between.
        exec("def inner():\n    warn('here', kind)\ndef outer():\n    inner()", space)
        space["outer"]()

    space = {"__name__": "qcore.somewhere", "warn": errors.warn_caller, "kind": errors.CalibrationWarning}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asks()
        line = inspect.getsourcelines(asks)[1] + 3
    assert [(w.filename, w.lineno, w.category) for w in caught] == [(__file__, line, errors.CalibrationWarning)]
