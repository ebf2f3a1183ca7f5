"""What is at the URL, and what it honours: found by asking, never by version string.

Three steps: `identify` (models, version, engine's own pages, metrics), `tokenizer` (a local one, or
the server's own /tokenize), `probe` (one short request: are token ids honoured, does a chunk tell
its tokens, are there per-request figures). Everything that would ruin a run is a UserError here,
before any measured request. Must not: measure.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import ssl
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import msgspec

from loadgen.errors import ServerError, UserError, nearest
from loadgen.runner import Tokenize
from loadgen.scrape import Scraper
from loadgen.tokens import LocalTokenizer, plain_text
from loadgen.transport import Transport, bounded, environment_proxy, refusal, secrets_of
from loadgen.types import (
    U32,
    Caveat,
    Completed,
    Dialogue,
    Engine,
    Honours,
    Message,
    Observer,
    Prompt,
    Refused,
    Request,
    Sampling,
    ServerConfig,
    ServerFacts,
    ServerInfo,
    Templating,
    Wire,
)
from loadgen.written import hide

ASK_TIMEOUT_S = 20.0
PAGE_BYTES = 16 << 20
PROBE_OUTPUT_TOKENS = 12
PROBE = (Message(role="user", content="Count from one to ten, in words."),)
PROBED = Prompt(prompt_id="preflight", category="preflight", messages=PROBE)
"""What preflight asks; never a measured prompt."""
READ = (
    "The quick brown fox jumps over 13 lazy dogs: def area(r): return 3.14159 * r ** 2. Zwölf "
    "Boxkämpfer jagen Viktor quer über den Sylter Deich. Съешь ещё этих мягких булок. "
    "我能吞下玻璃而不伤身体。"
)
"""What two tokenizers of different models read as different tokens."""
TOKENIZE_AT_ONCE = 8
SPARE_DESCRIPTORS = 64
MOST_DESCRIPTORS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server ready to be measured. `headers` are secret: they never enter a record.

    `tls` is what verifies it (transport.tls_context).
    """

    base_url: str
    engine: Engine
    wire: Wire
    info: ServerInfo
    metrics_url: str | None
    headers: Mapping[str, str]
    tls: ssl.SSLContext | bool = True
    caveats: tuple[Caveat, ...] = ()

    def hidden(self, text: str) -> str:
        """The text without what is secret here, as it may be shown or written down."""
        return hide(text, secrets_of(self.base_url, self.headers))

    def scraper(self, observe: Observer, zero: float) -> Scraper:
        """A Scraper of its metrics page."""
        return Scraper(
            self.metrics_url,
            self.engine,
            observe,
            zero=zero,
            headers=dict(self.headers),
            tls=self.tls,
        )

    def transport(self, **options: Any) -> Transport:
        """A Transport to this server."""
        return Transport(
            self.base_url,
            self.wire,
            headers=dict(self.headers),
            fresh_connections=not self.engine.keeps_alive,
            tls=self.tls,
            **options,
        )


def base_url(url: str) -> str:
    """The server's root: with a scheme, without `/v1` or an API path. UserError: no host."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"'{url}' is no server's URL. Expected http://HOST:PORT or https://HOST.")
    path = re.sub(r"/+(v1(/(chat/)?completions|/models)?/*)?$", "", parts.path)
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def checked_url(url: str, headers: Mapping[str, str]) -> str:
    """The server's root. UserError: no URL, or one with a password beside an API key."""
    root = base_url(url)
    if "@" in urlsplit(root).netloc and any(name.lower() == "authorization" for name in headers):
        raise UserError(
            f"{without_secrets(root)} was given with a password in the URL and with an API key. "
            "Expected one of them: take one away (the key may come from $OPENAI_API_KEY)."
        )
    return root


