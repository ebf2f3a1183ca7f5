"""Start a server, wait until it is ready, stop it; and leave nothing behind, however we end.

The server is the child of a small supervisor: this same file run as a program, in a session of its
own (Ctrl-C in the terminal hits only us), with one end of a socket pair as its stdin. When our end
closes, because we stop the server or because a kill -9 took us, the supervisor ends the server's
process group: SIGTERM, `stop_s`, SIGKILL. One way to stop, so the way that matters is always used.
Must not: use a shell, know an engine, import ours or aiohttp at the top (the supervisor runs under
`python -I -S`, standard library only, so that it starts in milliseconds, stays small, and needs no
import path).
"""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from asyncio.subprocess import Process

    from aiohttp import ClientSession

    from loadgen.types import Engine, ServerConfig

LOG_LINES = 200
"""Lines of a server's output that are kept."""
SHOWN_LINES = 12
MAX_LINE = 2000
FIRST_POLL_S, LONGEST_POLL_S = 0.05, 0.5
POLL_TIMEOUT_S = 5.0
HELP_TIMEOUT_S = 60.0
"""How long an executable may take to print its help: a Python engine imports itself first."""
ELSEWHERE_TIMEOUT_S = 2.0
_HELP: dict[tuple[str, ...], tuple[str, str]] = {}
"""Question → what `_printed` gave: an executable is asked once a process, as that takes seconds."""
SUPERVISOR_GRACE_S = 10.0
"""What a stop may take beyond `stop_s` before the supervisor itself is taken for lost."""


class Launched:
    """A ready server: `url` without a slash at the end, `pid` of the process that leads its group.

    log_tail() are its last lines (at most LOG_LINES), stdout and stderr as they came, cleaned.
    """

    def __init__(self, name: str, url: str, pid: int, log: Log, process: Process) -> None:
        self.url = url
        self.pid = pid
        self._name = name
        self._log = log
        self._process = process

    async def died(self) -> str:
        """Waits until the server's process ends by itself: how it ended, and its last lines."""
        code = await self._process.wait()
        self._log.read()
        return _died(self._name, code, tuple(self._log.lines), "while it was used")

    def log_tail(self) -> tuple[str, ...]:
        return tuple(self._log.lines)


