"""`draftload datasets`: the built-in sets, and how unlike the prompts of a set are.

Not a format of runs: there is no study here, only its page. Must not: compute a figure.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from loadgen.types import Diversity, Pair, SetFacts, Spread, Study
from reports import units
from reports.page import Column, Section, clean, grid, short, text_of, wrapped


def listing(sets: Sequence[SetFacts], page: Study) -> str:
    """The built-in sets, a paragraph each."""
    sections = []
    for of in sets:
        size = (
            f"{units.count(of.prompts)} prompts of one turn"
            if of.made
            else f"{units.count(of.prompts)} prompts, {units.count(of.turns)} turns "
            f"({units.count(of.multi_turn)} prompts of several), {units.count(of.subcategories)} "
            "sub-categories"
        )
        lines = [
            of.description,
            size,
            "categories: " + ", ".join(f"{name} {n}" for name, n in of.categories.items()),
            f"made {of.made}" if of.made else f"scripts: {', '.join(of.scripts)}",
            f"licence: {of.licence}",
        ]
        section: Section = [Text(of.name, style="bold")]
        for line in lines:
            section += wrapped(line, page.width, "  ", "    ")
        sections.append(section)
    return text_of(sections, page)


def diversity(found: Diversity, page: Study) -> str:
    """A row a category, then the nearest pairs with the beginnings of their texts."""
    head = f"{found.source}: {units.count(found.whole.prompts)} prompts"
    about = "Mean cosine over all pairs of prompts of a category, 1 for the same text. Embedder: "
    top = [*wrapped(head, page.width, style="bold"), *wrapped(about + found.embedder, page.width)]
    table = grid(_columns((*found.categories, found.whole)), page.width)
    return text_of([top, table, _pairs(found, page.width)], page)


def _columns(rows: Sequence[Spread]) -> list[Column]:
    def near(pair: Pair | None) -> str:
        return units.MISSING if pair is None else " · ".join(map(short, pair.ids))

    words = [row.words for row in rows]
    return [
        Column("category", [short(row.category) for row in rows], left=True),
        Column("prompts", [units.count(row.prompts) for row in rows]),
        Column("several\nturns", [units.count(row.multi_turn) for row in rows], 1, "several turns"),
        Column("words\nmin", [units.whole(w.min) for w in words], 3, "words min"),
        Column("\np50", [units.whole(w.p50) for w in words], 2, "words p50"),
        Column("\nmean", [units.whole(w.mean) for w in words]),
        Column("\nmax", [units.whole(w.max) for w in words], 3, "words max"),
        Column("mean\ncosine", [units.figure(row.cosine) for row in rows]),
        Column(
            "nearest\npair", [units.figure(r.nearest.cosine if r.nearest else None) for r in rows]
        ),
        Column("", [near(row.nearest) for row in rows], 4, "nearest pair's ids", left=True),
    ]


def _pairs(found: Diversity, width: int) -> Section:
    section: Section = []
    if found.bound is not None:
        bound = units.number(found.bound)
        count = units.count(found.near_duplicates)
        text = f"Suspected near-duplicates, pairs at or over a cosine of {bound}: {count}"
        section += wrapped(text, width, style="bold")
    if found.pairs:
        section += wrapped("Nearest pairs:", width)
    for pair in found.pairs:
        section += wrapped(f"{units.figure(pair.cosine)}  {' · '.join(pair.ids)}", width)
        for text in pair.texts:
            line = Text("       " + clean(text), style="dim")
            line.truncate(min(width, 110), overflow="ellipsis")
            section.append(line)
    return section
