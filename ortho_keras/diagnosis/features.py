"""Feature maps and filters of one network, or of several side by side, as PNG files."""

import difflib
import math

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.diagnosis.plots import new_figure, save
from ortho_keras.diagnosis.spectra import mean_cosines
from ortho_keras.method.checks import check_built, check_number
from ortho_keras.method.graphs import Graph
from ortho_keras.method.kernels import as_matrices, layer_kernels

MAP, PATCH, GAP, DPI, LARGEST, CHANNELS = 72, 36, 4, 144, 20_000, 4  # pixels, and the input channels drawn of each filter


def plot_features(models, images, layers, path, maps=8, titles=None):
    """Draws feature maps as a PNG file: a row for each image, with the image at the left and a cell for each layer.

    Several models are drawn side by side. A model runs in inference mode. Each map is scaled to its own range, from black
    to white; a constant map is grey, and values that are not finite are red.

    Args:
        models: A built Functional or Sequential model with one input, images `(batch, height, width, channels)`, or a dict of
            label to such models, which all have the layers.
        images: Array `(n, height, width, channels)`, n at least 1, 1 or 3 channels. uint8 images are shown as they are, others
            scaled to their own range.
        layers: List of names of the model's own layers (not those of a model inside it) with an output of rank 4. Of a layer
            that is called several times, the first output is drawn.
        path: Path of the file.
        maps: int, at least 1. The first `maps` channels of each output are drawn.
        titles: List of a string for each image, its class say. Defaults to `None`.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If an argument is not as above.

    Example:

    >>> model = ortho_keras.plain_cnn(44)
    >>> plot_features(model, images[:3], ["stem_conv_relu", "stage3_conv14_relu"], "features.png")

    Reference:
        The figures of Xie, Xiong, Pu 2017 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)); the layout is ours.
    """
    models = _labelled(models, "maps", maps)
    images = np.asarray(images)
    shaped = images.ndim == 4 and images.size and images.shape[-1] in (1, 3)
    if not shaped or images.dtype.kind not in "iuf" or not np.isfinite(images).all():
        expected = "`images` must be finite numbers (n, height, width, channels), with n at least 1 and 1 or 3 channels"
        raise ValueError(f"{expected}. Received: images of shape {images.shape} and type {images.dtype}")
    titles = ["input", *[""] * (len(images) - 1)] if titles is None else list(titles)
    if len(titles) != len(images):
        raise ValueError(f"`titles` must have one string for each of the {len(images)} images. Received: titles={titles!r}")
    outputs = {label: layer_outputs(model, images, layers) for label, model in models.items()}
    columns = math.isqrt(min(maps, max(output.shape[-1] for block in outputs.values() for output in block.values())))
    pixels = [image / 255 if images.dtype == np.uint8 else _stretched(image) for image in images]
    blocks = {"": [[(title, _mosaic([image], 1, columns * (MAP + GAP) - GAP))] for title, image in zip(titles, pixels)]}

    def cell(output):
        return _mosaic([_stretched(output[..., k, np.newaxis]) for k in range(min(maps, output.shape[-1]))], columns, MAP)

    for label, block in outputs.items():
        blocks[label] = [[(name * (row == 0), cell(block[name][row])) for name in block] for row in range(len(images))]
    _draw(blocks, path)


def plot_filters(models, layers, path, filters=16):
    """Draws convolution kernels as a PNG file: a row for each layer, in it a column for each of its first filters.

    A filter with three input channels is one patch in color; of others the first four input channels are drawn in grey. All
    patches of a layer have one scale, symmetric around 0 (mid-grey), given in the title with the mean |cosine| of its filters.

    Args:
        models: A built Keras model, or a dict of label to models, which are drawn side by side and all have the layers.
        layers: List of names of its Conv2D, Conv2DTranspose or DepthwiseConv2D layers; not those of a model inside it.
        path: Path of the file.
        filters: int, at least 1. The first `filters` of each layer are drawn; the title's cosine is over all of them.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If an argument is not as above. For an unknown layer the message lists the nearest names.

    Example:

    >>> plot_filters(ortho_keras.plain_cnn(44), ["stem_conv", "stage3_conv14"], "filters.png")
    """
    models = _labelled(models, "filters", filters)
    found = {label: _named_layers(model, layers) for label, model in models.items()}
    _draw({label: [[_filters(layer, filters)] for layer in each] for label, each in found.items()}, path)


def layer_outputs(model, images, layers):
    """Returns the named layers' outputs in inference mode, a dict of float32 arrays `(n, height, width, channels)`."""
    graph, chosen, found = Graph(model), _named_layers(model, layers), {}
    shapes = [tuple(tensor.shape) for tensor in model.inputs]
    if len(shapes) > 1 or not tf.TensorShape([None, *shapes[0][1:]]).is_compatible_with(images.shape):
        expected = f"`images` must fit the inputs of model {model.name!r}, one of shape {shapes[0]}"
        raise ValueError(f"{expected}. Received: images of shape {images.shape}, {len(shapes)} inputs")

    def call(layer, *args, **kwargs):
        outputs = layer(*args, **kwargs)
        if layer in chosen:
            found.setdefault(layer.name, outputs)
        return outputs

    graph.run(tf.cast(images, model.inputs[0].dtype), call, training=False)
    for name, output in found.items():
        shape = getattr(output, "shape", ())
        if len(shape) != 4:
            expected = "`layers` must name layers whose output is (batch, height, width, channels)"
            raise ValueError(f"{expected}. Received: {name!r}, whose output is {shape or type(output).__name__}")
    return {name: tf.cast(found[name], tf.float32).numpy() for name in layers}


