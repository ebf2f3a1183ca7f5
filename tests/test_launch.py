"""servers/launch.py with stand-in servers: small Python programs that behave and misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import aiohttp
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.errors import ServerError, UserError
from loadgen.types import Engine, ServerConfig
from servers import launch

ROOT = Path(launch.__file__).parent.parent
CONFIG = ServerConfig(engine="stand-in", model="m")

SERVES = """
    import http.server, os, signal, subprocess, sys, threading
    answered = 0
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            global answered
            answered += 1
            loading = self.path == "/health" and answered <= LOADING
            self.send_response(503 if loading else 200)
            self.end_headers()
            self.wfile.write(str(answered).encode())
            if self.path == "/quit":
                os._exit(3)
        def log_message(self, *args):
            pass
    LOADING = 0
    {prelude}
    print("ready soon", flush=True)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
# Prints the pid of a child that ignores SIGTERM by then.
CHILD = """
    source = "import os, signal, time; signal.signal(15, signal.SIG_IGN);"
    source += "print(os.getpid(), flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE)
    print(int(child.stdout.readline()), flush=True)
"""
IGNORES = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def program(text: str) -> Engine:
    """An engine whose server is this Python program; its first argument is the port."""
    source = textwrap.dedent(text)
    return Engine(
        name="stand-in",
        wires={},
        command=lambda config, port: [sys.executable, "-c", source, str(port)],
        stop_s=0.3,
    )


def serves(prelude: str = "") -> Engine:
    return program(SERVES.replace("{prelude}", prelude))