@asynccontextmanager
async def launched(
    engine: Engine,
    config: ServerConfig,
    *,
    start_timeout_s: float = 1200,
    on_log: Callable[[str], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> AsyncIterator[Launched]:
    """The config's server, ready on entry, gone with all its children on exit.

    `on_log` gets every line of its output; `say` what was changed for the version at hand.
    UserError: the port is taken, the engine only attaches, or the config makes no command.
    ServerError: it exited before it was ready or was not ready in `start_timeout_s`, with its last
    lines.
    """
    from loadgen.errors import UserError
    from servers import fitting

    if engine.command is None:
        raise UserError(
            f"engine '{engine.name}' cannot be started by draftload; attach to one with --url."
        )
    fitting.reach(engine, config)
    port = _port(config.host, config.port)
    url = fitting.url(config.host, port)
    argv = await _asked(engine.command(config, port), engine, config, say)
    with _beside(argv, engine.files(config), config.files_dir) as words:
        sent = fitting.sent(words, config)
        async with _running(sent, config, engine.stop_s, on_log) as (process, pid, log):
            await _ready(url, engine, process, log, start_timeout_s)
            yield Launched(engine.name, url, pid, log, process)


async def _asked(
    argv: list[str], engine: Engine, config: ServerConfig, say: Callable[[str], None]
) -> list[str]:
    """argv as the executable takes it by its own help, which is asked for once.

    Where the help cannot be had, argv as it is: what is wrong with the executable, its start tells.
    """
    from servers import fitting

    question = engine.help(config)
    if not question:
        return argv
    key = (*question, *(f"{name}={value}" for name, value in config.env.items()))
    if key not in _HELP:
        with _beside(question, engine.files(config), config.files_dir) as words:
            _HELP[key] = await _printed(fitting.sent(words, config), config)
    text, why = _HELP[key]
    if why:
        say(f"{engine.name}: no flag was checked against its version: {why}.")
        return argv
    fits, notes = fitting.fitted(argv, text, engine, config)
    for note in notes:
        say(note)
    return fits


async def _printed(question: Sequence[str], config: ServerConfig) -> tuple[str, str]:
    """What a program prints, and why that is not to be used, or ""."""
    import asyncio

    lines: list[str] = []
    code = None
    async with _running(question, config, 1.0, lines.append) as (process, _, _):
        with suppress(TimeoutError):
            async with asyncio.timeout(HELP_TIMEOUT_S):
                code = await process.wait()
    if code is None:
        return "", f"its help was not there in {HELP_TIMEOUT_S:g} s"
    return "\n".join(lines), f"its help ended with code {code}" if code else ""


@contextmanager
def _beside(
    argv: Sequence[str], files: Mapping[str, str], parent: str | None = None
) -> Iterator[list[str]]:
    """argv with FILES made a folder (in `parent`) that holds `files` as long as the server runs.

    UserError: `parent` takes no folder.
    """
    if not files:
        yield list(argv)
        return
    import tempfile

    from loadgen.errors import UserError
    from loadgen.types import FILES

    try:
        made = tempfile.TemporaryDirectory(prefix="draftload-", dir=parent)
    except OSError as fault:
        raise UserError(
            f"cannot make a folder in {parent or 'the folder for temporary files'} (files_dir): "
            f"{fault.strerror}. Expected one of this machine that the server sees as well."
        ) from None
    with made as folder:
        if parent is not None:
            Path(folder).chmod(0o755)  # the server may be another user
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        yield [word.replace(FILES, folder) for word in argv]


def shell(argv: Sequence[str], files: Mapping[str, str], config: ServerConfig) -> str:
    """What a shell takes in place of `launched`: the files are written first, then the command.

    A secret is not shown: its variable is taken from the user's own environment instead.
    """
    import shlex

    from loadgen.types import FILES
    from loadgen.written import is_secret, masked
    from servers import fitting

    inside = "" if config.files_dir is None else f" -p {shlex.quote(config.files_dir)}"
    lines = [f"files=$(mktemp -d{inside})"] if files else []
    for name, text in files.items():
        lines.append(f"cat > \"$files\"/{shlex.quote(name)} <<'END'\n{text}END")
    words = [
        f'{key}="${key}"' if is_secret(key) else f"{key}={shlex.quote(value)}"
        for key, value in config.env.items()
    ]
    for word in fitting.sent(masked(argv), config):
        parts = word.split(FILES) if files else [word]
        quoted = [shlex.quote(part) if part or len(parts) == 1 else "" for part in parts]
        words.append('"$files"'.join(quoted))
    return "\n".join([*lines, " ".join(words)])


@asynccontextmanager
async def _running(
    argv: Sequence[str], config: ServerConfig, stop_s: float, on_log: Callable[[str], None] | None
) -> AsyncIterator[tuple[Process, int, Log]]:
    """The supervisor's process, the server's pid (0 where it could not be run), and its log.

    The output is read in callbacks, not in a task: a server must never wait for us to read.
    """
    import asyncio

    from loadgen.errors import UserError
    from loadgen.written import hide, secret_values

    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    secrets = secret_values(argv, os.environ | config.env)
    log = Log(reader, on_log, lambda line: hide(line, secrets))

    def drain() -> None:
        if log.read():
            loop.remove_reader(reader)

    loop.add_reader(reader, drain)
    try:
        try:
            process = await _supervisor(argv, config, stop_s, theirs, writer)
        except (OSError, ValueError) as fault:  # too long a list, a NUL, an "=" in a name
            raise UserError(f"cannot start {argv[0]!r} with these arguments: {fault}.") from None
        finally:
            theirs.close()
            os.close(writer)
        pid = 0
        try:
            pid = int(await loop.sock_recv(ours, 32) or b"0")
            yield process, pid, log
        finally:
            ours.close()
            await _ended(process, pid, stop_s)
    finally:
        loop.remove_reader(reader)
        log.read()
        log.close()
        os.close(reader)
        ours.close()


async def _supervisor(
    argv: Sequence[str], config: ServerConfig, stop_s: float, stdin: socket.socket, output: int
) -> Process:
    import asyncio

    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", __file__, str(stop_s)),
        *argv,
        stdin=stdin.fileno(),
        stdout=output,
        stderr=output,
        env=environment(argv, config.env),
        start_new_session=True,
    )


def environment(argv: Sequence[str], extra: dict[str, str]) -> dict[str, str]:
    """os.environ and the config's own; for a server of ours, also where our packages lie.

    Only for ours (`python -P -m servers.X`): another engine's Python must never see our packages.
    """
    env = os.environ | extra
    if list(argv[:3]) == [sys.executable, "-P", "-m"]:
        ours = str(Path(__file__).resolve().parent.parent)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (ours, env.get("PYTHONPATH"))))
    return env