def without_secrets(url: str) -> str:
    """The URL without user and password, as it may be written down."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


async def identify(
    url: str,
    engines: Mapping[str, Engine],
    *,
    engine: str | None = None,
    model: str | None = None,
    api: Literal["completions", "chat"] = "completions",
    metrics_url: str | None = None,
    headers: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | bool = True,
    config: ServerConfig | None = None,
    gpus: int | None = None,
    any_model: bool = False,
    scraper: Scraper | None = None,
) -> Target:
    """Which engine, model and settings answer at `url`. UserError: what is wrong, what to do.

    `config` is what we launched, if we did: then its speculation is known to be on or off.
    `any_model`: of several the first that the server names, which is its base model (vLLM 0.32).
    `scraper`: reads the metrics page if it is its own, so that what a read drains is in its sums.
    """
    root = checked_url(url, headers or {})
    async with _session(root, headers, tls) as session:
        models = await _models(session, root)
        found = engine_of(engines, engine, models[0].owned_by)
        card = models[0] if any_model and model is None else _model(models, model)
        metrics, samples = await _metrics(
            root, found, metrics_url, dict(headers or {}), tls, scraper
        )
        pages = {path: await _page(session, root + path) for path in found.describe_paths}
    facts = found.describe(pages, samples or {})
    info = _info(without_secrets(root), found, card, facts, config)
    info = msgspec.structs.replace(
        info, api=api, gpus=gpus or info.gpus, honours=Honours(metrics_page=samples is not None)
    )
    return Target(
        base_url=root,
        engine=found,
        wire=found.wires[api],
        info=info,
        metrics_url=metrics if samples is not None else None,
        headers=headers or {},
        tls=tls,
        caveats=(
            *(_page_caveat(metrics) if samples is None else ()),
            *not_as_claimed(facts, config),
        ),
    )


async def _metrics(
    root: str,
    engine: Engine,
    url: str | None,
    headers: dict[str, str],
    tls: ssl.SSLContext | bool,
    known: Scraper | None,
) -> tuple[str | None, dict[str, float] | None]:
    """The metrics page that is there, with its series; the first where it should be, and None."""
    paths = (engine.metrics_path, engine.drained_path)
    places = [url] if url is not None else [root + path for path in paths if path]
    for place in places:
        scraper = known
        if scraper is None or not scraper.reads(place, engine):
            scraper = Scraper(place, engine, lambda _: None, zero=0.0, headers=headers, tls=tls)
        if (samples := await scraper.samples()) is not None:
            return place, samples
    return (places[0] if places else None), None


def _info(
    url: str, engine: Engine, card: _Card, facts: ServerFacts, config: ServerConfig | None
) -> ServerInfo:
    """What the server's pages say, and over them what we know for having launched it."""
    spec = config.spec if config is not None else None
    state = facts.state if config is None else ("on" if spec is not None else "off")
    depth = (spec.draft_depth or spec.draft_tokens) if spec is not None else None
    context = card.max_model_len or (card.meta.n_ctx if card.meta is not None else None)
    return ServerInfo(
        engine=engine.name,
        model=card.id,
        url=url,
        version=facts.version,
        max_model_len=facts.max_model_len or context,
        vocabulary=card.meta.n_vocab if card.meta is not None else None,
        max_running=facts.max_running or (config.max_running if config else None),
        state=state,
        draft_depth=depth or (facts.draft_depth if state != "off" else None),
        spec_reported=facts.spec_reported,
        sampling_defaults=facts.sampling_defaults,
        # The simulator in another engine's dialect is found as that engine.
        simulated=facts.simulated or card.id.startswith("simulated-"),
        verified=engine.verified,
        gpus=config.gpus if config else None,
        config=config,
    )


def not_as_claimed(facts: ServerFacts, config: ServerConfig | None) -> tuple[Caveat, ...]:
    """Speculation as the server reports it against the config that it was started with."""
    if config is None:
        return ()
    spec = config.spec
    claimed = (spec.draft_depth or spec.draft_tokens) if spec is not None else None
    said = ""
    if facts.state != "unknown" and (facts.state == "on") != (spec is not None):
        told = facts.spec_reported or ("speculation is on" if facts.state == "on" else "it is off")
        said = f"the config says {spec.method if spec is not None else 'none'}, the server {told}"
    elif claimed and facts.draft_depth and facts.draft_depth != claimed:
        said = f"the config says k = {claimed}, the server k = {facts.draft_depth}"
    if not said:
        return ()
    return (
        Caveat(
            code="spec-not-as-claimed",
            message=f"Speculation is not what the server was started with: {said}.",
            advice="Read the server's log for why it changed or left out the setting; figures are "
            "of what the server does, whatever the config is called.",
        ),
    )


def _page_caveat(metrics: str | None) -> tuple[Caveat, ...]:
    if metrics is None:
        return ()
    return (
        Caveat(
            code="no-metrics-page",
            message=f"No metrics page at {without_secrets(metrics)}: acceptance cannot be checked "
            "against the server's counters.",
            advice="Start the server with its metrics on, or give --metrics-url.",
        ),
    )


