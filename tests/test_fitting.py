"""Commands fitted to the version and the prefix at hand, by table."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import msgspec
import pytest

from loadgen.errors import UserError
from loadgen.types import Engine, ServerConfig, SpecConfig
from loadgen.written import read_toml
from servers import fitting, launch, llamacpp, sglang, trtllm, vllm

DATA = Path(__file__).parent / "data"
CONFIGS = Path(vllm.__file__).parent / "configs"
ENGINE = Engine(
    name="e",
    wires={},
    optional=frozenset(["--metrics-of-each", "--cache-report"]),
    respelled=(("--config", "--old-config"),),
)
CONFIG = ServerConfig(engine="e", model="m")
ASKED = ["e", "serve", "m", "--port", "1", "--cache-report", "--metrics-of-each", "detailed"]
ASKED += ["--config", "f", "-np", "4"]


def knows(*flags: str) -> str:
    """A help page as argparse, click and llama-server write it."""
    first, *rest = flags
    lines = [
        f"usage: e [-h] [{first} N]",
        *(f"  -x, {flag} TEXT   what --it does" for flag in rest),
    ]
    return "\n".join(lines)


ALL = ("--port", "--cache-report", "--metrics-of-each", "--config", "--old-config", "-np")


@pytest.mark.parametrize(
    ("known", "command", "notes"),
    [
        (ALL, " ".join(ASKED), []),
        (
            ("--port", "--config", "-np"),
            "e serve m --port 1 --config f -np 4",
            ["e: this version does not know --cache-report, --metrics-of-each: left out."],
        ),
        (
            ("--port", "--cache-report", "--metrics-of-each", "--old-config", "-np"),
            "e serve m --port 1 --cache-report --metrics-of-each detailed --old-config f -np 4",
            ["e: --config is spelled --old-config in this version."],
        ),
        # A longer flag is another flag.
        (
            ("--port", "--cache-reports", "--metrics-of-each-x", "--config", "-np"),
            "e serve m --port 1 --config f -np 4",
            ["e: this version does not know --cache-report, --metrics-of-each: left out."],
        ),
        (
            ("--api", "--groups"),
            " ".join(ASKED),
            ["e: its --help lists no flags, so none was checked."],
        ),
    ],
)
def test_what_a_version_does_not_know(
    known: tuple[str, ...], command: str, notes: list[str]
) -> None:
    assert fitting.fitted(ASKED, knows(*known), ENGINE, CONFIG) == (command.split(), notes)


@pytest.mark.parametrize("missing", ["-np", "--config"])
def test_a_flag_that_is_needed_is_refused_by_name(missing: str) -> None:
    known = [flag for flag in ALL if flag not in (missing, "--old-config")]
    with pytest.raises(UserError, match=f"^e does not know {missing}, which this config needs"):
        fitting.fitted(ASKED, knows(*known), ENGINE, CONFIG)


def test_words_of_the_user_are_left_alone() -> None:
    config = ServerConfig(
        engine="e", model="m", executable=("docker", "--cache-report", "e"), extra_args=("--new",)
    )
    argv = ["docker", "--cache-report", "e", "serve", "--port", "1", "--cache-report", "--new"]
    assert fitting.fitted(argv, knows("--port"), ENGINE, config)[0] == [
        *("docker", "--cache-report", "e", "serve", "--port", "1", "--new")
    ]


LISTED = (DATA / "vllm-flags-0.32.0.txt").read_text()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("vllm-*.toml")), ids=lambda path: path.stem)
def test_a_real_vllm_knows_every_flag_of_ours(path: Path) -> None:
    config = read_toml(path, ServerConfig)
    argv = vllm.command(config, 1)
    assert fitting.fitted(argv, LISTED, vllm.ENGINE, config) == (argv, [])


SPECULATES = {
    "vllm": (vllm.ENGINE, "--speculative-config"),
    "sglang": (sglang.ENGINE, "--speculative-algorithm"),
    "llamacpp": (llamacpp.ENGINE, "--spec-type"),
}


@pytest.mark.parametrize("name", SPECULATES)
def test_an_engine_without_speculation_is_refused_and_its_baseline_not(name: str) -> None:
    engine, flag = SPECULATES[name]
    command = engine.command
    assert command is not None
    config = ServerConfig(engine=name, model="m", max_running=8, executable=("x",))
    argv = command(config, 1)
    listed = "\n".join(
        word for word in argv if word.startswith("-") and word not in engine.optional
    )
    fits, notes = fitting.fitted(argv, listed, engine, config)
    assert [word for word in fits if word.startswith("-")] == listed.splitlines()
    assert len(notes) == 1
    spec = SpecConfig(method="ngram", draft_depth=3)
    argv = command(msgspec.structs.replace(config, spec=spec), 1)
    with pytest.raises(UserError, match=f"does not know {flag}"):
        fitting.fitted(argv, listed, engine, config)


def test_older_trtllm_takes_its_yaml_by_the_older_name() -> None:
    config = ServerConfig(engine="trtllm", model="m", max_running=8, name="n")
    argv = trtllm.command(config, 1)
    listed = "--host --port --backend --max_batch_size --tp_size --extra_llm_api_options"
    fits, notes = fitting.fitted(argv, listed, trtllm.ENGINE, config)
    assert fits[-2:] == ["--extra_llm_api_options", "{files}/trtllm.yaml"]
    assert "--served_model_name" not in fits
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("engine", "executable", "question"),
    [
        (vllm.ENGINE, (), "vllm serve --help=all"),
        (vllm.ENGINE, ("ssh", "h", "vllm"), "ssh h vllm serve --help=all"),
        (
            vllm.ENGINE,
            ("python", "-m", "vllm.entrypoints.openai.api_server"),
            "python -m vllm.entrypoints.openai.api_server --help=all",
        ),
        (sglang.ENGINE, (), "sglang serve --help"),
        (
            sglang.ENGINE,
            ("python", "-m", "sglang.launch_server"),
            "python -m sglang.launch_server --help",
        ),
        (trtllm.ENGINE, (), "trtllm-serve serve --help"),
        (llamacpp.ENGINE, ("/b/llama-server",), "/b/llama-server --help"),
        (llamacpp.ENGINE, (), ""),  # the embedded program
    ],
)
def test_what_is_asked(engine: Engine, executable: tuple[str, ...], question: str) -> None:
    config = ServerConfig(engine=engine.name, model="m", executable=executable)
    assert engine.help(config) == question.split()


# ── prefixes ─────────────────────────────────────────────────────────────────────────────────────

SPEC = SpecConfig(method="ngram", draft_depth=3)


def behind(*executable: str, engine: str = "vllm", files_dir: str | None = None) -> ServerConfig:
    return ServerConfig(
        engine=engine,
        model="it's",
        spec=SPEC,
        max_running=8,
        executable=executable,
        files_dir=files_dir,
    )


@pytest.mark.parametrize(
    "executable",
    [("ssh", "-tt", "h", "vllm"), ("/usr/bin/ssh", "h", "vllm"), ("nice", "ssh", "h", "vllm")],
)
def test_ssh_gets_words_that_its_shell_makes_one_again(executable: tuple[str, ...]) -> None:
    config = behind(*executable)
    argv = vllm.command(config, 1)
    sent = fitting.sent(argv, config)
    first = len(executable)
    assert sent[:first] == list(executable)
    far = " ".join(sent[first:])  # what sshd hands to the shell
    shown = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {far}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert shown.stdout.split("\0")[:-1] == argv[first:]


@pytest.mark.parametrize(
    "executable",
    [
        (),
        ("vllm",),
        ("docker", "run", "I", "vllm"),
        ("kubectl", "exec", "p", "--", "vllm"),
        ("ssh",),
    ],
)
def test_others_get_the_words_as_they_are(executable: tuple[str, ...]) -> None:
    config = behind(*executable)
    argv = vllm.command(config, 1)
    assert fitting.sent(argv, config) == argv


def test_the_printed_ssh_command_is_quoted_for_both_shells() -> None:
    config = behind("ssh", "h", "trtllm-serve", engine="trtllm", files_dir="/a b")
    text = launch.shell(trtllm.command(config, 1), trtllm.files(config), config)
    first, *_, last = text.splitlines()
    assert first == "files=$(mktemp -d -p '/a b')"
    near = shlex.split(last.replace('"$files"', "/a\\ b/tmp.1"))
    assert shlex.split(" ".join(near[2:]))[:2] == ["trtllm-serve", "it's"]
    assert shlex.split(" ".join(near[2:]))[-2:] == ["--config", "/a b/tmp.1/trtllm.yaml"]


MOUNT = ("docker", "run", "-v", "{files}:{files}:ro", "I", "trtllm-serve")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (behind("docker", "run", "I", "trtllm-serve", engine="trtllm"), 'To mount it: "-v", '),
        (behind("/usr/bin/podman", "run", "I", "trtllm-serve", engine="trtllm"), "behind podman"),
        (behind("ssh", "h", "trtllm-serve", engine="trtllm"), "give files_dir"),
        (behind("kubectl", "exec", "p", "--", "trtllm-serve", engine="trtllm"), "--print"),
    ],
)
def test_a_yaml_that_the_server_would_not_see_is_refused(config: ServerConfig, said: str) -> None:
    with pytest.raises(UserError) as caught:
        fitting.reach(trtllm.ENGINE, config)
    assert said in str(caught.value)
    assert ("-v" in str(caught.value)) == (config.executable[0] not in ("ssh", "kubectl"))


@pytest.mark.parametrize(
    ("engine", "config"),
    [
        (trtllm.ENGINE, behind(*MOUNT, engine="trtllm")),
        (trtllm.ENGINE, behind("ssh", "h", "trtllm-serve", engine="trtllm", files_dir="/shared")),
        (trtllm.ENGINE, behind("/venv/bin/trtllm-serve", engine="trtllm")),
        (trtllm.ENGINE, behind(engine="trtllm")),
        (vllm.ENGINE, behind("docker", "run", "I", "vllm")),
    ],
)
def test_a_command_that_reaches_its_files_is_let_pass(engine: Engine, config: ServerConfig) -> None:
    fitting.reach(engine, config)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8"),
        ("0.0.0.0", "http://127.0.0.1:8"),
        ("::", "http://[::1]:8"),
        ("fd00::7", "http://[fd00::7]:8"),
        ("gpu1.example", "http://gpu1.example:8"),
    ],
)
def test_where_a_server_is_found(host: str, url: str) -> None:
    assert fitting.url(host, 8) == url


@pytest.mark.parametrize("name", ["vllm", "sglang", "trtllm", "llamacpp"])
def test_every_engine_binds_the_host(name: str) -> None:
    engine = {e.ENGINE.name: e.ENGINE for e in (vllm, sglang, trtllm, llamacpp)}[name]
    assert engine.command is not None
    argv = engine.command(ServerConfig(engine=name, model="m", host="10.0.0.7", max_running=8), 9)
    assert argv[argv.index("--host") :][:4] == ["--host", "10.0.0.7", "--port", "9"]
    assert "127.0.0.1" not in argv
