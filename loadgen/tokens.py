"""Chat template + tokenizer → token ids: the same ids for every engine.

The template is rendered once and encoded without special tokens, since templates write their own
BOS (exactly one: SPEED-Bench does the same). Without a template the text is all there is, and no
special token is added. Ids of opening turns are kept on disk under a digest of all that decides
about them, so that a second start needs no tokenizer. transformers is imported here and nowhere
else, lazily. Must not: ask a server (that is preflight's), run code that a model repository ships.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from loadgen.errors import UserError, nearest
from loadgen.types import U32, Message, Prompt, Templating

BATCH_CHARACTERS = 4 << 20
"""Encoded at once: enough for all cores, some 200 MB while tokenizers holds a million tokens."""

_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "config.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
"""What may decide about ids in a tokenizer's folder (transformers 5.23)."""

_FINAL = "<|channel|>final<|message|>"
_CHECK_BYTES = 8


# ── conversations ────────────────────────────────────────────────────────────────────────────────


def next_turn(
    history: tuple[Message, ...], answer: str, said: str, *, whole: bool = True
) -> tuple[Message, ...]:
    """The conversation after the model's own answer and what the user says next.

    `whole`: thinking stays in the answer, and the chat template drops it or not; else it is gone.
    """
    kept = answer if whole else without_thinking(answer)
    return (*history, Message(role="assistant", content=kept), Message(role="user", content=said))


def without_thinking(answer: str) -> str:
    """What follows the thinking: after `</think>` (Qwen3, DeepSeek-R1), or gpt-oss' final channel.

    "" where the thinking was cut before its end, as far as its beginning can be seen.
    """
    if _FINAL in answer:
        return re.split(r"<\|(?:end|return|channel)\|>", answer.rpartition(_FINAL)[2])[0]
    if "</think>" in answer:
        return answer.rpartition("</think>")[2].lstrip("\n")
    return "" if answer.lstrip().startswith("<think>") else answer


def plain_text(messages: Sequence[Message]) -> str:
    """The conversation without a template: an answer follows its prompt as the model wrote it."""
    text = ""
    for message in messages:
        text += (
            message.content
            if not text or message.role == "assistant"
            else ("\n\n" + message.content)
        )
    return text


# ── a local tokenizer ────────────────────────────────────────────────────────────────────────────


