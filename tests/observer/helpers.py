"""What the tests of observers share."""


def seen(observer, *batches):
    """The observer, after it was given batches, which it hands on."""
    for batch in batches:
        assert observer(batch) is batch
    return observer


def qparams(observer):
    """Scale and zero point as numbers."""
    scale, zero_point = observer.calculate_qparams()
    return scale.tolist(), zero_point.tolist()


def squared_error(observer, x):
    """Of quantizing ``x`` with what an observer found: the mean."""
    scale, zero_point = observer.calculate_qparams()
    integers = ((x / scale).round() + zero_point).clamp(observer.quant_min, observer.quant_max)
    return ((integers - zero_point) * scale - x).double().pow(2).mean().item()
