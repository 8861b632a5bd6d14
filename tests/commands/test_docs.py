"""The pages: their code runs, their commands' flags parse, their links lead somewhere, their figures are the result files'."""

import dataclasses
import inspect
import pathlib
import re
import runpy
import shlex

import pytest
from absl.testing import flagsaver
from command_lines import ROOT, invoke, script

import ortho_keras
from ortho_keras.trainer import command, predict, report
from ortho_keras.trainer.recipe import RETIRED
from tuning import search

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PUBLIC = set(ortho_keras.__all__) - {"__version__"}


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """`(line, code)` of each fenced block of a page; its code begins on that line, counted from 0."""
    text = page.read_text()
    return [(text.count("\n", 0, block.start(2)), block[2]) for block in FENCE.finditer(text) if block[1] == language]


def run_blocks(page, folder, shorter=()):
    """Runs a page's Python blocks from top to bottom, as a script with the same line numbers."""
    lines = [""] * (page.read_text().count("\n") + 1)
    for start, code in blocks(page, "python"):
        lines[start : start + code.count("\n")] = code.splitlines()
    text = "\n".join(lines)
    for long, short in shorter:
        assert long in text
        text = text.replace(long, short)
    path = folder / f"{page.stem}.py"  # a file, since AutoGraph reads sources
    path.write_text(text)
    runpy.run_path(str(path))


def ours(page):
    """`(script or module, arguments)` of the commands in a page's sh blocks that run Python on something of ours."""
    found = []
    for _, code in blocks(page, "sh"):
        for line in re.split(r"\n|&&", code.replace("\\\n", " ")):
            words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
            if words and pathlib.PurePath(words[0]).name in ("python", "python3") and words[1] != "-c":
                target, *rest = words[2:] if words[1] == "-m" else words[1:]
                found += [(target, rest)] * (target not in ("venv", "pip", "build"))
    return found


GUIDE = DOCS / "my-deep-net-does-not-train.md"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != GUIDE], ids=name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(page, tmp_path, [("plain_cnn(110,", "plain_cnn(20,")] if page.name == "README.md" else [])


def test_the_code_of_the_guide_finds_what_is_wrong(capsys, tmp_path, monkeypatch):
    """With fewer layers and one epoch each, so that its accuracies are not reached."""
    monkeypatch.chdir(tmp_path)
    run_blocks(GUIDE, tmp_path, [("range(59)", "range(17)"), ("Conv2D(16,", "Conv2D(8,"), ("epochs=epochs", "epochs=1")])
    printed = [line for line in capsys.readouterr().out.splitlines() if line and not re.match(r"Epoch \d|\d+/\d+ - ", line)]
    broken, found, tamed, healthy, fixed, accuracy = printed
    assert "the error grows" in found and "nothing is wrong" in healthy and float(fixed) > float(broken)
    assert 0 <= float(tamed) <= 1 and 0 <= float(accuracy) <= 1 and (tmp_path / "signal.png").exists()


def test_pages_have_blocks_and_commands():
    """What the other tests here look for is there to be found."""
    assert {"README.md", "docs/start.md", "docs/own-model.md", "docs/method.md"} <= {
        name(page) for page in PAGES if blocks(page, "python")
    }
    targets = {target for page in PAGES for target, _ in ours(page)}
    assert {"train.py", "tuning.search", "ortho_keras.trainer.report", "benchmarks/features.py"} <= targets