def gone(pid: int) -> bool:
    """No such process, or a zombie that waits for its parent."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return shown.stdout.strip()[:1] in ("", "Z")


async def is_gone(pid: int) -> bool:
    """Seen gone within 20 s."""
    deadline = perf_counter() + 20
    while not gone(pid):
        if perf_counter() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


def parent_of(pid: int) -> int:
    shown = subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, text=True)
    return int(shown.stdout)


async def get(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        assert response.status == 200
        return await response.text()


# ── a server that behaves ────────────────────────────────────────────────────────────────────────


async def test_ready_on_entry_and_gone_on_exit() -> None:
    lines: list[str] = []
    async with launch.launched(serves(), CONFIG, on_log=lines.append) as server:
        await get(server.url)
        assert not gone(server.pid)
        supervisor = parent_of(server.pid)
    assert gone(server.pid)
    assert gone(supervisor)
    assert tuple(lines) == server.log_tail() == ("ready soon",)


# Leaves a grandchild in a session of its own, as MPI's daemon does; prints its pid.
GRANDCHILD = """
    rank = "import os, signal, time; signal.signal(15, signal.SIG_IGN);"
    rank += "print(os.getpid(), flush=True); time.sleep(600)"
    daemon = "import subprocess, sys;"
    daemon += f"subprocess.Popen([sys.executable, '-c', {rank!r}], start_new_session=True)"
    child = subprocess.Popen([sys.executable, "-c", daemon], stdout=subprocess.PIPE)
    print(int(child.stdout.readline()), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux alone")
@pytest.mark.parametrize("manners", ["", IGNORES])
async def test_a_grandchild_in_a_session_of_its_own_ends_too(manners: str) -> None:
    async with launch.launched(serves(GRANDCHILD + "    " + manners), CONFIG) as server:
        rank = int(server.log_tail()[0])
        assert not gone(rank)
    assert gone(rank)


async def test_not_ready_while_it_loads() -> None:
    async with launch.launched(serves("LOADING = 3"), CONFIG) as server:
        assert int(await get(server.url)) == 5  # three times 503, once 200, then this one


async def test_ctrl_c_in_the_terminal_hits_only_us() -> None:
    async with launch.launched(serves(), CONFIG) as server:
        sessions = {os.getsid(p) for p in (0, server.pid, parent_of(server.pid))}
        assert len(sessions) == 3
        assert os.getpgid(server.pid) == server.pid


async def test_given_port_and_environment() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = ServerConfig(engine="stand-in", model="m", port=port, env={"SAID": "by the config"})
    async with launch.launched(serves('print(os.environ["SAID"])'), config) as server:
        assert server.url == f"http://127.0.0.1:{port}"
        assert "by the config" in server.log_tail()


ASKED = """
    import os, sys, time
    if "--help" in sys.argv:
        print("asked", file=open(os.environ["ASKED"], "a"))
        {answer}
        sys.exit(0)
    if "--extra" in sys.argv:
        print("with --extra", flush=True)
"""


def asked(answer: str, tmp_path: Path) -> tuple[Engine, ServerConfig, Path]:
    """A server that knows what `answer` prints of --port and --extra; notes when it is asked."""
    source = textwrap.dedent(ASKED).replace("{answer}", answer) + textwrap.dedent(
        SERVES.replace("{prelude}", "")
    ).replace("sys.argv[1]", "sys.argv[2]")
    program = (sys.executable, "-c", source)
    engine = Engine(
        name="stand-in",
        wires={},
        command=lambda config, port: [*config.executable, "--port", str(port), "--extra", "7"],
        help=lambda config: [*config.executable, "--help"],
        optional=frozenset(["--extra"]),
        stop_s=0.3,
    )
    note = tmp_path / "asked"
    env = {"ASKED": str(note)}
    config = ServerConfig(engine="stand-in", model="m", executable=program, env=env)
    return engine, config, note


@pytest.mark.parametrize(
    ("answer", "said", "extra"),
    [
        ('print("--port N  --extra N")', [], True),
        ('print("--port N")', ["stand-in: this version does not know --extra: left out."], False),
        (
            "sys.exit(3)",
            ["stand-in: no flag was checked against its version: its help ended with code 3."],
            True,
        ),
        (
            "time.sleep(600)",
            ["stand-in: no flag was checked against its version: its help was not there in 2 s."],
            True,
        ),
    ],
)
async def test_the_executable_is_asked_once_for_its_flags(
    answer: str, said: list[str], extra: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "HELP_TIMEOUT_S", 2.0)
    engine, config, note = asked(answer, tmp_path)
    for _ in range(2):
        notes: list[str] = []
        async with launch.launched(engine, config, say=notes.append) as server:
            assert server.log_tail() == (("with --extra",) if extra else ()) + ("ready soon",)
        assert notes == said
    assert note.read_text() == "asked\n"


async def test_a_needed_flag_that_it_does_not_know_starts_nothing(tmp_path: Path) -> None:
    engine, config, _ = asked('print("--port N")', tmp_path)
    lines: list[str] = []
    with pytest.raises(UserError, match="does not know --extra, which this config needs"):
        async with launch.launched(
            dataclasses.replace(engine, optional=frozenset()), config, on_log=lines.append
        ):
            pass
    assert lines == []


async def test_no_log_line_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers print their arguments and their environment; ours and theirs are masked."""
    monkeypatch.setenv("OUR_API_KEY", "sk-ours")
    engine = program(
        """
        import os, sys
        print(sys.argv, os.environ["HF_TOKEN"], os.environ["OUR_API_KEY"], flush=True)
        sys.exit(1)
        """
    )
    secret = ["--api-key", "sk-argument", "--x-token=sk-equals"]

    def command(config: ServerConfig, port: int) -> list[str]:
        assert engine.command is not None
        return [*engine.command(config, port), *secret]

    config = msgspec.structs.replace(CONFIG, env={"HF_TOKEN": "hf-environment"})
    lines: list[str] = []
    with pytest.raises(ServerError) as caught:
        async with launch.launched(
            dataclasses.replace(engine, command=command), config, on_log=lines.append
        ):
            pass
    said = str(caught.value) + "".join(lines)
    assert said.count("***") == 2 * 4
    for word in ("sk-ours", "sk-argument", "sk-equals", "hf-environment"):
        assert word not in said


async def test_two_at_once() -> None:
    async with launch.launched(serves(), CONFIG) as one, launch.launched(serves(), CONFIG) as two:
        assert one.url != two.url
        await get(one.url)
        await get(two.url)
    assert gone(one.pid)
    assert gone(two.pid)


async def test_a_server_that_goes_away_is_no_error_of_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = []
    read = launch.Log.read

    def counted(log: launch.Log) -> bool:
        reads.append(log)
        return read(log)

    monkeypatch.setattr(launch.Log, "read", counted)
    async with launch.launched(serves(), CONFIG) as server:
        supervisor = parent_of(server.pid)
        with contextlib.suppress(aiohttp.ClientError):
            await get(server.url + "/quit")
        assert await is_gone(server.pid)
        assert await is_gone(supervisor)
        before = len(reads)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(reads) <= before + 1, "its closed pipe keeps the loop busy"
    assert server.log_tail() == ("ready soon",)


# ── what ends it ─────────────────────────────────────────────────────────────────────────────────


async def test_sigterm_ignored_then_killed() -> None:
    async with launch.launched(serves(IGNORES), CONFIG) as server:
        pass
    assert gone(server.pid)


async def test_sigterm_comes_first() -> None:
    said = 'signal.signal(signal.SIGTERM, lambda *_: (print("asked", flush=True), os._exit(0)))'
    async with launch.launched(serves(said), CONFIG) as server:
        pass
    assert server.log_tail()[-1] == "asked"


@pytest.mark.parametrize("leader", ["stays", "leaves"])
async def test_children_that_ignore_sigterm_go_too(leader: str) -> None:
    leaves = "signal.signal(signal.SIGTERM, lambda *_: os._exit(0))"
    engine = serves(CHILD + "    " + (IGNORES if leader == "stays" else leaves))
    async with launch.launched(engine, CONFIG) as server:
        child = int(server.log_tail()[0])
        assert not gone(child)
    assert await is_gone(child)
    assert gone(server.pid)


async def test_gone_when_the_body_raises_or_is_cancelled() -> None:
    pids: list[int] = []

    async def body() -> None:
        async with launch.launched(serves(), CONFIG) as server:
            pids.append(server.pid)
            inside.set()
            await asyncio.Event().wait()

    inside = asyncio.Event()
    task = asyncio.create_task(body())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone(pids[0])


async def test_kill_9_of_us_leaves_nothing() -> None:
    parent = """
        import asyncio
        from tests.test_launch import CHILD, CONFIG, IGNORES, launch, serves
        async def main():
            async with launch.launched(serves(CHILD + "    " + IGNORES), CONFIG) as server:
                print(server.pid, server.log_tail()[0], flush=True)
                await asyncio.Event().wait()
        asyncio.run(main())
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", textwrap.dedent(parent)), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    pids = [int(word) for word in (await process.stdout.readline()).split()]
    assert len(pids) == 2
    assert not any(gone(pid) for pid in pids)
    process.kill()
    await process.wait()
    for pid in pids:
        assert await is_gone(pid)


async def test_kill_9_of_the_supervisor_leaves_nothing_either() -> None:
    async with launch.launched(serves(), CONFIG) as server:
        os.kill(parent_of(server.pid), signal.SIGKILL)
    assert await is_gone(server.pid)


# ── a server that does not start ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('import sys; print("last word", file=sys.stderr); sys.exit(3)', ["code 3", "last word"]),
        ("", ["code 0", "starts a server that stays", "printed nothing"]),
        ("import os; os.kill(os.getpid(), 9)", ["signal 9", "want of memory"]),
        ("raise MemoryError", ["code 1", "out of memory", "max_running", "  MemoryError"]),
    ],
)
async def test_ended_before_it_was_ready(body: str, says: list[str]) -> None:
    with pytest.raises(ServerError) as caught:
        async with launch.launched(program(body), CONFIG):
            pass
    for words in says:
        assert words in str(caught.value)


