"""Records: what qcore knows of a graph goes with it, and a float model stands beside where one was asked for."""

import torch

import qcore
from tests.models import Attention, close, prepared_for


@torch.no_grad()
def test_or_goes_to_the_float_model_if_the_user_chose_so():
    torch.manual_seed(0)
    model = Attention()
    x, mask = torch.randn(2, 5, 16), torch.randn(5, 5)
    custom = qcore.PrepareCustomConfig().set_guard_failure("float")
    prepared = prepared_for(model, (x,), prepare_custom_config=custom)
    prepared(x)
    converted = qcore.convert_fx(prepared)
    assert torch.equal(converted(x, mask), model(x, mask))
    close(converted(x), model(x))
    assert not torch.equal(converted(x), model(x))
    assert qcore.explain(converted).quantized
