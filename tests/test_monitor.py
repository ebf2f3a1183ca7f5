"""The monitor against simulated servers, a server that restarts, and servers from hell."""

from __future__ import annotations

import asyncio
import gc
import gzip
import io
import itertools
import shutil
import signal
import subprocess
import sys
import urllib.request
from array import array
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from loadgen.cli import _engines, app
from loadgen.errors import UserError
from loadgen.measure import Attach
from loadgen.monitor import Canary, Event, Server, growth, in_rotation, kept, monitor, went_back
from loadgen.scrape import MAX_PAGE_BYTES
from loadgen.types import (
    Completed,
    Probed,
    Prompt,
    Reading,
    Sampling,
    Scenario,
    ServerInfo,
    ServerLoad,
    SpecCounters,
)
from reports.monitor_live import MonitorLive
from reports.monitor_page import MonitorPage
from reports.prometheus import MOST_POSITIONS
from tests.hostile import listening
from tests.records import record
from tests.test_cli import environment
from tests.test_scrape import answer
from tests.test_simulator import Simulated, prompts, request, running

ENGINES = _engines()

# ── servers to watch ─────────────────────────────────────────────────────────────────────────────


def page(n: int, *, more: str = "") -> bytes:
    """vLLM's counters after n rounds: 10 drafts of 3 tokens, 15 accepted, 27 tokens, a request."""
    rows = {
        "vllm:spec_decode_num_drafts_total": 10 * n,
        "vllm:spec_decode_num_draft_tokens_total": 30 * n,
        "vllm:spec_decode_num_accepted_tokens_total": 15 * n,
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"}': 10 * n,
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="1"}': 5 * n,
        "vllm:generation_tokens_total": 27 * n,
        "vllm:request_success_total": n,
        "vllm:num_requests_running": 2,
    }
    return ("".join(f"{name} {value}\n" for name, value in rows.items()) + more).encode()


GONE = answer(b"", status="404 Not Found")
BROKEN = answer(b"oops", status="500 Oops")


class Deployed:
    """A vLLM whose pages are the test's: path → bytes of an HTTP answer; None never answers. `once`
    are answers that come first, each once."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.answers: dict[str, bytes | None] = {}
        self.once: dict[str, list[bytes]] = {}
        self.is_model("m")
        self.shows(b'{"version": "0.32.0"}', "/version")
        self.shows(page(1))

    def is_model(self, name: str, *, owner: str = "vllm") -> None:
        card = {"id": name, "owned_by": owner}
        self.answers["/v1/models"] = answer(msgspec.json.encode({"data": [card]}))

    def shows(self, text: bytes, path: str = "/metrics") -> None:
        self.answers[path] = answer(text)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        self.asked[path] += 1
        first = self.once.get(path)
        sent = first.pop(0) if first else self.answers.get(path, GONE)
        if sent is None:
            await reader.read()
        else:
            writer.write(sent)
            await writer.drain()
        writer.close()


@asynccontextmanager
async def deployed() -> AsyncIterator[tuple[Deployed, Server]]:
    """A server, and the monitor's side of it."""
    it = Deployed()
    async with listening(it.serve) as url:
        yield it, Server(url, Attach(), ENGINES)


class Shown:
    """A MonitorPage, read back: (family, labels …) → value, over series that have those labels."""

    def __init__(self) -> None:
        self.page = MonitorPage("r1", self.show)
        self.text = ""

    def show(self, text: bytes) -> None:
        self.text = text.decode()

    def __call__(self, event: Event) -> None:
        self.page(event)

    def get(self, name: str, **labels: str) -> float | None:
        found = [
            sample.value
            for family in text_string_to_metric_families(self.text)
            for sample in family.samples
            if sample.name == f"draftload_{name}" and labels.items() <= sample.labels.items()
        ]
        return sum(found) if found else None

    def labels(self, name: str) -> dict[str, str]:
        (sample,) = (
            sample
            for family in text_string_to_metric_families(self.text)
            for sample in family.samples
            if sample.name == f"draftload_{name}"
        )
        return dict(sample.labels)


# ── what simulated servers really did ────────────────────────────────────────────────────────────


async def worked(server: Simulated, one: Server, count: int) -> None:
    """`count` requests to it, all at once."""
    target = one.target
    assert target is not None
    async with target.transport() as transport:
        bodies = [
            (r, target.wire.encode(r, target.info.model, Sampling()))
            for r in (request(ids, 40) for ids in prompts(count))
        ]
        done = await asyncio.gather(*(transport.stream(*body) for body in bodies))
    assert {type(record.outcome) for record, _ in done} == {Completed}