async def test_no_such_program() -> None:
    engine = Engine(name="stand-in", wires={}, command=lambda config, port: ["/no/such/engine"])
    with pytest.raises(ServerError, match="no such program: check `executable`") as caught:
        async with launch.launched(engine, CONFIG):
            pass
    assert "cannot run '/no/such/engine'" in str(caught.value)


async def test_never_ready() -> None:
    engine = program("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    with pytest.raises(ServerError, match=r"not ready within 1 s.*--start-timeout") as caught:
        async with launch.launched(engine, CONFIG, start_timeout_s=1):
            pass
    found = re.search(r"^  (\d+)$", str(caught.value), re.MULTILINE)
    assert found is not None
    assert gone(int(found[1]))


async def test_a_port_that_another_has() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        config = ServerConfig(engine="stand-in", model="m", port=port)
        with pytest.raises(UserError, match=f"port {port} cannot be used"):
            async with launch.launched(serves(), config):
                pass


@pytest.mark.parametrize("host", ["0.0.0.0", "localhost"])
async def test_a_host_of_this_machine(host: str) -> None:
    config = ServerConfig(engine="stand-in", model="m", host=host)
    engine = program(SERVES.replace("{prelude}", "").replace('"127.0.0.1"', repr(host)))
    async with launch.launched(engine, config) as server:
        await get(server.url)
        assert ("127.0.0.1" in server.url) == (host == "0.0.0.0")


@pytest.mark.parametrize(
    ("host", "port", "said"),
    [
        ("a..b", 8000, "host = 'a..b' is not known here"),
        ("192.0.2.1", 0, "no free port can be picked there"),  # RFC 5737: nobody's
    ],
)
async def test_a_host_that_no_server_can_be_started_for(host: str, port: int, said: str) -> None:
    config = ServerConfig(engine="stand-in", model="m", host=host, port=port)
    with pytest.raises(UserError, match=said):
        async with launch.launched(serves(), config):
            pass


def test_a_port_of_another_machine_is_taken_where_something_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()
    assert launch._port_elsewhere(*nobody) == nobody[1]
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(UserError, match="something answers there already"),
    ):
        launch._port_elsewhere("127.0.0.1", other.getsockname()[1])


