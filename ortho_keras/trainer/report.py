"""One HTML page that compares runs of `train.py`: curves, signal, orthonormality, filters, recipe and environment.

python -m ortho_keras.trainer.report runs/digits runs/digits_l2 --output=report.html

The page holds its pictures itself and asks for nothing else, so it can be mailed or put anywhere.
"""

import argparse
import base64
import html
import io
import json
import pathlib
import sys
import tempfile

import keras
import numpy as np

from ortho_keras.diagnosis.features import plot_filters
from ortho_keras.diagnosis.plots import errors_by_step, plot_heat_map
from ortho_keras.diagnosis.signals import read_signals
from ortho_keras.method.checks import require
from ortho_keras.method.errors import InputError, first_line
from ortho_keras.method.files import whole_file
from ortho_keras.method.loading import load_model

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 0 auto; padding: 1rem; }
body { color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ccc; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); gap: 1rem; }
figure { margin: 0; } img { max-width: 100%; height: auto; } figcaption { font-size: .9rem; color: #444; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
tr.differs td { background: #fff4d6; }
"""
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
}

# Rows of data with many classes, of runs that mirror images, and of damaged data.
ONLY_WHERE_THERE = ("test_top5_accuracy", "test_mirrored_accuracy", "skipped_images")


class Run:
    """What a workdir holds: the recipe always, figures, signals and the net where the run has come so far."""

    def __init__(self, workdir):
        self.workdir = pathlib.Path(workdir)
        refused = f"WORKDIR must be the folder of a run of train.py. Received: {str(workdir)!r}"
        try:
            self.recipe = dict(json.loads((self.workdir / "run.json").read_text())["recipe"])
            self.result = self._read("result.json", {})
            self.history = self._read("history.json", [])
            self.signals = read_signals(self.workdir / "signals.csv")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{refused} ({first_line(error)})") from error

    def _read(self, name, missing):
        path = self.workdir / name
        return json.loads(path.read_text()) if path.exists() else missing

    @property
    def environment(self):
        fingerprint = self.result.get("data_sha256")
        data = {"data_sha256": fingerprint} if fingerprint else {}
        return {**data, **self.result.get("device", {}), **self.result.get("versions", {})}


def write_report(workdirs, path):
    """Writes one self-contained HTML page that compares runs.

    Args:
        workdirs: List of paths of `train.py`'s workdirs, at least one. A run that is not finished is shown as far as it is.
        path: Path of the page; replaced if it is there.

    Raises:
        ImportError: If matplotlib is not installed.
        InputError: If a workdir holds no run, or one is named twice.
        ValueError: If `path` is not of a file in a folder that can be written.
    """
    require("a report", "matplotlib")
    runs = _labelled([pathlib.Path(workdir) for workdir in workdirs])
    sections = [
        ("Result", _summary(runs)),
        ("Curves", _curves(runs)),
        ("Orthonormality by layer", _orthonormality(runs)),
        ("Signal by layer and step", _heat_maps(runs)),
        ("Filters", _filters(runs)),
        ("Recipe", _values({label: run.recipe for label, run in runs.items()})),
        ("Environment", _values({label: run.environment for label, run in runs.items()})),
    ]
    title = html.escape("ortho_keras: " + ", ".join(runs))
    body = "".join(f"<section><h2>{name}</h2>{content}</section>\n" for name, content in sections if content)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}</body></html>\n'
    )
    with whole_file(path) as own:
        own.write_text(page, encoding="utf-8")


def _labelled(workdirs):
    """`{label: Run}`: the folder's name, with as many of its parents' as tell runs of one name apart."""
    full = [workdir.resolve().parts for workdir in workdirs]
    if len(set(full)) < len(full):
        raise InputError(f"WORKDIR must be named once each. Received: {' '.join(map(str, workdirs))}")
    runs = {}
    for workdir, parts in zip(workdirs, full):
        count = 1
        while count < len(parts) and sum(other[-count:] == parts[-count:] for other in full) > 1:
            count += 1
        runs["/".join(parts[-count:])] = Run(workdir)
    return runs


def _table(header, rows, marked=()):
    def line(cells, tag):
        return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)

    body = "".join(
        f"<tr{' class=differs' if number in marked else ''}>{line(row, 'td')}</tr>" for number, row in enumerate(rows)
    )
    return f'<div class="wide"><table><thead><tr>{line(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def _summary(runs):
    rows = []
    for name, (key, form) in SUMMARY.items():
        values = [run.result.get(key) for run in runs.values()]
        if key in ONLY_WHERE_THERE and not any(values):
            continue
        rows.append([name, *("" if value is None else form.format(value) for value in values)])
    errors = [run.result.get("orthonormality_error", {}).values() for run in runs.values()]
    rows.append(["largest |WᵀW − I|", *(f"{max(values):.3g}" if values else "" for values in errors)])
    unfinished = [label for label, run in runs.items() if not run.result]
    note = f"<p>Not finished: {html.escape(', '.join(unfinished))}.</p>" if unfinished else ""
    return note + _table(["", *runs], rows)


def _values(columns):
    """A table of every value by run; lines in which runs differ are marked."""
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    rows = [[name, *(values.get(name, "") for values in columns.values())] for name in names]
    differs = [number for number, row in enumerate(rows) if len({str(value) for value in row[1:]}) > 1]
    return _table(["", *columns], rows, differs) if rows else ""


def _curves(runs):
    drawn = {label: run.history for label, run in runs.items() if run.history}
    if not drawn:
        return ""
    panels = {
        "accuracy": ("accuracy", "validation_accuracy"),
        "cross-entropy": ("crossentropy", "validation_crossentropy"),
        "penalty": ("penalty", None),
        "learning rate": ("learning_rate", None),
    }
    pictures = []
    for title, (solid, dashed) in panels.items():
        figure, axes = _figure()
        for number, (label, history) in enumerate(drawn.items()):
            for name, style in ((solid, "-"), (dashed, "--")):
                points = [(row["step"], row[name]) for row in history if row.get(name) is not None]
                if points:
                    marker = "o" if len(points) == 1 else ""
                    axes.plot(
                        *zip(*points), style, color=f"C{number % 10}", marker=marker, label=label if style == "-" else None
                    )
        positive = all(y > 0 for line in axes.lines for y in line.get_ydata())
        axes.set(xlabel="step", title=title, yscale="log" if title in ("cross-entropy", "penalty") and positive else "linear")
        axes.legend()
        validated = any(line.get_linestyle() == "--" for line in axes.lines)
        pictures.append(_picture(figure, f"{title} over the steps" + ", validation dashed" * validated))
    return f'<div class="pictures">{"".join(pictures)}</div>'


def _orthonormality(runs):
    found = {label: run.result["orthonormality_error"] for label, run in runs.items() if run.result.get("orthonormality_error")}
    if not found:
        return ""
    figure, axes = _figure()
    for label, errors in found.items():
        axes.plot(np.arange(1, len(errors) + 1), list(errors.values()), ".-", label=label)
    positive = all(y > 0 for line in axes.lines for y in line.get_ydata())
    axes.set(xlabel="kernel, from the input up", ylabel="largest |WᵀW − I|", yscale="log" if positive else "linear")
    axes.legend()
    return _picture(figure, "0 where all filters of a kernel are orthonormal, in groups where it has more filters than inputs")


def _heat_maps(runs):
    pictures = []
    for label, run in runs.items():
        if run.signals:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder, "signals.png")
                plot_heat_map(*errors_by_step(run.signals), path, label)
                pictures.append(_embedded(path.read_bytes(), "png", f"{label}: the error on its way down"))
    return f'<div class="pictures">{"".join(pictures)}</div>' if pictures else ""


def _filters(runs):
    """Filters of each net's first and last convolution."""
    pictures = []
    for label, run in runs.items():
        path = run.workdir / "final.keras"
        if not path.exists():
            continue
        try:
            model = load_model(path, compile=False)
        except (OSError, ValueError) as error:
            raise InputError(f"WORKDIR must hold a whole final.keras. Received: {run.workdir} ({first_line(error)})") from error
        convolutions = [layer.name for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
        layers = list(dict.fromkeys((convolutions[0], convolutions[-1])))
        with tempfile.TemporaryDirectory() as folder:
            picture = pathlib.Path(folder, "filters.png")
            plot_filters(model, layers, picture)
            pictures.append(_embedded(picture.read_bytes(), "png", f"{label}: filters of {' and '.join(layers)}"))
    return f'<div class="pictures">{"".join(pictures)}</div>' if pictures else ""


def _figure():
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _picture(figure, caption):
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return _embedded(file.getvalue(), "svg+xml", caption)


def _embedded(content, kind, caption):
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    caption = html.escape(caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m ortho_keras.trainer.report", description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="the folder of a run of train.py")
    parser.add_argument("--output", default="report.html", help="the page's file (default: report.html)")
    given = parser.parse_args(arguments)
    try:
        write_report(given.workdirs, given.output)
    except (ImportError, InputError) as error:
        print(f"ortho_keras.trainer.report: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"ortho_keras.trainer.report: --output: {error}", file=sys.stderr)
        return 2
    print(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
