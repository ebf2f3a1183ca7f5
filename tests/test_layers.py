"""The layers of the design, held by reading every module's source with `ast`.

The rules are the tables below. A module may be missing from the tree, but a module in the tree
must stand in a layer. Each rule is proved to bite on a few lines of source that break it.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("loadgen", "servers", "scenarios", "reports")


def _modules(package: str, names: str) -> frozenset[str]:
    return frozenset(f"{package}.{name}" for name in names.split())


# ── the rules, as data ───────────────────────────────────────────────────────────────────────────

LAYERS: Mapping[str, frozenset[str]] = {
    "ground": _modules("loadgen", "errors types") | {"loadgen"},
    "pure": _modules(
        "loadgen",
        "acceptance answers arrivals bounds breakeven capacity checks compare gates matrix metrics"
        " misstatement pareto plan protocol sides slo stats stepcost store summarize tokens"
        " written",
    ),
    "edge": _modules("loadgen", "embed scrape transport"),
    "loops": _modules("loadgen", "measure monitor preflight runner sweep"),
    "cli": _modules("loadgen", "cli"),
}
"""Modules of loadgen by layer, lowest first. The other packages are a layer each."""

MAY_IMPORT: Mapping[str, tuple[str, ...]] = {
    "ground": (),
    "pure": ("ground", "pure"),
    "edge": ("ground", "pure", "edge"),
    "loops": ("ground", "pure", "edge", "loops"),
    "servers": ("ground", "pure", "servers"),
    "scenarios": ("ground", "pure", "scenarios"),
    "reports": ("ground", "pure", "reports"),
    "cli": ("ground", "pure", "edge", "loops", "servers", "scenarios", "reports"),
}
"""Of ours. No row names "cli": nobody imports it."""

ASYNC = LAYERS["edge"] | LAYERS["loops"] | LAYERS["cli"] | _modules("servers", "launch simulator")
"""Where `async` and `await` may stand."""

FOREIGN: Mapping[str, tuple[frozenset[str], bool]] = {
    "asyncio": (ASYNC, False),
    "aiohttp": (ASYNC, False),
    "uvloop": (_modules("loadgen", "cli") | _modules("servers", "simulator"), True),
    "numpy": (LAYERS["pure"] | _modules("scenarios", "diversity embedders"), True),
    "transformers": (_modules("loadgen", "tokens"), True),
    "openai": (_modules("loadgen", "preflight"), True),
    "xllamacpp": (_modules("servers", "llamacpp"), True),
    "vllm": (frozenset(), True),
    "sglang": (frozenset(), True),
    "tensorrt_llm": (frozenset(), True),
    "torch": (frozenset(), True),
    "onnxruntime": (_modules("scenarios", "embedders"), True),
    "importlib": (_modules("loadgen", "cli tokens") | _modules("scenarios", "embedders"), False),
}
"""Package → who may import it, and whether only lazily: in a function or under TYPE_CHECKING."""

NO_ENGINE = _modules("servers", "launch fitting series simulated dialects pages")
NO_RENDER = _modules(
    "reports",
    "units page pareto live progress exposition prometheus datasets monitor_live monitor_page"
    " grafana.boards",
)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Import:
    """One import. `lazy`: not run when its module is imported; `typing`: never run."""

    target: str
    line: int
    lazy: bool
    typing: bool


def found() -> dict[str, ast.Module]:
    """Every module of the four packages, parsed."""
    trees = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            dotted = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            name = dotted.removesuffix(".__init__")
            trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


TREES = found()
OURS = frozenset(TREES).union(*LAYERS.values())


def layer(module: str) -> str | None:
    package = module.partition(".")[0]
    if package != "loadgen":
        return package if package in PACKAGES else None
    return next((name for name, members in LAYERS.items() if module in members), None)


def _targets(node: ast.Import | ast.ImportFrom) -> list[str]:
    """`from loadgen import preflight` means the module; `from loadgen import __version__` not."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = "." * node.level + (node.module or "")
    full = [f"{base}.{alias.name}" for alias in node.names]
    return [name if name in OURS else base for name in full]


def _only_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(node: ast.AST, lazy: bool = False, typing: bool = False) -> Iterator[Import]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        for target in dict.fromkeys(_targets(node)):
            yield Import(target, node.lineno, lazy or typing, typing)
    inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                hidden = typing or (field == "body" and _only_typing(node))
                yield from imports(child, inside, hidden)


# ── the rules, as functions ──────────────────────────────────────────────────────────────────────


def in_a_layer(module: str, tree: ast.Module) -> Iterator[str]:
    if layer(module) is None:
        yield "stands in no layer: give it a row in LAYERS here and in the design"


def documented(module: str, tree: ast.Module) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield "has no docstring: say what it is for and what it must not do"


def layered(module: str, tree: ast.Module) -> Iterator[str]:
    allowed = MAY_IMPORT.get(layer(module) or "", ())
    for one in imports(tree):
        if one.target.startswith("."):
            yield f"line {one.line} imports {one.target}: write the package out"
        elif one.target.partition(".")[0] not in PACKAGES:
            continue
        elif (other := layer(one.target)) not in allowed:
            yield (
                f"line {one.line} imports {one.target} ({other}): {layer(module)} may import "
                f"only {', '.join(allowed) or 'nothing of ours'}"
            )


def foreign(module: str, tree: ast.Module) -> Iterator[str]:
    for one in imports(tree):
        who, lazily = FOREIGN.get(one.target.partition(".")[0], (frozenset({module}), False))
        if module not in who:
            yield f"line {one.line} imports {one.target}: only {sorted(who) or 'nobody'} may"
        elif lazily and not one.lazy:
            yield f"line {one.line} imports {one.target} at module level: do it in a function"