def _session(
    root: str, headers: Mapping[str, str] | None, tls: ssl.SSLContext | bool
) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        headers=dict(headers or {}),
        timeout=aiohttp.ClientTimeout(total=ASK_TIMEOUT_S),
        connector=aiohttp.TCPConnector(force_close=True, ssl=tls),
        proxy=environment_proxy(root),
    )


class _Meta(msgspec.Struct):
    n_ctx: int | None = None
    n_vocab: int | None = None


class _Card(msgspec.Struct):
    """One model of /v1/models; `meta` is llama.cpp's, `max_model_len` vLLM's and SGLang's."""

    id: str
    owned_by: str | None = None
    max_model_len: int | None = None
    meta: _Meta | None = None


class _Models(msgspec.Struct):
    data: tuple[_Card, ...]


async def _models(session: aiohttp.ClientSession, root: str) -> tuple[_Card, ...]:
    where, secrets = without_secrets(root), secrets_of(root, session.headers)
    try:
        async with session.get(root + "/v1/models") as response:
            status, body = response.status, await bounded(response, PAGE_BYTES)
    except aiohttp.ClientSSLError as fault:
        raise UserError(
            f"{where} does not pass for whom it claims to be: {str(fault)[:200]}. Give its "
            "authority with --ca-file, and --client-cert if it asks who you are."
        ) from None
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as fault:
        said = hide(str(fault) or type(fault).__name__, secrets)
        raise UserError(
            f"no server answers at {where}: {said[:200]}. Expected an OpenAI-compatible server; "
            "check host and port, and that the server has finished starting."
        ) from None
    if status == 503:
        raise UserError(
            f"the server at {where} is still loading (HTTP 503: "
            f"{hide(refusal(body), secrets)[:120]}). "
            "Wait until it is ready and try again."
        )
    if status in (401, 403):
        raise UserError(
            f"the server at {where} refuses us (HTTP {status}). Give its key in the environment "
            "variable OPENAI_API_KEY or with --api-key-file."
        )
    cards: tuple[_Card, ...] = ()
    if status == 200:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            cards = msgspec.json.decode(body, type=_Models).data
    if not cards:
        raise UserError(
            f"{where}/v1/models answered HTTP {status} and no list of models. Expected an "
            "OpenAI-compatible server's root URL, with or without /v1."
        )
    return cards


def engine_of(engines: Mapping[str, Engine], name: str | None, owner: str | None = None) -> Engine:
    """The engine of that name, else the one whose models are `owner`'s. UserError: unknown."""
    if name is not None:
        if name not in engines:
            known = ", ".join(sorted(engines))
            raise UserError(
                f"unknown engine '{name}'{nearest(name, engines) or '.'} Known: {known}."
            )
        return engines[name]
    return next((e for e in engines.values() if owner in e.owned_by), None) or engines["openai"]


def _model(models: Sequence[_Card], name: str | None) -> _Card:
    ids = [m.id for m in models]
    if name is None:
        if len(ids) > 1:
            raise UserError(
                f"the server has {len(ids)} models: {', '.join(ids[:8])}. Say which with --model."
            )
        return models[0]
    if name not in ids:
        raise UserError(
            f"the server has no model '{name}'{nearest(name, ids) or '.'} "
            f"It has: {', '.join(ids[:8])}."
        )
    return models[ids.index(name)]


async def _page(session: aiohttp.ClientSession, url: str) -> Any:
    """A JSON page of the engine, or None: not every version has every page."""
    try:
        async with session.get(url) as response:
            if response.status != 200:
                return None
            return json.loads(await bounded(response, PAGE_BYTES))
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return None


# ── tokenizer ────────────────────────────────────────────────────────────────────────────────────


class Local:
    """A local tokenizer off the event loop (fast tokenizers let go of the GIL): a Tokenize.

    `known` says whether the server was seen to read a text as the same tokens; None: not asked, or
    it could not tell.
    """

    def __init__(self, local: LocalTokenizer, known: bool | None = None) -> None:
        self.local = local
        self.known = known

    async def __call__(self, messages: tuple[Message, ...]) -> U32:
        return await asyncio.to_thread(self.local, messages)


