"""An engine's command as the executable at hand takes it: its version's flags, its prefix's ways.

Facts are data of each ENGINE: which flags may be left out, which were spelled otherwise. Words that
a user wrote (`executable`, `extra_args`) are left as they are. Must not: start anything, know an
engine.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from loadgen.errors import UserError, nearest
from loadgen.types import FILES, Engine, ServerConfig

_FLAG = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")


def fitted(
    argv: Sequence[str], help_text: str, engine: Engine, config: ServerConfig
) -> tuple[list[str], list[str]]:
    """argv with the flags that `help_text` names, and a line for each kind of change.

    A text that does not name --port lists no flags, and changes nothing. UserError: a flag that
    cannot be left out is not known.
    """
    known = set(_FLAG.findall(help_text))
    if "--port" not in known:
        return list(argv), [f"{engine.name}: its --help lists no flags, so none was checked."]
    first, last = len(config.executable) or 1, len(argv) - len(config.extra_args)
    fits, left_out, notes = list(argv[:first]), list[str](), list[str]()
    older = dict(engine.respelled)
    dropped = False
    for word in argv[first:last]:
        is_flag = _FLAG.fullmatch(word) is not None
        if dropped and not is_flag:
            continue
        dropped = is_flag and word not in known and word in engine.optional
        if dropped:
            left_out.append(word)
        elif not is_flag or word in known:
            fits.append(word)
        elif older.get(word) in known:
            fits.append(older[word])
            notes.append(f"{engine.name}: {word} is spelled {older[word]} in this version.")
        else:
            raise UserError(_unknown(word, known, engine, argv[first - 1]))
    if left_out:
        flags = ", ".join(left_out)
        notes.append(f"{engine.name}: this version does not know {flags}: left out.")
    return [*fits, *argv[last:]], notes


def _unknown(flag: str, known: set[str], engine: Engine, program: str) -> str:
    return (
        f"{program} does not know {flag}, which this config needs: its --help does not name it"
        f"{nearest(flag, sorted(known)) or '.'} Give a version of {engine.name} that has it as "
        "`executable`, or a config that does without."
    )


# ── prefixes ─────────────────────────────────────────────────────────────────────────────────────

_ELSEWHERE = frozenset(["docker", "podman", "nerdctl", "kubectl", "ssh"])


def _programs(config: ServerConfig) -> set[str]:
    """What stands before the engine's own program: docker of `/usr/bin/docker run … vllm`."""
    return {Path(word).name for word in config.executable[:-1]}


def sent(argv: Sequence[str], config: ServerConfig) -> list[str]:
    """argv as the prefix's program needs it: ssh joins its words with spaces, for a shell to part.

    Only the words after `executable` are quoted: in it a user may write for that shell.
    """
    if "ssh" not in _programs(config):
        return list(argv)
    first = len(config.executable)
    return [*argv[:first], *map(shlex.quote, argv[first:])]


def reach(engine: Engine, config: ServerConfig) -> None:
    """UserError: the server could not see the files that its command names."""
    elsewhere = sorted(_programs(config) & _ELSEWHERE)
    if not elsewhere or config.files_dir is not None or not engine.files(config):
        return
    if any(FILES in word for word in config.executable):
        return
    names = ", ".join(engine.files(config))
    mount = f' To mount it: "-v", "{FILES}:{FILES}:ro".'
    raise UserError(
        f"{engine.name} behind {elsewhere[0]} would not see {names}, which draftload writes in a "
        f"folder of this machine.{mount if elsewhere[0] not in ('ssh', 'kubectl') else ''} Else "
        "give files_dir, a folder that both sides see under one path. With neither, run what "
        "`draftload serve F.toml --print` shows over there, `executable` without its prefix, and "
        "measure it with --url."
    )


def url(host: str, port: int) -> str:
    """Where draftload finds a server that bound `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
