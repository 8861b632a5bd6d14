"""Pictures of a run."""

import pathlib

import numpy as np


def plot_curves(history, path, title):
    """Draws loss and penalty, accuracy, and learning rate over the steps, from a run's history, as a PNG file.

    Args:
        history: List of one dict of figures for each epoch, as `Trainer.run` returns it.
        path: Path of the file.
        title: String.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def series(name):
        rows = [(row["step"], row[name]) for row in history if name in row]
        return np.array(rows, float).reshape(-1, 2).T

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(1, 3)
    marker = "o" if len(history) == 1 else ""
    for name, label in (("crossentropy", "training"), ("validation_crossentropy", "validation"), ("penalty", "penalty")):
        loss.plot(*series(name), marker=marker, label=label)
    loss.set(title="cross-entropy and penalty", xlabel="step", yscale="symlog" if _has_zero(series("penalty")) else "log")
    loss.legend()
    for name, label in (("accuracy", "training"), ("validation_accuracy", "validation")):
        accuracy.plot(*series(name), marker=marker, label=label)
    accuracy.set(title="accuracy", xlabel="step", ylim=(0, 1.02))
    accuracy.legend()
    rate.plot(*series("learning_rate"), marker=marker, color="0.3")
    rate.set(title="learning rate", xlabel="step", ylim=(0, None))
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    partial = pathlib.Path(path).with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)


def _has_zero(series):
    return bool((series[1] <= 0).any())
