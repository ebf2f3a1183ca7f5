"""The only loop: it waits, sends and hands records to the observers.

Closed loop: N workers over one iterator of dialogues in one TaskGroup; a dialogue holds its worker
through all its turns. Open loop: a dialogue begins when the plan says, whatever became of those
before; where `max_in_flight` holds it back, `intended_s` still says when it should have left.
Bodies are encoded before they are due, at most `concurrency` (open loop: 64) of them ahead.
The collector of cyclic garbage is off inside a phase (a full pass stops every stream for tens of
milliseconds) but for a young pass every 10 s. Must not: decide what to send (plan), read a stream
(transport), compute a percentile (the run file is read for that).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Literal

import msgspec

from loadgen.errors import ServerError
from loadgen.protocol import Tally
from loadgen.scrape import Scraper
from loadgen.tokens import next_turn
from loadgen.transport import Transport
from loadgen.types import (
    U32,
    Broke,
    Caveat,
    ClientSample,
    ClosedLoop,
    Completed,
    Dialogue,
    Message,
    Observer,
    OpenLoop,
    Phase,
    PhaseRecord,
    Plan,
    Record,
    Request,
    RequestRecord,
    Sampling,
    Templating,
)

Tokenize = Callable[[tuple[Message, ...]], Awaitable[U32]]
"""Messages → ids, off the timed span: a local tokenizer in a thread, or the server's own."""

_Ready = Callable[[Phase, Dialogue, int, tuple[Message, ...], U32 | None], tuple[Request, bytes]]

RAMP_S = 0.001
"""The first wave leaves one stream a millisecond: set-up costs 0.4 ms each, and a burst of 512 is
itself a TTFT tail of 0.2 s (measured with aiohttp 3.14)."""

AHEAD = 64
UNREACHED_PAUSE_S = 1.0
BREAK_S = 1.0
SAMPLE_S = 0.5
LAG_PROBE_S = 0.05
YOUNG_COLLECTION_S = 10.0


