"""One HTML page that compares runs of `train.py`: curves, signal, orthonormality, filters, recipe and environment.

python -m ortho_keras.trainer.report runs/digits runs/digits_l2 --output=report.html

All plots are inside the page.
"""

import argparse
import base64
import dataclasses
import itertools
import math
import os
import pathlib
import sys
import tempfile
import textwrap

import keras
import numpy as np

from ortho_keras.diagnosis.features import plot_filters
from ortho_keras.diagnosis.plots import errors_by_step, new_figure, plot_confusion, plot_heat_map, save
from ortho_keras.diagnosis.signals import read_signals
from ortho_keras.method.checks import require
from ortho_keras.method.console import start_command
from ortho_keras.method.errors import InputError, first_line
from ortho_keras.method.files import check_file, expanded, read_json, whole_file
from ortho_keras.method.loading import load_model
from ortho_keras.trainer.optimizers import LearningRate
from ortho_keras.trainer.recipe import STORED, Recipe
from ortho_keras.trainer.result import progress

TEMPLATE = pathlib.Path(__file__).with_name("report.html.jinja")
SUMMARY = {
    "test accuracy": ("test_accuracy", "{:.4f}"),
    "test top-5 accuracy": ("test_top5_accuracy", "{:.4f}"),
    "test accuracy with mirror images": ("test_mirrored_accuracy", "{:.4f}"),
    "validation accuracy": ("validation_accuracy", "{:.4f}"),
    "training accuracy": ("training_accuracy", "{:.4f}"),
    "test cross-entropy": ("test_crossentropy", "{:.4f}"),
    "penalty": ("penalty", "{:.3g}"),
    "steps": ("steps", "{:,}"),
    "training, s": ("seconds", "{:.0f}"),
    "images/s": ("images_per_second", "{:.0f}"),
    "parameters": ("parameters", "{:,}"),
    "images skipped": ("skipped_images", "{:,}"),
    "largest |WᵀW − I|": ("largest_error", "{:.3g}"),
}
NUMBER = (float, type(None))
RESULT = {key: NUMBER for key, _ in SUMMARY.values()} | {"orthonormality_error": {str: float}, "device": dict, "versions": dict}
RESULT |= {"data_sha256": (str, type(None)), "class_names": ([str], type(None))}
RESULT |= {"test_accuracy_by_class": ({str: NUMBER}, type(None)), "test_confusion_matrix": ([[int]], type(None))}
HISTORY = [{str: NUMBER, "step": int, "seconds": float, "accuracy": float, "penalty": float}]
CURVES = {"accuracy": "accuracy", "cross-entropy": "crossentropy", "penalty": "penalty"}
LISTED_CLASSES = 20
MISSING = "–"


class Run:
    """The content of a workdir: the recipe, and what the run has written so far."""

    def __init__(self, workdir):
        expected = "WORKDIR must be the folder of a run of train.py"

        def read(name, form, missing):
            return read_json(workdir / name, form, expected) if (workdir / name).exists() else missing

        begun = read_json(workdir / "run.json", STORED, expected)
        self.recipe = begun["recipe"]
        self.history, self.result = read("history.json", HISTORY, []), read("result.json", RESULT, {})
        try:
            first_epoch = self.recipe.get("grow_epoch", 0) if self.recipe.get("start_depth") else 0
            self.values = {**progress(self.history, first_epoch), **self.result}
            self.signals = read_signals(workdir / "signals.csv")
            self.learning_rates = _learning_rates(self)
        except (OSError, ValueError, TypeError, ArithmeticError) as error:
            raise InputError(f"{expected}. Received: {str(workdir)!r} ({first_line(error)})") from error
        self.errors = self.result.get("orthonormality_error", {})
        self.values["largest_error"] = max(self.errors.values(), default=None)
        self.environment = {"data_sha256": (self.result.get("data_sha256") or begun.get("data_sha256") or MISSING)[:12]}
        self.environment |= {**self.result.get("device", {}), **self.result.get("versions", {})}
        self.model = workdir / "final.keras"


