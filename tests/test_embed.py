"""/v1/embeddings against a server on 127.0.0.1: order, batches, and what can go wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadgen import embed
from loadgen.errors import ServerError, UserError

KEY = {"Authorization": "Bearer sk-secret"}


class Fake:
    """Embeds a text as (length, 1), answers in reverse, remembers what it was sent."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.reply: web.Response | None = None
        self.url = ""

    async def post(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers.get("Authorization"))
        rows = [{"index": i, "embedding": [len(t), 1]} for i, t in enumerate(body["input"])]
        return self.reply or web.json_response({"data": rows[::-1], "model": "m"})


@pytest.fixture
async def fake() -> AsyncIterator[Fake]:
    made, app = Fake(), web.Application()
    app.router.add_post("/v1/embeddings", made.post)
    async with TestServer(app) as server:
        made.url = str(server.make_url(""))
        yield made


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/", "/v1/embeddings"])
def test_endpoint(tail: str) -> None:
    assert embed.endpoint(f"https://host:1/base{tail}") == "https://host:1/base/v1/embeddings"


async def test_vectors_come_in_the_order_of_the_texts(fake: Fake) -> None:
    texts = ["x" * n for n in range(2 * embed.BATCH + 5)]
    vectors = await embed.embedded(fake.url, texts, model="m", headers=KEY)
    assert vectors == [[float(n), 1.0] for n in range(len(texts))]
    assert sorted(len(body["input"]) for body in fake.bodies) == [5, embed.BATCH, embed.BATCH]
    assert {body["model"] for body in fake.bodies} == {"m"}
    assert fake.keys == {"Bearer sk-secret"}


async def test_without_a_model_the_server_chooses(fake: Fake) -> None:
    await embed.embedded(fake.url, ["a"])
    assert "model" not in fake.bodies[0]
    assert fake.keys == {None}


async def test_a_refusal_is_passed_on_without_the_key(fake: Fake) -> None:
    fake.reply = web.json_response({"error": {"message": "bad key sk-secret"}}, status=401)
    with pytest.raises(ServerError, match="401: bad key") as caught:
        await embed.embedded(fake.url, ["a"], headers=KEY)
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [b"not json", b"[]", b'{"data": []}', b'{"data": [{"index": 1, "embedding": [1]}]}',
     b'{"data": [{"index": 0, "embedding": "AAAA"}]}', b'{"data": [{"index": 0}]}'],
)  # fmt: skip
def test_another_answer_is_no_vector(answer: bytes) -> None:
    with pytest.raises(ServerError, match="not what OpenAI's is"):
        embed.vectors(answer, 1)


async def test_no_server_there(unused_tcp_port: int) -> None:
    with pytest.raises(UserError, match="no embeddings server at"):
        await embed.embedded(f"http://127.0.0.1:{unused_tcp_port}", ["a"])
