"""HTTPS: verified by default, --ca-file, client certificates, on every connection of a run."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme
from aiohttp.test_utils import TestServer

from loadgen.errors import UserError
from loadgen.measure import Attach, measure
from loadgen.transport import tls_context
from servers import simulator
from servers.simulated import preset
from tests.test_measure import job

CA = trustme.CA()
OTHER_CA = trustme.CA()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEM files by name."""
    folder = tmp_path_factory.mktemp("pem")
    mine, stranger = CA.issue_cert("client@example.org"), OTHER_CA.issue_cert("x@example.org")
    found = {name: folder / name for name in ("ca", "other-ca", "cert", "key", "both", "stranger")}
    CA.cert_pem.write_to_path(str(found["ca"]))
    OTHER_CA.cert_pem.write_to_path(str(found["other-ca"]))
    mine.cert_chain_pems[0].write_to_path(str(found["cert"]))
    mine.private_key_pem.write_to_path(str(found["key"]))
    mine.private_key_and_cert_chain_pem.write_to_path(str(found["both"]))
    stranger.private_key_and_cert_chain_pem.write_to_path(str(found["stranger"]))
    (folder / "text").write_text("no PEM")
    return found | {"text": folder / "text", "none": folder / "none"}


@contextlib.asynccontextmanager
async def secured(*, asks_who: bool = False) -> AsyncIterator[str]:
    """The simulator behind TLS, its certificate made out for 127.0.0.1."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CA.issue_cert("127.0.0.1").configure_cert(context)
    if asks_who:
        CA.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    settings = preset("eagle3", time_scale=0.05)
    server = TestServer(simulator.app(settings), scheme="https")
    await server.start_server(ssl=context)
    try:
        yield f"https://127.0.0.1:{server.port}"
    finally:
        await server.close()


async def go(url: str, out: Path, tls: ssl.SSLContext | bool) -> str:
    _, reason = await measure(url, job(out, attach=Attach(tls=tls)))
    return reason


async def test_a_server_nobody_vouches_for_is_refused(
    files: dict[str, Path], tmp_path: Path
) -> None:
    async with secured() as url:
        for context in (True, tls_context(files["other-ca"], None, None)):
            with pytest.raises(UserError, match="Give its authority with --ca-file"):
                await go(url, tmp_path, context)
    assert list(tmp_path.iterdir()) == []


async def test_a_ca_file_is_enough(files: dict[str, Path], tmp_path: Path) -> None:
    async with secured() as url:
        assert await go(url, tmp_path, tls_context(files["ca"], None, None)) == "completed"


@pytest.mark.parametrize("names", [("cert", "key"), ("both", None)])
async def test_a_client_certificate_says_who_we_are(
    names: tuple[str, str | None], files: dict[str, Path], tmp_path: Path
) -> None:
    cert, key = files[names[0]], None if names[1] is None else files[names[1]]
    async with secured(asks_who=True) as url:
        assert await go(url, tmp_path, tls_context(files["ca"], cert, key)) == "completed"


async def test_without_the_right_certificate_the_server_refuses(
    files: dict[str, Path], tmp_path: Path
) -> None:
    async with secured(asks_who=True) as url:
        for cert in (None, files["stranger"]):
            with pytest.raises(UserError, match=r"https://127\.0\.0\.1"):
                await go(url, tmp_path, tls_context(files["ca"], cert, None))


@pytest.mark.parametrize(
    ("ca", "cert", "key", "said"),
    [
        ("none", None, None, "No such file"),
        ("text", None, None, "Expected PEM"),
        ("ca", "none", None, "No such file"),
        ("ca", "cert", None, "Expected PEM"),
        ("ca", "cert", "text", "Expected PEM"),
        ("ca", "both", "none", "No such file"),
        (None, None, "key", "without --client-cert"),
    ],
)
def test_files_that_are_no_use(
    ca: str | None, cert: str | None, key: str | None, said: str, files: dict[str, Path]
) -> None:
    given = [None if name is None else files[name] for name in (ca, cert, key)]
    with pytest.raises(UserError, match=said):
        tls_context(*given)


def test_no_file_is_the_systems_authorities() -> None:
    assert tls_context(None, None, None) is True
