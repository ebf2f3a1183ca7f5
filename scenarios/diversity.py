"""How unlike the prompts of a set are, and the choice of the most unlike out of a pool.

Rows x_i are unit vectors, so x_i·x_j is a cosine. A choice S of k rows is good when
L(S) = Σ_{i∈S} Σ_{j∈S, j≠i} x_i·x_j is small: SPEED-Bench (arXiv 2604.09557) takes greedily, from a
given first row, the row least like those taken, then swaps a row of S for one outside as long as
that lowers L. With s_i = Σ_{j∈S} x_i·x_j a swap changes L by 2·((s_in − x_in·x_out) − (s_out − 1)).
Ties (to a billionth) go to the lowest index, so that a start gives one answer. Must not: embed,
read files, place a figure.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from loadgen.errors import UserError
from loadgen.stats import distribution
from loadgen.types import Diversity, Pair, Prompt, Spread

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float64]

DIGITS = 9
"""Sums are compared to so many decimals: the last bits differ from one BLAS to another."""
BLOCK = 256
EXCERPT = 160

# Han and kana are written without spaces; about a word a character. Thai, Lao, Khmer and Burmese
# are too, and are counted short.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")


# ── the published selection ──────────────────────────────────────────────────────────────────────


def unit(vectors: Sequence[Sequence[float]] | Vectors) -> Vectors:
    """(n, d) rows of length 1. UserError: rows of unlike length, of length 0, or not finite."""
    import numpy as np

    try:
        rows = np.asarray(vectors, dtype=np.float64)
    except ValueError:
        raise UserError("the embedder gave vectors of unlike length. Expected one model.") from None
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    if rows.ndim != 2 or not np.isfinite(lengths).all() or not lengths.all():
        raise UserError(
            "the embedder gave no usable vectors: some are empty, all zeros or not finite. "
            "Expected a vector of numbers a text; try another --embedder."
        )
    unit_rows: Vectors = rows / lengths
    return unit_rows


def mean_cosine(x: Vectors) -> float | None:
    """L ÷ k(k − 1): the mean over all pairs. None for fewer than two rows."""
    k = len(x)
    return (float((x.sum(axis=0) ** 2).sum()) - k) / (k * (k - 1)) if k > 1 else None


def greedy(x: Vectors, k: int, start: int) -> list[int]:
    """k indices: `start`, then again and again the row least like those taken."""
    import numpy as np

    taken, sums = [start], x @ x[start]
    while len(taken) < k:
        sums[taken[-1]] = np.inf
        taken.append(int(np.argmin(np.round(sums, DIGITS))))
        sums += x @ x[taken[-1]]
    return taken


def half_change(x: Vectors, chosen: Sequence[int], out: int, into: int) -> float:
    """Half of what swapping `out` of `chosen` for `into` adds to L."""
    sums = x[[out, into]] @ x[list(chosen)].sum(axis=0)
    return float((sums[1] - x[into] @ x[out]) - (sums[0] - 1))


def refine(x: Vectors, chosen: Sequence[int]) -> list[int]:
    """`chosen` after the best swap, again and again until none lowers L; ascending indices.

    Of equal swaps the one that leaves the lowest indices in the choice.
    """
    import numpy as np

    inside = sorted(chosen, reverse=True)
    while True:
        outside = np.setdiff1d(np.arange(len(x)), inside)
        if not len(outside):
            return inside[::-1]
        sums = x @ x[inside].sum(axis=0)
        half = sums[outside] - x[inside] @ x[outside].T - (sums[inside] - 1)[:, None]
        row, column = divmod(int(np.argmin(np.round(half, DIGITS))), len(outside))
        if round(float(half[row, column]), DIGITS) >= 0:
            return inside[::-1]
        inside[row] = int(outside[column])
        inside.sort(reverse=True)


def select(x: Vectors, k: int, start: int = 0) -> list[int]:
    """The k rows that the published algorithm chooses, ascending; 1 ≤ k ≤ n."""
    return refine(x, greedy(x, k, start))


def nearest(x: Vectors, count: int, bound: float = 1.0) -> tuple[list[tuple[float, int, int]], int]:
    """The `count` nearest pairs as (cosine, i, j), i < j; and how many pairs reach `bound`."""
    import numpy as np

    found: list[tuple[float, int, int]] = []
    over = 0
    for begin in range(0, len(x) if count else 0, BLOCK):
        cosines = x[begin : begin + BLOCK] @ x.T
        rows = np.arange(begin, begin + len(cosines))[:, None]
        cosines[np.arange(len(x))[None] <= rows] = -np.inf
        over += int(np.count_nonzero(cosines >= bound))
        for flat in np.argsort(-cosines, axis=None, kind="stable")[:count]:
            i, j = divmod(int(flat), len(x))
            if np.isfinite(cosines[i, j]):
                found.append((float(cosines[i, j]), begin + i, j))
    return sorted(found, key=lambda pair: (-round(pair[0], DIGITS), *pair[1:]))[:count], over


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────


def chosen(
    prompts: Sequence[Prompt], vectors: Sequence[Sequence[float]] | Vectors, k: int, seed: int = 0
) -> list[int]:
    """k prompts of each category, ascending; `seed` draws where each category's greedy starts.

    UserError: a category has fewer than k.
    """
    x, kept = unit(vectors), []
    for category, rows in _by_category(prompts).items():
        if not 1 <= k <= len(rows):
            raise UserError(
                f"category '{category}' has {len(rows)} prompts, and {k} of each are wanted. "
                f"Expected 1 to {len(rows)}: more candidates, or a lower --per-category."
            )
        start = random.Random(f"{seed} {category}").randrange(len(rows))
        kept += [rows[i] for i in select(x[rows], k, start)]
    return sorted(kept)


def _by_category(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt.category, []).append(i)
    return dict(sorted(groups.items()))


def text(prompt: Prompt) -> str:
    """Everything that is asked, all turns. UserError: a prompt of token ids has no text."""
    parts = [*(message.content for message in prompt.messages), *prompt.later_turns]
    if not parts:
        raise UserError(
            f"prompt '{prompt.prompt_id}' carries token ids and no text. Expected prompt, turns or "
            "messages: likeness is measured on text."
        )
    return "\n\n".join(parts)


def words(of: str) -> int:
    """Words: what spaces part; in Han and kana a character each."""
    return len(_WORD.findall(of))


def measured(
    prompts: Sequence[Prompt],
    vectors: Sequence[Sequence[float]] | Vectors,
    *,
    source: str,
    embedder: str,
    pairs: int = 10,
    bound: float | None = None,
) -> Diversity:
    """Diversity of a set, by category. `vectors` are its texts', in order, of any length."""
    x, texts = unit(vectors), [text(prompt) for prompt in prompts]

    def pair(cosine: float, *at: int) -> Pair:
        shown = (" ".join(texts[i].split())[:EXCERPT] for i in at)
        return Pair(cosine=cosine, ids=_two(prompts[i].prompt_id for i in at), texts=_two(shown))

    def spread(category: str, rows: list[int]) -> Spread:
        found, _ = nearest(x[rows], 1)
        return Spread(
            category=category,
            prompts=len(rows),
            multi_turn=sum(1 for i in rows if prompts[i].later_turns),
            words=distribution([words(texts[i]) for i in rows]),
            cosine=mean_cosine(x[rows]),
            nearest=next((pair(cosine, rows[i], rows[j]) for cosine, i, j in found), None),
        )

    close, over = nearest(x, max(pairs, 1), 2.0 if bound is None else bound)
    return Diversity(
        source=source,
        embedder=embedder,
        categories=tuple(spread(name, rows) for name, rows in _by_category(prompts).items()),
        whole=spread("all", list(range(len(prompts)))),
        pairs=tuple(pair(*one) for one in close[:pairs]),
        bound=bound,
        near_duplicates=None if bound is None else over,
    )


def _two(of: Iterable[str]) -> tuple[str, str]:
    first, second = of
    return first, second
