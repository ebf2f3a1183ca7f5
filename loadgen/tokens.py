"""Chat template + tokenizer → token ids: the same ids for every engine.

The template is rendered once and encoded without special tokens, since templates write their own
BOS (exactly one: SPEED-Bench does the same). Thinking text and the model's own answer stay in the
history as the template leaves them. transformers is imported here and nowhere else, lazily. Must
not: ask a server (that is preflight's), never run code that a model repository ships.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable

from loadgen.errors import UserError
from loadgen.types import U32, Message, Prompt

Render = Callable[[tuple[Message, ...]], U32]
"""Messages → the ids of the templated conversation, open for the assistant's answer."""


def next_turn(history: tuple[Message, ...], answer: str, said: str) -> tuple[Message, ...]:
    """The conversation after the model's own answer and what the user says next."""
    return (*history, Message(role="assistant", content=answer), Message(role="user", content=said))


def local_tokenizer(name: str) -> Render:
    """A tokenizer from a folder or the local hub cache. UserError: none there, or no template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as fault:
        raise UserError(
            f"no tokenizer at '{name}': {str(fault).splitlines()[0][:200]}. Expected a folder with "
            "tokenizer.json or a model id in the local hub cache; give --tokenizer PATH, or "
            "--api chat to let the server template the text."
        ) from None
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"the tokenizer at '{name}' has no chat template. Expected an instruct model's; give "
            "another --tokenizer, or --api chat to let the server template the text."
        )

    def render(messages: tuple[Message, ...]) -> U32:
        text = tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            tokenize=False,
            add_generation_prompt=True,
        )
        return array("I", tokenizer.encode(text, add_special_tokens=False))

    return render


def local_decoder(name: str) -> Callable[[U32], str]:
    """Ids → text, special tokens spelled out. UserError: no tokenizer there."""
    local_tokenizer(name)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)

    def decode(ids: U32) -> str:
        return str(tokenizer.decode(list(ids)))

    return decode


def prompts_digest(prompts: Iterable[Prompt], templating: str) -> str:
    """sha256 over the first turns (ids, else text), later user texts and the templating's name.

    Two runs with the same digest asked the same thing.
    """
    digest = hashlib.sha256(templating.encode())
    for prompt in prompts:
        digest.update(b"\x00" + prompt.prompt_id.encode())
        if prompt.prompt_token_ids is not None:
            digest.update(array("Q", prompt.prompt_token_ids).tobytes())
        else:
            for message in prompt.messages:
                digest.update(f"\x01{message.role}\x02{message.content}".encode())
        for said in prompt.later_turns:
            digest.update(b"\x03" + said.encode())
    return digest.hexdigest()
