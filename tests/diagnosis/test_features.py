import json
import pathlib
import subprocess
import sys

import keras
import matplotlib.image
import numpy as np
import pytest
from keras import layers

from ortho_keras import modulate, plain_cnn
from ortho_keras.diagnosis.features import (
    CHANNELS,
    MAP,
    PATCH,
    compare_features,
    compare_filters,
    layer_outputs,
    plot_features,
    plot_filters,
)

ROOT = pathlib.Path(__file__).parents[2]
PATTERN = np.array([[0, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 0], [0, 1, 0, 1]], np.float32)


def read(path):
    return matplotlib.image.imread(path)[..., :3]


def count(picture, tile, side):
    """How often a picture holds a tile, each of whose pixels became a square: `tile` is (n, n, 3), `side` its whole width."""
    height, width = (size - side + 1 for size in picture.shape[:2])
    step = side // len(tile)
    same = np.ones((height, width), bool)
    for row, column in np.ndindex(tile.shape[:2]):
        for inset in (1, step - 2):  # two points within the square
            y, x = row * step + inset, column * step + inset
            same &= np.abs(picture[y : y + height, x : x + width] - tile[row, column]).max(-1) < 0.004  # a step of 8 bits
    found = []
    for place in np.argwhere(same):
        if all(np.abs(place - other).max() > step for other in found):
            found.append(place)
    return len(found)


def grey(tile):
    return np.repeat(np.asarray(tile, np.float32)[..., np.newaxis], 3, -1)


def pointwise(weights, name="conv"):
    """A 1x1 convolution with the given kernel (cin, cout)."""
    weights = np.array(weights, np.float32)
    conv = layers.Conv2D(weights.shape[1], 1, use_bias=False, name=name)
    model = keras.Sequential([keras.Input((4, 4, weights.shape[0])), conv])
    conv.kernel.assign(weights[np.newaxis, np.newaxis])
    return model


def kernel_model(kernel, shape):
    conv = layers.Conv2D(kernel.shape[-1], kernel.shape[:2], use_bias=False, name="conv")
    model = keras.Sequential([keras.Input(shape), conv])
    conv.kernel.assign(kernel)
    return model


def test_an_identity_kernel_shows_the_image(tmp_path):
    path = tmp_path / "features.png"
    plot_features(pointwise([[1.0, -1.0, 0.0]]), PATTERN[np.newaxis, ..., np.newaxis], ["conv"], path, maps=4)
    picture = read(path)
    assert count(picture, grey(PATTERN), MAP) == 2  # the image itself, and its copy
    assert count(picture, grey(1 - PATTERN), MAP) == 1
    assert count(picture, grey(np.full((4, 4), 0.5)), MAP) == 1  # constant
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("scale", [1.0, 1e-3, -7.0])
def test_each_map_has_its_own_range(tmp_path, scale):
    plot_features(pointwise([[scale, 100.0]]), PATTERN[np.newaxis, ..., np.newaxis], ["conv"], tmp_path / "a.png")
    assert count(read(tmp_path / "a.png"), grey(PATTERN), MAP) == (2 if scale < 0 else 3)


@pytest.mark.parametrize("kind", ["uint8", "float32", "int64"])
def test_input_images(tmp_path, kind):
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3))
    images[:, 0, 0], images[:, 0, 1] = 0, 255
    plot_features(pointwise(np.eye(3)), images.astype(kind), ["conv"], tmp_path / "a.png", maps=1)
    picture = read(tmp_path / "a.png")
    for image in images:
        assert count(picture, image / 255, MAP) == 1  # one map: the image is as large as a map
        assert count(picture, grey(image[..., 0] / 255), MAP) == 1


def test_uint8_images_are_not_stretched(tmp_path):
    images = (100 * PATTERN + 50).astype("uint8")[np.newaxis, ..., np.newaxis]
    plot_features(pointwise([[1.0]]), images, ["conv"], tmp_path / "a.png")
    picture = read(tmp_path / "a.png")
    assert count(picture, grey(images[0, ..., 0] / 255), MAP) == count(picture, grey(PATTERN), MAP) == 1


def test_what_is_not_finite_is_red(tmp_path):
    plot_features(pointwise([[np.inf]]), PATTERN[np.newaxis, ..., np.newaxis], ["conv"], tmp_path / "a.png")
    red = np.broadcast_to([1.0, 0.0, 0.0], (4, 4, 3))
    assert count(read(tmp_path / "a.png"), red, MAP) == 1  # inf * 0 is nan


