"""The soak of benchmarks/soak.py, short: every request accounted for, nothing left, memory flat."""

from __future__ import annotations

from pathlib import Path

import pytest

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