def _filters(layer, filters):
    """Returns a title and what is drawn of a layer's filters."""
    found = [kernel for kernel in layer_kernels(layer) if len(kernel.variable.shape) == 4 and isinstance(kernel.layout, str)]
    if len(found) != 1:
        expected = "`layers` must name layers with one kernel of rank 4: Conv2D, Conv2DTranspose, DepthwiseConv2D"
        raise ValueError(f"{expected}. Received: {layer.name!r}, a {type(layer).__name__}")
    (kernel,) = found
    height, width = kernel.variable.shape[:2]
    matrices = tf.cast(as_matrices(kernel.variable, kernel.layout, kernel.groups), tf.float32).numpy()
    patches = matrices.reshape(len(matrices), height, width, -1, matrices.shape[2])
    patches = patches.transpose(0, 4, 1, 2, 3).reshape(-1, height, width, patches.shape[3])[:filters]
    columns = len(patches)
    if patches.shape[3] != 3:  # a row for each input channel
        patches = np.moveaxis(patches[..., :CHANNELS], 3, 0).reshape(-1, height, width, 1)
    scale = np.abs(patches[np.isfinite(patches)]).max(initial=0)
    _, cosine = mean_cosines([matrices])
    title = f"{layer.name}  {tuple(kernel.variable.shape)}  ±{scale:#.2g}"
    title += "" if math.isnan(cosine) else f"  mean |cos| {cosine:.2f}"
    return title, _mosaic(0.5 + 0.5 * patches / (scale or 1), columns, PATCH)


def _named_layers(model, names):
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`layers` must be a list of at least one layer's name. Received: layers={names!r}")
    known = {layer.name: layer for layer in model.layers if not isinstance(layer, (keras.layers.InputLayer, keras.Model))}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0)
            expected = f"`layers` must name layers of model {model.name!r} itself, not a model inside it nor a layer of one"
            raise ValueError(f"{expected}. The nearest are {', '.join(map(repr, near))}. Received: {name!r}")
    return [known[name] for name in names]


def _labelled(models, name, number):
    """Returns the models as a dict of label to model, checked, with the number of maps or filters."""
    models = models if isinstance(models, dict) else {getattr(models, "name", ""): models}
    if not models or not all(isinstance(label, str) for label in models):
        raise ValueError(f"`models` must be a model, or a dict of label, a string, to model. Received: models={models!r}")
    for model in models.values():
        check_built(model)
    check_number(name, number, least=1, integer=True)
    return models


def _stretched(values):
    """Scales an array to its own range, 0 to 1; a constant one to 0.5. What is not finite becomes NaN."""
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    scaled = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
    return np.where(np.isfinite(values), scaled, np.nan)


def _mosaic(tiles, columns, side):
    """Arranges tiles, `(height, width, 1 or 3)` of values 0 to 1, in rows on white, `side` pixels each; NaN is red."""
    tiles = np.asarray(tiles, np.float32)
    scale = side / max(tiles.shape[1:3])
    size = [max(1, round(scale * length)) for length in tiles.shape[1:3]]
    tiles = tf.image.resize(tiles, size, "nearest" if scale >= 1 else "area").numpy()
    tiles = np.where(np.isfinite(tiles).all(-1, keepdims=True), tiles.clip(0, 1), (1, 0, 0))
    tiles = np.pad(tiles, [(0, -len(tiles) % columns), (0, GAP), (0, GAP), (0, 0)], constant_values=1)
    rows = tiles.reshape(-1, columns, *tiles.shape[1:]).swapaxes(1, 2)
    return rows.reshape(rows.shape[0] * rows.shape[1], -1, 3)[:-GAP, :-GAP]


def _draw(blocks, path):
    """Draws blocks of cells side by side, `{label: rows of (title, pixels)}`."""
    heights = [max(pixels.shape[0] for row in rows for _, pixels in row) for rows in zip(*blocks.values())]
    lines = [max(title.count("\n") + 2 if title else 0 for row in rows for title, _ in row) for rows in zip(*blocks.values())]
    widths = {}
    for label, rows in blocks.items():  # a title's letter is about 9 pixels wide
        widths[label] = [
            max(max(pixels.shape[1], *(9 * len(line) for line in title.split("\n"))) for title, pixels in column)
            for column in zip(*rows)
        ]
        widths[label][-1] += max(0, 14 * len(label) - sum(widths[label]))  # a label's are larger
    width = sum(block_width + 3 * GAP for block in widths.values() for block_width in block)
    height = 40 + sum(heights) + 15 * sum(lines)
    if max(width, height) > LARGEST:
        raise ValueError(f"choose fewer images, layers or maps: at most {LARGEST} pixels a side. Received: {width} x {height}")
    figure = new_figure(width / DPI, height / DPI)
    figure.get_layout_engine().set(w_pad=GAP / DPI, h_pad=GAP / DPI, wspace=0, hspace=0)
    subfigures = figure.subfigures(1, len(blocks), squeeze=False, width_ratios=[sum(block) for block in widths.values()])
    for subfigure, (label, rows) in zip(subfigures[0], blocks.items()):
        subfigure.suptitle(label or " ", x=0.01, ha="left", fontsize=9, fontweight="bold", parse_math=False)
        grid = subfigure.subplots(len(rows), len(rows[0]), squeeze=False, width_ratios=widths[label], height_ratios=heights)
        for line, row in zip(grid, rows):
            for axes, (title, pixels) in zip(line, row):
                axes.imshow(pixels, interpolation="nearest")
                axes.set_title(title, loc="left", fontsize=7, parse_math=False)
                axes.set_anchor("NW")
                axes.axis("off")
    save(figure, path, DPI)