class Runner:
    """Runs a plan's phases on one server.

    `interrupt()` is for Ctrl-C: the first lets what is in flight end (`grace_s` at most), the
    second ends it now. `fail(why)` is for a server that is gone. `run` returns RunEnd's reason.
    """

    def __init__(
        self,
        transport: Transport,
        scraper: Scraper,
        observe: Observer,
        *,
        model: str,
        sampling: Sampling,
        tokenize: Tokenize | None,
        templating: Templating | None = None,
        grace_s: float = 30.0,
    ) -> None:
        self._transport = transport
        self._scraper = scraper
        self._observe = observe
        self._model = model
        self._sampling = sampling
        self._tokenize = tokenize
        self._templating = Templating() if templating is None else templating
        self._grace_s = grace_s
        self._reason = "completed"
        self._closed = asyncio.Event()
        self._current: _PhaseRun | None = None
        self._border: asyncio.Task[None] | None = None

    async def run(self, plan: Plan) -> str:
        """All phases in order; "completed", "interrupted" after Ctrl-C, or "failed: …"."""
        for phase in plan.phases:
            if self._reason != "completed":
                break
            await self._phase(phase)
        return self._reason

    def interrupt(self) -> None:
        """Nothing new is sent; called again, nothing more is waited for."""
        if self._reason != "completed":
            self._end_now()
        else:
            self._reason = "interrupted"
        self._close()

    def fail(self, why: str) -> None:
        """Nothing new is sent, and little waited for: what is in flight breaks by itself, as the
        server's failure and not ours."""
        self._reason = f"failed: {why}"
        self._close()
        asyncio.get_running_loop().call_later(BREAK_S, self._end_now)

    def _end_now(self) -> None:
        self._transport.abort()
        if self._border is not None:
            self._border.cancel()

    def _close(self) -> None:
        """Send nothing new in this phase; end what is still in flight after the grace."""
        if not self._closed.is_set():
            self._closed.set()
            asyncio.get_running_loop().call_later(self._grace_s, self._abort_phase, self._current)

    def _abort_phase(self, phase: _PhaseRun | None) -> None:
        if phase is not None and phase is self._current:
            self._transport.abort()

    async def _at_border(self, phase: str, edge: Literal["start", "end"]) -> None:
        """The scraper's border, which a second Ctrl-C does not wait for."""
        self._border = asyncio.create_task(self._scraper.border(phase, edge))
        try:
            await asyncio.wait({self._border})
            if not self._border.cancelled():
                self._border.result()
        finally:
            self._border.cancel()
            self._border = None

    async def _phase(self, phase: Phase) -> None:
        now, zero = perf_counter, self._transport.zero
        self._closed.clear()
        self._transport.resume()
        self._current = run = _PhaseRun(phase, self._ready)
        if phase.measured:
            await self._at_border(phase.name, "start")
        run.fill()
        with _quiet_collector():
            started = now()
            helpers = [asyncio.create_task(self._sample(run))]
            if phase.measured:
                helpers.append(asyncio.create_task(self._scraper.ticks(phase.name)))
            timer = (
                asyncio.get_running_loop().call_later(phase.ramp_s + phase.duration_s, self._close)
                if phase.duration_s is not None
                else None
            )
            try:
                async with asyncio.TaskGroup() as group:
                    self._start(run, group, started)
            except BaseExceptionGroup as faults:
                raise faults.exceptions[0] from None  # workers fail alike: a full disk, or a bug
            finally:
                if timer is not None:
                    timer.cancel()
                for helper in helpers:
                    helper.cancel()
                await asyncio.gather(*helpers, return_exceptions=True)
            ended = now()
        self._current = None
        if phase.measured:
            await self._at_border(phase.name, "end")
        self._observe(
            PhaseRecord(
                name=phase.name,
                load=phase.load,
                repeat=phase.repeat,
                measured=phase.measured,
                category=phase.category,
                started_s=started - zero,
                ended_s=ended - zero,
                steady_from_s=None if run.full_at is None else run.full_at - zero,
                steady_to_s=None if run.last_dispatch is None else run.last_dispatch - zero,
            )
        )

    def _never_sent(
        self, phase: Phase, dialogue: Dialogue, turn: int, fault: ServerError
    ) -> RequestRecord:
        """The record of a turn whose tokens the server's tokenizer did not give."""
        now = perf_counter()
        request, _ = self._ready(phase, dialogue, turn, (), None)
        outcome = Broke(reason="tokenizer", message=str(fault)[:500])
        tally = Tally(self._transport.wire.decode)
        return tally.record(request, outcome, zero=self._transport.zero, sent=now, ended=now)

    def _start(self, run: _PhaseRun, group: asyncio.TaskGroup, started: float) -> None:
        if isinstance(run.phase.load, OpenLoop):
            group.create_task(self._arrivals(run, run.phase.load, group, started))
        else:
            apart_s = max(RAMP_S, run.phase.ramp_s / max(run.target or 1, 1))
            for index in range(run.target or 0):
                group.create_task(self._worker(run, started + index * apart_s))

    async def _arrivals(
        self, run: _PhaseRun, load: OpenLoop, group: asyncio.TaskGroup, started: float
    ) -> None:
        """Begins each dialogue at its instant, or at the first free slot after it: none is left
        out. Those that wait for a slot wait here, in the order in which they came."""
        slots = asyncio.Semaphore(load.max_in_flight or len(run.phase.arrivals_s))
        for offset in run.phase.arrivals_s:
            if not await self._until(due := started + offset):
                return
            await slots.acquire()
            if self._closed.is_set() or (item := run.take()) is None:
                return
            run.arrived(due, started + run.phase.ramp_s)
            begun = group.create_task(self._dialogue(run, *item, due))
            begun.add_done_callback(lambda _: slots.release())
            await asyncio.sleep(0)  # late arrivals in a row must not keep streams from being read

    async def _until(self, due: float) -> bool:
        """Waits for an instant; False: nothing more is to be sent."""
        # A loop's timer may come early (uvloop rounds to milliseconds).
        while not self._closed.is_set() and (left := due - perf_counter()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), left)
        return not self._closed.is_set()

    async def _worker(self, run: _PhaseRun, joins: float) -> None:
        await self._until(joins)
        while not self._closed.is_set() and (item := run.take()) is not None:
            request, body = item
            run.busy += 1
            try:
                reached = await self._dialogue(run, request, body)
            finally:
                run.busy -= 1
            if not reached:
                await self._pause()

    async def _pause(self) -> None:
        """A server that restarts must not cost the whole plan: a worker waits, or until closed."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), UNREACHED_PAUSE_S)

    async def _dialogue(
        self, run: _PhaseRun, request: Request, body: bytes, due: float | None = None
    ) -> bool:
        """All its turns, one after the other; `due`: when the first should have left. False: its
        first turn found no server."""
        intended_s = None if due is None else due - self._transport.zero
        dialogue, history = request.dialogue, request.dialogue.prompt.messages
        later = dialogue.prompt.later_turns if run.phase.measured else ()
        for said in (*later, None):
            run.dispatched(perf_counter())
            record, answer = await self._transport.stream(request, body)
            self._observe(msgspec.structs.replace(record, intended_s=intended_s))
            intended_s = None if due is None else record.end_s
            outcome = record.outcome
            if said is None or self._closed.is_set() or not isinstance(outcome, Completed):
                return not (isinstance(outcome, Broke) and outcome.reason == "connect")
            whole = self._templating.history == "full"
            history = next_turn(history, answer, said, whole=whole)
            try:
                ids = await self._tokenize(history) if self._tokenize is not None else None
            except ServerError as fault:
                record = self._never_sent(run.phase, dialogue, request.turn + 1, fault)
                self._observe(msgspec.structs.replace(record, intended_s=intended_s))
                break
            request, body = self._ready(run.phase, dialogue, request.turn + 1, history, ids)
        return True

    def _ready(
        self,
        phase: Phase,
        dialogue: Dialogue,
        turn: int,
        messages: tuple[Message, ...],
        ids: U32 | None,
    ) -> tuple[Request, bytes]:
        """A turn and its encoded body."""
        sampling = self._sampling
        cap = phase.max_output_tokens or dialogue.prompt.max_output_tokens
        request = Request(
            request_id=f"{phase.name}/{dialogue.dialogue_id}/{turn}",
            phase=phase.name,
            dialogue=dialogue,
            turn=turn,
            max_output_tokens=cap or sampling.max_output_tokens,
            prompt_token_ids=ids,
            messages=messages,
            template_args=self._templating.args,
        )
        return request, self._transport.wire.encode(request, self._model, sampling)

    async def _sample(self, run: _PhaseRun) -> None:
        """ClientSamples, and the loop's own lag: how late a short sleep comes back."""
        live, zero = self._transport.live, self._transport.zero
        lag = 0.0
        sampled = collected = perf_counter()
        while True:
            due = perf_counter() + LAG_PROBE_S
            await asyncio.sleep(LAG_PROBE_S)
            now = perf_counter()
            lag = max(lag, now - due)
            if now - sampled >= SAMPLE_S:
                self._observe(
                    ClientSample(
                        at_s=now - zero,
                        phase=run.phase.name,
                        in_flight=live.in_flight,
                        target=run.target,
                        sent=live.sent,
                        chunks=live.chunks,
                        tokens=live.tokens,
                        loop_lag_s=lag,
                        cpu_s=time.process_time(),
                        rss_bytes=rss_bytes(),
                    )
                )
                lag, sampled = 0.0, now
            if now - collected >= YOUNG_COLLECTION_S:
                gc.collect(0)
                collected = now