def awaits(module: str, tree: ast.Module) -> Iterator[str]:
    if module in ASYNC:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith):
            yield f"line {node.lineno} is async: decide in plain functions, await at the edge"


def speaks(module: str, tree: ast.Module) -> Iterator[str]:
    """An engine file has ENGINE, a report file `render(study: Study) -> str`."""
    package, _, name = module.partition(".")
    if package == "servers" and name and module not in NO_ENGINE:
        assigned = {
            ast.unparse(target)
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        }
        if "ENGINE" not in assigned:
            yield "has no ENGINE: a file under servers/ is an engine"
    if package == "reports" and name and module not in NO_RENDER:
        heads = {
            f"{node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.returns is not None
        }
        if "render(study: Study) -> str" not in heads:
            yield "has no render(study: Study) -> str: a file under reports/ is a format"


Rule = Callable[[str, ast.Module], Iterator[str]]
RULES: tuple[Rule, ...] = (in_a_layer, documented, layered, foreign, awaits, speaks)


def faults(module: str, tree: ast.Module) -> list[str]:
    return [f"{module} {fault}" for rule in RULES for fault in rule(module, tree)]


# ── the tests ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("module", TREES)
def test_module_keeps_the_rules(module: str) -> None:
    assert faults(module, TREES[module]) == []


def test_the_four_packages_are_read() -> None:
    assert {name for name in TREES if "." not in name} == set(PACKAGES)
    assert {"loadgen.types", "loadgen.transport", "reports.units"} <= set(TREES)


def test_nothing_of_ours_imports_itself_round_a_corner() -> None:
    graph = {
        module: {i.target for i in imports(tree) if i.target in TREES and not i.typing} - {module}
        for module, tree in TREES.items()
    }
    assert tuple(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


DOC = '"""What it is for."""\n'


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("loadgen.helpers", DOC, "in no layer"),
        ("servers.vllm", "ENGINE = 1", "has no docstring"),
        ("loadgen.types", DOC + "import loadgen.errors", "may import only nothing of ours"),
        ("loadgen.errors", DOC + "from loadgen import __version__", "imports loadgen (ground)"),
        ("loadgen.plan", DOC + "from loadgen.runner import Runner", "imports loadgen.runner"),
        ("loadgen.plan", DOC + "def f():\n    from loadgen import scrape", "loadgen.scrape (edge)"),
        ("loadgen.scrape", DOC + "from loadgen import preflight", "imports loadgen.preflight"),
        ("loadgen.runner", DOC + "import servers", "imports servers"),
        ("loadgen.sweep", DOC + "from reports import table", "imports reports.table"),
        ("loadgen.measure", DOC + "from loadgen.cli import main", "imports loadgen.cli (cli)"),
        ("reports.units", DOC + "from loadgen.transport import f", "imports loadgen.transport"),
        ("reports.units", DOC + "from scenarios import prompts", "imports scenarios"),
        ("servers.launch", DOC + "from loadgen.runner import f", "imports loadgen.runner"),
        ("scenarios.prompts", DOC + "from . import data", "write the package out"),
        ("loadgen.plan", DOC + "import asyncio", "imports asyncio: only"),
        ("reports.units", DOC + "from aiohttp import web", "imports aiohttp: only"),
        ("loadgen.stats", DOC + "import numpy as np", "numpy at module level"),
        ("loadgen.runner", DOC + "def f():\n    import numpy.random", "imports numpy.random: only"),
        ("loadgen.tokens", DOC + "from transformers import x", "transformers at module level"),
        ("servers.llamacpp", DOC + "import xllamacpp\nENGINE = 1", "xllamacpp at module level"),
        (
            "servers.vllm",
            DOC + "def f():\n    import vllm\nENGINE = 1",
            "imports vllm: only nobody",
        ),
        ("loadgen.checks", DOC + "import torch.cuda", "imports torch.cuda: only nobody"),
        ("loadgen.summarize", DOC + "import importlib", "imports importlib: only"),
        ("loadgen.plan", DOC + "async def f(): ...", "line 2 is async"),
        ("servers.vllm", DOC + "async def f():\n    await x\nENGINE = 1", "line 3 is async"),
        ("servers.new", DOC, "has no ENGINE"),
        ("reports.new", DOC + "def render(study): ...", "has no render"),
        (
            "loadgen.plan",
            DOC + "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import loadgen.cli",
            "imports loadgen.cli",
        ),
        (
            "loadgen.stats",
            DOC + "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    x = 1\n"
            "else:\n    import numpy",
            "numpy at module level",
        ),
    ],
)
def test_rules_bite(module: str, source: str, fault: str) -> None:
    assert fault in "\n".join(faults(module, ast.parse(source)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("loadgen.stats", "if TYPE_CHECKING:\n    import numpy as np"),
        ("loadgen.stats", "def f():\n    import numpy as np"),
        ("loadgen.store", "from loadgen import __version__"),
        ("loadgen.preflight", "import asyncio\nasync def f():\n    await asyncio.sleep(0)"),
        ("servers.simulator", "from servers import vllm\nENGINE = vllm.ENGINE"),
        ("servers.launch", "import asyncio\nimport vllm_but_not_really"),
        ("reports.new", "from loadgen.types import Study\ndef render(study: Study) -> str: ..."),
    ],
)
def test_rules_let_pass(module: str, source: str) -> None:
    assert faults(module, ast.parse(DOC + source)) == []


HELP = """
import sys
from loadgen.cli import main
sys.argv = ["draftload", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def test_help_imports_nothing_heavy() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert "Usage: draftload" in ran.stdout
    loaded = set(ran.stderr.splitlines()[-1].split())
    assert "loadgen" in loaded
    assert not loaded & {"transformers", "numpy", "openai"}