@pytest.mark.parametrize("page", [page for page in PAGES if ours(page)], ids=name)
def test_the_commands_of_a_page_parse(page, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setattr(report, "write_report", lambda workdirs, output: None)
    monkeypatch.setattr(predict, "predict", lambda model, images, top: [])
    for target, arguments in ours(page):
        if target in ("train.py", "tuning.search"):
            with flagsaver.flagsaver():
                command.parse_flags([target, *arguments], target)
                command.recipe_from_flags()
                if target == "tuning.search":
                    search.check_flags()
        elif target.startswith("ortho_keras.trainer."):
            assert {"report": report, "predict": predict}[target.rpartition(".")[2]].main(arguments) == 0
        elif target == "pytest":
            assert all((ROOT / path).exists() for path in arguments)
        elif target == "tuning.report":
            assert len(arguments) == 1
        else:
            unknown = {argument[2:].partition("=")[0] for argument in arguments} - defined_flags(ROOT / target)
            assert not unknown, f"{target} has no flag {unknown}"


def defined_flags(path):
    """The names of the flags that a script defines, without running it."""
    return set(re.findall(r"\b(?:DEFINE_\w+|add_argument)\(\s*\"(?:--)?(\w+)\"", path.read_text()))


def test_flags_and_names_of_the_pages_exist():
    known, used = {"help", "output", "strict", "top", *search.FLAGS, *RETIRED}, set()
    for path in (ROOT / "benchmarks").glob("*.py"):
        known |= defined_flags(path)
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        used |= set(re.findall(r"`--(?:no)?([a-z_0-9]+)", page.read_text()))
    assert len(used) > 20 and used <= known, used - known


def test_the_first_run_of_the_start_is_as_the_page_says(tmp_path, monkeypatch, capsys):
    """Its commands about `runs/first`, run; the words that its table explains, and the files that docs/train.md lists."""
    monkeypatch.chdir(tmp_path)
    page = DOCS / "start.md"
    first, baseline, compared = [rest for _, rest in ours(page) if any("runs/first" in word for word in rest)]
    status, out, _ = invoke(capsys, *first, "--epochs=3")
    assert status == 0 and invoke(capsys, *baseline, "--epochs=1")[0] == 0
    assert report.main(compared) == 0 and (tmp_path / "report.html").exists()
    terms, paths = (
        re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\| (.*?) \|", rows[1], re.M)))
        for text, head in ((page, "in the line"), (DOCS / "train.md", "file"))
        if (rows := re.search(rf"^\| {head} .*\n((?:\|.*\n)+)", text.read_text(), re.M))
    )
    shown = " ".join(line for line in out.splitlines() if line.startswith("epoch "))
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
        if anchor:  # GitHub's names for a page's headings
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", target.read_text()), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{name(page)}: {link}"


def test_figures_are_those_of_the_result_files(monkeypatch, capsys):
    with script(monkeypatch, "benchmarks/pages.py", "--check") as pages:
        assert pages.main(None) == 0, capsys.readouterr().err


def test_the_site_has_every_page_and_every_public_name():
    listed = re.findall(r"^ +- (\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(PUBLIC)
    site = re.findall(r"^  - .*: ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert {f"docs/{path}" for path in site} >= {name(page) for page in DOCS.glob("*.md")}


def test_docstrings_list_the_arguments_in_their_order():
    checked = 0
    for public in PUBLIC:
        thing = getattr(ortho_keras, public)
        function = thing.__init__ if inspect.isclass(thing) else thing
        if dataclasses.is_dataclass(thing) or not function.__module__.startswith("ortho_keras."):
            continue  # a result, or a parent's arguments
        parameters = inspect.signature(function).parameters.values()
        given = [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]
        if inspect.isclass(thing):  # without `self`, and up to Keras's `name`
            given = given[1 : given.index("name") if "name" in given else None]
        arguments = re.search(r"^Args:\n((?:    .*\n|\n)*)", inspect.getdoc(thing) + "\n", re.MULTILINE)
        listed = re.findall(r"^    (\w[\w, ]*):", arguments[1], re.MULTILINE)
        assert ", ".join(listed).split(", ") == given, public
        checked += 1
    assert checked > 30


def test_contributing_names_every_module():
    text = (DOCS / "contributing.md").read_text()
    rows = dict(re.findall(r"^\| `ortho_keras/([\w/]+)/` \| (.*?) \|$", text, re.MULTILINE))
    modules = {}
    for path in (ROOT / "ortho_keras").rglob("*.py"):
        folder = path.parent.relative_to(ROOT / "ortho_keras").as_posix()
        if path.name != "__init__.py" and folder != ".":
            modules.setdefault(folder, set()).add(path.stem)
    assert {folder: set(re.findall(r"`(\w+)`", row)) for folder, row in rows.items()} == modules