class LocalTokenizer:
    """A tokenizer from a folder or the local hub cache, loaded when it is first needed.

    `cache`: a folder for ids, which may be deleted at any time; None keeps none. UserError as soon
    as it is loaded: no tokenizer there, no chat template, or one that never reads an argument.
    """

    def __init__(
        self, name: str, templating: Templating | None = None, cache: Path | None = None
    ) -> None:
        self.name = name
        self.templating = Templating() if templating is None else templating
        self._cache = cache

    def __call__(self, messages: tuple[Message, ...]) -> U32:
        """The ids of one conversation, open for the assistant's answer. Never cached."""
        return self._encoded([self._text(messages)])[0]

    def plain(self, text: str) -> U32:
        """The ids of a text as it is: no template, no special token added."""
        return self._through_cache([("plain", text)], lambda _: text, lambda count: None)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out."""
        return str(self.loaded.decode(list(ids)))

    def many(
        self,
        conversations: Sequence[tuple[Message, ...]],
        done: Callable[[int], None] = lambda count: None,
    ) -> list[U32]:
        """The ids of each conversation, on all cores or from the cache; done(n) as n are there."""
        how = (self.templating.apply, self.templating.args)
        return self._through_cache(
            [(how, messages) for messages in conversations],
            lambda index: self._text(conversations[index]),
            done,
        )

    @cached_property
    def loaded(self) -> Any:
        """transformers' tokenizer."""
        # It would advise every user to install PyTorch (transformers 5.23).
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
        except Exception as fault:
            raise UserError(
                f"no tokenizer at '{self.name}': {str(fault).splitlines()[0][:200]}. Expected a "
                "folder with tokenizer.json or a model id in the local hub cache; give "
                "--tokenizer PATH, or --api chat to let the server template the text."
            ) from None
        if self.templating.apply:
            self._check_template(found)
        return found

    def _check_template(self, found: Any) -> None:
        if not getattr(found, "chat_template", None):
            raise UserError(
                f"the tokenizer at '{self.name}' has no chat template. Expected an instruct "
                "model's; give another --tokenizer, --no-template for a base model, or --api chat "
                "to let the server template the text."
            )
        # Jinja takes an unknown variable for nothing: a slip would change nothing, unnoticed.
        words = set(re.findall(r"[A-Za-z_]\w*", str(found.chat_template)))
        for key in self.templating.args:
            if key not in words:
                hint = nearest(key, words) or "."
                raise UserError(
                    f"the chat template at '{self.name}' never reads '{key}'{hint} "
                    "Expected template arguments that it knows, such as enable_thinking for Qwen3 "
                    "or reasoning_effort for gpt-oss; mend --template-args or [templating]."
                )

    def _text(self, messages: tuple[Message, ...]) -> str:
        if not self.templating.apply:
            return plain_text(messages)
        found, said = self.loaded, [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(
                found.apply_chat_template(
                    said, tokenize=False, add_generation_prompt=True, **self.templating.args
                )
            )
        except Exception as fault:  # a template may raise what it likes
            raise UserError(
                f"the chat template at '{self.name}' failed: {str(fault)[:200]}. Expected messages "
                "and --template-args that it takes."
            ) from None

    def _encoded(self, texts: list[str]) -> list[U32]:
        fast = getattr(self.loaded, "backend_tokenizer", None)
        if fast is None:  # one in Python; `verbose` warns of texts longer than the context
            rows = self.loaded(texts, add_special_tokens=False, verbose=False)["input_ids"]
            return [array("I", row) for row in rows]
        fast.no_truncation()  # a tokenizer.json may bring both
        fast.no_padding()
        # Without offsets: 0.6 of the time (tokenizers 0.23).
        found = fast.encode_batch_fast(texts, add_special_tokens=False)
        return [array("I", row.ids) for row in found]

    def _through_cache(
        self, keys: Sequence[Any], text: Callable[[int], str], done: Callable[[int], None]
    ) -> list[U32]:
        """The ids of text(index) for each key, read where they are kept, else made and kept."""
        places = self._places(keys)
        found = [None if place is None else _read(place) for place in places]
        missing = [index for index, ids in enumerate(found) if ids is None]
        count = len(keys) - len(missing)
        done(count)
        for batch in _batches((index, text(index)) for index in missing):
            rows = self._encoded([text for _, text in batch])
            for (index, _), ids in zip(batch, rows, strict=True):
                found[index] = ids
                if (place := places[index]) is not None:
                    _write(place, ids)
            count += len(batch)
            done(count)
        return [ids for ids in found if ids is not None]

    def _places(self, keys: Sequence[Any]) -> list[Path | None]:
        """Where the ids of each key are kept; None where they cannot be."""
        if self._cache is None:
            return [None] * len(keys)
        content = content_of(self.name)
        if content is None:
            _ = self.loaded  # fetches a hub's tokenizer, or says that there is none
            content = content_of(self.name)
        if content is None:
            return [None] * len(keys)
        # A template may write today's date: a kept one stays, and so do the ids.
        base = [version("transformers"), version("tokenizers"), sys.byteorder]
        folder = self._cache / content
        return [folder / f"{_digest([*base, key])}.u32" for key in keys]


def _batches(texts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """As they come, about BATCH_CHARACTERS at a time."""
    batch: list[tuple[int, str]] = []
    size = 0
    for index, text in texts:
        batch.append((index, text))
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ── the cache ────────────────────────────────────────────────────────────────────────────────────


def content_of(name: str) -> str | None:
    """A digest of a tokenizer's files, without loading it; None where there are none."""
    folder = Path(name)
    found = [(file, _file_of(folder, name, file)) for file in _FILES]
    digests = [(file, hashlib.sha256(at.read_bytes()).hexdigest()) for file, at in found if at]
    return _digest(digests) if digests else None


def _file_of(folder: Path, name: str, file: str) -> Path | None:
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with contextlib.suppress(HFValidationError):  # no id of a hub
        found = try_to_load_from_cache(name, file)
        return Path(found) if isinstance(found, str) else None
    return None


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()


def _read(path: Path) -> U32 | None:
    """Ids after a checksum of them; None where the file is not there, or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    check, kept = data[:_CHECK_BYTES], data[_CHECK_BYTES:]
    if not kept or len(kept) % 4 or hashlib.sha256(kept).digest()[:_CHECK_BYTES] != check:
        return None
    ids: U32 = array("I")
    ids.frombytes(kept)
    return ids


def _write(path: Path, ids: U32) -> None:
    """Whole or not at all; a cache that cannot be written is no fault."""
    half = path.with_name(f"{path.name}.{os.getpid()}")
    kept = ids.tobytes()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(hashlib.sha256(kept).digest()[:_CHECK_BYTES] + kept)
        half.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            half.unlink()


# ── what was asked ───────────────────────────────────────────────────────────────────────────────


def prompts_digest(
    prompts: Iterable[Prompt], api: str, templating: Templating | None = None
) -> str:
    """sha256 over the first turns (ids, else text), later user texts, and how they are templated.

    Two runs with the same digest asked the same thing.
    """
    digest = hashlib.sha256(api.encode())
    if templating not in (None, Templating()):
        digest.update(b"\x04" + msgspec.json.encode(templating, order="deterministic"))
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
