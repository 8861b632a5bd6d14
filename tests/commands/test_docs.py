"""The pages: their code runs, their commands' flags parse, their links lead somewhere, the API page is what docstrings say."""

import ast
import dataclasses
import importlib.util
import inspect
import pathlib
import re
import runpy
import shlex

import pytest
from absl.testing import flagsaver

import ortho_keras
import train
from ortho_keras.trainer import report
from tuning import search

ROOT = pathlib.Path(train.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Run by tests/test_readme.py, which holds what it prints against what it says.
WITH_A_TEST_OF_ITS_OWN = ROOT / "docs" / "my-deep-net-does-not-train.md"


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """`(line, code)` of each fenced block of a page; its code begins on that line, counted from 0."""
    text = page.read_text()
    return [(text.count("\n", 0, block.start(2)), block[2]) for block in FENCE.finditer(text) if block[1] == language]


def commands(page):
    """The commands of a page's sh blocks, lists of words without variables before them, `&&` taken as their end."""
    found = []
    for _, code in blocks(page, "sh"):
        for line in code.replace("\\\n", " ").splitlines():
            words = []
            for word in [*shlex.split(line), "&&"]:
                if word == "&&":
                    found.append(words)
                    words = []
                elif words or not re.match(r"[A-Z_]+=", word):
                    words.append(word)
    return found


def ours(page):
    """`(script or module, arguments)` of a page's commands that run Python on something of ours."""
    found = []
    for program, *arguments in commands(page):
        if pathlib.PurePath(program).name not in ("python", "python3") or arguments[0] == "-c":
            continue
        target, *rest = arguments[1:] if arguments[0] == "-m" else arguments
        if target not in ("venv", "pip", "build"):
            found.append((target, rest))
    return found


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and page != WITH_A_TEST_OF_ITS_OWN], ids=name
)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    lines = [""] * (page.read_text().count("\n") + 1)
    for start, code in blocks(page, "python"):
        lines[start : start + code.count("\n")] = code.splitlines()
    script = tmp_path / f"{page.stem}.py"  # lines as in the page; a file, since AutoGraph reads sources
    script.write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))


def test_pages_have_blocks_and_commands():
    """What the other tests here look for is there to be found."""
    assert {"README.md", "docs/start.md", "docs/own-model.md", "docs/method.md"} <= {
        name(page) for page in PAGES if blocks(page, "python")
    }
    targets = {target for page in PAGES for target, _ in ours(page)}
    assert {"train.py", "tuning.search", "ortho_keras.trainer.report", "benchmarks/features.py", "docs/make_api.py"} <= targets


@pytest.mark.parametrize("page", [page for page in PAGES if ours(page)], ids=name)
def test_the_commands_of_a_page_parse(page, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    for target, arguments in ours(page):
        if target == "train.py":
            with flagsaver.flagsaver():
                train.parse_flags(["train.py", *arguments])
                train.recipe_from_flags()
        elif target == "tuning.search":
            with flagsaver.flagsaver():
                train.parse_flags(["search", *arguments], "tuning.search")
                search.check_flags()
                train.recipe_from_flags()
        elif target == "ortho_keras.trainer.report":
            with monkeypatch.context() as patch:
                patch.setattr(report, "write_report", lambda workdirs, output: None)
                assert report.main(arguments) == 0
        elif target == "pytest":
            assert all((ROOT / path).exists() for path in arguments)
        elif target == "tuning.report":
            assert len(arguments) == 1
        else:
            unknown = {argument[2:].partition("=")[0] for argument in arguments} - defined_flags(ROOT / target)
            assert not unknown, f"{target} has no flag {unknown}"


def defined_flags(script):
    """The names of the flags that a script defines, without running it: scripts' flags share one space of names."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    calls = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr.startswith("DEFINE_")]
    return {call.args[0].value for call in calls}


def test_the_first_run_of_the_start_is_as_the_page_says(tmp_path, monkeypatch, capsys):
    """Its commands about `runs/first`, run; the words that its table explains, and the files that docs/train.md lists."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "start.md"
    first, control, compared = [(target, rest) for target, rest in ours(page) if any("runs/first" in word for word in rest)]
    for target, arguments in (first, control):
        assert target == "train.py"
        with flagsaver.flagsaver():
            assert train.main(train.parse_flags([target, *arguments])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert report.main(compared[1]) == 0 and (tmp_path / "report.html").exists()
    (in_the_line,), (files,) = (
        re.findall(rf"^\| {head} .*\n((?:\|.*\n)+)", text.read_text(), re.M)
        for text, head in ((page, "in the line"), (page.with_name("train.md"), "file"))
    )
    terms, paths = (
        re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\| (.*?) \|", rows, re.M))) for rows in (in_the_line, files)
    )
    shown = " ".join(line for line in lines if line.startswith("epoch "))
    assert len(terms) > 6 and all(f"{term} " in shown for term in terms)
    assert set(re.findall(r"- ([a-z_/]+) [\d.]", shown)) <= set(terms)
    made = {path.name for path in (tmp_path / "runs" / "first").iterdir()} - {".lock"}
    assert len(paths) > 5 and {path.rstrip("/") for path in paths} == made


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{name(page)}: {link}"


def anchors(text):
    """GitHub's names for a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_api_page_is_what_the_docstrings_say():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    assert make_api.PAGE.read_text() == make_api.page(), "run python docs/make_api.py"
    headings = re.findall(r"^### `(\w+)`$", make_api.PAGE.read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(set(ortho_keras.__all__) - {"__version__"})


def test_docstrings_list_the_arguments_in_their_order():
    checked = 0
    for name in set(ortho_keras.__all__) - {"__version__"}:
        thing = getattr(ortho_keras, name)
        function = thing.__init__ if inspect.isclass(thing) else thing
        if dataclasses.is_dataclass(thing) or not function.__module__.startswith("ortho_keras."):
            continue  # a result, or a parent's arguments
        parameters = inspect.signature(function).parameters.values()
        given = [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]
        given = [one for one in given if one != "self" and not (one == "name" and inspect.isclass(thing))]  # Keras's `name`
        arguments = re.search(r"^Args:\n((?:    .*\n|\n)*)", inspect.getdoc(thing) + "\n", re.MULTILINE)
        listed = re.findall(r"^    ([\w, ]+):", arguments[1], re.MULTILINE)
        assert ", ".join(listed).split(", ") == given, name
        checked += 1
    assert checked > 30


def test_contributing_names_every_module():
    text = (ROOT / "docs" / "contributing.md").read_text()
    modules = {path.name for path in (ROOT / "ortho_keras").glob("*.py")} - {"__init__.py"}
    table = text[text.index("In `ortho_keras/`:") : text.index("`tuning/`:")]
    assert modules == set(re.findall(r"`(\w+\.py)`", table))