def test_models_side_by_side(tmp_path):
    images = PATTERN[np.newaxis, ..., np.newaxis]
    plain, negative = pointwise([[1.0]]), pointwise([[-1.0]])
    plot_features(plain, images, ["conv"], tmp_path / "one.png")
    compare_features({"plain": plain, "negative": negative}, images, ["conv"], tmp_path / "two.png")
    one, two = read(tmp_path / "one.png"), read(tmp_path / "two.png")
    assert two.shape[1] > one.shape[1] and two.shape[0] == one.shape[0]
    assert (count(one, grey(PATTERN), MAP), count(one, grey(1 - PATTERN), MAP)) == (2, 0)
    assert (count(two, grey(PATTERN), MAP), count(two, grey(1 - PATTERN), MAP)) == (2, 1)
    compare_features({"plain": plain}, np.repeat(images, 3, 0), ["conv"], tmp_path / "three.png")
    assert count(read(tmp_path / "three.png"), grey(PATTERN), MAP) == 6


def test_filters_side_by_side(tmp_path):
    kernel = np.array([[1.0, -1.0], [-1.0, 0.0]], np.float32)[..., np.newaxis, np.newaxis]
    models = {"plain": kernel_model(kernel, (4, 4, 1)), "negative": kernel_model(-9 * kernel, (4, 4, 1))}
    plot_filters(models["plain"], ["conv"], tmp_path / "one.png")
    compare_filters(models, ["conv"], tmp_path / "two.png")
    one, two = read(tmp_path / "one.png"), read(tmp_path / "two.png")
    tiles = grey([[1, 0], [0, 0.5]]), grey([[0, 1], [1, 0.5]])
    assert [count(one, tile, PATCH) for tile in tiles] == [1, 0]
    assert [count(two, tile, PATCH) for tile in tiles] == [1, 1]
    assert two.shape[1] > one.shape[1] and two.shape[0] == one.shape[0]


def test_outputs_are_those_in_inference_mode_and_the_model_stays_as_it_is():
    model = plain_cnn(8, (8, 8, 1), width=4, seed=0)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype("uint8")
    before = model.get_weights()
    (output,) = layer_outputs(model, images, ["stage1_conv01_relu"]).values()
    stem, first = (model.get_layer(name) for name in ("stem_conv", "stage1_conv01"))
    x = keras.ops.relu(stem(images.astype("float32")) / np.sqrt(1 + 1e-5))  # BatchNormalization as it is at first
    np.testing.assert_allclose(output, keras.ops.relu(first(x) / np.sqrt(1 + 1e-5)), rtol=1e-4, atol=1e-4)
    assert output.min() == 0 and output.shape == (3, 8, 8, 4)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)


def test_modulated_and_half_precision_models():
    images = np.ones((1, 8, 8, 1), np.float32)
    plain = plain_cnn(8, (8, 8, 1), width=4, seed=0)
    (expected,) = layer_outputs(plain, images, ["stage3_conv02_relu"]).values()
    (modulated,) = layer_outputs(modulate(plain), images, ["stage3_conv02_relu"]).values()
    np.testing.assert_array_equal(modulated, expected)
    keras.config.set_dtype_policy("mixed_bfloat16")
    half = plain_cnn(8, (8, 8, 1), width=4, seed=0)
    (output,) = layer_outputs(half, images, ["stage3_conv02_relu"]).values()
    assert output.dtype == np.float32 and not np.array_equal(output, expected)
    np.testing.assert_allclose(output, expected, atol=0.1 * expected.max())


def test_a_deep_model(tmp_path):
    x = keras.Input((4, 4, 1))
    y = x
    for at in range(600):
        y = layers.ReLU(name=f"relu{at}")(y)
    plot_features(keras.Model(x, y), PATTERN[np.newaxis, ..., np.newaxis], ["relu599"], tmp_path / "a.png")
    assert count(read(tmp_path / "a.png"), grey(PATTERN), MAP) == 2


