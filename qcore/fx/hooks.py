"""Hooks on modules: those that compute a weight, as torch's own utilities do, and all others, which are the user's.

A graph has no place for a hook that runs at each call. A known module with a hook is called whole; any other module
with one stays Python. A weight that a hook computes (pruned, or normed) is a constant, as long as nobody trains.
"""

from torch import nn

_WEIGHT_HOOKS = "torch.nn.utils."


def hook_of(module: nn.Module) -> str:
    """Which hook of the user's runs at each call of a module, for a message; empty if there is none."""
    if module._forward_hooks:
        return "a forward hook"
    return "" if all(map(_computes_weight, module._forward_pre_hooks.values())) else "a forward pre-hook"


def compute_weights(module: nn.Module) -> None:
    """Let hooks compute the weights in a module anew, as its next call would.

    Args:
        module: is changed.
    """
    for inner in module.modules():
        for hook in inner._forward_pre_hooks.values():
            if _computes_weight(hook):
                hook(inner, ())


def makers_of_weights(module: nn.Module) -> list[str]:
    """What computes the weights of a module (not of those in it), by hook or as a parametrization: names of classes."""
    makers = [hook for hook in module._forward_pre_hooks.values() if _computes_weight(hook)]
    lists = dict(module.named_children()).get("parametrizations")
    makers += [maker for listed in lists.children() for maker in listed.children()] if lists is not None else []
    return list(dict.fromkeys(type(maker).__name__.lstrip("_") for maker in makers))


def notes_of_weights(module: nn.Module) -> tuple[str, ...]:
    """A sentence about each module whose weights are computed."""
    return tuple(
        f"{path or type(inner).__name__}: what {' and '.join(makers)} make of its weights is kept as it is now"
        for path, inner in module.named_modules()
        if (makers := makers_of_weights(inner))
    )


def _computes_weight(hook: object) -> bool:
    """Whether it is one of torch's: the weight's norm, the spectral norm, or pruning, also of a user's own method."""
    return any(kind.__module__.startswith(_WEIGHT_HOOKS) for kind in type(hook).__mro__)
