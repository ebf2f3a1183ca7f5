"""The soaks of benchmarks/, short: every count is right, nothing is left, memory is flat."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import monitor_soak
from benchmarks.soak import KINDS, Soaked, faulty_server, soak

SECONDS, STREAMS = 15.0, 128


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
async def test_every_fault_is_accounted_for_and_nothing_is_left(tmp_path: Path) -> None:
    with faulty_server() as url:
        found = await soak(url, STREAMS, SECONDS, tmp_path)
    assert found.injected["requests"] > 2 * STREAMS
    assert sum(found.injected[kind] for kind in KINDS), "faults were injected"
    assert found.seen == found.injected
    assert (found.tasks_left, found.descriptors_left, found.tokens_lost) == (0, 0, 0)
    assert found.growth_bytes < 8 << 20


def test_growth_is_seen() -> None:
    """Flat is what the soak says it is: a leak of 1 MiB a sample shows."""

    def soaked(sizes: list[int]) -> float:
        memory = tuple((float(i), size << 20) for i, size in enumerate(sizes))
        return Soaked(
            injected={}, seen={}, memory=memory, tasks_left=0, descriptors_left=0, tokens_lost=0
        ).growth_bytes

    assert soaked([10, 90, *[100] * 48]) == 0
    assert soaked(list(range(50))) == 30 << 20


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
async def test_a_monitor_counts_over_restarts_and_faults_and_keeps_nothing() -> None:
    with monitor_soak.played_servers(30) as urls:
        found = await monitor_soak.day(urls, 400)
    assert list(monitor_soak.faults(found)) == []
    assert min(told.restarts for told in found.servers.values()) >= 5
    assert min(told.scrapes - told.worked for told in found.servers.values()) >= 40


def test_what_the_monitor_lost_or_kept_is_seen() -> None:
    told = monitor_soak.Told(
        scrapes=100, worked=90, restarts=2, restarted=4, probes=0, counted=100,
        grown=90 * monitor_soak.GENERATED,
    )  # fmt: skip
    found = monitor_soak.Day(
        servers={"vllm": told}, memory=((0.0, 1), (0.15, 1), (1.0, 9 << 20)), most_series=1,
        tasks_left=1, descriptors_left=0, objects=(*[40_000] * 10, *[50_000] * 10), collects=False,
    )  # fmt: skip
    said = "\n".join(monitor_soak.faults(found))
    for what in (
        "8 of 100 turns",
        "2 restarts were told",
        "not probed",
        "1 tasks",
        "objects grew",
        "by 9.0",
        "off",
    ):
        assert what in said
