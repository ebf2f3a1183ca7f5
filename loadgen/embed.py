"""Texts → vectors from any server that speaks OpenAI's `/v1/embeddings`.

Batches go out a few at a time and come back in the order of the texts. Nothing here is timed. Must
not: know what the vectors are for, keep them, write down a key.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from loadgen.errors import ServerError, UserError
from loadgen.transport import bounded, environment_proxy, refusal, secrets_of
from loadgen.written import hide

BATCH = 32
IN_FLIGHT = 4
TIMEOUT_S = 300.0
MAX_BODY_BYTES = 64 << 20


def endpoint(url: str) -> str:
    """The address of the embeddings of a server given with or without /v1/embeddings."""
    root = url.rstrip("/").removesuffix("/embeddings").removesuffix("/v1")
    return f"{root}/v1/embeddings"


async def embedded(
    url: str,
    texts: Sequence[str],
    *,
    model: str | None = None,
    headers: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | bool = True,
) -> list[list[float]]:
    """A vector a text, in order. `model` None leaves the choice to the server.

    UserError: no such server. ServerError: it refused, broke off, or answered something else.
    """
    where, secrets = endpoint(url), secrets_of(url, headers or {})
    turn = asyncio.Semaphore(IN_FLIGHT)

    async def ask(batch: Sequence[str]) -> list[list[float]]:
        body: dict[str, Any] = {"input": list(batch), "encoding_format": "float"}
        if model is not None:
            body["model"] = model
        async with turn, session.post(where, json=body) as response:
            answer = await bounded(response, MAX_BODY_BYTES)
        if response.status != 200:
            raise ServerError(
                f"{where} answered {response.status}: {refusal(answer)}. Expected embeddings of "
                f"{len(batch)} texts; is it an embedding model, does it need --model or a key?"
            )
        return vectors(answer, len(batch))

    try:
        async with aiohttp.ClientSession(
            headers=dict(headers or {}),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            connector=aiohttp.TCPConnector(ssl=tls),
            proxy=environment_proxy(where),
        ) as session:
            batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
            answers = await asyncio.gather(*map(ask, batches))
    except ServerError as fault:
        raise ServerError(hide(str(fault), secrets)) from None
    except (aiohttp.InvalidURL, aiohttp.ClientConnectorError) as fault:
        raise UserError(hide(f"no embeddings server at {where}: {fault}.", secrets)) from None
    except (aiohttp.ClientError, OSError, TimeoutError) as fault:
        said = f"{where} broke off: {type(fault).__name__} {fault}".strip()
        raise ServerError(hide(f"{said}.", secrets)) from None
    return [vector for answer in answers for vector in answer]


def vectors(answer: bytes, count: int) -> list[list[float]]:
    """The vectors of one answer by their `index`. ServerError: not `count` of them, or no such."""
    try:
        rows = json.loads(answer)["data"]
        found = {int(row["index"]): [float(v) for v in row["embedding"]] for row in rows}
        return [found[i] for i in range(count)]
    except (ValueError, KeyError, TypeError) as fault:
        raise ServerError(
            f"an answer to /v1/embeddings is not what OpenAI's is: {type(fault).__name__} {fault}. "
            f"Expected data with {count} items, each with index and embedding."
        ) from None