async def tokenizer(
    target: Target,
    name: str | None,
    templating: Templating | None = None,
    *,
    cache: Path | None = None,
    check: bool = True,
) -> Tokenize:
    """`--tokenizer`, else the server's own, else the served model's id as a local tokenizer.

    `cache`: where a local one keeps ids. UserError: none of them works, or (`check`) the server
    reads other tokens than the local one does.
    """
    templating = Templating() if templating is None else templating
    if name is None:
        asked = await _server_tokenizer(target, templating)
        if asked is not None:
            return asked
    local = LocalTokenizer(name or target.info.model, templating, cache)
    try:
        ours = await asyncio.to_thread(local.plain, READ)
    except UserError as fault:
        if name is not None:
            raise
        raise UserError(
            f"no tokenizer for '{target.info.model}': the server has no /tokenize of a known kind, "
            f"and {fault}"
        ) from None
    known = await _reads_alike(target, ours) if check else None
    if known is False:
        raise UserError(
            f"the tokenizer at '{local.name}' is not that of '{target.info.model}': a text that "
            f"it reads as {len(ours)} tokens the server reads as others. Expected the served "
            "model's; give another --tokenizer, or --any-tokenizer to go on all the same."
        )
    return Local(local, known)


async def _reads_alike(target: Target, ours: U32) -> bool | None:
    """Whether the server reads READ as these ids; None: it tells neither ids nor their number."""
    text = (Message(role="user", content=READ),)
    asked = await _server_tokenizer(target, Templating(apply=False))
    if asked is not None:
        with contextlib.suppress(ServerError):
            return await asked(text) == ours
    body = {"model": target.info.model, "prompt": READ, "max_tokens": 1}
    async with _session(target.base_url, target.headers, target.tls) as session:
        try:
            usage = (await _poster(target, session)("/v1/completions", body))["usage"]
            # A server may put a BOS before a text that is not templated.
            return usage["prompt_tokens"] in (len(ours), len(ours) + 1)
        except (ServerError, aiohttp.ClientError, OSError, ValueError, TypeError, KeyError):
            return None


def unchecked(tokenize: Tokenize | None) -> tuple[Caveat, ...]:
    """A caveat where nobody knows whether the local tokenizer is the served model's."""
    if not isinstance(tokenize, Local) or tokenize.known:
        return ()
    return (
        Caveat(
            code="tokenizer-unchecked",
            message="Prompts were tokenized here, and it was not checked that the served model's "
            "tokenizer is the same: with another one the model read noise.",
            advice="Run without --any-tokenizer and --no-preflight, or read a few answers.",
        ),
    )


async def _server_tokenizer(target: Target, templating: Templating) -> Tokenize | None:
    """The first dialect that turns a conversation into ids."""
    for dialect in (_vllm_tokenize, _llamacpp_tokenize):
        ask = _asker(target, dialect, templating)
        try:
            if len(await ask(PROBE)) > 1:
                return ask
        except ServerError:
            continue
    return None


_Post = Callable[[str, dict[str, Any]], Any]


def _poster(target: Target, session: aiohttp.ClientSession) -> _Post:
    async def post(path: str, body: dict[str, Any]) -> Any:
        async with session.post(target.base_url + path, json=body) as response:
            data = await bounded(response, PAGE_BYTES)
            if response.status != 200:
                said = target.hidden(refusal(data))
                raise ServerError(f"{path} answered HTTP {response.status}: {said}")
            return json.loads(data)

    return post


def _asker(target: Target, dialect: Callable[..., Any], templating: Templating) -> Tokenize:
    async def tokenize(messages: tuple[Message, ...]) -> U32:
        async with _session(target.base_url, target.headers, target.tls) as session:
            try:
                post = _poster(target, session)
                ids = await dialect(post, target.info.model, messages, templating)
                return array("I", ids)
            except (aiohttp.ClientError, OSError, TimeoutError) as fault:
                raise ServerError(f"the server's tokenizer failed: {fault!r}.") from None
            except (ValueError, TypeError, KeyError, OverflowError) as fault:
                raise ServerError(
                    f"the server's tokenizer said something else: {fault!r}."
                ) from None

    return tokenize


