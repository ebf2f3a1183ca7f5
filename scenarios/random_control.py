"""The random control: prompts of random token ids, to show by how much they misstate a server.

The field's two recipes: consecutive ids from a random offset (vLLM's `random` dataset) and ids
drawn independently, each bare and as the user's message in the chat template; a category each. Ids
come from the range that the built-in set's texts reach in the target's tokenizer, without those of
its chat template: ordinary tokens, which every engine takes. Must not: tokenize, be a headline.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence

from loadgen.errors import UserError
from loadgen.types import U32, Dataset, Prompt, Recipe
from scenarios.throughput import bucket, built_in_texts, chosen, common_ends, length_of, share

PER_RECIPE = 64


def consecutive(ids: Sequence[int], count: int, rng: random.Random) -> U32:
    """`count` ids in a row from a random offset, going round at the end of the range."""
    offset = rng.randrange(len(ids))
    return array("I", (ids[(offset + n) % len(ids)] for n in range(count)))


def independent(ids: Sequence[int], count: int, rng: random.Random) -> U32:
    """`count` ids, each drawn alone."""
    return array("I", rng.choices(ids, k=count))


RECIPES: dict[str, tuple[Callable[[Sequence[int], int, random.Random], U32], bool]] = {
    "consecutive": (consecutive, False),
    "consecutive_chat": (consecutive, True),
    "independent": (independent, False),
    "independent_chat": (independent, True),
}
"""Category → how ids are drawn, and whether the chat template stands around them."""


def counts(dataset: Dataset) -> dict[str, int]:
    """Prompts of each category that recipe() makes: `limit` over them in turn, or 64 each."""
    categories = chosen(dataset.categories, tuple(RECIPES))
    return share(dataset.limit or PER_RECIPE * len(categories), categories)


def recipe(dataset: Dataset) -> Recipe:
    """Prompts of `isl_tokens`, template included. UserError: nothing to make."""
    isl = length_of(dataset)
    wanted = counts(dataset)

    def build(rows: Sequence[U32]) -> tuple[tuple[Prompt, ...], str]:
        head, tail = common_ends(rows)
        if isl <= len(head) + len(tail):
            raise UserError(
                f"--isl {isl} leaves no room: the chat template alone has {len(head) + len(tail)} "
                "tokens. Expected more."
            )
        ids = ordinary(rows, head, tail)
        prompts = tuple(
            _prompt(category, number, isl, ids, head, tail, dataset.seed)
            for category, many in wanted.items()
            for number in range(many)
        )
        return prompts, (
            f"{len(prompts):,} prompts of {isl:,} random ids of {ids[0]:,} … {ids[-1]:,}; a "
            "control, not a workload"
        )

    return Recipe(texts=built_in_texts(), build=build)


def ordinary(rows: Sequence[U32], head: U32, tail: U32) -> list[int]:
    """All ids from the lowest to the highest that texts have, without the template's own."""
    said = [token for row in rows for token in row[len(head) : len(row) - len(tail)]]
    template = {*head, *tail}
    return [token for token in range(min(said), max(said) + 1) if token not in template]


def _prompt(
    category: str, number: int, isl: int, ids: Sequence[int], head: U32, tail: U32, seed: int
) -> Prompt:
    draw, templated = RECIPES[category]
    rng = random.Random(f"{seed}/{category}/{isl}/{number}")
    middle = draw(ids, isl - (len(head) + len(tail) if templated else 0), rng)
    return Prompt(
        prompt_id=f"{bucket(isl)}-{category}-{number:03}",
        category=category,
        isl_bucket=bucket(isl),
        prompt_token_ids=head + middle + tail if templated else middle,
        source="random",
    )
