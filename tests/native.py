"""What lowering put into a converted model, whatever backend it is of."""

from torch import nn

from qcore.fx.record import records


def kernels_of(model: nn.Module) -> list[nn.Module]:
    """The backend's modules in all graphs of a model, in the order of the paths."""
    paths = (f"{path}.{native}".lstrip(".") for path, record in records(model).items() for native in record.native)
    return [model.get_submodule(path) for path in sorted(paths)]