def _port(host: str, wanted: int) -> int:
    """A free port, or the wanted one. UserError: another process listens there, or no such host.

    Without the check, that process would answer for ours and be measured in its place.
    """
    from loadgen.errors import UserError

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted))
        except (socket.gaierror, UnicodeError) as fault:  # the latter: no name at all, as a..b
            raise UserError(f"host = {host!r} is not known here: {fault}.") from None
        except (OSError, OverflowError) as fault:
            if isinstance(fault, OSError) and fault.errno == errno.EADDRNOTAVAIL:
                return _port_elsewhere(host, wanted)
            why = fault.strerror if isinstance(fault, OSError) else str(fault)
            raise UserError(
                f"port {wanted} cannot be used: {why}. Stop what listens there, or give another "
                "port (0 picks a free one)."
            ) from None
        port: int = probe.getsockname()[1]
        return port


def _port_elsewhere(host: str, wanted: int) -> int:
    """The wanted port of another machine, where it can only be seen that nobody answers yet."""
    from loadgen.errors import UserError

    if not wanted:
        raise UserError(
            f"host = {host!r} is no address of this machine, so no free port can be picked there: "
            "give `port`."
        )
    with suppress(OSError), socket.create_connection((host, wanted), ELSEWHERE_TIMEOUT_S):
        raise UserError(
            f"port {wanted} of {host} cannot be used: something answers there already. Stop it, "
            "or give another port."
        )
    return wanted


async def _ready(
    url: str, engine: Engine, process: Process, log: Log, start_timeout_s: float
) -> None:
    """Until ready_path answers 200 while the process lives. ServerError: it never did."""
    import asyncio

    import aiohttp

    from loadgen.errors import ServerError

    deadline = perf_counter() + start_timeout_s
    pause = FIRST_POLL_S
    exited = asyncio.ensure_future(process.wait())
    try:
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=POLL_TIMEOUT_S),
            connector=aiohttp.TCPConnector(force_close=True),
        ) as session:
            while True:
                answered = await _answers(session, url + engine.ready_path)
                await asyncio.wait({exited}, timeout=0 if answered else pause)
                if exited.done():
                    log.read()
                    raise ServerError(_died(engine.name, exited.result(), tuple(log.lines)))
                if answered:
                    return
                if perf_counter() > deadline:
                    raise ServerError(_late(engine.name, start_timeout_s, tuple(log.lines)))
                pause = min(pause * 1.5, LONGEST_POLL_S)
    finally:
        exited.cancel()
        with suppress(asyncio.CancelledError):
            await exited


async def _answers(session: ClientSession, url: str) -> bool:
    import aiohttp

    try:
        async with session.get(url) as response:
            return response.status == 200
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False


