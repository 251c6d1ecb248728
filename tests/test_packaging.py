"""The guide's extra `quan` resolves to this package: by name and version, installed and as a wheel,
without an index."""

import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUAN = ["autoawq>=0.2.9", "transformers>=4.51.3", "torch>=2.6.0"]  # as the guide writes it
PROJECT = f"""
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "embedding-server"
version = "0"

[project.optional-dependencies]
quan = {QUAN}

[tool.setuptools]
packages = []
"""


def _laid_over():
    """Whether transformers came by PYTHONPATH, without what that release needs being installed."""
    place = importlib.metadata.distribution("transformers").locate_file("")
    return Path(place).resolve() != Path(sysconfig.get_path("purelib")).resolve()


def pip(*arguments, cwd):
    command = [
        sys.executable,
        "-m",
        "pip",
        *arguments,
        "--no-index",
        "--no-build-isolation",
        "--disable-pip-version-check",
    ]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if "No matching distribution found" in done.stderr and _laid_over():
        pytest.skip("transformers has no place of its own in this environment")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the wheel is made from: building writes beside it."""
    import shutil

    target = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    shutil.copytree(ROOT / "awq", target / "awq", ignore=shutil.ignore_patterns("__pycache__"))
    return target


def test_what_is_installed_satisfies_it():
    from packaging import requirements

    for line in QUAN:
        wanted = requirements.Requirement(line)
        assert wanted.specifier.contains(
            importlib.metadata.version(wanted.name), prereleases=True
        ), line
    assert importlib.metadata.version("autoawq") == importlib.import_module("awq").__version__


def test_one_version_everywhere():
    """The package's, the project file's and the citation's."""
    version = importlib.import_module("awq").__version__
    for name, pattern in (
        ("pyproject.toml", r'^version = "(.+)"$'),
        ("CITATION.cff", r"^version: (.+)$"),
    ):
        assert re.findall(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE) == [
            version
        ]


def test_a_project_with_the_extra_resolves_without_an_index(source, tmp_path):
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    out = pip("install", "--dry-run", ".[quan]", cwd=tmp_path)
    for line in QUAN:
        assert f"Requirement already satisfied: {line}" in out


def test_the_wheel_is_the_newest_that_the_extra_accepts(source, tmp_path):
    """Beside AutoAWQ's last release, pip takes ours."""
    pip("wheel", str(source), "--no-deps", "-w", str(tmp_path), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    version = importlib.metadata.version("autoawq")
    assert wheel.name == f"autoawq-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"autoawq-{version}.dist-info/METADATA").decode()
    assert {
        "awq/__init__.py",
        "awq/integrations/emb_model_provider.py",
        "awq/calibration/data/passages.txt",
        "awq/py.typed",
    } <= names
    assert wheel.stat().st_size < 3_000_000
    assert not [name for name in names if name.endswith((".so", ".pyd", ".dll"))]
    required = re.findall(r"^Requires-Dist: ([A-Za-z]+)([^;\n]*)$", metadata, re.MULTILINE)
    assert {("torch", ">=2.6"), ("transformers", ">=4.51.3")} <= set(required)
    older = tmp_path / "autoawq-0.2.9-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(older, "w") as other:
        for name in (n for n in ours.namelist() if "dist-info" in n):
            text = ours.read(name).decode().replace(f"Version: {version}", "Version: 0.2.9")
            other.writestr(name.replace(version, "0.2.9"), text)
    out = pip(
        "install",
        "--dry-run",
        "--no-deps",
        "--ignore-installed",
        "--find-links",
        str(tmp_path),
        QUAN[0],
        cwd=tmp_path,
    )
    assert f"Would install autoawq-{version}" in out
