"""Pictures of what a trained net sees and has learned: feature maps and filters, of one model or of several side by side."""

import difflib
import math

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.diagnosis.spectra import mean_cosines
from ortho_keras.method.checks import require
from ortho_keras.method.files import whole_file
from ortho_keras.method.graphs import Graph
from ortho_keras.method.kernels import as_matrices, layer_kernels

# Pixels.
MAP, PATCH, GAP, LINE, MARGIN = 72, 36, 4, 20, 12
DPI, LARGEST = 144, 20_000
CHANNELS = 4  # input channels that are drawn of each filter


def plot_features(model, images, layers, path, maps=8):
    """Draws feature maps as a PNG file: a row for each image, the image at the left, then a cell for each layer.

    The layers' outputs in inference mode; weights and BatchNormalization's statistics stay as they are. Each map is scaled to
    its own range, lowest value black, highest white; a constant map is grey, and values that are not finite are red.

    Args:
        model: A built Functional or Sequential model with one input, images `(batch, height, width, channels)`.
        images: Array `(n, height, width, channels)` as the model takes it, n at least 1, 1 or 3 channels. uint8 images are
            shown as they are, others scaled to their own range.
        layers: List of names of layers whose output is `(batch, height, width, channels)`. Layers of the model itself, not
            of a model inside it. Of a layer that is called several times, the first output is drawn.
        path: Path of the file.
        maps: int, at least 1. The first `maps` channels of each output are drawn.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If an argument is not as above. A wrong layer's name is answered with the nearest ones.

    Example:

    >>> model = ortho_keras.plain_cnn(44)
    >>> plot_features(model, images[:3], ["stem_conv_relu", "stage3_conv14_relu"], "features.png")

    Reference:
        Xie, Xiong, Pu 2017 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)) compare orthonormal nets with others in
        their figures; the layout is ours.
    """
    compare_features({getattr(model, "name", ""): model}, images, layers, path, maps)