async def _ended(process: Process, pid: int, stop_s: float) -> None:
    """Until the supervisor has ended the server. Our end of the socket is closed by now."""
    import asyncio

    try:
        async with asyncio.timeout(stop_s + SUPERVISOR_GRACE_S):
            code = await process.wait()
    except TimeoutError:
        process.kill()
        code = await process.wait()
    if code < 0 and pid:
        # The supervisor was killed itself (out of memory, by hand): its task falls to us.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


# ── what a server says ───────────────────────────────────────────────────────────────────────────


class Log:
    """The last LOG_LINES lines of a pipe; `on_line` gets each as it is complete.

    `mask` takes secrets out: servers print the arguments that they were started with.
    """

    def __init__(
        self,
        pipe: int = -1,
        on_line: Callable[[str], None] | None = None,
        mask: Callable[[str], str] = str,
    ) -> None:
        self._pipe = pipe
        self._mask = mask
        self.lines: deque[str] = deque(maxlen=LOG_LINES)
        self._on_line = on_line
        self._rest = b""

    def read(self) -> bool:
        """Takes all that is in the pipe, which must not block. True at its end."""
        with suppress(BlockingIOError):
            while data := os.read(self._pipe, 1 << 16):
                self.feed(data)
            return True
        return False

    def feed(self, data: bytes) -> None:
        # Progress bars end their lines in CR alone: each state is a line.
        *lines, rest = re.split(rb"\r\n|\n|\r(?!\Z)", self._rest + data)
        self._rest = rest[-MAX_LINE:]
        for line in lines:
            self._add(line)

    def close(self) -> None:
        """The last line, if it has no end."""
        if self._rest:
            self._add(self._rest)
            self._rest = b""

    def _add(self, raw: bytes) -> None:
        line = self._mask(clean(raw[:MAX_LINE].decode("utf-8", "replace")))
        if line:
            self.lines.append(line)
            if self._on_line is not None:
                self._on_line(line)


# ECMA-48: CSI, OSC and the other string sequences, two-byte escapes; then whatever control is left.
_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0a-\x1f\x7f-\x9f]"
)


def clean(line: str) -> str:
    """The line without terminal control, as it may be shown to a terminal."""
    return _ESCAPES.sub("", line).rstrip()


def _died(name: str, code: int, lines: Sequence[str], when: str = "before it was ready") -> str:
    how = (
        f"with code {code}"
        if 0 <= code <= 128
        else f"by signal {code - 128 if code > 0 else -code}"
    )
    cause = explain(lines)
    if not cause and code == 128 + signal.SIGKILL:
        cause = "It was killed: by the kernel for want of memory, most often."
    if not cause and code == 0 and "ready" in when:
        cause = (
            "It ended as if its work were done: see that the command starts a server that stays."
        )
    return f"{name} ended {how} {when}. {cause}".rstrip() + _said(lines)


def _late(name: str, start_timeout_s: float, lines: Sequence[str]) -> str:
    advice = "A large model may take longer to load or compile: give more with --start-timeout."
    text = f"{name} was not ready within {start_timeout_s:g} s. {advice} {explain(lines)}"
    return text.rstrip() + _said(lines)


def _said(lines: Sequence[str]) -> str:
    if not lines:
        return " It printed nothing."
    return "\nIts last lines:\n" + "\n".join(f"  {line}" for line in lines[-SHOWN_LINES:])


