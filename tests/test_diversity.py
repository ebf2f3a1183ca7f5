"""The published selection: golden G15, its laws against brute force; lengths and pairs of a set."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.errors import UserError
from loadgen.types import Message, Prompt
from scenarios import diversity

E1, E2, E3 = np.eye(3)
G15 = np.array([E1, E1, E2, E3])


def likeness(x: diversity.Vectors, chosen: list[int]) -> float:
    """L(S), pair by pair."""
    return sum(float(x[i] @ x[j]) for i in chosen for j in chosen if i != j)


@st.composite
def pools(draw: st.DrawFn, least: int = 2) -> tuple[diversity.Vectors, int, int]:
    """Unit vectors, some of them twins; how many to choose; where to start."""
    n = draw(st.integers(least, 9))
    seed = draw(st.integers(0, 2**32 - 1))
    x = np.random.default_rng(seed).normal(size=(n, 3))
    for row in draw(st.lists(st.integers(1, n - 1), max_size=3)):
        x[row] = x[row - 1]
    return diversity.unit(x), draw(st.integers(1, n - 1)), draw(st.integers(0, n - 1))


def test_golden_g15_greedy_takes_what_is_unlike_and_ties_go_to_the_lowest() -> None:
    assert diversity.greedy(G15, 3, start=0) == [0, 2, 3]
    assert likeness(G15, [0, 2, 3]) == 0
    assert diversity.mean_cosine(G15[[0, 2, 3]]) == 0
    assert diversity.select(G15, 3, start=0) == [0, 2, 3]


def test_golden_g15_swap_of_a_twin_is_accepted() -> None:
    assert diversity.half_change(G15, [0, 1, 2], out=1, into=3) == -1
    assert diversity.refine(G15, [0, 1, 2]) == [0, 2, 3]


@given(pools())
def test_swap_formula_is_brute_force(pool: tuple[diversity.Vectors, int, int]) -> None:
    x, k, _ = pool
    chosen = list(range(k))
    for out, into in itertools.product(chosen, range(k, len(x))):
        after = [i for i in chosen if i != out] + [into]
        half = diversity.half_change(x, chosen, out, into)
        assert 2 * half == pytest.approx(likeness(x, after) - likeness(x, chosen), abs=1e-9)


@given(pools())
def test_greedy_adds_the_least_like_of_all(pool: tuple[diversity.Vectors, int, int]) -> None:
    x, k, start = pool
    taken = diversity.greedy(x, k, start)
    assert taken[0] == start
    assert len(set(taken)) == k
    for size in range(1, k):
        sums = {i: likeness(x, [*taken[:size], i]) for i in range(len(x)) if i not in taken[:size]}
        assert sums[taken[size]] <= min(sums.values()) + 1e-8


@given(pools())
def test_no_swap_is_left_that_lowers_the_sum(pool: tuple[diversity.Vectors, int, int]) -> None:
    x, k, start = pool
    chosen = diversity.select(x, k, start)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == k
    assert likeness(x, chosen) <= likeness(x, diversity.greedy(x, k, start)) + 1e-8
    for out, into in itertools.product(chosen, set(range(len(x))) - set(chosen)):
        after = [i for i in chosen if i != out] + [into]
        assert likeness(x, after) >= likeness(x, chosen) - 1e-8
    assert diversity.select(x, k, start) == chosen


@given(pools())
def test_mean_and_nearest_are_brute_force(pool: tuple[diversity.Vectors, int, int]) -> None:
    x, count, _ = pool
    pairs = list(itertools.combinations(range(len(x)), 2))
    cosines = [float(x[i] @ x[j]) for i, j in pairs]
    assert diversity.mean_cosine(x) == pytest.approx(np.mean(cosines), abs=1e-9)
    found, over = diversity.nearest(x, count, bound=0.5)
    assert [cosine for cosine, _, _ in found] == pytest.approx(
        sorted(cosines, reverse=True)[:count], abs=1e-9
    )
    assert all(i < j for _, i, j in found)
    assert over == sum(cosine >= 0.5 for cosine in cosines)


def test_nearest_looks_past_its_blocks() -> None:
    x = diversity.unit(np.random.default_rng(7).normal(size=(2 * diversity.BLOCK + 9, 16)))
    x[-1] = x[diversity.BLOCK + 3]
    (pair,), over = diversity.nearest(x, 1, bound=0.9999)
    assert pair[1:] == (diversity.BLOCK + 3, len(x) - 1)
    assert over == 1


def test_one_prompt_has_no_mean_and_no_pair() -> None:
    assert diversity.mean_cosine(G15[:1]) is None
    assert diversity.nearest(G15[:1], 3) == ([], 0)


@pytest.mark.parametrize("bad", [[[1.0], [1.0, 2.0]], [[0.0, 0.0]], [[float("nan")]], [[], []]])
def test_vectors_that_are_none(bad: list[list[float]]) -> None:
    with pytest.raises(UserError, match="embedder gave"):
        diversity.unit(bad)


@pytest.mark.parametrize(
    ("text", "count"),
    [("one two\n three", 3), ("", 0), ("今日は晴れ", 5), ("Python で書く", 4), ("naïve—yes", 1)],
)
def test_words(text: str, count: int) -> None:
    assert diversity.words(text) == count


def prompt(name: str, category: str, *turns: str) -> Prompt:
    opening = (Message(role="user", content=turns[0]),) if turns else ()
    return Prompt(prompt_id=name, category=category, messages=opening, later_turns=turns[1:])


def test_a_set_is_measured_by_category() -> None:
    prompts = [
        prompt("a", "x", "one two"), prompt("b", "x", "one", "two three"), prompt("c", "y", "four"),
        prompt("d", "x", "five"),
    ]  # fmt: skip
    found = diversity.measured(
        prompts, G15, source="s", embedder="e", pairs=2, bound=0.9
    )  # a and b are the same vector
    x, y = found.categories
    assert (x.category, x.prompts, x.multi_turn, x.words.max) == ("x", 3, 1, 3)
    assert x.cosine == pytest.approx(1 / 3)
    assert x.nearest is not None
    assert (x.nearest.ids, x.nearest.texts[1]) == (("a", "b"), "one two three")
    assert (y.prompts, y.cosine, y.nearest) == (1, None, None)
    assert (found.whole.prompts, found.near_duplicates, len(found.pairs)) == (4, 1, 2)


def test_choice_is_made_in_each_category_from_a_seed() -> None:
    prompts = [prompt(str(i), "xy"[i % 2], "text") for i in range(40)]
    x = np.random.default_rng(1).normal(size=(40, 3))
    chosen = diversity.chosen(prompts, x, 5, seed=3)
    assert chosen == sorted(chosen)
    assert [prompts[i].category for i in chosen].count("x") == 5
    assert len(chosen) == 10
    assert diversity.chosen(prompts, x, 5, seed=3) == chosen
    with pytest.raises(UserError, match="category 'x' has 20 prompts, and 21"):
        diversity.chosen(prompts, x, 21)


def test_token_ids_have_no_likeness() -> None:
    with pytest.raises(UserError, match="'a' carries token ids and no text"):
        diversity.text(prompt("a", "x"))
