"""loadgen/answers.py: labels on texts made up here, their arithmetic, and a run's shares."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.answers import (
    BIMODAL,
    Answer,
    anchors,
    answer_caveats,
    answer_figures,
    bimodality,
    clustered,
    echoed,
    families,
    fluent,
    label,
)
from loadgen.stats import wilson
from tests.records import ENGINE, record

TRIVIAL = (
    "It looks like your message contains random characters, and I'm not sure what you need. Could"
    " you please clarify your question?",
    "The text you sent appears to be a jumbled list of words in several languages. It doesn't form"
    " a clear question. How can I help you today?",
    "I’m happy to help! What you pasted seems to be garbled, though: would you tell me a bit more"
    " context?",
)
REAL = (
    "The function opens the file lazily and yields one record for each line, so memory stays flat"
    " even where the input is large. A caller that stops early closes the generator.",
    "To bake the loaf, let the dough rise in a warm place until it has doubled, shape it with wet"
    " hands, and put it into a hot oven for forty minutes.",
    "Trade along the river grew after the locks were built, because barges no longer had to wait"
    " for high water. Within ten years the town had doubled.",
)
NOISE = " ".join(
    f"{word} {n}zq"
    for n, word in enumerate(["kelp", "vortex", "unity", "ombre", "platform", "gauze", "rhubarb"])
)
LATCHED = (
    "The platform is a place where people come together, and unity is what keeps it going. When a"
    " platform has grown, its members will ask what unity means to them, and the answer that they"
    " give is the platform itself. So unity and the platform are one and the same thing, and to"
    " care for one of them is to care for the other. "
) * 3


def answer(text: str, prompt: str = NOISE, tokens: int = 40, reason: str = "stop") -> Answer:
    return Answer(text=text, prompt=prompt, tokens=tokens, finish_reason=reason)


@pytest.mark.parametrize("text", TRIVIAL)
def test_trivial_answers_have_three_families_at_least(text: str) -> None:
    assert families(text) >= 3
    assert label(answer(text)) == "trivial"


@pytest.mark.parametrize("text", REAL)
def test_real_answers_have_none(text: str) -> None:
    assert families(text) == 0
    assert label(answer(text)) is None


def test_one_family_is_trivial_only_with_both_numeric_signs() -> None:
    text = "Sure. Could you share the file?"
    assert families(text) == 1

    def of(**changes: float | str) -> str | None:
        fields = {"tokens": 40, "finish_reason": "stop", "acceptance_length": 3.44} | changes
        return label(Answer(text=text, prompt=NOISE, **fields), 3)  # type: ignore[arg-type]

    assert of() == "trivial", "3.44 is above 1 + 0.75 k"
    assert of(acceptance_length=3.2) is None
    assert of(tokens=300) is None
    assert of(finish_reason="length") is None


def test_a_family_far_into_the_answer_does_not_count() -> None:
    assert families("word " * 130 + TRIVIAL[0]) == 0


def test_an_answer_that_keeps_coming_back_to_a_word_of_the_noise_is_latched() -> None:
    assert set(anchors(LATCHED, NOISE)) == {"unity", "platform"}
    assert label(answer(LATCHED, tokens=260)) == "latched"
    assert label(answer(LATCHED, tokens=100, reason="length")) == "latched"
    assert label(answer(LATCHED, tokens=100)) is None, "short answers are not called latched"


def test_a_word_that_the_prompt_is_full_of_is_no_anchor() -> None:
    assert anchors(LATCHED, "unity platform " * 3) == ()
    assert label(answer(LATCHED, "some other noise", tokens=300)) is None


def test_an_answer_that_repeats_the_noise_is_an_echo() -> None:
    words = NOISE.split()
    half = " ".join(words[:8]) + " and that is all that there is to say here now"
    assert 0.3 < echoed(half, NOISE) < 0.6
    assert label(answer(half)) == "echo"
    assert echoed(REAL[0], NOISE) == 0
    assert echoed("two words", NOISE) == 0


@pytest.mark.parametrize("text", ["Spectra" * 40, " 1" * 150, "the most recent example of " * 12])
def test_an_answer_that_goes_round_in_circles_is_a_loop(text: str) -> None:
    """What SmolLM2-135M gave on llama.cpp."""
    assert label(answer(text, tokens=300, reason="length")) == "loop"
    assert label(answer(text, "", tokens=300, reason="length")) == "loop"
    assert label(answer(text[:100])) is None, "too short to tell"


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_answer_that_ended_at_once_is_empty(text: str) -> None:
    assert label(answer(text, tokens=1)) == "empty"


def test_without_the_prompts_text_no_echo_and_no_topic_is_told() -> None:
    assert label(answer(LATCHED, "", tokens=300)) is None
    assert label(answer(TRIVIAL[0], "")) == "trivial"


@pytest.mark.parametrize(
    ("text", "is_text"),
    [
        (REAL[0], True),
        ("kelp vortex ombre gauze rhubarb lattice", False),
        ("the of and to in is it that", False),
        ("{}[]();;==<<>>" * 4, False),
        ("\ufffd\ufffd\ufffd a word and the rest of it", False),
        ("Die Stadt wuchs schnell, nachdem die Schleusen gebaut waren, für alle.", True),
        ("", False),
    ],
)
def test_what_reads_like_text(text: str, is_text: bool) -> None:
    assert fluent(text) == is_text


def test_answers_that_begin_alike_are_clustered_in_any_language() -> None:
    alike = [f"Es tut mir leid, aber ich verstehe Ihre Nachricht {n} leider nicht." for n in "ab"]
    assert clustered([*alike, *REAL]) == 2
    assert clustered(REAL) == 0
    assert clustered(["", "a b", ""]) == 0


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # Newcombe 1998, table I, score method without continuity correction
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_as_published(hits: int, n: int, low: float, high: float) -> None:
    found = wilson(hits, n)
    assert found is not None
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_mirrors(of: tuple[int, int]) -> None:
    hits, n = of
    found, other = wilson(hits, n), wilson(n - hits, n)
    assert found is not None
    assert other is not None
    assert 0 <= found.low <= hits / n <= found.high <= 1
    assert found.low == pytest.approx(1 - other.high, abs=1e-12)


def test_wilson_of_nothing_is_nothing() -> None:
    assert wilson(0, 0) is None


def test_bimodality_of_known_shapes() -> None:
    assert bimodality([1.0, 3.0] * 20) == pytest.approx(1.0)
    assert bimodality([n / 2000 for n in range(2001)]) == pytest.approx(0.5556, abs=1e-3)
    rng = random.Random(1)
    two = [rng.gauss(3.44, 0.25) for _ in range(40)] + [rng.gauss(1.88, 0.25) for _ in range(40)]
    assert (bimodality(two) or 0) > BIMODAL, "the reference's mixture, of a spread of our own"
    one = [rng.gauss(2.25, 0.3) for _ in range(4000)]
    assert bimodality(one) == pytest.approx(0.333, abs=0.03)
    assert bimodality([2.0] * 9) is None
    assert bimodality([1.0, 2.0]) is None


def test_shares_add_up_and_carry_their_acceptance() -> None:
    """40 answers: a quarter trivial at AL 4, a quarter latched at AL 1, the rest at AL 2."""
    kinds = [(TRIVIAL[0], 4), (LATCHED, 1), (REAL[0], 2), (REAL[1], 2)]
    records = [
        record(
            [1, *[kinds[n % 4][1]] * 10],
            [float(t) for t in range(12)],
            dialogue=f"d{n}",
            text=kinds[n % 4][0],
            finish_reason="length",
        )
        for n in range(40)
    ]
    found = answer_figures(records, {r.prompt_id: NOISE for r in records}, ENGINE, 3)
    assert found is not None
    assert {s.label: (s.count, s.acceptance_length) for s in found.shares} == {
        "empty": (0, None),
        "trivial": (10, 4.0),
        "loop": (0, None),
        "echo": (0, None),
        "latched": (10, 1.0),
        "none of these": (20, 2.0),
    }
    assert sum(s.count for s in found.shares) == found.answers == 40
    assert found.clustered.count == 40, "the same four texts over and over"
    (caveat,) = answer_caveats(found, "c=1")
    assert "10 of 40 are trivial, 10 of 40 are latched" in caveat.message


def test_where_texts_are_not_known_nothing_is_said_of_them() -> None:
    bare = [record([1, 2], [0.0, 1.0, 2.0])]
    assert answer_figures(bare, {}, ENGINE, 3) is None
    told = [record([1, 2], [0.0, 1.0, 2.0], text=REAL[0])]
    found = answer_figures(told, {}, ENGINE, 3)
    assert found is not None
    assert not found.prompts_known
    assert [s.label for s in found.shares] == ["empty", "trivial", "loop", "none of these"]
    assert list(answer_caveats(found, "c=1")) == []


def test_where_chunks_are_disproved_as_steps_no_label_has_an_acceptance_length() -> None:
    merged = [record([1, 9, 9], [0.0, 1.0, 2.0, 3.0], text=REAL[0])]
    found = answer_figures(merged, {}, ENGINE, 3)
    assert found is not None
    assert {s.acceptance_length for s in found.shares} == {None}