# What an engine prints → what it means. First match wins: the particular before the general.
# Seen on llama.cpp b11549 and vLLM 0.32, read in SGLang 0.5.23, else the messages of Python,
# argparse and the kernel.
_CAUSES = (
    (
        r"draftload: cannot run ",
        "There is no such program: check `executable`, or install the engine.",
    ),
    (
        r"address already in use|EADDRINUSE|couldn't bind|failed to bind",
        "The port is taken by another process: give another port, or 0 for a free one.",
    ),
    (
        r"out of memory|OutOfMemoryError|bad_alloc|MemoryError|Cannot allocate memory"
        r"|failed to allocate|unable to allocate|No available memory for the cache"
        r"|Not enough memory\. Please try to increase --mem-fraction-static",
        "It ran out of memory: take a smaller model, max_model_len or max_running.",
    ),
    (
        r"unrecognized arguments?:|invalid argument: -|unknown argument|unknown option"
        r"|no such option|argument has been removed|error: argument \S+: invalid choice"
        r"|Unknown speculative algorithm",
        "It does not know an option that it was given: engine versions differ; see its --help.",
    ),
    (
        r"gated repo|40[13] Client Error|Access to model .* is restricted",
        "The model is gated: ask its owner for access and log in, or give a local copy.",
    ),
    (
        r"invalid magic|not within the file bounds|corrupted or incomplete|wrong number of tensors"
        r"|HeaderTooLarge|SafetensorError|unsupported model|unknown model arch",
        "The model file is damaged, cut short, or of a kind that this engine cannot read.",
    ),
    (
        r"failed to open GGUF|failed to load model|not a valid model identifier|RepositoryNotFound"
        r"|does not appear to have a file|LocalEntryNotFound",
        "The model was not found where it was looked for: check `model` and `draft_model`.",
    ),
    (
        r"No module named",
        "A Python package is missing there: install the engine, or set `executable` to its Python.",
    ),
    (r"No such file or directory", "A file was not found: check the paths in the server's config."),
    (r"only supports CUDA device", "That method needs an NVIDIA GPU, and the server sees none."),
    (
        r"Received sigquit from a child process",
        "One of its processes failed, and SGLang then kills itself: the reason stands above that.",
    ),
)
_COMPILED = tuple((re.compile(pattern, re.IGNORECASE), cause) for pattern, cause in _CAUSES)


def explain(lines: Sequence[str]) -> str:
    """The probable cause of a failed start in one sentence, "" when the lines do not tell."""
    text = "\n".join(lines)
    return next((cause for pattern, cause in _COMPILED if pattern.search(text)), "")


# ── the supervisor ───────────────────────────────────────────────────────────────────────────────


def supervise(stop_s: float, argv: Sequence[str]) -> int:
    """Runs `argv` until it ends or our stdin does; its exit code, 128 + n for signal n.

    Writes the server's pid to stdin, which is a socket; 127 and a line when it cannot be run.
    """
    _adopt_orphans()
    try:
        server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
    except (OSError, ValueError) as fault:
        why = fault.strerror if isinstance(fault, OSError) else fault
        print(f"draftload: cannot run '{argv[0]}': {why}", file=sys.stderr, flush=True)
        return 127

    def end(number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(server.pid, number)

    ended = threading.Event()

    def watch() -> None:
        with suppress(OSError):
            os.write(0, str(server.pid).encode())
            while os.read(0, 1):
                pass
        end(signal.SIGTERM)
        if not ended.wait(stop_s):
            end(signal.SIGKILL)

    signal.signal(signal.SIGTERM, lambda *_: end(signal.SIGTERM))
    threading.Thread(target=watch, daemon=True).start()
    code = server.wait()
    ended.set()
    end(signal.SIGKILL)  # its children, should any have outlived it
    _end_orphans()
    return code if code >= 0 else 128 - code


def _adopt_orphans() -> None:
    """Whoever the server leaves behind becomes our child, whatever its group (Linux alone).

    MPI's ranks, TensorRT-LLM's under tensor parallelism, are children of a daemon in groups of
    their own.
    """
    with suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER, linux/prctl.h


def _end_orphans() -> None:
    """Until we have no child: each that is killed leaves us its own."""
    with suppress(ChildProcessError):
        while True:
            try:
                tasks = [t.read_text() for t in Path("/proc/self/task").glob("*/children")]
            except OSError:  # a thread of ours ended meanwhile, and left its children to another
                continue
            for pid in " ".join(tasks).split():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(int(pid), signal.SIGKILL)
            os.waitpid(-1, 0)


def _main() -> NoReturn:
    sys.exit(supervise(float(sys.argv[1]), sys.argv[2:]))


if __name__ == "__main__":
    _main()
