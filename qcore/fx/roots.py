"""What a traced graph refers to: the tensors and modules of a model, at paths that the graph's code can read."""

from typing import Any

import torch
from torch import fx, nn

from qcore.fx.effects import has_hooks
from qcore.fx.graph_module import (
    get_attribute,
    has_attribute,
    is_persistent,
    modules_of,
    place_for,
    set_tensor,
    submodule,
    tensors_of,
)
from qcore.fx.names import readable_targets
from qcore.fx.twin import Copies, twin_of, with_shared_parameters


class Source:
    """Where a graph's tensors and modules come from.

    Args:
        model: has them as they are.
        traced: has those that came to be while it ran.
        copies: makes the graph's own.
    """

    def __init__(self, model: nn.Module, traced: nn.Module, copies: Copies) -> None:
        self.model = model
        self.traced = traced
        self.copies = copies
        self._leaves: dict[str, nn.Module] = {}

    def leaf(self, path: str) -> nn.Module:
        """A module to keep whole: a copy, as it may change when it is called."""
        if path not in self._leaves:
            module = get_attribute(self.home(path), path)
            if any(has_hooks(inner) for inner in modules_of(module)):  # They may know the model.
                memo: dict[int, Any] = {id(tensor): self.copies(tensor) for tensor in tensors_of(module)}
                self._leaves[path] = submodule(twin_of(self.model, with_shared_parameters, memo), path)
            else:
                self._leaves[path] = twin_of(module, self.copies)
        return self._leaves[path]

    def home(self, path: str) -> nn.Module:
        """Which of the two has something at a path."""
        return self.model if has_attribute(self.model, path) else self.traced


class Root(nn.Module):
    """A root that holds just what a graph refers to; GraphModule takes its attributes from here.

    What code couldn't read at its own path stands at another, to which the graph's nodes are changed.
    """

    def __init__(
        self, source: Source, graph: fx.Graph, constants: dict[str, torch.Tensor], *, keeps_parameters: bool
    ) -> None:
        super().__init__()
        # Modules first: a tensor may be one of theirs.
        ops = ("call_module", "get_attr")
        kinds = {str(node.target): op for op in ops for node in graph.nodes if node.op == op}
        places = readable_targets(source.model, kinds)
        for target, kind in kinds.items():
            owner_path, _, name = places[target].rpartition(".")
            place = place_for(self, owner_path)
            if name in place._parameters or name in place._buffers or name in place._modules:
                continue
            # Straight into the registries: a module's __setattr__ costs more than all else here.
            if kind == "call_module":
                place._modules[name] = source.leaf(target)
                continue
            if target in constants:
                set_tensor(self, places[target], constants[target])
                continue
            home = source.home(target)
            value = get_attribute(home, target)
            if not (keeps_parameters and isinstance(value, nn.Parameter)):
                value = source.copies(value)
            set_tensor(self, places[target], value, is_persistent(home, target))
        for node in graph.nodes:
            if node.op in ops and places[str(node.target)] != node.target:
                node.target = places[str(node.target)]
        self.training = source.model.training