def test_filters_have_one_scale(tmp_path):
    random = np.random.default_rng(0)
    kernel = random.normal(size=(2, 2, 6, 5)).astype("float32")
    kernel[..., 3] *= 0.5
    plot_filters(kernel_model(kernel, (4, 4, 6)), ["conv"], tmp_path / "a.png", filters=4)
    picture, drawn = read(tmp_path / "a.png"), kernel[:, :, :CHANNELS, :4]
    scaled = 0.5 + 0.5 * drawn / np.abs(drawn).max()
    for channel, at in np.ndindex(CHANNELS, 4):
        assert count(picture, grey(scaled[:, :, channel, at]), PATCH) == 1
    assert count(picture, grey(0.5 + 0.5 * kernel[:, :, 0, 4] / np.abs(drawn).max()), PATCH) == 0


@pytest.mark.parametrize(
    "layer",
    [
        layers.Conv2D(4, 2, name="conv"),
        layers.Conv2DTranspose(4, 2, name="conv"),
        layers.DepthwiseConv2D(2, depth_multiplier=2, name="conv"),
        layers.Conv2D(6, 2, groups=3, name="conv"),
    ],
)
def test_layouts_of_filters(tmp_path, layer):
    model = keras.Sequential([keras.Input((4, 4, 3)), layer])
    plot_filters(model, ["conv"], tmp_path / "a.png")
    picture, kernel = read(tmp_path / "a.png"), layer.kernel.numpy()
    scaled = 0.5 + 0.5 * kernel / np.abs(kernel).max()
    if isinstance(layer, layers.DepthwiseConv2D):
        tiles = [grey(scaled[:, :, channel, at]) for channel, at in np.ndindex(3, 2)]
    elif isinstance(layer, layers.Conv2DTranspose):
        tiles = [scaled[:, :, at] for at in range(4)]
    elif layer.groups == 1:
        tiles = [scaled[..., at] for at in range(4)]
    else:
        tiles = [grey(scaled[:, :, 0, at]) for at in range(6)]
    assert [count(picture, tile, PATCH) for tile in tiles] == [1] * len(tiles)


def nested():
    inner = keras.Sequential([keras.Input((4, 4, 1)), layers.Conv2D(2, 1, name="deep")], name="inner")
    x = keras.Input((4, 4, 1))
    return keras.Model(x, layers.GlobalAveragePooling2D(name="pool")(layers.Conv2D(2, 1, name="conv")(inner(x))), name="outer")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layers": ["comv"]}, "The nearest are 'conv'.* Received: 'comv'"),
        ({"layers": ["deep"]}, "layers of model 'outer' itself .not a model inside it"),
        ({"layers": ["inner"]}, "layers of model 'outer' itself"),
        ({"layers": ["pool"]}, r"whose output is \(batch, height, width, channels\). Received: 'pool'"),
        ({"layers": []}, "`layers` must be a list"),
        ({"layers": "conv"}, "`layers` must be a list"),
        ({"maps": 0}, "`maps` must be an integer, at least 1. Received: maps=0"),
        ({"maps": True}, "`maps` must be"),
        ({"images": np.zeros((0, 4, 4, 1))}, "`images` must be finite numbers"),
        ({"images": np.zeros((4, 4, 1))}, r"`images` must be finite numbers.*shape \(4, 4, 1\)"),
        ({"images": np.full((1, 4, 4, 1), np.nan)}, "`images` must be finite numbers"),
        ({"images": np.zeros((1, 4, 4, 2))}, "1 or 3 channels"),
        ({"images": np.array([[[["a"]]]])}, "`images` must be finite numbers"),
        ({"images": np.zeros((1, 4, 5, 1))}, r"`images` must fit .*'outer'.*\(1, 4, 5, 1\)"),
        ({"images": np.zeros((1, 4, 4, 3))}, "`images` must fit"),
        ({"images": np.zeros((400, 4, 4, 1))}, "pixels a side"),
        ({"model": keras.Sequential}, "`model` must be a built Keras model"),
        ({"model": lambda: "model"}, "`model` must be a built Keras model"),
    ],
)
def test_wrong_arguments(tmp_path, changes, match):
    arguments = {"model": nested, "images": np.zeros((1, 4, 4, 1)), "layers": ["conv"], **changes}
    arguments["model"] = arguments["model"]()
    with pytest.raises(ValueError, match=match):
        plot_features(path=tmp_path / "a.png", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "filters", "match"),
    [(["pool"], 16, "one kernel of rank 4.* Received: 'pool'"), (["x"], 16, "nearest"), (["conv"], 0, "`filters` must be")],
)
def test_wrong_arguments_of_filters(tmp_path, names, filters, match):
    with pytest.raises(ValueError, match=match):
        plot_filters(nested(), names, tmp_path / "a.png", filters)


