"""A trained recurrent network after quantization: Resemblyzer's LSTM, by how well it identifies speakers.

Each voice of Debian's ``asterisk-core-sounds-{en,es,it}-wav`` is enrolled with every other clip of its own (the mean
of the embeddings); each of the remaining clips, 1.6 s long, is given to the enrolled voice of the highest cosine.
Enrolment and identification are by the same network, calibrated on some of the enrolled clips. Every contender is a
process of its own; torch.ao stands beside: its static quantization in FX graph mode, which leaves an LSTM float, and
its dynamic quantization of LSTM and linear layers. Needs ``requirements.txt`` of this directory::

    python benchmarks/speakers.py
    python benchmarks/speakers.py --sounds /tmp/unpacked/usr/share/asterisk/sounds
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import qcore
from benchmarks._common import machine_line, markdown_table, run_json, write
from benchmarks.weights import int8_share
from examples.speech import SOUNDS_DIRECTORY, resemblyzer, voices

FLOAT, STATIC, DYNAMIC = "float", "torch.ao static", "torch.ao dynamic"
#: How far the accuracy of identification may be from the float one, and the least cosine with the float embedding.
ACCURACY_BOUND, COSINE_BOUND = 0.01, 0.99
_CALIBRATION_CLIPS = 8


def identify(model: nn.Module, speech: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Share of the clips that are given to their speaker, and the embeddings of these clips."""
    with torch.no_grad():
        enrolled = torch.stack([model(clips[::2]).mean(0) for clips in speech.values()])
        tested = [model(clips[1::2]) for clips in speech.values()]
    enrolled = nn.functional.normalize(enrolled, dim=1)
    embeddings = torch.cat(tested)
    speakers = torch.cat([torch.full((len(clips),), index) for index, clips in enumerate(tested)])
    accuracy = ((embeddings @ enrolled.T).argmax(1) == speakers).double().mean().item()
    return accuracy, embeddings


def _quantize_qcore(model: nn.Module, batches: list[Tensor], backend: str) -> nn.Module:
    prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping(backend), (batches[0],))
    qcore.calibrate(prepared, batches)
    quantized = qcore.convert_fx(prepared)
    print(qcore.explain(quantized), file=sys.stderr)
    return quantized


def _quantize_torch_ao(model: nn.Module, batches: list[Tensor], kind: str) -> nn.Module:
    """The baseline; the one place of this file that may import it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It announces on every call that it is deprecated.
        from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        torch.backends.quantized.engine = "x86"
        if kind == DYNAMIC:
            dynamic: nn.Module = quantize_dynamic(model, {nn.LSTM, nn.Linear}, dtype=torch.qint8)
            return dynamic
        prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (batches[0],))
        qcore.calibrate(prepared, batches)
        static: nn.Module = convert_fx(prepared)
        return static


def evaluate(contender: str, sounds: Path) -> dict[str, Any]:
    """Quantize the network and compare it with the float one.

    Args:
        contender: ``FLOAT``, an installed backend, ``STATIC`` or ``DYNAMIC``.
        sounds: the directory of the voices.
    """
    model, speech = resemblyzer(), voices(sounds)
    accuracy, embeddings = identify(model, speech)
    if contender == FLOAT:
        return {"accuracy": accuracy, "clips": len(embeddings), "voices": len(speech)}
    batches = [clips[::2][:_CALIBRATION_CLIPS] for clips in speech.values()]
    quantize = _quantize_torch_ao if contender in (STATIC, DYNAMIC) else _quantize_qcore
    quantized = quantize(model, batches, contender)
    accuracy, found = identify(quantized, speech)
    cosines = (embeddings * found).sum(1)
    return {
        "accuracy": accuracy,
        "cosine_mean": cosines.mean().item(),
        "cosine_min": cosines.min().item(),
        "int8_share": int8_share(model, quantized),
    }


def _judged(text: str, met: bool) -> str:
    return f"{text} ({'met' if met else 'MISSED'})"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="*", default=["x86_onednn", "fbgemm", "reference"])
    parser.add_argument("--no-torch-ao", action="store_true")
    parser.add_argument("--sounds", type=Path, default=SOUNDS_DIRECTORY, help="where the directories of the voices are")
    parser.add_argument("--output", help="a Markdown file to write the table to")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        torch.set_num_threads(1)
        print(json.dumps(evaluate(options.contender, options.sounds)))
        return 0
    common = ("--sounds", str(options.sounds), "--contender")
    try:
        expected = run_json("speakers.py", *common, FLOAT)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    rows = [[FLOAT, f"{expected['accuracy']:.4f}", "", "", ""]]
    for contender in [*options.backends, *([] if options.no_torch_ao else [STATIC, DYNAMIC])]:
        try:
            result = run_json("speakers.py", *common, contender)
        except RuntimeError as error:
            reason = str(error).split(" failed: ", 1)[-1].replace("|", "/")
            rows.append([contender, f"fails: {reason[:100]}", "", "", ""])
            continue
        apart = result["accuracy"] - expected["accuracy"]
        rows.append(
            [
                contender,
                _judged(f"{result['accuracy']:.4f}, {apart:+.4f}", abs(apart) <= ACCURACY_BOUND),
                _judged(f"{result['cosine_min']:.4f}", result["cosine_min"] >= COSINE_BOUND),
                f"{result['cosine_mean']:.4f}",
                f"{result['int8_share']:.0%}",
            ]
        )
    header = [
        "contender",
        f"accuracy, within {ACCURACY_BOUND}",
        f"least cosine, >= {COSINE_BOUND}",
        "mean",
        "int8 weights",
    ]
    legend = f"{expected['clips']} clips of {expected['voices']} voices"
    write(f"{markdown_table(header, rows)}\n\n{legend}; {machine_line()}", options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
