"""Feature maps and filters, by the pixels of the figures that are saved."""

import itertools
import json
import pathlib
import sys

import keras
import matplotlib.image
import numpy as np
import pytest
from keras import layers

from ortho_keras import modulate, plain_cnn, plot_features, plot_filters
from ortho_keras.diagnosis import features
from ortho_keras.diagnosis.features import CHANNELS, GAP, MAP, PATCH, layer_outputs
from ortho_keras.trainer.data import load_data

PATTERN = np.array([[0, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 0], [0, 1, 0, 1]], np.float32)
IMAGES = PATTERN[np.newaxis, ..., np.newaxis]


@pytest.fixture
def cells(monkeypatch, tmp_path):
    """Calls a function with a path, and returns what it drew: `{label: rows of (title, pixels)}`."""
    figures, save = [], features.save

    def record(figure, path, dpi):
        figures.append(figure)
        save(figure, path, dpi)

    def draw(function, *arguments, **options):
        function(*arguments, path=tmp_path / "drawn.png", **options)
        picture = matplotlib.image.imread(tmp_path / "drawn.png")
        figures[-1].dpi = features.DPI
        width, height = figures[-1].get_size_inches() * features.DPI
        assert len(np.unique(picture)) > 2 and picture.shape[1] > 0.9 * width and picture.shape[0] > 0.9 * height
        drawn = {}
        labels = [part._suptitle.get_window_extent() for part in figures[-1].subfigs]
        assert all(box.xmax < next_box.xmin for box, next_box in itertools.pairwise(labels)) and labels[-1].xmax < width
        for part in figures[-1].subfigs:
            shape = part.axes[0].get_subplotspec().get_gridspec().get_geometry()
            sizes = [axes.get_window_extent().height / axes.images[0].get_array().shape[0] for axes in part.axes]
            assert min(sizes) > 0.9  # about a pixel for each, at least
            each = [(axes.get_title(loc="left"), np.asarray(axes.images[0].get_array())) for axes in part.axes]
            drawn[part.get_suptitle().strip()] = [each[row * shape[1] : (row + 1) * shape[1]] for row in range(shape[0])]
        return drawn

    monkeypatch.setattr(features, "save", record)
    return draw