def _conversation(messages: tuple[Message, ...], templating: Templating) -> dict[str, Any]:
    """Messages, and what is for their template: the same words in vLLM (0.32, read in its source)
    and llama.cpp (its documentation; not seen on a live server)."""
    body: dict[str, Any] = {"messages": [{"role": m.role, "content": m.content} for m in messages]}
    return body | ({"chat_template_kwargs": templating.args} if templating.args else {})


async def _vllm_tokenize(
    post: _Post, model: str, messages: tuple[Message, ...], templating: Templating
) -> Any:
    """vLLM 0.32: /tokenize applies the template itself, or takes a plain text."""
    if templating.apply:
        body = _conversation(messages, templating) | {"add_generation_prompt": True}
    else:
        body = {"prompt": plain_text(messages), "add_special_tokens": False}
    return (await post("/tokenize", body | {"model": model}))["tokens"]


async def _llamacpp_tokenize(
    post: _Post, model: str, messages: tuple[Message, ...], templating: Templating
) -> Any:
    """llama.cpp b11434: /apply-template renders, /tokenize reads the special tokens in it.

    The template writes its own BOS, so none is added.
    """
    del model
    text = plain_text(messages)
    if templating.apply:
        text = (await post("/apply-template", _conversation(messages, templating)))["prompt"]
    body = {"content": text, "add_special": False, "parse_special": True}
    return (await post("/tokenize", body))["tokens"]


async def tokenized(
    prompts: Sequence[Prompt], tokenize: Tokenize, done: Callable[[int], None] = lambda count: None
) -> tuple[Prompt, ...]:
    """The prompts with the ids of their first turn; those that brought ids are left alone.

    done(n) as n are there. UserError: a prompt of no tokens.
    """
    texts = [prompt for prompt in prompts if prompt.prompt_token_ids is None]
    if isinstance(tokenize, Local):
        rows = await _made(texts, tokenize.local, done)
    else:
        rows = await _asked_for(texts, tokenize, done)
    ids = iter(rows)
    ready = [
        prompt
        if prompt.prompt_token_ids is not None
        else msgspec.structs.replace(prompt, prompt_token_ids=next(ids))
        for prompt in prompts
    ]
    for prompt in ready:
        if not prompt.prompt_token_ids:
            raise UserError(f"prompt {prompt.prompt_id} has no tokens. Give it a text.")
    return tuple(ready)


async def _made(
    prompts: Sequence[Prompt], local: LocalTokenizer, done: Callable[[int], None]
) -> list[U32]:
    """A local tokenizer's ids of each, all at once."""
    over = threading.Event()

    def told(count: int) -> None:
        if over.is_set():
            raise InterruptedError  # Ctrl-C ends no thread, and the process would wait for it
        done(count)

    try:
        rows = await asyncio.to_thread(local.many, [p.messages for p in prompts], told)
    finally:
        over.set()
    if any(p.later_turns for p in prompts):
        await asyncio.to_thread(lambda: local.loaded)  # now, and not beside the first streams
    return rows


async def _asked_for(
    prompts: Sequence[Prompt], tokenize: Tokenize, done: Callable[[int], None]
) -> list[U32]:
    """The server's ids of each, a few requests at once."""
    gate = asyncio.Semaphore(TOKENIZE_AT_ONCE)
    count = 0

    async def one(prompt: Prompt) -> U32:
        nonlocal count
        async with gate:
            ids = await tokenize(prompt.messages)
        count += 1
        done(count)
        return ids

    return await asyncio.gather(*(one(p) for p in prompts))


async def with_texts(
    target: Target, name: str | None, prompts: Sequence[Prompt]
) -> tuple[Prompt, ...]:
    """The prompts with what their ids say: by `--tokenizer`, else the server's /detokenize.

    vLLM 0.32 and llama.cpp b11434 have it; where the server has none, the prompts as they are.
    """
    if name is not None:
        own = LocalTokenizer(name, Templating(apply=False))
        return tuple(
            msgspec.structs.replace(p, text=own.decode(p.prompt_token_ids or ())) for p in prompts
        )
    gate = asyncio.Semaphore(TOKENIZE_AT_ONCE)
    async with _session(target.base_url, target.headers, target.tls) as session:

        async def one(prompt: Prompt) -> Prompt:
            body = {"model": target.info.model, "tokens": list(prompt.prompt_token_ids or ())}
            async with gate, session.post(target.base_url + "/detokenize", json=body) as response:
                said = json.loads(await bounded(response, PAGE_BYTES))
            text = said.get("prompt", said.get("content"))
            return msgspec.structs.replace(prompt, text=text if isinstance(text, str) else None)

        try:
            return tuple(await asyncio.gather(*(one(p) for p in prompts)))
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, AttributeError):
            return tuple(prompts)