def test_models_without_a_graph_have_filters_only(tmp_path):
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv = layers.Conv2D(2, 1, name="conv")

        def call(self, x):
            return self.conv(x)

    model = Subclassed()
    model(np.zeros((1, 4, 4, 1)))
    plot_filters(model, ["conv"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="must be a Functional or Sequential model"):
        plot_features(model, np.zeros((1, 4, 4, 1)), ["conv"], tmp_path / "b.png")
    with pytest.raises(ValueError, match="`models` must be a dict"):
        compare_features([], np.zeros((1, 4, 4, 1)), ["conv"], tmp_path / "b.png")
    with pytest.raises(ValueError, match="`models` must be a dict of label, a string, to model. Received: models={44: "):
        compare_features({44: model}, np.zeros((1, 4, 4, 1)), ["conv"], tmp_path / "b.png")


COMMANDS = """
import json, sys
sys.path.insert(0, "benchmarks")
import features
from absl.testing import flagsaver
for arguments in json.loads(sys.argv[1]):
    with flagsaver.flagsaver():
        try:
            status = features.main(features.parse_flags(["features.py", *arguments]))
        except SystemExit as stop:
            status = stop.code
    print("status", status, flush=True)
    print("end", file=sys.stderr, flush=True)
"""


def test_command(tmp_path):
    for name, depth in (("first", 8), ("second", 14)):
        run = tmp_path / name
        run.mkdir()
        plain_cnn(depth, (8, 8, 1), width=4, seed=0).save(run / "final.keras")
        (run / "run.json").write_text(json.dumps({"recipe": {"dataset": "digits", "image_size": 8}}))
    (tmp_path / "second" / "result.json").write_text(json.dumps({"recipe_name": "digits"}))
    (tmp_path / "text.keras").write_text("no model")
    other = tmp_path / "other.keras"
    plain_cnn(8, (8, 8, 1), width=4).save(other)
    both = f"--models={tmp_path / 'first'},{tmp_path / 'second' / 'final.keras'}"
    refused = {
        (): "--models must name at least one model",
        (f"--models={tmp_path}",): "--models must be .keras files or folders that hold final.keras",
        (f"--models={tmp_path / 'text.keras'}", "--dataset=digits"): "no zip archive",
        (f"--models={other}",): "--dataset must be given",
        (both, "--images=1000"): "--images must be at most 360",
        (both, "--images=0"): "flag --images=0",
        (both, "--labels=one"): "--labels must be 2 different ones",
        (both, "--image_size=9"): "`images` must fit",
        (both, "--layers=stem"): "nearest are 'stem_conv",
        (both, "--layers=stage1_conv03_relu"): "of model 'plain8' itself",
        (
            f"--models={tmp_path / 'second'},{tmp_path / 'first'}",
            "--layers=stage1_conv03",
        ): "must all have the layers stage1_conv03",
        (both, "--leyers=stem"): "leyers",
        (both, "stem"): "every argument must be a flag",
    }
    drawn = [
        [both, f"--output={tmp_path / 'new' / 'both.png'}"],
        [both, "--layers=stem_conv", "--images=1", f"--output={tmp_path / 'one.png'}"],
    ]
    command = [sys.executable, "-c", COMMANDS, json.dumps([*drawn, *refused])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    statuses = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert statuses == ["status 0"] * 2 + ["status 2"] * len(refused), done.stderr
    *messages, _ = done.stderr.split("end\n")
    for message, (arguments, expected) in zip(messages[2:], refused.items(), strict=True):
        assert message.startswith("features.py: ") and message.count("\n") == 1, (arguments, message)
        assert expected in message, arguments

    both, one = read(tmp_path / "new" / "both.png"), read(tmp_path / "one.png")
    assert both.shape[0] > 2 * one.shape[0] and both.shape[1] > 3 * one.shape[1]
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == [
        "both.png",
        "both_filters.png",
        "one.png",
        "one_filters.png",
    ]
    assert read(tmp_path / "new" / "both_filters.png").shape[0] > 3 * read(tmp_path / "one_filters.png").shape[0]
