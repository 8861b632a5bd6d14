"""Pictures: a run's curves, a net's signal."""

import textwrap

import numpy as np

from ortho_keras.method.checks import require
from ortho_keras.method.files import whole_file


def plot_curves(history, path, title):
    """Draws loss and penalty, accuracy, and learning rate over the steps, from a run's history, as a PNG file.

    Args:
        history: List of one dict of figures for each epoch, as `Trainer.run` returns it.
        path: Path of the file.
        title: String.
    """

    def series(name):
        rows = [(row["step"], row[name]) for row in history if name in row]
        return np.array(rows, float).reshape(-1, 2).T

    figure, (loss, accuracy, rate) = _figure((12, 3.8), 1, 3)
    marker = "o" if len(history) == 1 else ""
    for name, label in (("crossentropy", "training"), ("validation_crossentropy", "validation"), ("penalty", "penalty")):
        loss.plot(*series(name), marker=marker, label=label if series(name).size else None)
    loss.set(title="cross-entropy and penalty", xlabel="step", yscale="symlog" if _has_zero(series("penalty")) else "log")
    loss.legend()
    for name, label in (("accuracy", "training"), ("validation_accuracy", "validation")):
        accuracy.plot(*series(name), marker=marker, label=label if series(name).size else None)
    accuracy.set(title="accuracy", xlabel="step", ylim=(0, 1.02))
    accuracy.legend()
    rate.plot(*series("learning_rate"), marker=marker, color="0.3")
    rate.set(title="learning rate", xlabel="step", ylim=(0, None))
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    _save(figure, path)


def plot_signals(report, path):
    """Draws a `SignalReport` over the layers: error and activations, gradients, singular values, and shares, as a PNG file."""
    figure, ((error, gradient), (values, shares)) = _figure((13, 7.5), 2, 2)
    at = np.arange(1, len(report.layers) + 1)

    def series(name):
        return np.array([getattr(layer, name) for layer in report.layers], float)

    points = {"marker": ".", "markersize": 4}  # a line alone would not show a layer between two that have no figure
    error.plot(at, series("error_to_top"), label="error, over the top layer's", **points)
    error.plot(at, np.sqrt(series("forward_moment")), color="0.5", label="activation", **points)
    fired = series("fired") > 0
    word = "rescaled by modulation" if report.modulated else "modulation would rescale"
    if fired.any():
        error.plot(at[fired], series("error_to_top")[fired], "o", color="tab:red", markersize=4, label=word)
    error.set(title="magnitudes (root mean square)", yscale="log")
    gradient.plot(at, series("gradient_ratio"), label="gradient norm / kernel norm", **points)
    gradient.set(title="kernel gradients", yscale="log")
    cosine = gradient.twinx()
    cosine.plot(at, series("mean_abs_cosine"), color="tab:green", label="mean |cosine| of filters", **points)
    cosine.set_ylim(0, None)
    cosine.legend(handles=[*gradient.lines, *cosine.lines], loc="upper right")  # where it grows going down, this corner is free
    for kind, color in (("kernel", "tab:blue"), ("operator", "tab:orange")):
        low, high = series(f"{kind}_smallest"), series(f"{kind}_largest")
        if np.isfinite(low).any():
            label = "W" if kind == "kernel" else "the layer's linear map"
            values.fill_between(at, low, high, color=color, alpha=0.3, label=label)
            for edge in (low, high):
                values.plot(at, edge, color=color, linewidth=1, **points)
    values.set(title="singular values, smallest to largest", ylim=(0, None))
    shares.plot(at, 100 * series("image_share"), label="between-image share of the variance", **points)
    shares.plot(at, 100 * series("dead_share"), color="0.3", label="dead channels", **points)
    shares.set(title="shares, %", ylim=(-2, 102))
    for axes in (error, gradient, values, shares):
        axes.set(xlabel="layer, from the input up", xlim=(0.5, len(at) + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes is not gradient and axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")
    figure.suptitle("\n".join(textwrap.wrap(str(report).splitlines()[0], 150)), fontsize=11)
    _save(figure, path)


_MOST_NAMES, _MOST_STEPS = 22, 12  # what fits beside the map, and under it


def plot_heat_map(steps, names, ratios, path, title):
    """Draws magnitudes, layer by step, on a logarithmic color scale around 1, as a PNG file.

    Args:
        steps: List of ints.
        names: List of the layers' names, from the input up.
        ratios: Array `(layers, steps)`, above 0; others stay white.
        path: Path of the file.
        title: String.
    """
    figure, axes = _figure((10, 5.5), 1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        decades = np.log10(np.asarray(ratios, float))
    decades[~np.isfinite(decades)] = np.nan
    limit = max(1.0, float(np.nanmax(np.abs(decades)))) if np.isfinite(decades).any() else 1.0
    image = axes.imshow(decades, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    for set_ticks, labels, most in ((axes.set_xticks, steps, _MOST_STEPS), (axes.set_yticks, names, _MOST_NAMES)):
        every = -(-len(labels) // most)
        set_ticks(range(0, len(labels), every), labels[::every])
    axes.set(xlabel="step", title=title)
    figure.colorbar(image, label="log10 of the error's magnitude over the top layer's")
    _save(figure, path)


def _figure(size, rows, columns):
    require("a picture", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _save(figure, path):
    with whole_file(path) as own:
        figure.savefig(own, format="png", dpi=120)


def _has_zero(series):
    return bool((series[1] <= 0).any())