# ── probe ────────────────────────────────────────────────────────────────────────────────────────


async def probe(
    target: Target, ids: U32 | None, template_args: Mapping[str, Any] | None = None
) -> Target:
    """One short request; the target with what it honoured. UserError: it would ruin the run.

    `ids`: a prompt that is not measured (completions API); None sends messages (chat API), with
    `template_args` for the server's template. Where the engine has a second way to send ids, it is
    asked too if the first does not tell all, and taken if it tells more.
    """
    found = await _probed(target, ids, template_args)
    if found.info.spec_reported is not None or found.info.state == "off":
        return found
    async with _session(found.base_url, found.headers, found.tls) as session:
        paths = found.engine.describe_paths
        pages = {path: await _page(session, found.base_url + path) for path in paths}
    told = found.engine.describe(pages, {}).spec_reported  # llama.cpp tells it after a request
    return replace(found, info=msgspec.structs.replace(found.info, spec_reported=told))


async def _probed(
    target: Target, ids: U32 | None, template_args: Mapping[str, Any] | None
) -> Target:
    found = await _asked(target, ids, template_args)
    honours = found.info.honours
    told = honours.per_request_acceptance or target.info.state == "off"
    if ids is None or "generate" not in target.engine.wires or (honours.ids_in_chunks and told):
        return found
    with contextlib.suppress(UserError):
        other = await _asked(replace(target, wire=target.engine.wires["generate"]), ids)
        if _tells(other.info.honours) > _tells(honours):
            chosen = msgspec.structs.replace(other.info.honours, wire="generate")
            return replace(other, info=msgspec.structs.replace(other.info, honours=chosen))
    return found


def _tells(honours: Honours) -> int:
    return honours.ids_in_chunks + honours.per_request_acceptance


def categories_apart(target: Target) -> tuple[Caveat, ...]:
    """What is to be said where categories must run one after another; () where they need not.

    Needed where the server tells no request's steps, neither in figures nor by a chunk a step, but
    counts drafts or steps over all requests (DESIGN §5).
    """
    info, honours = target.info, target.info.honours
    by_chunks = target.engine.chunk_is_step and (honours.ids_in_chunks or honours.continuous_usage)
    told = honours.per_request_acceptance or honours.chunk_timings or by_chunks
    counted = honours.metrics_page and target.engine.metrics_path is not None
    if told or not counted or info.state == "off":
        return ()
    return (
        Caveat(
            code="categories-apart",
            message="This server tells no request's acceptance, only its counters over all: the "
            "categories ran one after another, so that each has its own.",
            advice="Throughput, latency and acceptance length are those of one category at a time, "
            "not of a mixed batch. Turn per-request figures on for that (vLLM "
            "--per-request-spec-decode-metrics detailed).",
        ),
    )


async def _asked(
    target: Target, ids: U32 | None, template_args: Mapping[str, Any] | None = None
) -> Target:
    request = Request(
        request_id="preflight",
        phase="preflight",
        dialogue=Dialogue(dialogue_id="preflight", prompt=PROBED),
        turn=0,
        max_output_tokens=PROBE_OUTPUT_TOKENS,
        prompt_token_ids=ids,
        messages=PROBE,
        template_args=dict(template_args or {}),
    )
    body = target.wire.encode(request, target.info.model, Sampling(max_output_tokens=1))
    async with target.transport(timeout_s=120.0) as transport:
        record, _ = await transport.stream(request, body)
    outcome = record.outcome
    if isinstance(outcome, Refused):
        raise UserError(
            f"the server refuses a short request at {target.wire.path} with HTTP {outcome.status}: "
            f"{outcome.message}. Expected a stream; try --api chat, another --engine, or ids that "
            f"the model has{f' (the greatest was {max(ids)})' if ids else ''}."
        )
    if not isinstance(outcome, Completed):
        raise UserError(
            f"a short request at {target.wire.path} did not complete: {outcome}. Expected a stream "
            "that ends; read the server's log."
        )
    if ids is not None and record.isl_tokens != len(ids):
        raise UserError(
            f"the server counted {record.isl_tokens} prompt tokens where {len(ids)} ids were sent: "
            "it does not take token ids as they are. Use --api chat (then the server templates)."
        )
    source = record.token_count_source
    honours = Honours(
        token_id_prompts=True if ids is not None else None,
        ids_in_chunks=source == "ids",
        continuous_usage=source == "continuous_usage",
        chunk_timings=record.step_tokens is not None,
        per_request_acceptance=record.spec is not None,
        metrics_page=target.info.honours.metrics_page,
    )
    info = msgspec.structs.replace(target.info, honours=honours)
    return replace(target, info=info, caveats=(*target.caveats, *_count_caveat(source)))