def compare_features(models, images, layers, path, maps=8):
    """Draws several models' feature maps side by side: the same images and layers, a block of cells for each model.

    Args:
        models: Dict of label to model, see `plot_features`.
        images: See `plot_features`.
        layers: See `plot_features`. Every model must have all of them.
        path: See `plot_features`.
        maps: See `plot_features`.

    Raises:
        ValueError: See `plot_features`.
    """
    _check_models(models)
    _check_count("maps", maps)
    images = _checked_images(images)
    outputs = {label: layer_outputs(model, images, layers) for label, model in models.items()}
    maps = min(maps, max(output.shape[-1] for block in outputs.values() for output in block.values()))
    columns = math.isqrt(maps)
    rows = -(-maps // columns)
    width, height = _fit(images.shape[1:3], MAP, MAP)
    cell_width, cell_height = columns * (width + GAP), rows * (height + GAP)
    top = MARGIN + 2 * LINE + GAP

    sheet = _Sheet()
    sheet.text("input", MARGIN, top - LINE, cell_width)
    for row, image in enumerate(images):
        pixels = image / 255 if images.dtype == np.uint8 else _stretched(image)
        sheet.tile(pixels, MARGIN, top + row * (cell_height + 3 * GAP), cell_width - GAP, cell_height - GAP)
    left = MARGIN + cell_width + 2 * GAP
    for label, block in outputs.items():
        sheet.text(label, left, MARGIN, len(block) * (cell_width + 2 * GAP), bold=True)
        for name, output in block.items():
            sheet.text(name, left, top - LINE, cell_width)
            for row, image_maps in enumerate(output):
                for at in range(min(maps, output.shape[-1])):
                    x = left + at % columns * (width + GAP)
                    y = top + row * (cell_height + 3 * GAP) + at // columns * (height + GAP)
                    sheet.tile(_stretched(image_maps[..., at]), x, y, width, height)
            left += cell_width + 2 * GAP
        left += 4 * GAP
    sheet.save(path)


def plot_filters(model, layers, path, filters=16):
    """Draws convolution kernels as a PNG file: a row for each layer, in it a column for each of its first filters.

    A filter with three input channels is one patch in colour; of others the first four input channels are drawn in grey, one
    below the other. What is drawn of a layer has one scale, symmetric around 0 (mid-grey), so that norms can be compared; the
    title gives it, with the kernel's shape and the mean |cosine| between the layer's filters: 0 where they are orthogonal.

    Args:
        model: A built Keras model.
        layers: List of names of its Conv2D, Conv2DTranspose or DepthwiseConv2D layers; not those of a model inside it.
        path: Path of the file.
        filters: int, at least 1. The first `filters` of each layer are drawn; the title's cosine is over all of them.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If an argument is not as above. A wrong layer's name is answered with the nearest ones.

    Example:

    >>> plot_filters(ortho_keras.plain_cnn(44), ["stem_conv", "stage3_conv14"], "filters.png")
    """
    compare_filters({getattr(model, "name", ""): model}, layers, path, filters)


def compare_filters(models, layers, path, filters=16):
    """Draws several models' kernels side by side: the same layers, a block for each model.

    Args:
        models: Dict of label to model, see `plot_filters`.
        layers: See `plot_filters`. Every model must have all of them.
        path: See `plot_filters`.
        filters: See `plot_filters`.

    Raises:
        ValueError: See `plot_filters`.
    """
    _check_models(models)
    _check_count("filters", filters)
    blocks = [[_patches(layer, filters) for layer in _named_layers(model, layers)] for model in models.values()]
    most = max(len(patches) for block in blocks for patches, _ in block)
    block_width = max(most, 8) * (PATCH + GAP)  # room for the titles

    sheet = _Sheet()
    lefts = [MARGIN + column * (block_width + 4 * GAP) for column in range(len(models))]
    for label, left in zip(models, lefts):
        sheet.text(label, left, MARGIN, block_width, bold=True)
    top = MARGIN + LINE + GAP
    for row in zip(*blocks):
        for (patches, title), left in zip(row, lefts):
            sheet.text(title, left, top, block_width)
            for (at, down), _ in np.ndenumerate(patches[:, :, 0, 0, 0]):
                x, y = left + at * (PATCH + GAP), top + LINE + down * (PATCH + GAP)
                sheet.tile(patches[at, down], x, y, PATCH, PATCH)
        top += LINE + 2 * GAP + max(patches.shape[1] for patches, _ in row) * (PATCH + GAP)
    sheet.save(path)


def layer_outputs(model, images, layers):
    """Returns the named layers' outputs in inference mode, a dict of float32 arrays `(n, height, width, channels)`."""
    if not isinstance(model, (keras.Function, keras.Sequential)):
        raise ValueError(
            "`model` must be a Functional or Sequential model, whose layers' order is known. "
            f"Received: {model.name!r}, a {type(model).__name__}"
        )
    names = {id(layer): layer.name for layer in _named_layers(model, layers)}
    shapes = [tuple(tensor.shape) for tensor in model.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or not all(map(_agree, shapes[0][1:], images.shape[1:])):
        raise ValueError(
            f"`images` must fit the one input of model {model.name!r}, (batch, height, width, channels). "
            f"Received: images of shape {images.shape}, model inputs {shapes}"
        )
    found = {}

    def call(layer, *args, **kwargs):
        outputs = layer(*args, **kwargs)
        if id(layer) in names:
            found.setdefault(names[id(layer)], outputs)
        return outputs

    Graph(model).run(tf.cast(images, model.inputs[0].dtype), call, training=False)
    for name, output in found.items():
        if len(getattr(output, "shape", ())) != 4:
            raise ValueError(
                "`layers` must name layers whose output is (batch, height, width, channels). "
                f"Received: {name!r}, whose output is {getattr(output, 'shape', type(output).__name__)}"
            )
    return {name: tf.cast(found[name], tf.float32).numpy() for name in layers}


def _patches(layer, filters):
    """Returns what is drawn of a layer's filters, `(filters, rows, height, width, colours)` in 0 to 1, and their title."""
    found = [kernel for kernel in layer_kernels(layer) if len(kernel.variable.shape) == 4 and isinstance(kernel.layout, str)]
    if len(found) != 1:
        raise ValueError(
            "`layers` must name layers with one kernel of rank 4: Conv2D, Conv2DTranspose, DepthwiseConv2D. "
            f"Received: {layer.name!r}, a {type(layer).__name__}"
        )
    (kernel,) = found
    height, width = kernel.variable.shape[:2]
    matrices = tf.cast(as_matrices(kernel.variable, kernel.layout, kernel.groups), tf.float32).numpy()
    patches = matrices.reshape(len(matrices), height, width, -1, matrices.shape[2])
    patches = patches.transpose(0, 4, 3, 1, 2).reshape(-1, patches.shape[3], height, width)[:filters]
    coloured = patches.shape[1] == 3
    patches = patches.transpose(0, 2, 3, 1)[:, np.newaxis] if coloured else patches[:, :CHANNELS, ..., np.newaxis]
    scale = np.abs(patches[np.isfinite(patches)]).max(initial=0)
    _, cosine = mean_cosines([matrices])
    title = f"{layer.name}  {tuple(kernel.variable.shape)}  ±{scale:#.2g}"
    title += "" if math.isnan(cosine) else f"  mean |cos| {cosine:.2f}"
    return 0.5 + 0.5 * patches / (scale or 1), title


def _agree(expected, size):
    return expected is None or expected == size


def _named_layers(model, names):
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`layers` must be a list of at least one layer's name. Received: layers={names!r}")
    own = {layer.name: layer for layer in model.layers if not isinstance(layer, (keras.layers.InputLayer, keras.Model))}
    for name in names:
        if name not in own:
            near = difflib.get_close_matches(name, own, n=3, cutoff=0)
            raise ValueError(
                f"`layers` must name layers of model {model.name!r} itself (not a model inside it, nor a layer of one). "
                f"The nearest are {', '.join(map(repr, near))}. Received: {name!r}"
            )
    return [own[name] for name in names]


def _check_models(models):
    if not isinstance(models, dict) or not models or not all(isinstance(label, str) for label in models):
        raise ValueError(f"`models` must be a dict of label, a string, to model. Received: models={models!r}")
    for model in models.values():
        if not isinstance(model, keras.Model) or not model.built:
            raise ValueError(f"`model` must be a built Keras model (call `model.build(...)`). Received: model={model!r}")


def _check_count(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer, at least 1. Received: {name}={value!r}")


def _checked_images(images):
    images = np.asarray(images)
    numbers = np.issubdtype(images.dtype, np.integer) or np.issubdtype(images.dtype, np.floating)
    if images.ndim != 4 or not images.size or images.shape[-1] not in (1, 3) or not numbers or not np.isfinite(images).all():
        raise ValueError(
            "`images` must be finite numbers (n, height, width, channels), with n at least 1 and 1 or 3 channels. "
            f"Received: images of shape {images.shape} and type {images.dtype}"
        )
    return images


def _stretched(values):
    """Scales an array to its own range, 0 to 1; a constant one to 0.5. What is not finite stays as it is."""
    values = np.asarray(values, np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    return (values - low) / (high - low) if high > low else np.where(np.isfinite(values), 0.5, np.nan)


def _fit(shape, width, height):
    """Returns the largest width and height with the proportions of `shape`, whole pixels that fit into those given."""
    scale = min(width / shape[1], height / shape[0])
    return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


class _Sheet:
    """A picture that is put together in pixels from its top left corner."""

    def __init__(self):
        require("a picture", "matplotlib")
        self.tiles, self.texts = [], []

    def tile(self, pixels, x, y, width, height):
        """Puts values of 0 to 1, `(height, width)` or with 1 or 3 channels behind, into a box; what is not finite is red."""
        pixels = np.atleast_3d(pixels)
        colours = np.broadcast_to(pixels, (*pixels.shape[:2], 3)).astype(np.float64)
        colours[~np.isfinite(pixels).all(-1)] = (1, 0, 0)
        self.tiles.append((colours, x, y, *_fit(pixels.shape, width, height)))

    def text(self, words, x, y, width, bold=False):
        size = min(9 if bold else 7, width * 72 / DPI / (0.62 * max(1, len(words))))  # in points; a letter is 0.62 wide
        self.texts.append((words, x, y, size, "bold" if bold else "normal"))

    def save(self, path):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        width = MARGIN + max(x + width for _, x, _, width, _ in self.tiles)
        height = MARGIN + max(y + height for _, _, y, _, height in self.tiles)
        if max(width, height) > LARGEST:
            raise ValueError(
                f"a picture may have {LARGEST} pixels a side: ask for fewer images, layers or maps. "
                f"Received: {width} x {height}"
            )
        figure = Figure(figsize=(width / DPI, height / DPI))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        for colours, x, y, tile_width, tile_height in self.tiles:
            axes.imshow(colours.clip(0, 1), extent=(x, x + tile_width, y + tile_height, y), aspect="auto")
        for words, x, y, size, weight in self.texts:
            axes.text(x, y, words, fontsize=size, fontweight=weight, va="top", parse_math=False)
        axes.set(xlim=(0, width), ylim=(height, 0))
        with whole_file(path) as own:
            figure.savefig(own, format="png", dpi=DPI)