class _PhaseRun:
    """A phase under way: what is encoded ahead, and when the load was full."""

    def __init__(self, phase: Phase, ready: _Ready) -> None:
        self.phase = phase
        self.busy = 0
        self.full_at: float | None = None
        self.last_dispatch: float | None = None
        self._ready = ready
        self._dialogues: Iterator[Dialogue] = iter(phase.dialogues)
        self._ahead: deque[tuple[Request, bytes]] = deque()
        load = phase.load
        self.target = load.concurrency if isinstance(load, ClosedLoop) else None

    def fill(self) -> None:
        """Encode what may be ready ahead; fewer dialogues lower a closed loop's target."""
        while len(self._ahead) < (self.target or AHEAD) and self._one_more():
            pass
        if self.target is not None:
            self.target = min(self.target, len(self._ahead))

    def take(self) -> tuple[Request, bytes] | None:
        """The next first turn; its place is filled once this send is under way."""
        if not self._ahead and not self._one_more():
            return None
        item = self._ahead.popleft()
        asyncio.get_running_loop().call_soon(self._one_more)
        return item

    def arrived(self, due: float, ramped: float) -> None:
        """Open loop: an arrival, and when its ramp is over. From the first after it to the last,
        arrivals as they were intended, the load is steady."""
        self.last_dispatch = due
        if self.full_at is None and due >= ramped:
            self.full_at = due

    def dispatched(self, now: float) -> None:
        if self.target is None:
            return
        self.last_dispatch = now
        if self.full_at is None and self.busy >= self.target:
            self.full_at = now

    def _one_more(self) -> bool:
        dialogue = next(self._dialogues, None)
        if dialogue is None:
            return False
        prompt = dialogue.prompt
        self._ahead.append(
            self._ready(self.phase, dialogue, 0, prompt.messages, prompt.prompt_token_ids)
        )
        return True


@contextlib.contextmanager
def _quiet_collector() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def rss_bytes() -> int:
    """Resident memory of this process now; where /proc is missing, its peak."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def fan_out(store: Observer, observers: tuple[Observer, ...]) -> Observer:
    """One observer out of several. The store's failure ends the run; another that raises is
    dropped, and a caveat says so."""
    alive = list(observers)

    def observe(record: Record) -> None:
        store(record)
        for observer in tuple(alive):
            try:
                observer(record)
            except Exception as fault:
                alive.remove(observer)
                name = getattr(observer, "__qualname__", type(observer).__name__)
                store(
                    Caveat(
                        code="observer-dropped",
                        message=f"{name} failed and was dropped: {fault!r}.",
                        advice="The run file is complete; only what that observer shows is not.",
                    )
                )

    return observe
