"""The HTML page of real runs, one of them stopped: its content, and what is refused."""

import dataclasses
import html
import json
import math
import os
import pathlib
import re
import shutil
import signal
import tomllib

import keras
import pytest

from ortho_keras.method.errors import InputError, Interrupted
from ortho_keras.trainer import report
from ortho_keras.trainer.build import make_optimizer
from ortho_keras.trainer.optimizers import SHAPES
from ortho_keras.trainer.recipe import Recipe
from ortho_keras.trainer.report import TEMPLATE, Run, _learning_rates, main, write_report
from ortho_keras.trainer.run import run

SMALL = Recipe(image_size=8, depth=8, width=2, epochs=3, batch_size=256, learning_rate=0.01, rate_depth=8, bn_batches=1)
PICTURE = "data:image/png;base64"


class Page:
    """Headings, how each picture's address begins, all addresses, and rows as `{name: cells}`, those marked apart."""

    def __init__(self, path):
        self.text = path.read_text()
        self.headings = re.findall("<h2>(.*?)</h2>", self.text)
        self.addresses = re.findall(r'(?:src|href|srcset|action)="([^"]*)"', self.text)
        self.pictures = re.findall(r'<img src="([^",]*)[^"]*" alt="[^"]+">', self.text)
        self.rows, self.marked = {}, {}
        for kind, row in re.findall(r'<tr(?: class="(\w+)")?>(.*?)</tr>', self.text):
            name, *cells = map(html.unescape, re.findall("<t[dh]>(.*?)</t[dh]>", row))
            (self.marked if kind else self.rows)[name] = cells


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run, the same run as it was when it got SIGTERM in its last epoch, and a copy with other images."""
    folder = tmp_path_factory.mktemp("runs")
    stop = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: epoch == 2 and os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(Interrupted):
        run(SMALL, folder / "method", callbacks=[stop], signal_every=3, log=lambda line: None)
    shutil.copytree(folder / "method", folder / "stopped")
    run(SMALL, folder / "method", signal_every=3, log=lambda line: None)
    shutil.copytree(folder / "method", folder / "a <control> & more")
    for name in ("run.json", "result.json"):
        path = folder / "a <control> & more" / name
        content = json.loads(path.read_text()) | {"data_sha256": "0" * 64}
        content["recipe"]["regularizer"] = "l2"
        content.get("test_accuracy_by_class", {})["3"] = None  # as of a class without a test image
        path.write_text(json.dumps(content))
    return folder


def test_two_runs_side_by_side(runs, tmp_path):
    write_report([runs / "method", runs / "a <control> & more"], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.headings == [
        "Result", "Curves", "Test accuracy by class, the lowest first", "Orthonormality by layer", "Signal by layer and step",
        "Filters", "Recipe", "Environment",
    ]  # fmt: skip
    assert page.pictures == 12 * [PICTURE]  # five curves, orthonormality, each run's signal, filters and confusion matrix
    captions = re.findall("<figcaption>(.*?)</figcaption>", page.text)
    assert captions[2:5] == ["penalty (orthonormal) by step", "penalty (l2) by step", "learning rate by step"]
    assert all(address.startswith("data:") for address in page.addresses)
    assert "http" not in re.sub(r'src="data:[^"]*"', "", page.text) and "<control>" not in page.text
    rows, result = page.rows, json.loads((runs / "method" / "result.json").read_text())
    assert "test top-5 accuracy" not in rows and rows["images skipped"] == ["0", "0"]  # ten classes
    assert rows["test accuracy"] == 2 * [f"{result['test_accuracy']:.4f}"]
    assert rows["largest |WᵀW − I|"] == 2 * [f"{max(result['orthonormality_error'].values()):.3g}"]
    assert rows["tensorflow"] == 2 * [result["versions"]["tensorflow"]] and rows[""] == ["method", "a <control> & more"]
    shown = {name: cells for name, cells in rows.items() if name.isdecimal()}
    by_class = result["test_accuracy_by_class"]
    assert shown == {name: [f"{value:.4f}", "–" if name == "3" else f"{value:.4f}"] for name, value in by_class.items()}
    assert [by_class[name] for name in shown] == sorted(by_class.values())
    hashes = [result["data_sha256"][:12], "0" * 12]
    assert page.marked == {"regularizer": ["orthonormal", "l2"], "data_sha256": hashes}


def test_a_stopped_run_is_shown_as_far_as_it_came(runs, tmp_path):
    assert main([str(runs / "stopped"), f"--output={tmp_path / 'new' / 'report.html'}"]) == 0
    page = Page(tmp_path / "new" / "report.html")
    assert page.headings == ["Result", "Curves", "Signal by layer and step", "Recipe", "Environment"]
    assert page.pictures == 5 * [PICTURE] and "stopped is not finished (2 of 3 epochs): " in page.text
    rows, history = page.rows, json.loads((runs / "method" / "history.json").read_text())
    assert rows["steps"] == [f"{history[1]['step']}"] and "test accuracy" not in rows
    assert rows["training accuracy"] == [f"{history[1]['accuracy']:.4f}"]
    assert rows["validation accuracy"] == [f"{history[1]['validation_accuracy']:.4f}"]
    assert rows["data_sha256"] == [json.loads((runs / "stopped" / "run.json").read_text())["data_sha256"][:12]]
    write_report([runs / "stopped", runs / "method"], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.rows["test accuracy"][0] == page.rows["keras"][0] == "–" != page.rows["test accuracy"][1] and not page.marked


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("run.json", "[]"),
        ("run.json", {"recipe": []}),
        ("run.json", {"recipe": {"epochs": "three"}}),
        ("run.json", {"recipe": {"start_depth": 8, "grow_epoch": "one"}}),
        ("run.json", {"data_sha256": 5}),
        ("history.json", "{}"),
        ("history.json", '[{"step": 1}]'),
        ("history.json", '[{"step": 1, "seconds": 1, "accuracy": 1, "penalty": 0, "validation_accuracy": "0.5"}]'),
        ("result.json", ""),
        ("result.json", {"test_accuracy": "0.9"}),
        ("result.json", {"orthonormality_error": {"conv": "0.1"}}),
        ("result.json", {"device": ["CPU"]}),
        ("result.json", {"test_confusion_matrix": [[1, "2"], [0, 3]]}),
        ("signals.csv", "step,name,error_to_top\n0,conv,much\n"),
        ("signals.csv", "step,name,error_to_top\n0\n"),
        ("signals.csv", "mine\n"),
    ],
)
def test_odd_files_are_one_line(runs, tmp_path, capsys, name, change):
    for own in ("run.json", "history.json", "result.json"):
        shutil.copy(runs / "method" / own, tmp_path)
    text = change if isinstance(change, str) else json.dumps({**json.loads((tmp_path / name).read_text()), **change})
    (tmp_path / name).write_text(text)
    assert main([str(tmp_path), f"--output={tmp_path / 'report.html'}"]) == 2 and not (tmp_path / "report.html").exists()
    error = capsys.readouterr().err
    message = "ortho_keras.trainer.report: WORKDIR must be the folder of a run of train.py. Received: "
    assert error.startswith(message) and error.count("\n") == 1 and error.endswith(")\n")


def test_a_run_that_diverged_has_a_page(runs, tmp_path):
    shutil.copytree(runs / "method", tmp_path / "run")
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    history[-1] |= {"validation_crossentropy": math.nan, "penalty": math.inf}
    (tmp_path / "run" / "history.json").write_text(json.dumps(history))
    result = json.loads((tmp_path / "run" / "result.json").read_text()) | {"test_crossentropy": math.nan}
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    write_report([tmp_path / "run"], tmp_path / "report.html")
    assert Page(tmp_path / "report.html").rows["test cross-entropy"] == ["nan"]


def test_a_model_without_a_convolution(runs, tmp_path):
    shutil.copy(runs / "method" / "run.json", tmp_path)
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(tmp_path / "final.keras")
    with pytest.raises(InputError, match="^final.keras must be a convolutional network .* Received: '.*final.keras'$"):
        write_report([tmp_path], tmp_path / "report.html")


def test_runs_of_one_name_without_an_epoch(runs, tmp_path):
    for parent in ("first", "second"):
        (tmp_path / parent / "digits").mkdir(parents=True)
        shutil.copy(runs / "method" / "run.json", tmp_path / parent / "digits")
    write_report([tmp_path / parent / "digits" for parent in ("first", "second")], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.headings == ["Recipe", "Environment"] and page.rows[""] == ["first/digits", "second/digits"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_learning_rate_is_drawn_step_by_step(runs, tmp_path, shape):
    """As the optimizers of a run that grows have it at each step: the second warms up again."""
    recipe = dataclasses.replace(
        SMALL,
        schedule=shape,
        depth=20,
        start_depth=8,
        grow_epoch=1,
        warmup_steps=3,
        rate_depth=16,
        learning_rate=0.5,
        max_steps=70,
    )
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {**recipe.to_json(), "retired": 1}}))
    (tmp_path / "history.json").write_text(
        json.dumps([{"step": step, "seconds": 1, "accuracy": 0, "penalty": 0} for step in (30, 60)])
    )
    rates = _learning_rates(Run(tmp_path))
    before, after = make_optimizer(dataclasses.replace(recipe, depth=8), 70), make_optimizer(recipe, 70, 30)
    expected = {}
    for optimizer, steps, first in ((before, range(30), 0), (after, range(30, 61), 30)):
        optimizer.build([])
        for step in steps:
            optimizer.iterations.assign(step - first)
            expected[step] = float(optimizer.learning_rate)
    assert {int(step): float(rate) for step, rate in rates.items()} == pytest.approx(expected)
    assert 0 < expected[0] < expected[2] == pytest.approx(0.5 * 16 / 8, abs=0.01) and expected[30] < expected[32]
    assert len(_learning_rates(Run(runs / "method"))) == 1 + 15  # from a recipe whose net does not grow


def test_more_runs_than_colors_and_long_labels(monkeypatch):
    figures = []
    monkeypatch.setattr(report, "_picture", lambda caption, save, figure: figures.append(figure))
    points = {1: 1.0, 2: 3.0}
    for labels in (["a"], [f"run{index}" for index in range(14)], [f"{index}{'/long' * 30}" for index in range(3)]):
        report._plot(labels, [points] * len(labels), [points] * len(labels), caption="", log=True, xlabel="x", ylabel="y")
        (figure,), (axes,) = figures[-1:], figures[-1].axes
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box, area = legend.get_window_extent().padded(-3), axes.get_window_extent()
        assert [text.get_text().replace("\n", "") for text in legend.get_texts()] == labels
        assert not box.overlaps(area) and box.xmin >= 0 and box.xmax <= figure.bbox.xmax and area.height > 150
        solid = [line for line in axes.lines if line.get_linestyle() == "-"]
        assert len({tuple(line.get_color()) for line in solid}) == len(solid) == len(labels)


def test_the_package_holds_the_template():
    settings = tomllib.loads((pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]
    (pattern,) = settings["package-data"]["ortho_keras.trainer"]
    assert TEMPLATE.match(pattern) and TEMPLATE.parent.parts[-2:] == ("ortho_keras", "trainer")


def test_what_is_refused(runs, tmp_path, capsys):
    for name, content in (("empty", None), ("damaged", "{"), ("list", "[]")):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "run.json").write_text(content)
        message = f"WORKDIR must be the folder of a run of train.py. Received: '{tmp_path / name / 'run.json'}' ("
        with pytest.raises(InputError, match=re.escape(message)):
            write_report([tmp_path / name], tmp_path / "report.html")
    with pytest.raises(InputError, match="each WORKDIR must be listed once"):
        write_report([runs / "method", runs / ".." / runs.name / "method"], tmp_path / "report.html")
    (tmp_path / "file").write_text("")
    assert main([str(runs / "method"), f"--output={tmp_path / 'file' / 'page.html'}"]) == 2
    assert capsys.readouterr().err.startswith("ortho_keras.trainer.report: --output must be a folder that can be written")
    assert not (tmp_path / "report.html").exists()
