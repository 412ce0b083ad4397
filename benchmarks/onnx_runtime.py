"""ONNX Runtime's int8 as a contender of latency.py, which starts this file where onnxruntime is installed.

It reads a float model and its inputs as ``torch.save`` wrote them, exports the model to ONNX, quantizes it with
``onnxruntime.quantization`` and answers as every contender does. Convolutional networks are quantized statically (QDQ,
uint8 activations, int8 weights per channel), transformers dynamically, as ONNX Runtime's documentation advises.
"""

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._interleaved import serve


class _Reader:
    """Calibration data in the form that ONNX Runtime asks for."""

    def __init__(self, names: list[str], inputs: list[tuple[Tensor, ...]]) -> None:
        self.given = iter([dict(zip(names, (value.numpy() for value in one), strict=True)) for one in inputs])

    def get_next(self) -> dict[str, Any] | None:
        """The next inputs by name, ``None`` after the last."""
        return next(self.given, None)


def session(model: nn.Module, inputs: list[tuple[Tensor, ...]], threads: int, directory: Path) -> Any:
    """An ONNX Runtime session of the quantized model; the first dimension of all inputs may vary.

    Args:
        model: float, in evaluation mode.
        inputs: calibration data.
        threads: of the session.
        directory: for files.
    """
    runtime: Any = importlib.import_module("onnxruntime")
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    preparation: Any = importlib.import_module("onnxruntime.quantization.shape_inference")
    names = [f"input_{number}" for number in range(len(inputs[0]))]
    exported, prepared, quantized = (str(directory / f"{name}.onnx") for name in ("float", "prepared", "int8"))
    axes = {name: {0: "batch"} for name in names}
    torch.onnx.export(model, inputs[0], exported, input_names=names, dynamic_axes=axes, dynamo=False)
    is_convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
    # Its inference of symbolic shapes gives up on a transformer whose batch may vary.
    preparation.quant_pre_process(exported, prepared, skip_symbolic_shape=not is_convolutional)
    if is_convolutional:
        reader = _Reader(names, inputs)
        quantization.quantize_static(
            prepared,
            quantized,
            reader,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    else:
        quantization.quantize_dynamic(prepared, quantized, weight_type=quantization.QuantType.QInt8, per_channel=True)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    return runtime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])


def main(path: str, calls: str, threads: str) -> int:
    """Command line: a file with ``model``, ``inputs`` (calibration data) and ``example``; calls in a round; threads."""
    torch.set_num_threads(int(threads))
    given = torch.load(path, weights_only=False)
    with tempfile.TemporaryDirectory() as directory:
        model = session(given["model"], given["inputs"], int(threads), Path(directory))
    names = [found.name for found in model.get_inputs()]
    feed = {f"input_{number}": value.numpy() for number, value in enumerate(given["example"])}
    serve(lambda: model.run(None, {name: feed[name] for name in names}), int(calls))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