def write_report(workdirs, path):
    """Writes one self-contained HTML page that compares runs.

    Args:
        workdirs: List of paths of `train.py`'s workdirs, at least one. Of a run that is stopped or still running, the page
            shows the epochs so far.
        path: Path of the page; an existing file is replaced.

    Raises:
        ImportError: If matplotlib or jinja2 is not installed.
        InputError: If a workdir holds no run, or is listed twice.
        ValueError: If `path` is not a file in a folder that can be written, or a run's `final.keras` does not load.
    """
    require("a report", "matplotlib", "jinja2")
    import jinja2

    runs = _labelled([pathlib.Path(workdir) for workdir in workdirs])
    sections = [
        ("Result", _summary(runs.values()), []),
        ("Curves", [], _curves(runs)),
        ("Test accuracy by class, the lowest first", _classes(runs.values()), _confusions(runs)),
        ("Orthonormality by layer", [], _orthonormality(runs)),
        ("Signal by layer and step", [], _heat_maps(runs)),
        ("Filters", [], _filters(runs)),
        ("Recipe", _comparison([run.recipe for run in runs.values()]), []),
        ("Environment", _comparison([run.environment for run in runs.values()]), []),
    ]
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    pathlib.Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        part.write_text(template.render(runs=runs, sections=sections), encoding="utf-8")


def _labelled(workdirs):
    """Returns `{label: Run}`: a folder's name, after the folders in which it differs from the others."""
    paths = [workdir.resolve() for workdir in workdirs]
    if len(set(paths)) < len(paths):
        raise InputError(f"each WORKDIR must be listed once. Received: {' '.join(map(str, workdirs))}")
    common = os.path.commonpath([path.parent for path in paths])
    return {os.path.relpath(path, common): Run(workdir) for path, workdir in zip(paths, workdirs)}


def _summary(runs):
    """Returns rows `(name, values, whether to mark the row)` of the results."""
    rows = []
    for name, (key, form) in SUMMARY.items():
        values = [run.values.get(key) for run in runs]
        if any(value is not None for value in values):
            rows.append((name, [MISSING if value is None else form.format(value) for value in values], False))
    return rows


def _comparison(columns):
    """Returns rows of every value by run, marked where runs that have one differ."""
    names = dict.fromkeys(itertools.chain(*columns))
    rows = {name: [str(column.get(name, MISSING)) for column in columns] for name in names}
    return [(name, values, len({*values} - {MISSING}) > 1) for name, values in rows.items()]


def _classes(runs):
    """Returns rows of the classes with the lowest test accuracies."""
    columns = [run.result.get("test_accuracy_by_class") or {} for run in runs]
    known = [{name: value for name, value in column.items() if value is not None} for column in columns]
    names = {name: min(column.get(name, 1.0) for column in known) for column in known for name in column}
    lowest = sorted(names, key=names.get)[:LISTED_CLASSES]
    return [(name, [f"{column[name]:.4f}" if name in column else MISSING for column in known], False) for name in lowest]


def _confusions(runs):
    return [
        _picture(f"{label}: test images by class", plot_confusion, matrix, run.result["class_names"], title=label)
        for label, run in runs.items()
        if (matrix := run.result.get("test_confusion_matrix"))
    ]


def _curves(runs):
    pictures = []
    for title, key in CURVES.items():
        kinds = [run.recipe.get("regularizer") if key == "penalty" else "" for run in runs.values()]  # others do not compare
        for kind in dict.fromkeys(kinds):
            training, validation = (
                [
                    {row["step"]: row[name] for row in run.history if own == kind and row.get(name) is not None}
                    for run, own in zip(runs.values(), kinds)
                ]
                for name in (key, f"validation_{key}")
            )
            label = f"{title} ({kind})" if kind else title
            caption = f"{label} by step" + (", validation dashed" if any(validation) else "")
            pictures += _plot(runs, training, validation, caption=caption, log=key != "accuracy", xlabel="step", ylabel=label)
    rates = [run.learning_rates for run in runs.values()]
    return pictures + _plot(runs, rates, caption="learning rate by step", log=False, xlabel="step", ylabel="learning rate")