@pytest.mark.parametrize(
    ("dialect", "engine", "path"),
    [
        ("vllm", "simulated", None),
        ("sglang", "sglang", None),
        ("trtllm", "trtllm", None),
        ("trtllm", "trtllm", "/metrics"),
        ("llamacpp", "llamacpp", None),
    ],
)
async def test_acceptance_over_a_window_is_what_really_happened(
    dialect: str, engine: str, path: str | None
) -> None:
    """AL where decode steps are told, AL where drafted elsewhere, of this window and no other."""
    shown = Shown()
    async with running("eagle3", dialect=dialect) as server:
        page_url = None if path is None else server.url + path
        one = Server(server.url, Attach(metrics_url=page_url), ENGINES)
        await one.read()
        await worked(server, one, 8)
        for _ in range(2):  # one that drafted is asked again whether it speculates
            shown(await one.read())
        before = (await server.get("/truth"))["overall"]
        counted = {n: shown.get(f"{n}_total") or 0 for n in ("drafts", "accepted_tokens")}
        steps, tokens = (shown.get(f"decode_{n}_total") or 0 for n in ("steps", "tokens"))
        await worked(server, one, 16)
        reading = await one.read()
        truth = (await server.get("/truth"))["overall"]
    shown(reading)
    assert reading.result == "ok"
    assert reading.info is not None
    assert reading.info.engine == engine
    assert one.drains == (path == "/metrics")

    def grew(name: str) -> int:
        return int(truth[name] - before[name])

    if dialect == "sglang":
        assert (shown.get("decode_steps_total") or 0) - steps == grew("steps")
        decoded = grew("generated_tokens") - grew("requests")
        assert (shown.get("decode_tokens_total") or 0) - tokens == decoded
        assert shown.get("drafts_total") is None, "it tells no drafts, and none are made up"
        assert shown.get("server_acceptance_length") == pytest.approx(
            truth["acceptance_length"], rel=0.3
        )
    else:
        for name in counted:
            assert (shown.get(f"{name}_total") or 0) - counted[name] == grew(name)
        at = [shown.get("accepted_tokens_at_position_total", position=str(j)) for j in (1, 2, 3)]
        assert path == "/metrics" or [a or 0 for a in at] == truth["accepted_by_position"]
        assert shown.get("decode_steps_total") is None, "its page tells no steps"
        assert shown.get("server_acceptance_length") is None
    if path != "/metrics":
        assert shown.get("output_tokens_total") == truth["generated_tokens"]


async def test_without_speculation_there_is_no_acceptance() -> None:
    """Not even the zeros that a server shows of it."""
    for dialect in ("vllm", "sglang", "trtllm", "llamacpp"):
        shown = Shown()
        async with running(dialect=dialect) as server:
            one = Server(server.url, Attach(), ENGINES)
            await one.read()
            await worked(server, one, 4)
            shown(await one.read())
            shown(await one.read())
        assert shown.get("output_tokens_total"), dialect
        for name in ("drafts", "decode_steps", "accepted_tokens", "draft_tokens"):
            assert shown.get(f"{name}_total") is None, (dialect, name)


# ── counters that go on, and back ────────────────────────────────────────────────────────────────

COUNTS = st.none() | st.integers(0, 50)
ROWS = st.none() | st.lists(st.integers(0, 50), max_size=4).map(tuple)
COUNTERS = st.builds(
    SpecCounters,
    **dict.fromkeys(("steps", "drafts", "accepted_tokens", "requests"), COUNTS),
    accepted_by_position=ROWS,
)
FAULTS = st.sampled_from(("", "/metrics", "/version", "/v1/models"))
LIVES = st.lists(st.lists(st.tuples(st.integers(0, 9), FAULTS), max_size=4), max_size=3)


def increase(counts: list[int]) -> int:
    """Prometheus': what was added, and all of a count that is lower than the one before."""
    return sum(b - a if b >= a else b for a, b in itertools.pairwise(counts))


