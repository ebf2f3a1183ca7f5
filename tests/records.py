"""Builders for tests: records from chunk sizes and times, engines with one fact changed."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from loadgen.protocol import completions_wire
from loadgen.types import (
    ClientInfo,
    ClosedLoop,
    Completed,
    Dialogue,
    Engine,
    Message,
    PhaseData,
    PhaseRecord,
    Prompt,
    Request,
    RequestRecord,
    RunInfo,
    Scenario,
    ServerInfo,
    ServerLoad,
)

DATA = Path(__file__).parent / "data"

ENGINE = Engine(name="test", wires={"completions": completions_wire({})}, chunk_is_step=True)
SERVER = ServerInfo(engine="test", model="m", url="http://h", state="on", draft_depth=3)


def told(samples: Mapping[str, float]) -> ServerLoad:
    """A load whose fields are the page's series."""
    return msgspec.convert(dict(samples), ServerLoad, strict=False)


ENGINE_THAT_TELLS = replace(ENGINE, load=told)


def record(
    chunks: Sequence[int],
    times: Sequence[float],
    *,
    dialogue: str = "d0",
    turn: int = 0,
    category: str = "coding",
    **changes: Any,
) -> RequestRecord:
    """A completed request: `times[0]` is the send, `times[i]` the arrival of `chunks[i - 1]`."""
    gaps = array("I", [round((b - a) * 1e6) for a, b in itertools.pairwise(times)])
    made = RequestRecord(
        request_id=f"{dialogue}/{turn}",
        dialogue_id=dialogue,
        prompt_id=dialogue,
        category=category,
        phase="c=1",
        turn=turn,
        outcome=Completed(),
        sent_s=times[0],
        end_s=times[-1],
        osl_tokens=sum(chunks),
        chunk_gaps_us=gaps,
        chunk_tokens=array("I", chunks),
        token_count_source="ids",
        finish_reason="length",
    )
    return msgspec.structs.replace(made, **changes)


def phase_data(
    records: Sequence[RequestRecord], *, concurrency: int = 1, **changes: Any
) -> PhaseData:
    """The records as one measured phase."""
    start = min((r.sent_s for r in records), default=0.0)
    end = max((r.end_s for r in records), default=1.0)
    fields: dict[str, Any] = {
        "phase": PhaseRecord(
            name="c=1",
            load=ClosedLoop(concurrency=concurrency),
            repeat=0,
            measured=True,
            started_s=start,
            ended_s=end,
            steady_from_s=start,
            steady_to_s=end,
        ),
        "scenario": Scenario(name="smoke"),
        "server": SERVER,
        "engine": ENGINE,
        "draft_depth": SERVER.draft_depth,
        "records": tuple(records),
    }
    return PhaseData(**(fields | changes))


def run_info(**changes: Any) -> RunInfo:
    """A RunInfo of the test engine."""
    info = RunInfo(
        run_id="r1",
        started_at="2026-11-24T12:00:00Z",
        scenario=Scenario(name="smoke"),
        server=SERVER,
        client=ClientInfo(
            draftload="0", python="3", aiohttp="3", loop="uvloop", cores=2, machine="Linux x86_64"
        ),
        prompts_sha256="0" * 64,
    )
    return msgspec.structs.replace(info, **changes)


def prompts(count: int, length: int = 16) -> tuple[Prompt, ...]:
    """Prompts of token ids only, all different."""
    return tuple(
        Prompt(
            prompt_id=f"p{i}",
            category=("coding", "math")[i % 2],
            prompt_token_ids=array("I", range(100 + i, 100 + i + length)),
        )
        for i in range(count)
    )


REQUEST = Request(
    request_id="r",
    phase="c=1",
    dialogue=Dialogue(dialogue_id="d", prompt=Prompt(prompt_id="p", category="qa")),
    turn=0,
    max_output_tokens=40,
    prompt_token_ids=array("I", [1, 2, 3]),
    messages=(Message(role="user", content="hi"),),
)

# Golden G2: four turns of three requests, run through SPEED-Bench's own metric classes.
G2 = (
    record([1, 4, 4, 2], [10.0, 10.5, 10.6, 10.7, 10.8], dialogue="q0"),
    record([1, 3, 1], [11.0, 11.25, 11.5, 11.75], dialogue="q0", turn=1),
    record([1, 4, 4, 4, 3], [10.0, 11.0, 11.1, 11.2, 11.3, 11.4], dialogue="q1"),
    record(
        [1, 1, 2, 1, 1, 1],
        [12.0, 12.2, 12.4, 12.6, 12.8, 13.0, 13.2],
        dialogue="q2",
        category="roleplay",
    ),
)
