"""The HTML page: what it holds, of real runs, and what it refuses."""

import html.parser
import json
import re
import shutil
import subprocess
import sys

import pytest

from ortho_keras.method.errors import InputError
from ortho_keras.trainer.recipe import Recipe
from ortho_keras.trainer.report import main, write_report
from ortho_keras.trainer.run import run

SMALL = Recipe(depth=8, width=4, epochs=2, batch_size=256, learning_rate=0.01, bn_batches=1)


class Page(html.parser.HTMLParser):
    """Headings, pictures' beginnings, cells by line, and every address that a browser would ask for."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.pictures, self.rows, self.addresses, self.open = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [value for name, value in attributes.items() if name in ("src", "href", "srcset", "action")]
        self.rows += [(attributes.get("class"), [])] if tag == "tr" else []
        if tag == "img":
            assert attributes["alt"]
            self.pictures.append(attributes["src"].split(",")[0])
        if tag not in ("img", "meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][1].append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run(SMALL, folder / "method", signal_every=3, log=lambda line: None)
    run(Recipe(**{**SMALL.to_json(), "regularizer": "l2"}), folder / "a <control> & more", log=lambda line: None)
    return folder


def test_two_runs_side_by_side(runs, tmp_path):
    path = tmp_path / "report.html"
    write_report([runs / "method", runs / "a <control> & more"], path)
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert page.headings == [
        "Result", "Curves", "Orthonormality by layer", "Signal by layer and step", "Filters", "Recipe", "Environment",
    ]  # fmt: skip
    assert page.pictures == 5 * ["data:image/svg+xml;base64"] + 3 * ["data:image/png;base64"]
    assert all(address.startswith("data:") for address in page.addresses)
    assert "http" not in re.sub(r'src="data:[^"]*"', "", text) and "<control>" not in text

    rows = {cells[0]: (marked, cells[1:]) for marked, cells in page.rows if len(cells) == 3}
    results = [json.loads((runs / name / "result.json").read_text()) for name in ("method", "a <control> & more")]
    assert "test top-5 accuracy" not in rows and "images skipped" not in rows  # ten classes, all sound
    assert rows["test accuracy"][1] == [f"{result['test_accuracy']:.4f}" for result in results]
    assert rows["largest |WᵀW − I|"][1] == [f"{max(r['orthonormality_error'].values()):.3g}" for r in results]
    assert rows["regularizer"] == ("differs", ["orthonormal", "l2"])
    assert [name for name, (marked, _) in rows.items() if marked] == ["regularizer"]
    assert rows["tensorflow"][1] == 2 * [results[0]["versions"]["tensorflow"]]
    assert rows["data_sha256"] == (None, 2 * [results[0]["data_sha256"]])


def test_other_images_are_marked(runs, tmp_path):
    shutil.copytree(runs / "method", tmp_path / "other")
    result = json.loads((tmp_path / "other" / "result.json").read_text())
    (tmp_path / "other" / "result.json").write_text(json.dumps(result | {"data_sha256": "0" * 64}))
    write_report([runs / "method", tmp_path / "other"], tmp_path / "report.html")
    marked = [cells for kind, cells in Page((tmp_path / "report.html").read_text()).rows if kind]
    assert marked == [["data_sha256", result["data_sha256"], "0" * 64]]


def test_a_run_that_is_not_finished_is_shown_as_far_as_it_is(runs, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.json").write_text((runs / "method" / "run.json").read_text())
    write_report([begun], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.headings == ["Result", "Recipe"] and page.pictures == [] and "Not finished: begun." in text


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    for parent in ("first", "second"):
        (tmp_path / parent / "digits").mkdir(parents=True)
        (tmp_path / parent / "digits" / "run.json").write_text((runs / "method" / "run.json").read_text())
    write_report([tmp_path / parent / "digits" for parent in ("first", "second")], tmp_path / "report.html")
    assert "<th>first/digits</th><th>second/digits</th>" in (tmp_path / "report.html").read_text()


def test_the_command_line(runs, tmp_path):
    command = [sys.executable, "-m", "ortho_keras.trainer.report", runs / "method", f"--output={tmp_path / 'page.html'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'page.html'}\n", done.stderr
    assert Page((tmp_path / "page.html").read_text()).headings[0] == "Result"


def test_what_is_refused(runs, tmp_path, capsys):
    empty, damaged = tmp_path / "empty", tmp_path / "damaged"
    for folder in (empty, damaged):
        folder.mkdir()
    (damaged / "run.json").write_text("{")
    for folder in (empty, damaged, tmp_path / "missing"):
        with pytest.raises(
            InputError, match=re.escape(f"WORKDIR must be the folder of a run of train.py. Received: '{folder}'")
        ):
            write_report([folder], tmp_path / "report.html")
    with pytest.raises(InputError, match="WORKDIR must be named once each"):
        write_report([runs / "method", runs / ".." / runs.name / "method"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    assert main([str(empty)]) == 2
    assert main([str(runs / "method"), f"--output={tmp_path / 'no' / 'page.html'}"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("ortho_keras.trainer.report: WORKDIR must be")
    assert errors[1].startswith(
        "ortho_keras.trainer.report: --output: `path` must be the path of a file in a folder that exists"
    )