@given(LIVES)
async def test_growth_adds_up_to_what_prometheus_would_say(
    lives: list[list[tuple[int, str]]],
) -> None:
    """Two restarts at most, and faults of any page that a scrape or an identification reads."""
    async with deployed() as (it, one):
        seen, total = [1], 0
        assert (await one.read()).result == "ok"
        sound = dict(it.answers)
        for life in lives:
            n = seen[-1] if life is lives[0] else 0
            for more, fault in life:
                n += more
                it.answers = dict(sound)
                it.shows(page(n))
                if fault:
                    it.answers[fault] = BROKEN
                reading = await one.read()
                seen += [n] * (reading.result == "ok")
                assert (reading.grown is None) == (reading.result != "ok")
                total += (reading.grown and reading.grown.drafts) or 0
        assert total == 10 * increase(seen)


@given(st.lists(COUNTERS, min_size=1, max_size=8))
def test_growth_of_counters_that_come_and_go(seen: list[SpecCounters]) -> None:
    """None where there is none, and never below zero."""
    before = SpecCounters()
    for now in seen:
        since = SpecCounters() if went_back(before, now) else before
        grown = growth(since, now)
        assert (grown.drafts is None) == (now.drafts is None)
        assert (grown.drafts or 0) >= 0
        before = kept(since, now)


@pytest.mark.parametrize("path", ["/version", "/metrics"])
async def test_a_page_that_fails_when_it_is_asked_anew_makes_no_other_server(path: str) -> None:
    async with deployed() as (it, one):
        shown = Shown()
        labels = []
        for n in range(1, 9):
            it.shows(page(n))
            if n in (3, 6):
                it.answers["/metrics"] = GONE  # so that it is asked anew who it is
            if n == 4:
                it.once[path] = [BROKEN] * 2  # it asks twice where it doubts the first answer
            shown(await one.read())
            labels.append(shown.labels("scrape_up"))
        assert shown.get("server_restarts_total") == 0
        assert shown.get("drafts_total") == 70
        assert labels == labels[:1] * 8
        assert one.target is not None
        assert one.target.info.version == "0.32.0"


async def test_a_page_that_fails_leaves_what_speculates_known() -> None:
    told = {"speculative_algorithm": "EAGLE3", "speculative_num_draft_tokens": 4, "version": "0.5"}
    async with deployed() as (it, one):
        it.is_model("m", owner="sglang")
        it.shows(msgspec.json.encode(told), "/server_info")
        shown, labels = Shown(), []
        for n in range(1, 6):
            rows = {"spec_verify_calls": 10 * n, "generation_tokens": 27 * n, "num_requests": n}
            it.shows("".join(f"sglang:{k}_total {v}\n" for k, v in rows.items()).encode())
            if n == 2:
                it.answers["/metrics"] = BROKEN
            if n == 3:
                it.once["/server_info"] = [BROKEN] * 2
            shown(await one.read())
            labels.append(shown.labels("scrape_up"))
        assert labels[0]["spec"].startswith("EAGLE3")
        assert labels == labels[:1] * 5
        assert shown.get("decode_steps_total") == 40


async def test_another_version_is_a_restart() -> None:
    async with deployed() as (it, one):
        await one.read()
        it.shows(b'{"version": "0.33.0"}', "/version")
        it.once["/metrics"] = [GONE]
        await one.read()
        it.shows(page(2))
        reading = await one.read()
        assert reading.restarted
        assert reading.grown is not None
        assert reading.grown.drafts == 20


async def test_several_servers_behind_one_url_are_not_counted_and_told_of_once() -> None:
    """Two replicas by turns; then one alone, which is counted again after a while."""
    it, stop, said, shown = Deployed(), asyncio.Event(), list[str](), Shown()
    turns = (9, 9, *(9, 500, 500) * 40, *range(501, 700))
    totals: list[float | None] = []

    def watch(event: Event) -> None:
        shown(event)
        totals.append(shown.get("drafts_total"))
        if len(totals) == 200:
            stop.set()

    async with listening(it.serve) as url:
        it.once["/metrics"] = [answer(page(n)) for n in turns]
        await monitor({url: Attach()}, ENGINES, [watch], stop, said.append, every_s=0.0)
    (line,) = said
    assert line.startswith(f"WARNING: the counters of {url.partition('://')[2]} go back")
    assert "several servers behind one URL: give each replica its own --url" in line
    assert len(set(totals[10:100])) == 1, "nothing is added"
    assert totals[-1] != totals[100], "and it is, once it is steady"
    assert shown.get("server_restarts_total") == 2
    assert shown.get("scrape_up") == 1


