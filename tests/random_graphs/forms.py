"""What a random model may do next: every operator that qcore knows, in every form of writing it, and some it doesn't.

A form is a function of the generator and of a value; it gives source text, or ``None`` where it doesn't fit. What
doesn't fit and isn't foreseen raises when the generator tries the line, which then isn't taken.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from random_graphs.generate import Generator, Live

#: Makes an expression of a value.
Form = Callable[["Generator", "Live"], str | None]

#: The forms by ``(operator's name, kind)``; the kinds are module, function, method and inplace.
FORMS: dict[tuple[str, str], list[Form]] = {}
#: The forms that are no operator of qcore's, or several.
OTHERS: list[Form] = []


def form(operator: str, kind: str) -> Callable[[Form], Form]:
    """Put a form into the table."""

    def put(function: Form) -> Form:
        FORMS.setdefault((operator, kind), []).append(function)
        return function

    return put


def _put(operator: str, kind: str, text: str, ranks: tuple[int, ...] = ()) -> None:
    """A form whose text has ``{x}`` for the value, and ``{m:...}`` never: the simple ones."""

    def simple(g: "Generator", v: "Live") -> str | None:
        return text.replace("{x}", v.name) if not ranks or v.rank in ranks else None

    FORMS.setdefault((operator, kind), []).append(simple)


def _module(operator: str, constructor: str, ranks: tuple[int, ...] = ()) -> None:
    def simple(g: "Generator", v: "Live") -> str | None:
        return f"{g.module(constructor)}({v.name})" if not ranks or v.rank in ranks else None

    FORMS.setdefault((operator, "module"), []).append(simple)


def _geometry(g: "Generator", v: "Live", transposed: bool) -> tuple[int, int, dict[str, Any]]:
    """Output channels, groups and the spatial arguments of a convolution of a value."""
    channels = v.shape[1]
    groups = g.choose([1, 1, 1, *(n for n in (2, channels) if channels % n == 0)])
    out = groups * g.choose([1, 2, 3, 4])
    out = channels if groups == channels and g.choose([True, False]) else out
    least = min(v.shape[2:])
    kernel = g.choose([k for k in (1, 1, 2, 3, 3, 5) if k <= least] or [1])
    found: dict[str, Any] = {"kernel": kernel, "stride": g.choose([1, 1, 2])}
    if transposed:
        found["padding"] = g.choose([0, 1]) if kernel > 1 else 0
        found["output_padding"] = g.choose([0, 1]) if found["stride"] > 1 else 0
        return out, groups, found
    found["dilation"] = g.choose([1, 1, 2]) if 2 * (kernel - 1) < least else 1
    found["padding"] = g.choose([0, kernel // 2, kernel // 2])
    if found["stride"] == 1 and g.choose([True] + 5 * [False]):
        found["padding"] = g.choose(["same", "valid"])
    return out, groups, found


def _conv(n: int) -> None:
    @form(f"conv{n}d", "module")
    def as_module(g: "Generator", v: "Live") -> str | None:
        if v.rank != n + 2:
            return None
        out, groups, how = _geometry(g, v, False)
        kernel, bias = how.pop("kernel"), g.choose([True, False])
        if isinstance(how["padding"], int) and 0 < how["padding"] < min(v.shape[2:]) and g.choose([True] + 7 * [False]):
            how["padding_mode"] = "reflect"
        made = f"nn.Conv{n}d({v.shape[1]}, {out}, {kernel}, groups={groups}, bias={bias}, {_keywords(how)})"
        if g.choose([True, False]):
            made = f"nn.Sequential({made}, nn.BatchNorm{n}d({out})"
            made += g.choose([")", ", nn.ReLU())", ", nn.ReLU6(inplace=True))", ", nn.Hardswish())", ", nn.SiLU())"])
        return f"{g.module(made)}({v.name})"

    @form(f"conv{n}d", "function")
    def as_function(g: "Generator", v: "Live") -> str | None:
        if v.rank != n + 2:
            return None
        out, groups, how = _geometry(g, v, False)
        weight = g.parameter(out, v.shape[1] // groups, *[how.pop("kernel")] * n)
        bias = g.choose(["None", g.parameter(out)])
        return f"F.conv{n}d({v.name}, {weight}, {bias}, groups={groups}, {_keywords(how)})"

    @form(f"conv_transpose{n}d", "module")
    def transposed(g: "Generator", v: "Live") -> str | None:
        if v.rank != n + 2 or v.size > 2000:
            return None
        out, groups, how = _geometry(g, v, True)
        kernel = how.pop("kernel")
        made = f"nn.ConvTranspose{n}d({v.shape[1]}, {out}, {kernel}, groups={groups}, {_keywords(how)})"
        return f"{g.module(made)}({v.name})"

    @form(f"conv_transpose{n}d", "function")
    def transposed_function(g: "Generator", v: "Live") -> str | None:
        if v.rank != n + 2 or v.size > 2000:
            return None
        out, groups, how = _geometry(g, v, True)
        weight = g.parameter(v.shape[1], out // groups, *[how.pop("kernel")] * n)
        return f"F.conv_transpose{n}d({v.name}, {weight}, groups={groups}, {_keywords(how)})"

    @form("batch_norm", "module")
    def norm(g: "Generator", v: "Live") -> str | None:
        fits = v.rank == n + 2 or (n == 1 and v.rank == 2)
        return f"{g.module(f'nn.BatchNorm{n}d({v.shape[1]})')}({v.name})" if fits else None

    rank = n + 2
    _module(f"max_pool{n}d", f"nn.MaxPool{n}d(2)", (rank,))
    _module(f"max_pool{n}d", f"nn.MaxPool{n}d(3, 2, 1, ceil_mode=True)", (rank,))
    _put(f"max_pool{n}d", "function", f"F.max_pool{n}d({{x}}, 3, 1, 1)", (rank,))
    _put(f"max_pool{n}d", "function", f"torch.max_pool{n}d({{x}}, 2, stride=1)", (rank,))
    _module(f"avg_pool{n}d", f"nn.AvgPool{n}d(2, ceil_mode=True)", (rank,))
    _module(f"avg_pool{n}d", f"nn.AvgPool{n}d(3, 2, 1, count_include_pad=False)", (rank,))
    _put(f"avg_pool{n}d", "function", f"F.avg_pool{n}d({{x}}, 2, 1)", (rank,))
    _module(f"adaptive_avg_pool{n}d", f"nn.AdaptiveAvgPool{n}d(1)", (rank,))
    _module(f"adaptive_avg_pool{n}d", f"nn.AdaptiveAvgPool{n}d(2)", (rank,))
    _put(f"adaptive_avg_pool{n}d", "function", f"F.adaptive_avg_pool{n}d({{x}}, 3)", (rank,))


def _keywords(how: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in how.items())


for _n in (1, 2, 3):
    _conv(_n)


@form("linear", "module")
def _linear(g: "Generator", v: "Live") -> str:
    made = f"nn.Linear({v.shape[-1]}, {g.width()}, bias={g.choose([True, False])})"
    return f"{g.module(made)}({v.name})"


@form("linear", "module")
def _linear_with_norm(g: "Generator", v: "Live") -> str | None:
    width = g.width()
    if v.rank == 2:
        return f"{g.module(f'nn.Sequential(nn.Linear({v.shape[1]}, {width}), nn.BatchNorm1d({width}))')}({v.name})"
    if v.rank == 3:  # Over the middle dimension, which isn't the layer's own.
        norm = f"nn.Sequential(nn.Linear({v.shape[2]}, {width}), nn.BatchNorm1d({v.shape[1]}), nn.ReLU())"
        return f"{g.module(norm)}({v.name})"
    return None


@form("linear", "function")
def _linear_function(g: "Generator", v: "Live") -> str:
    width = g.width()
    weight, bias = g.parameter(width, v.shape[-1]), g.choose(["None", g.parameter(width)])
    return f"F.linear({v.name}, weight={weight}, bias={bias})"


@form("linear", "function")
def _linear_of_another(g: "Generator", v: "Live") -> str | None:
    """A weight that a module has, too, and that is read as float besides."""
    owners = [name for name, made in g.modules if made.startswith(f"nn.Linear({v.shape[-1]},")]
    if not owners:
        return None
    weight = f"self.{g.choose(owners)}.weight"
    return g.choose([f"F.linear({v.name}, {weight})", f"F.linear({v.name}, {weight}) * {weight}.abs().max()"])


@form("linear", "method")
def _matrix(g: "Generator", v: "Live") -> str:
    matrix = g.parameter(v.shape[-1], g.width())
    texts = [f"{v.name} @ {matrix}", f"torch.matmul({v.name}, {matrix})", f"{v.name}.matmul({matrix})"]
    if v.rank == 2:
        texts.append(f"torch.addmm({g.parameter(4)}, {v.name}, {g.parameter(v.shape[-1], 4)})")
    return str(g.choose(texts))


def _cell(name: str, gates: int) -> None:
    @form(name, "function")
    def cell(g: "Generator", v: "Live") -> str | None:
        if v.rank != 2:
            return None
        width = v.shape[1]
        state = g.choose([o for o in g.values if o.shape == v.shape]).name
        weights = f"{g.parameter(gates * width, width)}, w_hh={g.parameter(gates * width, width)}"
        biases = g.choose(["", f", b_ih={g.parameter(gates * width)}, b_hh={g.parameter(gates * width)}"])
        return f"torch.{name}({v.name}, {state}, {weights}{biases})"


_cell("rnn_tanh_cell", 1)
_cell("rnn_relu_cell", 1)
_cell("gru_cell", 3)


@form("batch_norm", "function")
def _norm_function(g: "Generator", v: "Live") -> str | None:
    if v.rank < 2:
        return None
    size = v.shape[1]
    mean, scale, shift = (g.parameter(size) for _ in range(3))
    var = g.buffer(f"torch.rand({size}) + 0.5")
    return f"F.batch_norm({v.name}, {mean}, {var}, {scale}, {shift}, False, 0.1, 1e-3)"


# Clamps.
for _text in ("nn.ReLU()", "nn.ReLU6()", "nn.Hardtanh(-0.7, 1.3)"):
    _module("clamp", _text)
for _text in (
    "F.relu({x})", "F.relu6({x})", "torch.relu({x})", "torch.clamp({x}, -0.5, 0.8)", "torch.clip({x}, max=1.0)",
    "F.hardtanh({x}, -2.0, 0.5)", "torch.clamp({x}, min=0.25)",
):  # fmt: skip
    _put("clamp", "function", _text)
for _text in ("{x}.relu()", "{x}.clamp(-1, 1)", "{x}.clamp(min=-0.125)", "{x}.clip(0.0, 4.0)"):
    _put("clamp", "method", _text)
for _text in (
    "{x}.relu_()", "{x}.clamp_(-0.9, 0.9)", "F.relu({x}, inplace=True)", "F.relu6({x}, inplace=True)",
    "torch.relu_({x})",    "F.hardtanh_({x})", "nn.functional.hardtanh({x}, -1.0, 2.0, True)", "{x}.clip_(max=1.5)",
):  # fmt: skip
    _put("clamp", "inplace", _text)


@form("clamp", "inplace")
def _inplace_module(g: "Generator", v: "Live") -> str:
    made = g.choose(["nn.ReLU(inplace=True)", "nn.ReLU6(inplace=True)", "nn.Hardtanh(-1.0, 1.0, inplace=True)"])
    return f"{g.module(made)}({v.name})"


# Sums and products.
for _name, _sign, _extra in (("add", "+", ""), ("mul", "*", "")):

    def _binary(name: str, sign: str) -> None:
        @form(name, "function")
        def function(g: "Generator", v: "Live") -> str | None:
            other = g.partner(v)
            texts = [f"{v.name} {sign} {other}", f"torch.{name}({v.name}, {other})", f"{other} {sign} {v.name}"]
            texts.append(f"{v.name} {sign} {g.choose([0.5, -1.25, 2])}")
            return str(g.choose(texts))

        @form(name, "method")
        def method(g: "Generator", v: "Live") -> str:
            return f"{v.name}.{name}({g.partner(v)})"

        @form(name, "inplace")
        def inplace(g: "Generator", v: "Live") -> str:
            other = g.partner(v)
            return str(g.choose([f"{v.name}.{name}_({other})", f"{v.name} {sign}= {other}", f"{v.name} {sign}= 0.75"]))

    _binary(_name, _sign)


@form("matmul", "function")
def _product(g: "Generator", v: "Live") -> str | None:
    if v.rank < 3:
        return None
    other = g.choose([o for o in g.values if o.rank == v.rank and o.shape == v.shape])
    turned = f"{other.name}.transpose(-1, -2)"
    texts = [f"torch.matmul({v.name}, {turned})", f"{v.name} @ {turned}"]
    return str(g.choose([*texts, f"torch.bmm({v.name}, {turned})"] if v.rank == 3 else texts))


@form("matmul", "method")
def _product_method(g: "Generator", v: "Live") -> str | None:
    if v.rank < 3:
        return None
    name = g.choose(["matmul", "bmm"] if v.rank == 3 else ["matmul"])
    return f"{v.name}.transpose(-2, -1).{name}({v.name})"


@form("cat", "function")
def _cat(g: "Generator", v: "Live") -> str | None:
    if v.rank < 2:
        return None
    dim = g.choose([1, -1, v.rank - 1])
    place = dim % v.rank
    rest = v.shape[:place] + v.shape[place + 1 :]
    fits = [o for o in g.values if o.rank == v.rank and o.shape[:place] + o.shape[place + 1 :] == rest]
    others = [g.choose(fits).name for _ in range(g.choose([1, 1, 2]))]
    name = g.choose(["torch.cat", "torch.concat", "torch.cat"])
    return f"{name}([{', '.join([v.name, *others])}], {g.choose(['', 'dim='])}{dim})"


@form("stack", "function")
def _stack(g: "Generator", v: "Live") -> str | None:
    if v.rank > 4:
        return None
    fits = [o for o in g.values if o.shape == v.shape]
    return f"torch.stack([{v.name}, {g.choose(fits).name}], {g.choose([1, -1])})"


_put("mean", "function", "torch.mean({x}, -1)", (3, 4, 5))
_put("mean", "method", "{x}.mean([2, 3])", (4,))
_put("mean", "method", "{x}.mean(dim=(1,), keepdim=True)", (2, 3, 4, 5))
_put("mean", "method", "{x}.mean(dim=-1, keepdim=True)", (2, 3, 4, 5))

# Functions of single values.
_put("sigmoid", "function", "torch.sigmoid({x})")
_put("sigmoid", "method", "{x}.sigmoid()")
_put("sigmoid", "inplace", "{x}.sigmoid_()")
_module("sigmoid", "nn.Sigmoid()")
_put("hardsigmoid", "function", "F.hardsigmoid({x})")
_put("hardsigmoid", "inplace", "F.hardsigmoid({x}, inplace=True)")
_module("hardsigmoid", "nn.Hardsigmoid()")
_put("tanh", "function", "torch.tanh({x})")
_put("tanh", "method", "{x}.tanh()")
_put("tanh", "inplace", "{x}.tanh_()")
_module("tanh", "nn.Tanh()")
_put("softmax", "function", "F.softmax({x}, dim=-1)")
_put("softmax", "method", "{x}.softmax(1)", (2, 3, 4, 5))
_module("softmax", "nn.Softmax(dim=-1)")
_put("hardswish", "function", "F.hardswish({x})")
_put("hardswish", "inplace", "F.hardswish({x}, inplace=True)")
_module("hardswish", "nn.Hardswish()")
_put("leaky_relu", "function", "F.leaky_relu({x}, 0.1)")
_put("leaky_relu", "inplace", "F.leaky_relu_({x}, 0.2)")
_module("leaky_relu", "nn.LeakyReLU(0.3)")
_put("elu", "function", "F.elu({x})")
_put("elu", "inplace", "F.elu_({x})")
_module("elu", "nn.ELU(0.7)")
_put("silu", "function", "F.silu({x})")
_put("silu", "inplace", "F.silu({x}, inplace=True)")
_module("silu", "nn.SiLU()")
_put("gelu", "function", "F.gelu({x})")
_module("gelu", "nn.GELU()")
_put("interpolate", "function", "F.interpolate({x}, scale_factor=2.0)", (3, 4, 5))
_put("interpolate", "function", "F.interpolate({x}, size=(5, 4), mode='bilinear', align_corners=False)", (4,))
_put("interpolate", "function", "F.interpolate({x}, size=(3, 6), mode='bicubic')", (4,))
_put("interpolate", "function", "F.interpolate({x}, size={x}.shape[2:], mode='nearest-exact')", (4,))
_module("interpolate", "nn.Upsample(scale_factor=2, mode='nearest')", (3, 4))

# What moves elements.
_put("pad", "function", "F.pad({x}, (1, 0))", (2, 3, 4, 5))
_put("pad", "function", "F.pad({x}, (1, 2, 0, 1))", (3, 4, 5))
_put("pad", "function", "F.pad({x}, (0, 1), value=1.5)", (2, 3, 4))
_put("pad", "function", "F.pad({x}, (1, 1), mode='reflect')", (3,))
_put("pad", "function", "F.pad({x}, (1, 1, 2, 0), mode='replicate')", (4,))
_module("pad", "nn.ZeroPad2d(1)", (4,))
_module("pad", "nn.ReflectionPad2d(1)", (4,))
_put("flatten", "function", "torch.flatten({x}, 1)", (2, 3, 4, 5))
_put("flatten", "method", "{x}.flatten(1)", (3, 4, 5))
_module("flatten", "nn.Flatten()", (3, 4, 5))
_put("unflatten", "method", "{x}.unflatten(1, (1, -1))", (2, 3, 4))
_put("unflatten", "function", "torch.unflatten({x}, -1, (-1, 1))", (2, 3, 4))
_module("unflatten", "nn.Unflatten(1, (-1, 1))", (2, 3, 4))
_put("reshape", "method", "{x}.reshape({x}.size(0), -1)")
_put("reshape", "method", "{x}.view({x}.shape[0], {x}.shape[1], -1)", (3, 4, 5))
_put("reshape", "function", "torch.reshape({x}, ({x}.size(0), -1, 2))")
_put("permute", "method", "{x}.permute(0, 2, 3, 1)", (4,))
_put("permute", "function", "torch.permute({x}, (0, 2, 1))", (3,))
_put("transpose", "method", "{x}.transpose(1, -1)", (3, 4, 5))
_put("transpose", "function", "torch.transpose({x}, 1, 2)", (3, 4, 5))
_put("squeeze", "method", "{x}.unsqueeze(1).squeeze(1)")
_put("squeeze", "function", "torch.squeeze(torch.unsqueeze({x}, -1), -1)")
_put("unsqueeze", "method", "{x}.unsqueeze(1)", (2, 3, 4))
_put("unsqueeze", "function", "torch.unsqueeze({x}, -1)", (2, 3, 4))
_put("chunk", "method", "{x}.chunk(2, 1)[0]", (2, 3, 4, 5))
_put("chunk", "function", "torch.chunk({x}, 2, dim=-1)[-1]", (2, 3, 4, 5))
_put("split", "method", "{x}.split(1, 1)[0]", (2, 3, 4, 5))
_put("split", "function", "torch.split({x}, 2, -1)[0]", (2, 3, 4, 5))
_put("getitem", "function", "{x}[:, :2]", (2, 3, 4, 5))
_put("getitem", "function", "{x}[:, 1:]", (2, 3, 4, 5))
_put("getitem", "function", "{x}[..., ::2]", (2, 3, 4, 5))
_put("getitem", "function", "{x}[:, 0]", (3, 4, 5))
_put("narrow", "method", "{x}.narrow(1, 0, 1)", (2, 3, 4, 5))
_put("narrow", "function", "torch.narrow({x}, -1, 0, 2)", (2, 3, 4, 5))
_put("pixel_shuffle", "function", "F.pixel_shuffle({x}, 2)", (4,))
_module("pixel_shuffle", "nn.PixelShuffle(2)", (4,))
_put("pixel_unshuffle", "function", "F.pixel_unshuffle({x}, 2)", (4,))
_module("pixel_unshuffle", "nn.PixelUnshuffle(2)", (4,))
_put("channel_shuffle", "function", "torch.channel_shuffle({x}, 2)", (4,))


def _other(text: str, *ranks: int) -> None:
    OTHERS.append(lambda g, v: text.replace("{x}", v.name) if not ranks or v.rank in ranks else None)


for _text in (
    "{x}.abs()", "torch.exp(-{x} * {x})", "torch.sin({x})", "{x} - {x}.mean()", "{x}.pow(2)", "{x} / 2",
    "{x}.contiguous()", "F.dropout({x}, 0.5, training=False)", "torch.where({x} > 0, {x}, -{x})",
    "{x}.to(torch.float32)",
    "{x} - 1", "{x}.detach()", "{x}.clone()", "{x}.float()",
    "F.layer_norm({x}, {x}.shape[-1:])", "torch.maximum({x}, -{x})",
    "{x}.expand_as({x})", "{x}.masked_fill({x} > 1, 0.5)", "{x}.flip(-1)",
):  # fmt: skip
    _other(_text)
_other("{x} * torch.arange({x}.size(1), dtype=torch.float32)[None, :, None, None]", 4)
_other("{x} + torch.zeros({x}.size(0), {x}.size(1))", 2)
_other("torch.cat([t for t in {x}.unbind(1)], 1)", 2, 3, 4)
_other("sum({x}.chunk(2, -1), 0.0)", 2, 3, 4)


def _block(text: str, *ranks: int) -> None:
    """A module of ``blocks.py``; ``{c}`` is the number of channels, ``{w}`` the last size, ``{n}`` the dimensions."""

    def block(g: "Generator", v: "Live") -> str | None:
        if v.rank not in ranks:
            return None
        sizes = {"{c}": v.shape[1], "{w}": v.shape[-1], "{n}": v.rank - 2, "{flag}": g.choose([True, False])}
        made = text
        for name, size in sizes.items():
            made = made.replace(name, str(size))
        call, dot, rest = made.partition(" -> ")
        return f"{g.module(call)}({v.name}){rest if dot else ''}"

    OTHERS.append(block)


_block("blocks.Residual({c}, {n}, {flag})", 3, 4, 5)
_block("blocks.Gate({c})", 4)
_block("blocks.ByData(nn.Linear({w}, {w}))", 2, 3, 4)
_block("blocks.ByData(nn.Conv2d({c}, {c}, 1))", 4)
_block("blocks.BySize(nn.Linear({w}, {w}))", 2, 3)
_block("blocks.Counting()", 2, 3, 4)
_block("blocks.Branches({w}) -> ['first']", 2, 3)
_block("blocks.Branches({w}) -> ['second']", 2, 3)
_block("blocks.Attention({w})", 3)
_block("nn.LayerNorm({w})", 2, 3, 4)
_block("nn.PReLU()", 2, 3, 4)
_block("nn.Dropout(0.3)", 2, 3, 4)
_block("nn.Identity()", 2, 3, 4)
_block("nn.GroupNorm(1, {c})", 3, 4)
_block("nn.Sequential(nn.Conv2d({c}, {c}, 1), nn.ReLU(inplace=True), nn.Conv2d({c}, 4, 1))", 4)


@OTHERS.append
def _called_again(g: "Generator", v: "Live") -> str | None:
    """A module that was called before."""
    return f"self.{g.choose(g.modules)[0]}({v.name})" if g.modules else None


#: Statements that write into a value, or into part of it; whoever holds a view of it sees that.
WRITES: tuple[str, ...] = (
    "{x}[:, 0] = 0.5", "{x}[:, :1] += 1", "{x}[:, -1:].clamp_(-0.1, 0.1)", "{x}.fill_(0.25)", "{x}.copy_({x} * 2)",
    "{x}[..., 0].mul_(3)", "{x}.transpose(0, 1).add_(1)", "{x}.zero_()", "{x}.masked_fill_({x} > 0.5, 0.0)",
    "{x} -= 0.5", "{x}.data.mul_(0.5)", "torch.add({x}, 1, out={x})", "{x}.neg_()", "{x}.flatten(1)[:, 0].zero_()",
    "{x} /= 3",
)  # fmt: skip
