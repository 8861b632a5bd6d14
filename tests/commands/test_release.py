"""A release says the same everywhere: its version, what it needs, the Pythons it is tested on."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

from packaging.requirements import Requirement

import ortho_keras

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
BACKENDS = ("jax", "torch")  # beside TensorFlow
DEVELOPMENT = {"pytest", "pytest-xdist", "ruff"}
FOLDERS = ("", "ortho_keras/*", "tuning", "examples", "benchmarks", "docs", "tests", ".github/workflows")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def by_name(lines):
    """`{name: specifier}` of requirements; comments and empty lines are none."""
    texts = (line.partition("#")[0].strip() for line in lines)
    return {own.name: own.specifier for own in map(Requirement, filter(None, texts))}


def test_changelog_begins_with_the_version_and_names_what_the_library_exports():
    headings = re.findall(r"^## \[(.+?)\]", CHANGELOG, re.MULTILINE)
    assert headings[:2] == ["Unreleased", ortho_keras.__version__] and len(set(headings)) == len(headings)
    named = set(re.findall(r"`(\w+)`", CHANGELOG))
    # Classes of results, which come of calls, are not named.
    results = {"DesignReport", "LayerSignal", "OrthonormalizeReport", "SignalReport", "__version__"}
    assert set(ortho_keras.__all__) - results <= named


def test_the_version_has_one_home():
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    form = re.compile(rf"(?<![\d.]){re.escape(ortho_keras.__version__)}(?![\d.])")
    files = [path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.*".lstrip("/")) if path.is_file()]
    assert len(files) > 80
    found = {path.relative_to(ROOT).as_posix() for path in files if form.search(path.read_text(errors="replace"))}
    assert found == {"CHANGELOG.md"} and form.search((ROOT / "ortho_keras" / "version.py").read_text())


def test_dependencies_have_one_range():
    extras = [line for name, extra in PROJECT["optional-dependencies"].items() if name not in BACKENDS for line in extra]
    declared = by_name([*PROJECT["dependencies"], *extras])
    installed = by_name((ROOT / "requirements.txt").read_text().splitlines())
    assert {name: installed.get(name) for name in declared} == declared
    assert set(installed) - set(declared) == DEVELOPMENT
    assert all("<" in str(specifier) and ">=" in str(specifier) for specifier in installed.values())


def test_pythons_are_those_that_are_tested():
    stated = re.findall(r"Python :: (\d+\.\d+)", "\n".join(PROJECT["classifiers"]))
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert re.findall(r'"(\d+\.\d+)"', re.search(r"python-version: \[(.*)\]", workflow)[1]) == stated
    allowed = Requirement(f"python{PROJECT['requires-python']}").specifier
    minors = [f"3.{minor}" for minor in range(20) if f"3.{minor}.0" in allowed]
    assert minors == stated


def test_the_console_script_lists_the_flags_and_names_itself(tmp_path):
    """Called as pip's script does: from any folder, with the script's path as the program's."""
    module, function = PROJECT["scripts"]["ortho-train"].split(":")
    assert SETTINGS["tool"]["setuptools"]["py-modules"] == [module]
    code = f"import sys; from {module} import {function}; sys.argv[0] = '/usr/bin/ortho-train'; sys.exit({function}())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    calls = [[sys.executable, "-c", code, flag] for flag in ("--help", "--depth=3")]
    helped, refused = (subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True) for call in calls)
    assert helped.stdout.startswith("Trains a recipe") and "--recipe_file" in helped.stdout, helped.stderr
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and refused.stderr.startswith("ortho-train: --depth must")