async def test_a_fault_of_a_page_that_is_drained_loses_no_row() -> None:
    def rows(n: int) -> bytes:
        drafts = {"numDraftTokens": 3, "numAcceptedTokens": 1, "numRequestsWithDraftTokens": 1}
        return answer(msgspec.json.encode([{"iter": n, "specDecodingStats": drafts}]))

    async with deployed() as (it, one):
        it.is_model("m", owner="tensorrt_llm")
        it.answers["/metrics"] = answer(b"[]")
        it.once["/metrics"] = [rows(1), rows(2), BROKEN, rows(3), rows(4), rows(5)]
        readings = [await one.read() for _ in range(5)]
        assert [r.result for r in readings] == ["ok", "refused", "ok", "ok", "ok"]
        assert not any(r.restarted for r in readings)
        assert sum((r.grown and r.grown.drafts) or 0 for r in readings) == 3


async def test_a_restart_counts_from_zero_and_once() -> None:
    async with deployed() as (it, one):
        shown = Shown()
        for n in (4, 10, 3, 5):
            it.shows(page(n))
            shown(await one.read())
        assert shown.get("drafts_total") == 10 * (6 + 3 + 2)
        assert shown.get("accepted_tokens_at_position_total", position="2") == 5 * (6 + 3 + 2)
        assert shown.get("server_restarts_total") == 1
        assert shown.get("scrapes_total", result="ok") == 4


async def test_a_restart_that_overtook_its_counters_is_seen_by_when_it_began() -> None:
    async with deployed() as (it, one):
        for began, n, grown in ((1, 4, 0), (1, 5, 10), (2, 9, 90), (2, 10, 10)):
            it.shows(page(n, more=f"process_start_time_seconds {began}\n"))
            reading = await one.read()
            assert reading.grown is not None
            assert (reading.grown.drafts, reading.restarted) == (grown, grown == 90)


async def test_another_model_at_the_address_begins_a_page_of_its_own() -> None:
    async with deployed() as (it, one):
        shown = Shown()
        for n in (1, 5):
            it.shows(page(n))
            shown(await one.read())
        it.is_model("other")
        it.shows(page(2))
        shown(await one.read())
        assert shown.labels("drafts_total")["model"] == "other"
        assert shown.get("drafts_total") == 20, "what the other did, and nothing of the first"
        assert shown.get("server_restarts_total") == 1
        assert shown.get("scrapes_total", result="ok") == 3


async def test_another_engine_at_the_address_is_read_where_its_page_is() -> None:
    async with deployed() as (it, one):
        await one.read()
        it.is_model("m", owner="tensorrt_llm")
        del it.answers["/metrics"]
        row = 'trtllm_spec_decode_drafted_tokens_total{token_position="0"} 7\n'
        it.shows(row.encode(), "/prometheus/metrics")
        assert (await one.read()).result == "refused"
        reading = await one.read()
        assert reading.info is not None
        assert reading.info.engine == "trtllm"
        assert reading.grown is not None
        assert reading.grown.drafts == 7


async def test_a_network_fault_loses_nothing() -> None:
    """What was counted while nobody looked is counted; and who is back is asked who it is."""
    async with deployed() as (it, one):
        shown = Shown()
        shown(await one.read())
        it.answers["/metrics"] = b""
        for _ in range(3):
            shown(await one.read())
        assert shown.get("scrape_up") == 0
        assert shown.get("server_requests_running") is None, "it is not known how it stands now"
        assert shown.get("drafts_total") == 0, "a counter does not end"
        it.shows(page(9))
        asked = it.asked["/v1/models"]
        shown(await one.read())
        assert it.asked["/v1/models"] == asked + 1
        assert shown.get("scrape_up") == 1
        assert shown.get("drafts_total") == 80
        assert shown.get("server_restarts_total") == 0
        assert shown.get("scrapes_total") == 5


async def test_a_server_that_was_never_there_is_found_once_it_is() -> None:
    it = Deployed()
    async with listening(it.serve) as url:
        pass
    one, shown = Server(url, Attach(), ENGINES), Shown()
    shown(await one.read())
    assert shown.get("scrape_up", server=one.name) == 0
    async with listening(it.serve, int(url.rpartition(":")[2])):
        shown(await one.read())
    assert shown.get("scrape_up") == 1
    assert shown.labels("scrape_up")["engine"] == "vllm"


# ── pages from hell ──────────────────────────────────────────────────────────────────────────────