async def test_files_lie_where_both_sides_see_them(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    config = ServerConfig(engine="stand-in", model="m", files_dir=str(tmp_path / "shared"))
    source = textwrap.dedent(SERVES.replace("{prelude}", "print(open(sys.argv[2]).read())"))
    engine = Engine(
        name="stand-in",
        wires={},
        command=lambda config, port: [sys.executable, "-c", source, str(port), "{files}/f.yaml"],
        files=lambda config: {"f.yaml": "a: 1"},
        stop_s=0.3,
    )
    async with launch.launched(engine, config) as server:
        assert server.log_tail() == ("a: 1", "ready soon")
        (folder,) = (tmp_path / "shared").iterdir()
        assert [path.name for path in folder.iterdir()] == ["f.yaml"]
    assert list((tmp_path / "shared").iterdir()) == []
    gone_dir = msgspec.structs.replace(config, files_dir=str(tmp_path / "gone"))
    with pytest.raises(UserError, match="cannot make a folder in"):
        async with launch.launched(engine, gone_dir):
            pass


async def test_attach_only() -> None:
    with pytest.raises(UserError, match="cannot be started by draftload"):
        async with launch.launched(Engine(name="openai", wires={}), CONFIG):
            pass


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        # llama.cpp b11549
        ("E gguf_init_from_file: failed to open GGUF file 'x.gguf' (No such file)", "not found"),
        ("E gguf_init_from_reader: invalid magic characters: '????', expected 'GGUF'", "damaged"),
        ("E error loading model: tensor 'x' data is not within the file bounds", "damaged"),
        ("E failed to allocate buffer for kv cache", "out of memory"),
        ("E srv start: couldn't bind HTTP server socket, hostname: 127.0.0.1", "port is taken"),
        ("error: invalid argument: --spec-synth-len", "does not know an option"),
        # vLLM 0.32, PyTorch, Python
        ("api_server.py: error: unrecognized arguments: --x", "does not know an option"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "out of memory"),
        ("OSError: [Errno 98] Address already in use", "port is taken"),
        ("OSError: You are trying to access a gated repo.", "gated"),
        ("OSError: x is not a local folder and is not a valid model identifier", "not found"),
        ("python3: No module named vllm", "package is missing"),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'y'", "file was not found"),
        # SGLang 0.5.23, read in its source
        (
            "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
            "memory",
        ),
        ("ValueError: Unknown speculative algorithm name: LOOKAHEAD", "does not know an option"),
        (
            "__main__.py: error: argument --x: invalid choice: 'y' (choose from a)",
            "engine versions",
        ),
        ("ValueError: Ngram speculative decoding only supports CUDA device.", "NVIDIA GPU"),
        (
            "Received sigquit from a child process. It usually means the child failed.",
            "kills itself",
        ),
        ("INFO all is well", ""),
    ],
)
def test_explain(line: str, cause: str) -> None:
    said = launch.explain(["one line before", line, "and one after"])
    assert cause in said
    assert bool(said) == bool(cause)


