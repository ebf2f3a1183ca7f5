"""reports/exposition.py: a page that Prometheus' own parser reads back, served under fire."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from loadgen.errors import UserError
from reports.exposition import MEDIA_TYPE, Family, Page, Served

SENT = Family(name="draftload_sent_total", kind="counter", help='What was "sent"\nand \\ more.')
OPEN = Family(name="draftload_open", kind="gauge", help="Open now.")
WAIT = Family(name="draftload_wait_seconds", kind="histogram", help="Wait.", buckets=(0.1, 1.0))


def read(page: Page) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found = text_string_to_metric_families(page.text().decode())
    return {(s.name, tuple(s.labels.items())): s.value for f in found for s in f.samples}


def test_counts_gauges_and_histograms_are_read_back() -> None:
    page = Page((SENT, OPEN, WAIT))
    page.add(SENT, {"model": "m"})
    page.add(SENT, {"model": "m"}, 2)
    page.set(OPEN, {}, 4)
    page.set(OPEN, {}, 0.5)
    page.observe(WAIT, {"model": "m"}, (0.05, 0.1, 0.5, 7))
    m = ("model", "m")
    assert read(page) == {
        (SENT.name, (m,)): 3,
        (OPEN.name, ()): 0.5,
        ("draftload_wait_seconds_bucket", (m, ("le", "0.1"))): 2,
        ("draftload_wait_seconds_bucket", (m, ("le", "1.0"))): 3,
        ("draftload_wait_seconds_bucket", (m, ("le", "+Inf"))): 4,
        ("draftload_wait_seconds_sum", (m,)): pytest.approx(7.65),
        ("draftload_wait_seconds_count", (m,)): 4,
    }
    assert len(page) == 7


def test_a_family_without_series_is_not_on_the_page() -> None:
    page = Page((SENT, OPEN))
    assert page.text() == b""
    page.set(OPEN, {}, 1)
    page.add(SENT, {})
    page.clear(OPEN)
    assert [name for name, _ in read(page)] == [SENT.name]
    page.clear()
    assert len(page) == 0


@given(st.text(), st.floats(allow_nan=False))
def test_any_label_and_any_number_survive(label: str, value: float) -> None:
    page = Page((OPEN,))
    page.set(OPEN, {"model": label}, value)
    # The format knows LF alone as an end of line; the parser splits at it alone, too.
    assert read(page) == {(OPEN.name, (("model", label),)): value}


def test_it_is_served_and_a_client_that_hangs_or_sends_garbage_stops_nobody() -> None:
    with Served("127.0.0.1", 0) as served:
        where = f"http://127.0.0.1:{served.port}"
        assert served.url == f"{where}/metrics"
        served.show(b"draftload_open 1\n")
        with (
            socket.create_connection(("127.0.0.1", served.port)) as hangs,
            socket.create_connection(("127.0.0.1", served.port)) as garbage,
        ):
            hangs.sendall(b"GET /metr")
            garbage.sendall(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
            with urllib.request.urlopen(f"{where}/metrics?x=1", timeout=5) as reply:
                assert reply.read() == b"draftload_open 1\n"
                assert reply.headers["Content-Type"] == MEDIA_TYPE
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{where}/else", timeout=5)
            refused.value.close()
        assert refused.value.code == 404
        assert served.scrapes == 1
        began = time.perf_counter()
    assert time.perf_counter() - began < 5, "a client that hangs must not hold up the end"


def test_an_address_of_ipv6_is_served_and_written_as_a_url() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with Served("::1", 0) as served:
        served.show(b"draftload_open 1\n")
        assert served.url == f"http://[::1]:{served.port}/metrics"
        with urllib.request.urlopen(served.url, timeout=5) as reply:
            assert reply.read() == b"draftload_open 1\n"


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", None), ("192.0.2.1", 0), ("no.host", 1)])
def test_an_address_that_cannot_be_had_is_told_at_once(host: str, port: int | None) -> None:
    with (
        Served("127.0.0.1", 0) as holder,
        pytest.raises(UserError, match="cannot be served on") as told,
    ):
        Served(host, holder.port if port is None else port)
    assert "--prometheus-port" in str(told.value)