def _learning_rates(run):
    """Returns `{step: learning rate}` of the steps so far, a thousand at most, computed from the recipe."""
    if not run.history:
        return {}
    recipe = Recipe(**{name: value for name, value in run.recipe.items() if name in Recipe.__dataclass_fields__})
    epoch, steps = run.history[0]["step"], np.unique(np.linspace(0, run.history[-1]["step"], 1000, dtype=int))
    grown = recipe.grow_epoch * epoch if recipe.start_depth else 0
    shallow, rates = dataclasses.replace(recipe, depth=recipe.start_depth or recipe.depth), {}
    for own, first, at in ((shallow, 0, steps[steps < grown]), (recipe, grown, steps[steps >= grown])):
        total = min(recipe.epochs * epoch, recipe.max_steps or math.inf)
        schedule = LearningRate(own.peak_learning_rate, total, own.schedule, own.warmup_steps, first)
        rates |= zip(at, schedule(at - first).numpy())
    return rates


def _orthonormality(runs):
    errors = [dict(enumerate(run.errors.values(), 1)) for run in runs.values()]
    caption = "0 where all filters of a kernel are orthonormal, in groups where it has more filters than inputs"
    return _plot(runs, errors, caption=caption, log=True, xlabel="kernel, from input to output", ylabel="largest |WᵀW − I|")


def _heat_maps(runs):
    measured = {label: errors_by_step(run.signals) for label, run in runs.items() if run.signals}
    return [_picture(f"{label}: errors", plot_heat_map, *values, title=label) for label, values in measured.items()]


def _filters(runs):
    """Plots filters of each model's first and last convolution."""
    pictures = []
    for label, run in runs.items():
        if run.model.exists():
            model = load_model(run.model, compile=False)
            convolutions = [layer.name for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
            if not convolutions:
                raise InputError(f"final.keras must be a convolutional network of train.py. Received: {str(run.model)!r}")
            names = list(dict.fromkeys((convolutions[0], convolutions[-1])))
            pictures.append(_picture(f"{label}: filters of {' and '.join(names)}", plot_filters, {"": model}, names))
    return pictures


def _plot(labels, solid, dashed=(), *, caption, log, **settings):
    """Plots each run's `{x: y}`; returns a list of one picture, or none if all are empty."""
    if not any((*solid, *dashed)):
        return []
    from matplotlib import colormaps

    names = [textwrap.fill(label, 60) for label in labels]
    columns = max(1, 70 // (6 + max(map(len, names))))  # as many as fit
    figure = new_figure(5.5, 3.4 + 0.2 * "\n".join(names).count("\n") / columns)
    axes = figure.subplots()
    colors = colormaps["tab10"].colors if len(names) <= 10 else colormaps["turbo"](np.linspace(0.05, 0.95, len(names)))
    for style, lines in (("--", dashed), ("-", solid)):
        for name, color, points in zip(names, colors, lines):
            marker = "." if len(points) < 100 else ""
            axes.plot(points.keys(), points.values(), marker + style, color=color, label=name if points else "")
    positive = all(y > 0 for points in (*solid, *dashed) for y in points.values())
    axes.set(yscale="log" if log and positive else "linear", **settings)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    legend = dict(zip(*axes.get_legend_handles_labels()[::-1]))  # of a run's two lines the solid one
    figure.legend(legend.values(), legend.keys(), loc="outside lower left", ncols=columns, fontsize=9, frameon=False)
    return [_picture(caption, save, figure)]


def _picture(caption, draw, *args, **kwargs):
    """Returns the PNG file that `draw(*args, path=..., **kwargs)` writes as a `data:` address, and its caption."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "picture.png")
        draw(*args, path=path, **kwargs)
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}", caption


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m ortho_keras.trainer.report", description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="the folder of a run of train.py")
    parser.add_argument("--output", default="report.html", help="the page's file (default: report.html)")
    given = parser.parse_args(arguments)
    start_command()
    try:
        output = expanded(given.output)
        check_file("--output", output)
        write_report(given.workdirs, output)
    except (ImportError, ValueError) as error:
        print(f"ortho_keras.trainer.report: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
