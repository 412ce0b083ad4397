"""A trained transformer after quantization: all-MiniLM-L6-v2, as a plain module and as transformers' ``BertModel``.

Every contender is a process of its own, calibrated on 64 sentences of news and compared with the float network:

* cosine of the embeddings of 200 other sentences with those of the float network, the mean and the least;
* Spearman's correlation of the similarity of word pairs with people's judgement (WordSim-353);
* the share of the weights that are stored as int8.

torch.ao stands beside: its static quantization in FX graph mode, and its dynamic quantization of linear layers. Needs
``requirements.txt`` of this directory, and transformers for ``bert``::

    python benchmarks/sentences.py
    python benchmarks/sentences.py --models minilm --backends x86_onednn
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import qcore
from benchmarks._common import machine_line, markdown_table, run_json, write
from benchmarks.weights import int8_share
from examples.text import (
    MiniLM,
    calibration_sentences,
    evaluation_sentences,
    minilm,
    minilm_transformers,
    pool,
    tokenize,
    word_pairs,
)

MODELS: dict[str, Callable[[], nn.Module]] = {"minilm": minilm, "bert": minilm_transformers}
FLOAT, STATIC, DYNAMIC = "float", "torch.ao static", "torch.ao dynamic"
#: The mean cosine with the float network's embedding, and how far Spearman's correlation may be from the float one.
COSINE_BOUND, SPEARMAN_BOUND = 0.99, 0.01
_BATCH = 16


def _batches(texts: list[str]) -> list[dict[str, Tensor]]:
    return [tokenize(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH)]


def embed(model: nn.Module, texts: list[str]) -> Tensor:
    """Embeddings of texts, (texts, width)."""
    with torch.no_grad():
        return torch.cat([pool(model(**batch), batch["attention_mask"]) for batch in _batches(texts)])


def _ranks(values: Tensor) -> Tensor:
    # Equal values share the mean of their ranks.
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts - 1) / 2.0)[inverse]
    return ranks


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation."""
    return torch.corrcoef(torch.stack([_ranks(first), _ranks(second)]))[0, 1].item()


def word_similarity(model: nn.Module) -> float:
    """Spearman's correlation of the model's cosines with people's judgements, on WordSim-353."""
    pairs = word_pairs()
    words = sorted({word for pair in pairs for word in pair[:2]})
    place = {word: index for index, word in enumerate(words)}
    embeddings = embed(model, words)
    first, second = (embeddings[[place[str(pair[side])] for pair in pairs]] for side in (0, 1))
    return spearman((first * second).sum(1).double(), torch.tensor([pair[2] for pair in pairs], dtype=torch.float64))


def _quantize_qcore(model: nn.Module, batches: list[dict[str, Tensor]], backend: str) -> nn.Module:
    # What is traced whole takes positional arguments; transformers' models have too many others between theirs.
    example: Any = tuple(batches[0].values()) if isinstance(model, MiniLM) else batches[0]
    prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping(backend), example)
    qcore.calibrate(prepared, batches)
    return qcore.convert_fx(prepared)


def _quantize_torch_ao(model: nn.Module, batches: list[dict[str, Tensor]], kind: str) -> nn.Module:
    """The baseline; the one place of this file that may import it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It announces on every call that it is deprecated.
        from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        torch.backends.quantized.engine = "x86"
        if kind == DYNAMIC:
            dynamic: nn.Module = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
            return dynamic
        prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), tuple(batches[0].values()))
        qcore.calibrate(prepared, batches)
        static: nn.Module = convert_fx(prepared)
        return static


def evaluate(name: str, contender: str) -> dict[str, Any]:
    """Quantize a model and compare it with the float one.

    Args:
        name: a key of ``MODELS``.
        contender: ``FLOAT``, an installed backend, ``STATIC`` or ``DYNAMIC``.
    """
    model = MODELS[name]()
    if contender == FLOAT:
        return {"spearman": word_similarity(model)}
    batches = _batches(calibration_sentences())
    quantize = _quantize_torch_ao if contender in (STATIC, DYNAMIC) else _quantize_qcore
    quantized = quantize(model, batches, contender)
    texts = evaluation_sentences()
    cosines = (embed(model, texts) * embed(quantized, texts)).sum(1)
    return {
        "spearman": word_similarity(quantized),
        "cosine_mean": cosines.mean().item(),
        "cosine_min": cosines.min().item(),
        "int8_share": int8_share(model, quantized),
    }


def _judged(text: str, met: bool) -> str:
    return f"{text} ({'met' if met else 'MISSED'})"


def _row(name: str, contender: str, reference: float) -> list[str]:
    try:
        result = run_json("sentences.py", "--contender", name, contender)
    except RuntimeError as error:
        reason = str(error).split(" failed: ", 1)[-1].replace("|", "/")
        return [name, contender, f"fails: {reason[:100]}", "", "", ""]
    apart = result["spearman"] - reference
    return [
        name,
        contender,
        _judged(f"{result['cosine_mean']:.4f}", result["cosine_mean"] >= COSINE_BOUND),
        f"{result['cosine_min']:.4f}",
        _judged(f"{result['spearman']:.4f}, {apart:+.4f}", abs(apart) <= SPEARMAN_BOUND),
        f"{result['int8_share']:.0%}",
    ]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--backends", nargs="*", default=["x86_onednn", "fbgemm", "reference"])
    parser.add_argument("--no-torch-ao", action="store_true")
    parser.add_argument("--output", help="a Markdown file to write the table to")
    parser.add_argument("--contender", nargs=2, metavar=("MODEL", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        torch.set_num_threads(1)
        print(json.dumps(evaluate(*options.contender)))
        return 0
    rows = []
    for name in options.models:
        try:
            reference = run_json("sentences.py", "--contender", name, FLOAT)["spearman"]
        except RuntimeError as error:
            print(error, file=sys.stderr)
            continue
        rows.append([name, FLOAT, "", "", f"{reference:.4f}", ""])
        contenders = [*options.backends, *([] if options.no_torch_ao else [STATIC, DYNAMIC])]
        rows += [_row(name, contender, reference) for contender in contenders]
    header = [
        "model",
        "contender",
        f"mean cosine, >= {COSINE_BOUND}",
        "least",
        f"Spearman, within {SPEARMAN_BOUND}",
        "int8",
    ]
    write(f"{markdown_table(header, rows)}\n\n{machine_line()}", options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