def test_the_particular_cause_is_told_before_the_general() -> None:
    lines = ["E invalid magic characters: '????'", "E failed to load model, '/x.gguf'"]
    assert "damaged" in launch.explain(lines)


# ── its output ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"one\ntwo\r\nthree", ["one", "two", "three"]),
        (b" 10%\r 20%\r\nend\n", [" 10%", " 20%", "end"]),
        (b"\x1b[31mred\x1b[0m \x1b]0;title\x07text\n\n", ["red text"]),
        (b"\x1b]8;;http://x\x1b\\link\x1b[2J\x9b0m\n", ["link\ufffd0m"]),
        (b"\xff\xfe\n", ["\ufffd\ufffd"]),
        (b"a" * 5000 + b"\n", ["a" * launch.MAX_LINE]),
    ],
)
def test_log_lines(data: bytes, lines: list[str]) -> None:
    log = launch.Log()
    log.feed(data)
    log.close()
    assert list(log.lines) == lines


WORDS = st.lists(st.sampled_from([b"word", b"\n", b"\r", b"\r\n", b"\x1b[1m", b" "]), max_size=30)


@given(WORDS, st.data())
def test_log_lines_hold_for_any_split(words: Sequence[bytes], data: st.DataObject) -> None:
    whole = b"".join(words)
    at = data.draw(st.integers(0, len(whole)))
    split, unsplit = launch.Log(), launch.Log()
    unsplit.feed(whole)
    split.feed(whole[:at])
    split.feed(whole[at:])
    unsplit.close()
    split.close()
    assert split.lines == unsplit.lines


@given(st.text())
def test_a_cleaned_line_controls_no_terminal(line: str) -> None:
    assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", launch.clean(line))


def test_only_the_last_lines_are_kept() -> None:
    log = launch.Log()
    log.feed(b"".join(b"%d\n" % n for n in range(launch.LOG_LINES + 5)))
    assert (log.lines[0], len(log.lines)) == ("5", launch.LOG_LINES)


# ── the supervisor ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ([sys.executable, "-c", "raise SystemExit(7)"], 7),
        ([sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"], 128 + 15),
        (["/no/such/engine"], 127),
    ],
)
def test_supervisor_forwards_the_exit_code(argv: list[str], code: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            [sys.executable, "-I", "-S", launch.__file__, "1", *argv],
            stdin=theirs.fileno(),
            capture_output=True,
        )
    assert done.returncode == code


def test_supervisor_needs_only_the_standard_library(tmp_path: Path) -> None:
    """A copy of the file alone, far from our packages, does the work."""
    alone = tmp_path / "launch.py"
    alone.write_bytes(Path(launch.__file__).read_bytes())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        argv = [sys.executable, "-I", "-S", str(alone), "1", sys.executable, "-c", "print(6)"]
        done = subprocess.run(argv, stdin=theirs.fileno(), capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [b"6"], b"")


def test_a_server_of_ours_finds_our_packages_not_the_users(tmp_path: Path) -> None:
    (tmp_path / "servers").mkdir()
    (tmp_path / "servers" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    argv = [sys.executable, "-P", "-m", "servers.openai"]
    environment = launch.environment(argv, {})
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_foreign_server_never_sees_our_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    environment = launch.environment(["/other/venv/bin/vllm", "serve", "m"], {"A": "b"})
    assert "PYTHONPATH" not in environment
    assert environment["A"] == "b"


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux alone")
def test_a_thread_of_ours_that_ends_while_children_are_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its entry under /proc is gone between being found and being read: they are asked anew."""
    asked: list[int] = []

    def listed(self: Path, pattern: str) -> list[Path]:
        asked.append(len(asked))
        return [tmp_path / "gone"] if len(asked) == 1 else []

    monkeypatch.setattr(Path, "glob", listed)
    monkeypatch.setattr(os, "waitpid", lambda *_: (_ for _ in ()).throw(ChildProcessError))
    launch._end_orphans()
    assert len(asked) == 2
