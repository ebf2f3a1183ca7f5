"""The wheel: what is in it, and that it works alone, in an environment that knows no checkout.

Built once from this tree, without a network: the build backend and the dependencies are those of
the environment that runs the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from loadgen import __version__

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"loadgen", "servers", "scenarios", "reports"}
DIST_INFO = f"draftload-{__version__}.dist-info"
DATA = (
    "scenarios/*.toml", "scenarios/data/*.jsonl", "servers/configs/*.toml",
    "servers/configs/matrices/*.toml", "reports/grafana/*.json", "reports/grafana/*.y*ml",
    "reports/grafana/provisioning/*/*.yml",
)  # fmt: skip
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NAME = re.compile(r"[A-Za-z0-9_.-]+")


def ran(folder: Path, *command: str | Path) -> str:
    """stdout of a command that must succeed, run away from the checkout."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    ran(folder, *build)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment: the wheel, and our dependencies behind it on the path.

    A .pth line adds a folder at the end and reads no .pth files there, so an editable install of
    this checkout in the environment of the tests cannot stand in for the wheel.
    """
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "venv", with_pip=False)
    binaries = folder / "venv" / "bin"
    ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(ran(folder, binaries / "python", "-c", purelib).strip())
    (site / "dependencies.pth").write_text("\n".join(ours) + "\n", encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--python", binaries / "python", "install", "--quiet")
    ran(folder, *pip, "--no-index", "--no-deps", "--ignore-installed", wheel)
    return binaries


def test_top_level(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == PACKAGES | {DIST_INFO}
    assert f"{DIST_INFO}/licenses/LICENSE" in names


@pytest.mark.parametrize("pattern", [*DATA, *(f"{name}/*.py" for name in sorted(PACKAGES))])
def test_carries_every(pattern: str, wheel: Path) -> None:
    here = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
    assert here
    assert here <= set(zipfile.ZipFile(wheel).namelist())


def test_wheel_wins_over_the_checkout(installed: Path) -> None:
    code = f"import {', '.join(PACKAGES)}; print(*(m.__file__ for m in ({', '.join(PACKAGES)})))"
    files = ran(installed.parent, installed / "python", "-c", code).split()
    assert len(files) == len(PACKAGES)
    assert all(Path(file).is_relative_to(installed.parent) for file in files), files


def test_help(installed: Path) -> None:
    assert "Usage: draftload" in ran(installed.parent, installed / "draftload", "--help")


def test_version(installed: Path) -> None:
    shown = ran(installed.parent, installed / "draftload", "--version")
    assert shown == f"draftload {__version__}\n"


def test_finds_its_data_and_its_engines(installed: Path) -> None:
    shown = ran(installed.parent, installed / "draftload", "scenarios")
    assert {path.stem for path in ROOT.glob("scenarios/*.toml")} <= set(shown.split())
    assert "vllm" in ran(installed.parent, installed / "draftload", "engines")


def test_constraints_name_the_direct_dependencies() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["demo"], *extras["test"]]
    direct = {found[0] for line in wanted if (found := NAME.match(line))} - {"pip"}
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    assert direct <= {pin.partition("==")[0] for pin in pins}