def _count_caveat(source: str | None) -> tuple[Caveat, ...]:
    if source != "final_usage":
        return ()
    return (
        Caveat(
            code="chunk-tokens-unknown",
            message="The server does not say how many tokens a chunk holds: TPOT, steady "
            "throughput and acceptance from chunks are not known.",
            advice="Use an engine and version that honours stream_options.continuous_usage_stats "
            "or return_token_ids.",
        ),
    )


def fitting(
    prompts: Sequence[Prompt], info: ServerInfo, cap: int, *, skip: bool = False
) -> tuple[tuple[Prompt, ...], tuple[Caveat, ...]]:
    """The prompts that, with their output limit, fit the context; a caveat where some do not.

    Of later turns only the server can tell. UserError: some do not fit (servers shorten answers
    silently), unless they may be left out (`skip`) and others remain.
    """
    limit = info.max_model_len
    needs = [
        0 if p.prompt_token_ids is None else len(p.prompt_token_ids) + (p.max_output_tokens or cap)
        for p in prompts
    ]
    if limit is None or max(needs, default=0) <= limit:
        return tuple(prompts), ()
    long = [p for p, need in zip(prompts, needs, strict=True) if need > limit]
    said = (
        f"{len(long)} of {len(prompts)} prompts do not fit: with their output limit they need up "
        f"to {max(needs):,} tokens, and the server's context has {limit:,}"
    )
    if not skip or len(long) == len(prompts):
        raise UserError(
            f"{said}; it would shorten the answers silently. Lower --max-output-tokens (now {cap}),"
            " start the server with a larger context, or leave such prompts out with "
            "--skip-too-long."
        )
    by_category = Counter(p.category for p in long).most_common()
    which = ", ".join(f"{count} {category}" for category, count in by_category)
    caveat = Caveat(
        code="prompts-skipped",
        message=f"{said}: they were left out ({which}).",
        advice="Compare only with runs that left out the same; a larger context keeps them.",
    )
    kept = tuple(p for p, need in zip(prompts, needs, strict=True) if need <= limit)
    return kept, (caveat,)


def check_vocabulary(prompts: Sequence[Prompt], info: ServerInfo) -> None:
    """UserError: a token id that the model does not have, where the server tells how many it has.

    Where it does not, the probe holds the greatest id, and the server refuses it (vLLM 0.32).
    """
    if info.vocabulary is None:
        return
    for prompt in prompts:
        greatest = max(prompt.prompt_token_ids or (0,))
        if greatest >= info.vocabulary:
            raise UserError(
                f"prompt {prompt.prompt_id} holds token id {greatest}, and the model has the ids 0 "
                f"to {info.vocabulary - 1}. Expected ids of '{info.model}': tokenize the prompts "
                "with its tokenizer, or give texts."
            )


def probe_ids(prompts: Sequence[Prompt]) -> U32:
    """A prompt that is not measured, of ids that users gave: some of the first, and the greatest.

    UserError: there is none.
    """
    rows = [p.prompt_token_ids for p in prompts if p.prompt_token_ids]
    if not rows:
        raise UserError("no prompt has a token. Expected texts, or at least one id a prompt.")
    return array("I", [*rows[0][:64][::-1], max(map(max, rows))])


def check_descriptors(concurrency: int | None) -> None:
    """Raise the soft limit on open files as far as needed; None: as far as it goes, for a load
    without a bound. UserError: the hard limit is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if concurrency is None:
        needed = hard if 0 < hard < MOST_DESCRIPTORS else MOST_DESCRIPTORS
    else:
        needed = concurrency + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(
                f"concurrency {concurrency} needs {needed} open files, and the limit is {hard}. "
                f"Raise it (ulimit -n {needed}) or lower the concurrency."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