ZIPPED = gzip.compress(page(3))
ENCODED = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "result"),
    [
        (answer(b"nope", status="404 Not Found"), "refused"),
        (answer(b"nope", status="500 Oops"), "refused"),
        (answer(b"<html>\n", kind="text/html"), "garbage"),
        (answer(b"\x00\xff{{{\n" * 99), "garbage"),
        (answer(b'{"status": "ok"}\n', kind="application/json"), "garbage"),
        (answer(b"[[[[[[\n"), "garbage"),
        (answer(b""), "garbage"),
        (answer(page(3)[:-9]), "garbage"),
        (answer(page(3).replace(b" 30\n", b" -30\n")), "garbage"),
        (answer(page(3))[:-9], "unreachable"),
        (answer(page(3) + b"# x\n" * (MAX_PAGE_BYTES // 4)), "garbage"),
        (ENCODED % len(ZIPPED) + ZIPPED, "ok"),
        (ENCODED % 99 + ZIPPED[:40] + b"\x00" * 59, "unreachable"),
        (answer(page(3), kind="application/x-protobuf"), "ok"),
        (answer(page(3) + b"".join(b'x{y="%d"} 1\n' % n for n in range(50_000))), "ok"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "unreachable"),
        (b"\x16\x03\x01 no HTTP\r\n\r\n", "unreachable"),
        (b"", "unreachable"),
    ],
    ids=["404", "500", "HTML", "binary", "JSON", "half JSON", "empty", "cut", "negative",
         "truncated", "huge", "gzip", "broken gzip", "content type", "50,000 series", "framing",
         "TLS", "closed"],
)  # fmt: skip
async def test_any_page_is_a_reading_and_the_next_good_one_counts(sent: bytes, result: str) -> None:
    async with deployed() as (it, one):
        assert (await one.read()).result == "ok"
        it.answers["/metrics"] = sent
        reading = await one.read()
        assert reading.result == result, reading.why
        assert bool(reading.why) == (result != "ok")
        assert len(reading.why) <= 300
        it.shows(page(6))
        total = reading.grown.drafts if reading.grown is not None else 0
        reading = await one.read()
        assert reading.result == "ok", reading.why
        assert reading.grown is not None
        assert (reading.grown.drafts or 0) + (total or 0) == 50
        assert not reading.restarted


@given(st.binary(max_size=200), st.binary(max_size=200))
async def test_any_bytes_are_survived(models: bytes, metrics: bytes) -> None:
    async with deployed() as (it, one):
        await one.read()
        it.answers = {"/metrics": answer(metrics), "/v1/models": answer(models)}
        shown = Shown()
        for _ in range(3):
            shown(await one.read())
        assert shown.get("scrapes_total") == 3


async def test_a_server_that_hangs_delays_no_other_and_the_end_not_at_all() -> None:
    hangs, works, stop = Deployed(), Deployed(), asyncio.Event()
    hangs.answers = dict.fromkeys(("/v1/models", "/metrics"))
    seen: Counter[str] = Counter()

    def watch(event: Event) -> None:
        seen[event.server] += 1
        if event.server in good and seen[event.server] >= 5 and hangs.asked:
            stop.set()

    async with listening(hangs.serve) as bad, listening(works.serve) as good:
        servers = {url: Attach() for url in (bad, good)}
        await monitor(servers, ENGINES, [watch], stop, print, every_s=0.0)
    assert list(seen) == [good.partition("://")[2]]
    assert gc.isenabled()


async def test_a_watcher_that_fails_is_dropped_and_the_others_go_on() -> None:
    it, stop, said, seen = Deployed(), asyncio.Event(), deque[str](), 0

    def bad(event: Event) -> None:
        raise KeyError("x")

    def good(event: Event) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            stop.set()

    async with listening(it.serve) as url:
        await monitor({url: Attach()}, ENGINES, [bad, good], stop, said.append, every_s=0.0)
    assert seen >= 3
    assert [line.partition(":")[0] for line in said] == [
        "function failed and shows nothing any more"
    ]


async def test_nowhere_to_say_it_ends_no_monitor() -> None:
    """A full disk, a closed stderr: the terminal's watcher fails, and then telling so does."""
    it, stop, seen = Deployed(), asyncio.Event(), 0

    def bad(event: Event) -> None:
        raise OSError(28, "No space left on device")

    def good(event: Event) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            stop.set()

    def say(line: str) -> None:
        raise OSError(28, "No space left on device")

    async with listening(it.serve) as url:
        await monitor({url: Attach()}, ENGINES, [bad, good], stop, say, every_s=0.0)
    assert seen == 3


async def test_a_page_that_every_read_empties_is_warned_of_once() -> None:
    stop, said, seen = asyncio.Event(), list[str](), 0

    def watch(event: Event) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            stop.set()

    async with running("eagle3", dialect="trtllm") as server:
        servers = {server.url: Attach(metrics_url=server.url + "/metrics")}
        await monitor(servers, ENGINES, [watch], stop, said.append, every_s=0.0)
    (line,) = said
    assert "WARNING" in line
    assert "return_perf_metrics" in line


@pytest.mark.parametrize(
    ("servers", "said"),
    [
        ({"http://h:1": Attach(), "http://h:1/v1": Attach()}, "given twice"),
        ({"ftp://h": Attach()}, "is no server's URL"),
        ({"h": Attach(engine="vlm")}, "did you mean 'vllm'"),
        ({"http://a:b@h": Attach(headers={"Authorization": "x"})}, "with a password"),
    ],
)
async def test_what_cannot_be_watched_is_told_at_once(
    servers: dict[str, Attach], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        await monitor(servers, ENGINES, [], asyncio.Event(), print, every_s=1.0)


# ── the canary ───────────────────────────────────────────────────────────────────────────────────


def prompt(name: str, category: str) -> Prompt:
    ids = array("I", [7, *name.encode(), *range(20)])
    return Prompt(prompt_id=name, category=category, prompt_token_ids=ids)


ASKED = tuple(prompt(f"{c}{n}", c) for c in ("qa", "rag", "math") for n in range(1 + (c == "qa")))


def canary(prompts: tuple[Prompt, ...] = ASKED) -> Canary:
    scenario = Scenario(name="mine", sampling=Sampling(max_output_tokens=30))
    return Canary(scenario=scenario, prompts=prompts, every_s=0.0)


def test_a_canary_goes_round_the_categories() -> None:
    assert [p.prompt_id for p in in_rotation(ASKED)] == ["qa0", "rag0", "math0", "qa1"]


async def probed(url: str, count: int, canary: Canary) -> tuple[Shown, list[Probed], list[str]]:
    """What a monitor shows after so many probes, or three things that it said."""
    shown, stop, said, done = Shown(), asyncio.Event(), list[str](), list[Probed]()

    def watch(event: Event) -> None:
        shown(event)
        if isinstance(event, Probed):
            done.append(event)
            if len(done) == count:
                stop.set()

    def say(line: str) -> None:
        said.append(line)
        stop.set()

    await monitor({url: Attach()}, ENGINES, [watch], stop, say, every_s=0.0, canary=canary)
    return shown, done, said


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "trtllm", "llamacpp"])
async def test_a_canary_tells_acceptance_by_category(dialect: str) -> None:
    async with running("eagle3", dialect=dialect) as server:
        shown, done, said = await probed(server.url, 8, canary())
        most = server.batch.most_running
    assert said == []
    assert most == 1, "never two at once"
    assert [p.record.category for p in done[:4]] == ["qa", "rag", "math", "qa"]
    assert shown.get("requests_total", scenario="mine", category="qa", outcome="completed") == 4
    tokens = sum(p.record.osl_tokens for p in done if p.record.category == "rag")
    assert shown.get("output_tokens_total", scenario="mine", category="rag") == tokens
    if dialect != "trtllm":
        steps = shown.get("decode_steps_total", scenario="mine", category="rag") or 0
        length = (shown.get("decode_tokens_total", scenario="mine", category="rag") or 0) / steps
        assert 1 <= length <= 4


async def test_texts_are_tokenized_before_they_are_sent() -> None:
    text = msgspec.structs.replace(
        ASKED[0], prompt_token_ids=None, messages=(request(array("I", [1]), 1).messages)
    )
    async with running("eagle3") as server:
        _, done, said = await probed(server.url, 2, canary((text,)))
    assert said == []
    assert {type(p.record.outcome) for p in done} == {Completed}
    assert done[0].record.isl_tokens


async def test_a_canary_that_cannot_be_sent_says_why_and_the_scrapes_go_on() -> None:
    it = Deployed()
    async with listening(it.serve) as url:
        shown, done, said = await probed(url, 1, canary())
    assert not done
    assert "was not probed" in said[0]
    assert "404" in said[0]
    assert shown.get("scrape_up") == 1


# ── the page ─────────────────────────────────────────────────────────────────────────────────────

INFO = ServerInfo(engine="vllm", model="m", url="http://h", state="on", draft_depth=3)


def reading(**changes: Any) -> Reading:
    base = Reading(
        server="h:1",
        at_unix_s=1.8e9,
        duration_s=0.01,
        result="ok",
        rss_bytes=5,
        info=INFO,
        grown=SpecCounters(drafts=1, generated_tokens=9),
        load=ServerLoad(running=1, kv_cache_use=0.5),
    )
    return msgspec.structs.replace(base, **changes)


def test_a_page_of_hostile_names_is_bounded_and_read_back() -> None:
    shown = Shown()
    info = msgspec.structs.replace(INFO, model='a"\\\n}' * 999, version="v" * 999)
    grown = SpecCounters(accepted_by_position=tuple(range(1000)))
    for n in range(50):
        changed = msgspec.structs.replace(info, model=f"{n}{info.model}")
        shown(reading(info=changed, grown=grown))
    assert shown.labels("scrape_up")["model"].startswith('49a"\\')
    assert len(shown.text) < 200_000
    at = shown.get("accepted_tokens_at_position_total")
    assert at == sum(range(MOST_POSITIONS))
    assert shown.get("series") == sum(not line.startswith("#") for line in shown.text.splitlines())


def of_canary(*chunks: int, engine: str = "vllm", **info: Any) -> Probed:
    told = msgspec.structs.replace(INFO, **info)
    answered = record(chunks, range(len(chunks) + 1))
    return Probed(server="h:1", info=told, engine=ENGINES[engine], scenario="mine", record=answered)


def test_what_a_canary_learns_begins_no_new_part() -> None:
    """llama.cpp tells what speculates once a request was there."""
    shown = Shown()
    for _ in range(3):
        shown(reading())
        shown(of_canary(1, 2, spec_reported="ngram-mod"))
    assert shown.get("requests_total", scenario="mine", outcome="completed") == 3
    assert shown.get("drafts_total", source="server counters") == 3
    assert shown.labels("scrape_up")["spec"] == "speculation k = 3"


@pytest.mark.parametrize(
    ("engine", "chunks", "gaps", "steps"),
    [
        ("vllm", (1, 2, 4), 2, 2),
        ("vllm", (1, 2, 9), None, None),
        ("llamacpp", (1, 1, 1), None, None),
    ],
)
def test_a_canary_shows_chunks_only_as_what_they_are(
    engine: str, chunks: tuple[int, ...], gaps: int | None, steps: int | None
) -> None:
    """k is 3: a chunk of nine is no step. llama.cpp's are never."""
    shown = Shown()
    shown(reading(grown=SpecCounters(steps=7, generated_tokens=9, requests=1)))
    shown(of_canary(*chunks, engine=engine))
    assert shown.get("chunk_gap_seconds_count") == gaps
    assert shown.get("decode_steps_total", scenario="mine") == steps
    assert shown.get("decode_steps_total", scenario="") == 7, "the server's own are another source"
    assert shown.get("ttft_seconds_count") == 1


async def test_the_folder_of_a_model_is_not_shown() -> None:
    async with deployed() as (it, one):
        it.is_model("/home/someone/models/m.gguf")
        shown = Shown()
        shown(await one.read())
        assert shown.labels("scrape_up")["model"] == "m.gguf"
        assert "someone" not in shown.text
        assert one.target is not None
        assert one.target.info.model == "/home/someone/models/m.gguf", "what requests must name"


def test_counters_that_are_not_read_at_one_instant_never_fall() -> None:
    shown = Shown()
    for tokens, requests, decoded in ((100, 2, 98), (0, 5, 98), (20, 0, 113)):
        shown(reading(grown=SpecCounters(steps=9, generated_tokens=tokens, requests=requests)))
        assert shown.get("decode_tokens_total") == decoded


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
async def test_promtool_has_nothing_to_say() -> None:
    async with running("eagle3", dialect="sglang") as server:
        shown, _, _ = await probed(server.url, 4, canary())
    shown(reading())
    shown(reading(result="timed_out", why="x", grown=None, load=None, server="h:2", info=None))
    done = await asyncio.to_thread(
        subprocess.run, ["promtool", "check", "metrics"],
        input=shown.text, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ── the terminal ─────────────────────────────────────────────────────────────────────────────────


def test_without_a_terminal_changes_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    down = {"result": "timed_out", "why": "no \x1b[31manswer", "grown": None, "load": None}
    with MonitorLive(quiet=True) as live:
        live(reading())
        live(reading(at_unix_s=1.8e9 + 15))
        live(reading(at_unix_s=1.8e9 + 30, **down))
        live(reading(at_unix_s=1.8e9 + 45, **down))
        live(reading(at_unix_s=1.8e9 + 630, restarted=True))
    assert capsys.readouterr().err.splitlines() == [
        "draftload: h:1 is vllm, m, speculation k = 3",
        "draftload: h:1 is not there (timed out): no \\x1b[31manswer",
        "draftload: h:1 is back after 10 min",
        "draftload: h:1 was restarted: its counters began anew",
    ]


def test_what_is_not_counted_any_more_has_no_figures() -> None:
    live = MonitorLive(quiet=True)
    live(reading())
    live(reading(grown=None))
    assert not live._seen["h:1"].window


def test_without_a_terminal_every_server_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    grown = SpecCounters(drafts=10, draft_tokens=30, accepted_tokens=15, generated_tokens=27)
    with MonitorLive() as live:
        live(reading(grown=grown))
        live(reading(at_unix_s=1.8e9 + 1, grown=grown))
        live(reading(at_unix_s=1.8e9 + 1, grown=grown, server="h:2"))
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("draftload")]
    figures = "up, AL drafted 2.50, accepted 50.0 %, run+wait 1+–, KV 50.0 %"
    assert lines == [f"h:1: {figures}", f"h:2: {figures}"]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_table_fits_its_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names in full, every figure that has room, and no cell cut."""
    console = Console(width=width, record=True, file=io.StringIO())
    monkeypatch.setattr("reports.monitor_live.Console", lambda **_: console)
    grown = SpecCounters(
        drafts=10, draft_tokens=30, accepted_tokens=15, generated_tokens=270, steps=100, requests=20
    )
    live = MonitorLive(quiet=True)
    for second in (0, 10):
        live(reading(at_unix_s=1.8e9 + second, grown=grown, server="gpu-b:30000"))
    live(reading(result="unreachable", why="x", grown=None, load=None, info=None, server="a:1"))
    console.print(live._table())
    head, down, up, foot = console.export_text().splitlines()
    assert down.startswith("a:1 ")
    assert down.rstrip().endswith("unreachable for 1 s")
    assert up.startswith("gpu-b:30000 ")
    assert [cell for cell in up.split() if cell in ("2.50", "27.0", "1+–")] == [
        *("2.50", "2.50", "27.0", "1+–")
    ]
    assert ("accepted" in head, "KV" in head) == (width >= 120, width >= 100)
    assert "over 20 scrapes" in foot
    assert "…" not in head + down + up


# ── the command ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--url", "http://h:1", "--url", "http://h:1"], "given twice"),
        (["--url", "http://h:1", "--url", "http://h:1/v1"], "given twice"),
        (["--url", "ftp://h"], "is no server's URL"),
        (["--url", "h", "--engine", "sglng"], "did you mean 'sglang'"),
        (["--url", "a", "--url", "b", "--metrics-url", "c"], "one --metrics-url for each --url"),
        (["--url", "h", "--scrape-interval", "often"], "--scrape-interval often is no duration"),
        (["--url", "h", "--every", "60s"], "--every is of a probe"),
        (["--url", "h", "--probe", "smok"], "did you mean 'smoke'"),
        (["--url", "h", "--probe", "smoke", "--every", "0s"], "--every 0s is no duration"),
        (["--url", "h", "--probe", "throughput"], "made for one target's tokenizer"),
        (["--url", "h", "--quiet"], "would tell nobody anything"),
        (["--url", "h", "--api", "chatt"], "did you mean 'chat'"),
        (["--url", "h", "--prometheus-port", "99999"], "cannot be served on 127.0.0.1:99999"),
    ],
)
def test_bad_input_is_told_before_anything_starts(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        app(["monitor", *words], standalone_mode=False)


def test_a_port_that_is_taken() -> None:
    from reports.exposition import Served

    with Served("127.0.0.1", 0) as taken:
        words = ["monitor", "--url", "h", "--prometheus-port", str(taken.port)]
        with pytest.raises(UserError, match="cannot be served"):
            app(words, standalone_mode=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_stopped_and_that_is_no_failure(
    number: signal.Signals, tmp_path: Path
) -> None:
    """With a server that is not there: nothing else is needed to begin."""
    words = ["monitor", "--url", "http://127.0.0.1:1", "--prometheus-port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "loadgen.cli", *words],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    url = process.stderr.readline().split()[-1]
    assert "is not there (unidentified)" in process.stderr.readline()
    with urllib.request.urlopen(url, timeout=10) as page:
        text = page.read().decode()
    assert 'server="127.0.0.1:1"} 0\n' in text
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err