def tiles(pixels, side, size):
    """The tiles of a mosaic, `(rows, columns, size, size, 3)`, one pixel for each square; gaps are white."""
    step = side + GAP
    rows, columns = ((length + GAP) // step for length in pixels.shape[:2])
    assert (pixels[side:step] == 1).all() and (pixels[:, side:step] == 1).all()
    middles = np.arange(size) * (side // size) + side // size // 2
    return np.stack(
        [[pixels[row * step + middles][:, column * step + middles] for column in range(columns)] for row in range(rows)]
    )


def grey(values):
    return np.repeat(np.asarray(values, np.float32)[..., np.newaxis], 3, -1)


def conv_model(kernel, shape=(4, 4), **options):
    """One convolution with the given kernel."""
    kernel = np.asarray(kernel, np.float32)
    conv = layers.Conv2D(kernel.shape[-1], kernel.shape[:2], use_bias=False, name="conv", **options)
    model = keras.Sequential([keras.Input((*shape, kernel.shape[2])), conv])
    conv.kernel.assign(kernel)
    return model


def test_each_map_has_its_own_range(cells):
    model = conv_model([[[[1.0, -7.0, 0.0, 1e-3, np.inf]]]])
    drawn = cells(plot_features, model, IMAGES, ["conv"], maps=5)
    assert list(drawn) == ["", model.name] and drawn[""][0][0][0] == "input"
    np.testing.assert_array_equal(tiles(drawn[""][0][0][1], 2 * MAP + GAP, 4)[0, 0], grey(PATTERN))
    ((title, pixels),) = drawn[model.name][0]
    found = tiles(pixels, MAP, 4)
    expected = [PATTERN, 1 - PATTERN, np.full((4, 4), 0.5), PATTERN]
    assert title == "conv" and found.shape[:2] == (3, 2)
    np.testing.assert_allclose(found.reshape(6, 4, 4, 3)[:4], grey(expected), atol=1e-6)
    assert (found[2, 0, PATTERN == 0] == (1, 0, 0)).all()  # inf * 0 is NaN, red
    assert (found[2, 1] == 1).all()
    images = np.random.default_rng(0).integers(20, 200, (2, 4, 4, 3))
    low, high = images.min((1, 2, 3), keepdims=True), images.max((1, 2, 3), keepdims=True)
    for kind, scaled in (("uint8", images / 255), ("int64", (images - low) / (high - low))):
        drawn = cells(plot_features, conv_model(np.eye(3)[None, None]), images.astype(kind), ["conv"], maps=1)
        assert [[title for title, _ in row] for row in drawn[""]] == [["input"], [""]]
        for row, image in zip(drawn[""], scaled):
            np.testing.assert_allclose(tiles(row[0][1], MAP, 4)[0, 0], image, atol=1e-6)


def test_models_side_by_side_and_wide_images(cells):
    models = {"plain": conv_model([[[[1.0]]]]), "negative": conv_model([[[[-1.0]]]])}
    drawn = cells(plot_features, models, np.repeat(IMAGES, 3, 0), ["conv"])
    assert list(drawn) == ["", "plain", "negative"]
    for label, expected in (("plain", PATTERN), ("negative", 1 - PATTERN)):
        assert [[title for title, _ in row] for row in drawn[label]] == [["conv"], [""], [""]]
        for row in drawn[label]:
            np.testing.assert_array_equal(tiles(row[0][1], MAP, 4)[0, 0], grey(expected))
    long, titles = "a label that is longer than the maps are wide", ["zero", "one\nof two lines", "zero"]
    drawn = cells(plot_features, {long: models["plain"], **models}, np.repeat(IMAGES, 3, 0), ["conv"], titles=titles)
    assert [title for ((title, _),) in drawn[""]] == titles and list(drawn) == ["", long, "plain", "negative"]
    drawn = cells(plot_features, conv_model([[[[1.0]]]], (4, 100)), np.random.default_rng(0).random((1, 4, 100, 1)), ["conv"])
    assert drawn[""][0][0][1].shape == (3, 72, 3)  # smaller than the image, its pixels averaged


def test_filters_of_a_layer_have_one_scale(cells):
    kernel = np.random.default_rng(0).normal(size=(2, 2, 6, 5)) * [1, 1, 1, 0.5, 1]
    models = {"plain": conv_model(kernel), "negative": conv_model(-9 * kernel)}
    drawn = cells(plot_filters, models, ["conv"], filters=4)
    largest = np.abs(kernel[:, :, :CHANNELS, :4]).max()
    scaled = kernel[:, :, :CHANNELS, :4].transpose(2, 3, 0, 1) / largest  # a row for each input channel
    columns = kernel.reshape(24, 5) / np.linalg.norm(kernel.reshape(24, 5), axis=0)
    cosine = np.abs((columns.T @ columns)[np.triu_indices(5, 1)]).mean()
    for label, sign, factor in (("plain", 1, 1), ("negative", -1, 9)):
        (((title, pixels),),) = drawn[label]
        np.testing.assert_allclose(tiles(pixels, PATCH, 2), grey(0.5 + 0.5 * sign * scaled), atol=1e-6)
        assert title == f"conv  (2, 2, 6, 5)  ±{factor * largest:#.2g}  mean |cos| {cosine:.2f}"


LAYOUTS = [
    (layers.Conv2D(4, 2), lambda kernel: kernel.transpose(3, 0, 1, 2)),
    (layers.Conv2DTranspose(4, 2), lambda kernel: kernel.transpose(2, 0, 1, 3)),
    (layers.DepthwiseConv2D(2, depth_multiplier=2), lambda kernel: grey(kernel.reshape(2, 2, 6).transpose(2, 0, 1))),
    (layers.Conv2D(6, 2, groups=3), lambda kernel: grey(kernel[:, :, 0].transpose(2, 0, 1))),
]


@pytest.mark.parametrize(("layer", "patches"), LAYOUTS)
def test_layouts_of_filters(cells, layer, patches):
    model = keras.Sequential([keras.Input((4, 4, 3)), layer])
    ((((_, pixels),),),) = cells(plot_filters, model, [layer.name]).values()
    kernel = layer.kernel.numpy()
    np.testing.assert_allclose(tiles(pixels, PATCH, 2)[0], 0.5 + 0.5 * patches(kernel / np.abs(kernel).max()), atol=1e-6)


def test_outputs_are_those_in_inference_mode_and_the_model_stays_as_it_is():
    model = plain_cnn(8, (8, 8, 1), width=2, seed=0)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype("uint8")
    before = model.get_weights()
    (output,) = layer_outputs(model, images, ["stage1_conv01_relu"]).values()
    stem, first = (model.get_layer(name) for name in ("stem_conv", "stage1_conv01"))
    x = keras.ops.relu(stem(images.astype("float32")) / np.sqrt(1 + 1e-5))  # BatchNormalization as it is at first
    np.testing.assert_allclose(output, keras.ops.relu(first(x) / np.sqrt(1 + 1e-5)), rtol=1e-4, atol=1e-4)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    (modulated,) = layer_outputs(modulate(model), images, ["stage1_conv01_relu"]).values()
    np.testing.assert_array_equal(modulated, output)


WRONG = [
    ({"layers": ["comv"]}, "The nearest are 'conv'.* Received: 'comv'"),
    ({"layers": ["deep"]}, "layers of model 'outer' itself, not a model inside it"),
    ({"layers": ["pool"]}, r"whose output is \(batch, height, width, channels\). Received: 'pool'"),
    ({"layers": "conv"}, "`layers` must be a list"),
    ({"maps": 0}, "`maps` must be an integer, at least 1. Received: maps=0"),
    ({"images": np.zeros((4, 4, 1))}, r"`images` must be finite numbers.*shape \(4, 4, 1\)"),
    ({"images": np.full((1, 4, 4, 1), np.nan)}, "`images` must be finite numbers"),
    ({"images": np.zeros((1, 4, 5, 1))}, r"`images` must fit .*'outer'.*\(1, 4, 5, 1\)"),
    ({"images": np.zeros((400, 4, 4, 1))}, "pixels a side"),
    ({"titles": ["one", "two"]}, "`titles` must have one string for each of the 1 images. Received: titles=.'one', 'two'.$"),
    ({"models": "model"}, "`model` must be a built Keras model"),
]


def test_wrong_arguments(tmp_path):
    inner = keras.Sequential([keras.Input((4, 4, 1)), layers.Conv2D(2, 1, name="deep")], name="inner")
    stack = [inner, layers.Conv2D(2, 1, name="conv"), layers.GlobalAveragePooling2D(name="pool")]
    model = keras.Sequential([keras.Input((4, 4, 1)), *stack], name="outer")
    for changes, match in WRONG:
        arguments = {"models": model, "images": np.zeros((1, 4, 4, 1)), "layers": ["conv"], **changes}
        with pytest.raises(ValueError, match=match):
            plot_features(path=tmp_path / "a.png", **arguments)
    for names, filters, match in ((["pool"], 16, "one kernel of rank 4.* Received: 'pool'"), (["conv"], 0, "`filters` must")):
        with pytest.raises(ValueError, match=match):
            plot_filters(model, names, tmp_path / "a.png", filters)
    for models in ({}, {44: model}):
        with pytest.raises(ValueError, match="`models` must be a model, or a dict of label, a string, to model"):
            plot_features(models, IMAGES, ["conv"], tmp_path / "b.png")
    assert not list(tmp_path.iterdir())

    class Subclassed(keras.Model):  # has filters, but no graph
        def call(self, x):
            return self.conv(x)

    model = Subclassed()
    model.conv = layers.Conv2D(2, 1, name="conv")
    model(IMAGES)
    plot_filters(model, ["conv"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="must be a .*Functional or Sequential"):
        plot_features(model, IMAGES, ["conv"], tmp_path / "b.png")


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(pathlib.Path(__file__).parents[2] / "benchmarks"), *sys.path])
    monkeypatch.delitem(sys.modules, "features", raising=False)
    import features as command

    for name, depth in (("first", 8), ("second", 14)):
        (tmp_path / name).mkdir()
        plain_cnn(depth, (8, 8, 1), width=2, seed=0).save(tmp_path / name / "final.keras")
        (tmp_path / name / "run.json").write_text(json.dumps({"recipe": {"dataset": "digits", "image_size": 8}}))
    (tmp_path / "second" / "result.json").write_text(json.dumps({"recipe_name": "digits"}))
    both = f"--models={tmp_path / 'first'},{tmp_path / 'second' / 'final.keras'}"
    for flag, expected in {
        f"--models={tmp_path}": "--models must be .keras files or folders that hold final.keras",
        "--images=1000": "--images must be 1 to 360",
        "--labels=one": "--labels must be 2 different ones",
        "--layers=stage1_conv03_relu": "of model 'plain8' itself",
    }.items():
        assert command.main((both, flag)) == 2
        message = capsys.readouterr().err
        assert message.startswith("features.py: ") and message.count("\n") == 1 and expected in message
    titles, draw = [], command.plot_features
    monkeypatch.setattr(
        command, "plot_features", lambda *args, **kwargs: titles.extend(kwargs["titles"]) or draw(*args, **kwargs)
    )
    assert command.main([both, f"--output={tmp_path / 'new' / 'both.png'}"]) == 0
    test = load_data("digits", None, 8).test
    predicted = [
        keras.models.load_model(tmp_path / name / "final.keras")(test.images[:3]).numpy().argmax(1)
        for name in ("first", "second")
    ]
    assert titles == [
        f"true class: {label}\nfirst: {one}\ndigits: {other}"
        for label, one, other in zip(test.labels, *predicted, strict=False)
    ]
    assert command.main([both, "--layers=stem_conv", "--images=1", f"--output={tmp_path / 'one.png'}"]) == 0
    drawn = {path.name: matplotlib.image.imread(path).shape for path in tmp_path.rglob("*.png")}
    assert sorted(drawn) == ["both.png", "both_filters.png", "one.png", "one_filters.png"]
    assert drawn["both.png"][0] > 2 * drawn["one.png"][0] and drawn["both.png"][1] > 3 * drawn["one.png"][1]
    assert drawn["both_filters.png"][0] > 3 * drawn["one_filters.png"][0]
