"""Plots as PNG files: a run's curves, a network's signal over the layers, and its error over layers and steps."""

import textwrap

import numpy as np

from ortho_keras.method.checks import require
from ortho_keras.method.files import whole_file


def plot_curves(history, path, title):
    """Plots a run's `history`, a list of one dict of metrics for each epoch: cross-entropy, accuracy and penalty."""
    figure = new_figure(12, 3.8)
    panels = figure.subplots(1, 3)
    for axes, name, label in zip(panels, ("crossentropy", "accuracy", "penalty"), ("cross-entropy", "accuracy", "penalty")):
        lines = {"training": name, "validation": f"validation_{name}"}
        values = {label: [(row["step"], row[key]) for row in history if key in row] for label, key in lines.items()}
        for kind, points in values.items():
            axes.plot(*zip(*points), marker="o" if len(points) == 1 else "", label=kind)
        positive = all(value > 0 for points in values.values() for _, value in points)
        axes.set(xlabel="step", ylabel=label, yscale="log" if positive and name != "accuracy" else "linear")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    panels[1].set_ylim(0, 1.02)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(title)
    save(figure, path)


def plot_signals(report, path):
    """Plots a `SignalReport` over the layers: error and activations, gradients, singular values, and shares."""
    figure = new_figure(13, 7.5)
    (error, gradient), (values, shares) = figure.subplots(2, 2)
    at = np.arange(1, len(report.layers) + 1)

    def series(name):
        return np.array([getattr(layer, name) for layer in report.layers], float)

    points = {"marker": ".", "markersize": 4}  # a line alone would not show a layer between two without a value
    error.plot(at, series("error_to_top"), label="error, over the last layer's", **points)
    error.plot(at, np.sqrt(series("forward_moment")), color="0.5", label="activation", **points)
    fired = series("fired") > 0
    label = "rescaled by modulation" if report.modulated else "modulation would rescale"
    error.plot(at[fired], series("error_to_top")[fired], "o", color="tab:red", markersize=4, label=label if fired.any() else "")
    error.set(ylabel="root mean square", yscale="log")
    gradient.plot(at, series("gradient_ratio"), label="gradient of the kernel, over the kernel", **points)
    gradient.set(ylabel="ratio of norms", yscale="log")
    for kind, label, color in (("kernel", "W", "tab:blue"), ("operator", "the layer's linear map", "tab:orange")):
        low, high = series(f"{kind}_smallest"), series(f"{kind}_largest")
        if np.isfinite(low).any():
            values.fill_between(at, low, high, color=color, alpha=0.3, label=label)
            values.plot(at, np.stack([low, high], 1), color=color, linewidth=1, **points)
    values.set(ylabel="singular values, smallest to largest", ylim=(0, None))
    if not values.lines:
        values.text(0.5, 0.5, "no values without singular_values=True", transform=values.transAxes, ha="center")
    shares.plot(at, series("image_share"), label="variance between images", **points)
    shares.plot(at, series("dead_share"), color="0.3", label="dead channels", **points)
    shares.plot(at, series("mean_abs_cosine"), color="tab:green", label="mean |cosine| of filters", **points)
    shares.set(ylabel="share, or |cosine|", ylim=(-0.02, 1.02))
    for axes in (error, gradient, values, shares):
        axes.set(xlabel="layer, from input to output", xlim=(0.5, len(at) + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:  # above the axes, where no line is
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9, columnspacing=1, handlelength=1.5
            )
    figure.suptitle("\n".join(textwrap.wrap(str(report).splitlines()[0], 150)), fontsize=11)
    save(figure, path)


def errors_by_step(rows):
    """Returns `plot_heat_map`'s `(steps, names, ratios)`, the layers in the order of the deepest network, as it was last."""
    networks = {}
    for row in rows:
        networks.setdefault(row["step"], {})[row["name"]] = row["error_to_top"]
    steps = sorted(networks)
    deepest = max(steps, key=lambda step: (len(networks[step]), step))
    names = list(dict.fromkeys([*networks[deepest], *(name for network in networks.values() for name in network)]))
    return steps, names, np.array([[networks[step].get(name, np.nan) for step in steps] for name in names])


def plot_heat_map(steps, names, ratios, path, title):
    """Plots the errors' magnitudes, an array `(layers, steps)`, on a logarithmic color scale around 1; NaN is hatched."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    with np.errstate(divide="ignore"):
        decades = np.log10(np.asarray(ratios, float))
    limit = max(1.0, np.abs(decades[np.isfinite(decades)]).max(initial=0))
    decades = decades.clip(-limit, limit)  # an error of 0 has the darkest blue
    image = axes.imshow(decades, "RdBu_r", aspect="auto", origin="lower", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.patch.set(hatch="////", edgecolor="0.6")  # shows through where the image has no value
    for set_ticks, labels, most in ((axes.set_xticks, steps, 10), (axes.set_yticks, names, 22)):  # as many as fit
        every = -(-len(labels) // most)
        set_ticks(range(0, len(labels), every), labels[::every])
    axes.set(xlabel="step", ylabel="layer, from input to output", title=textwrap.fill(title, 70))
    figure.colorbar(image, label="log10 of the error's magnitude over the last layer's")
    save(figure, path)


def plot_confusion(matrix, names, path, title):
    """Plots a confusion matrix: a row for each true class, a column for each predicted one; the share of a row is the color."""
    matrix = np.asarray(matrix)
    figure = new_figure(6.5, 5.5)
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, "Blues", vmin=0, vmax=1, interpolation="nearest")
    every = -(-len(names) // 25)  # as many as fit
    for set_ticks, angle in ((axes.set_xticks, 90), (axes.set_yticks, 0)):
        set_ticks(range(0, len(names), every), [name[:16] for name in names[::every]], rotation=angle)
    if len(names) <= 12:
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    axes.set(xlabel="predicted class", ylabel="true class", title=textwrap.fill(title, 60))
    figure.colorbar(image, label="share of the true class's images")
    save(figure, path)


def new_figure(width, height):
    """Returns a matplotlib figure of a size in inches that no window shows."""
    require("a plot", "matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path, dpi=120):
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=dpi)
