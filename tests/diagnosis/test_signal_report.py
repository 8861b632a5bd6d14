"""signal_report against float64 backpropagation by hand, and what it must leave alone."""

import csv
import math

import keras
import matplotlib.image
import numpy as np
import pytest
import references
import tensorflow as tf

import ortho_keras

LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def batch(shape, count=8, classes=10):
    rng = np.random.default_rng(1)
    return rng.normal(size=(count, *shape)).astype("float32"), rng.integers(classes, size=count)


def test_two_dense_layers_by_hand():
    a, b = np.array([[2.0, 0.0], [0.0, 3.0]]), np.array([[1.0], [-1.0]])
    x, y = np.array([[1.0, 2.0], [3.0, -1.0]]), np.array([[0.5], [1.0]])
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False), keras.layers.Dense(1, use_bias=False)])
    model.set_weights([a, b])
    report = ortho_keras.signal_report(model, x.astype("float32"), y.astype("float32"), "mean_squared_error")
    hidden = x @ a
    output = hidden @ b
    top = 2 * (output - y) / 2  # the mean over two samples of one output each
    error = top @ b.T
    first, second = report.layers
    assert report.loss == pytest.approx(np.mean((output - y) ** 2))
    assert first.forward_moment == pytest.approx(np.mean(hidden**2))
    assert second.backward_moment == pytest.approx(np.mean(top**2))
    assert first.backward_moment == pytest.approx(np.mean(error**2))
    assert first.error_to_next == first.error_to_top == pytest.approx(np.sqrt(np.mean(error**2) / np.mean(top**2)))
    assert (second.error_to_next, second.error_to_top) == (1, 1)
    assert first.gradient_ratio == pytest.approx(np.linalg.norm(x.T @ error) / np.linalg.norm(a))
    assert second.gradient_ratio == pytest.approx(np.linalg.norm(hidden.T @ top) / np.linalg.norm(b))
    assert (first.kernel_smallest, first.kernel_largest, first.operator_largest) == pytest.approx((2, 3, 3))
    assert first.mean_cosine == first.mean_abs_cosine == 0 and math.isnan(second.mean_cosine)
    assert math.isnan(first.image_share) and math.isnan(first.dead_share)


@pytest.mark.parametrize("tolerance,reference", [(1.0, "neighbour"), (2.0, "neighbour"), (2.0, "anchor")])
def test_what_modulation_would_do_is_what_it_does(tolerance, reference):
    x, y = batch((8, 8, 1))
    model = ortho_keras.plain_cnn(14, (8, 8, 1), seed=0)
    report = ortho_keras.signal_report(model, x, y, LOGITS, tolerance, reference=reference, singular_values=False)
    names = {layer.name for layer in report.layers}
    gradients, scales = references.modulated_gradients(model, x, y, names, tolerance, 1000.0, reference)
    np.testing.assert_allclose([layer.scale for layer in report.layers], [scales[x.name] for x in report.layers], rtol=1e-3)
    assert [layer.fired for layer in report.layers] == [scales[layer.name] != 1 for layer in report.layers]
    assert any(layer.fired for layer in report.layers)
    assert not report.modulated

    modulated = ortho_keras.modulate(model, tolerance, reference=reference)
    did = ortho_keras.signal_report(modulated, x, y, LOGITS, singular_values=False)
    assert did.modulated
    np.testing.assert_allclose([layer.scale for layer in did.layers], [scales[x.name] for x in did.layers], rtol=1e-3)
    for layer in did.layers:  # the gradient that the modulated net trains on
        kernel = model.get_layer(layer.name).kernel
        expected = np.linalg.norm(gradients[kernel.path]) / np.linalg.norm(kernel)
        assert layer.gradient_ratio == pytest.approx(expected, rel=1e-3)


def test_the_plain_net_explodes_and_the_report_says_so():
    x, y = batch((8, 8, 1), 32)
    report = ortho_keras.signal_report(ortho_keras.plain_cnn(44, (8, 8, 1), seed=0), x, y, LOGITS, singular_values=False)
    total, per_layer, steps = report.growth
    assert steps == 41 and total == pytest.approx(per_layer**steps)  # 43 convolutions, the lowest left out
    assert total > 50 and 1.1 < per_layer < 1.25  # theory for dense nets: sqrt(pi / (pi - 1)) = 1.21
    first = str(report).splitlines()[0]
    assert first == f"plain44: the error grows {per_layer:.3g} times a layer going down: {total:.2g} over 41 layers"
    calm = ortho_keras.plain_cnn(44, (8, 8, 1), relu_shift=3.0, seed=0)
    report = ortho_keras.signal_report(calm, x, y, LOGITS, singular_values=False)
    assert report.findings == [] and str(report).startswith("plain44: nothing is wrong: the error keeps its magnitude")


def test_zero_padding_drowns_the_images_where_activations_have_a_mean():
    x, y = batch((8, 8, 1), 32)
    drowned = ortho_keras.plain_cnn(44, (8, 8, 1), bn_shift=2.0, seed=0)
    report = ortho_keras.signal_report(drowned, x, y, LOGITS, singular_values=False)
    worst = min(layer.image_share for layer in report.layers if layer.positions)
    assert worst < 0.01 and f"only {100 * worst:.2g} % of the variance at " in str(report).splitlines()[0]
    shifted = ortho_keras.plain_cnn(44, (8, 8, 1), relu_shift=2.0, seed=0)
    report = ortho_keras.signal_report(shifted, x, y, LOGITS, singular_values=False)
    assert min(layer.image_share for layer in report.layers if layer.positions) > 0.5


def test_image_share_and_dead_channels_by_hand():
    # A 1x1 identity over two channels: the first differs between images only, the second between positions only.
    x = np.zeros((4, 2, 2, 3), np.float32)
    x[..., 0] = np.array([-1.0, 1.0, -1.0, 1.0])[:, None, None]
    x[..., 1] = np.array([[-2.0, 2.0], [2.0, -2.0]])
    x[..., 2] = -5.0
    inputs = keras.Input((2, 2, 3))
    outputs = keras.layers.Conv2D(3, 1, use_bias=False, name="conv")(inputs)
    outputs = keras.layers.ReLU()(outputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(outputs)))
    model.get_layer("conv").kernel.assign(np.eye(3).reshape(1, 1, 3, 3))
    layer = ortho_keras.signal_report(model, x, np.ones((4, 1), np.float32), "mean_squared_error").layers[0]
    assert layer.image_share == pytest.approx(1 / (1 + 4))
    assert layer.dead_share == pytest.approx(1 / 3)


def noisy_model():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.GaussianNoise(0.1)(inputs)
    x = keras.layers.Conv2D(8, 3)(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.5)(keras.layers.ReLU()(x))
    return keras.Model(inputs, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x)))


def test_nothing_is_changed():
    x, y = batch((8, 8, 3), 16)

    def train(report):
        keras.utils.set_random_seed(5)
        model = noisy_model()
        model.compile(keras.optimizers.Adam(0.01), LOGITS)
        model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
        if report:
            before = [v.numpy().copy() for v in (*model.variables, *model.optimizer.variables)]
            first, second = (ortho_keras.signal_report(model, x, y) for _ in range(2))
            assert repr(first) == repr(second)  # dropout and noise drew the same
            for old, new in zip(before, (*model.variables, *model.optimizer.variables)):
                np.testing.assert_array_equal(old, new.numpy())
        model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
        return model.get_weights()

    for with_report, without in zip(train(True), train(False)):
        np.testing.assert_array_equal(with_report, without)


FUNCTIONS = ["binary_crossentropy", "binary_focal_crossentropy", "kl_divergence", "poisson", "hinge"]
COMPILED = {
    **{name: (1, {"loss": name}) for name in FUNCTIONS},
    "own": (1, {"loss": lambda y, outputs: tf.reduce_mean(tf.square(y - outputs), -1)}),
    "weight": (1, {"loss": "mse", "loss_weights": 0.5}),
    "sum": (1, {"loss": keras.losses.MeanSquaredError(reduction="sum")}),
    "one for two": (2, {"loss": "mse"}),
    "two": (2, {"loss": ["mse", "binary_crossentropy"], "loss_weights": [0.25, 2.0]}),
    "none for the second": (2, {"loss": ["mse", None]}),
    "classes": (10, {"loss": "crossentropy"}),
}


def heads(case, penalty=None):
    """A compiled model of one output or two of shape (16, 1), or one of 10 classes; its batch, with targets of shape (16,)."""
    outputs, settings = COMPILED[case]
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, "relu", kernel_regularizer=penalty, activity_regularizer=penalty)(inputs)
    sizes, activation = ([10], "softmax") if outputs == 10 else ([1] * outputs, "sigmoid")
    tensors = [keras.layers.Dense(size, activation)(x) for size in sizes]
    model = keras.Model(inputs, tensors if len(tensors) > 1 else tensors[0])
    model.compile(keras.optimizers.SGD(1.0), **settings)
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(16, 6)).astype("float32"), [rng.integers(max(2, outputs), size=16) for _ in sizes]
    return model, x, y if len(y) > 1 else y[0]


@pytest.mark.parametrize("case", COMPILED)
def test_the_compiled_loss_is_the_one_of_training(case):
    model, x, y = heads(case, "l2")
    bare, *_ = heads(case)  # the same without penalties, which are no part of the error
    model.fit(x, y, epochs=1, verbose=0)  # leaves tensors of its graph among the model's losses
    bare.set_weights(model.get_weights())
    report = ortho_keras.signal_report(model, x, y)
    assert report.loss == pytest.approx(bare.test_on_batch(x, y, return_dict=True)["loss"], rel=1e-5)
    bare.train_on_batch(x, y)  # at a rate of 1 a kernel loses its gradient
    after = {layer.name: other.kernel for layer, other in zip(model.layers[1:], bare.layers[1:])}
    for layer in report.layers:
        kernel = model.get_layer(layer.name).kernel.numpy()
        expected = np.linalg.norm(kernel - after[layer.name]) / np.linalg.norm(kernel)
        assert np.nan_to_num(layer.gradient_ratio) == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("case", [*FUNCTIONS, "own"])
def test_a_function_gets_targets_of_its_outputs_rank(case):
    model, x, y = heads(case)
    report = ortho_keras.signal_report(model, x, y, COMPILED[case][1]["loss"])
    assert report.loss == pytest.approx(model.test_on_batch(x, y, return_dict=True)["loss"], rel=1e-5)


def test_a_penalty_far_above_the_loss():
    model, x, y = heads("binary_crossentropy")
    expected = ortho_keras.signal_report(model, x, y)
    model.layers[1].kernel.regularizer = keras.regularizers.L2(1e6)
    before = float(model.losses[0])
    report = ortho_keras.signal_report(model, x, y)
    assert before > 1e5 and float(model.losses[0]) == before
    assert report.loss == pytest.approx(expected.loss, rel=1e-5)
    for name in ("forward_moment", "backward_moment", "gradient_ratio"):
        mine, theirs = ([getattr(layer, name) for layer in some.layers] for some in (report, expected))
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def my_crossentropy(y, outputs):
    return keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)


class MyCrossentropy(keras.losses.Loss):
    def call(self, y, outputs):
        return my_crossentropy(y, outputs)


@pytest.mark.parametrize("loss", [my_crossentropy, MyCrossentropy()], ids=["function", "object"])
def test_a_loss_of_ones_own_may_be_called_a_crossentropy(loss):
    x, y = batch((8, 8, 1))
    model = ortho_keras.plain_cnn(8, (8, 8, 1), seed=0)
    expected = ortho_keras.signal_report(model, x, y, LOGITS, singular_values=False)
    given = ortho_keras.signal_report(model, x, y, loss, singular_values=False)
    model.compile("sgd", loss)
    for report in (given, ortho_keras.signal_report(model, x, y, singular_values=False)):
        assert report.loss == pytest.approx(expected.loss, rel=1e-6)
        magnitudes = [[layer.backward_moment for layer in some.layers] for some in (report, expected)]
        np.testing.assert_allclose(*magnitudes, rtol=1e-4)


KERAS = [
    "sparse_categorical_crossentropy",
    "crossentropy",
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.SparseCategoricalCrossentropy,
    keras.losses.SparseCategoricalCrossentropy(),
]


@pytest.mark.parametrize("loss", KERAS, ids=["name", "alias", "function", "class", "object"])
def test_a_model_compiled_with_a_crossentropy_of_probabilities_that_returns_logits(loss):
    x, y = batch((8, 8, 1))
    model = ortho_keras.plain_cnn(8, (8, 8, 1), seed=0)
    model.compile("sgd", loss)
    with pytest.raises(ValueError, match="these outputs are logits: give the loss object, with from_logits=True"):
        ortho_keras.signal_report(model, x, y)


def test_a_dead_net_and_a_broken_one():
    x, y = batch((4,), 8)
    layers = [keras.layers.Dense(4, name="dead"), keras.layers.ReLU(), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.get_layer("dead").bias.assign([-100.0] * 4)
    report = ortho_keras.signal_report(model, x, y, LOGITS)
    assert report.findings[0] == "no error reaches 1 of 2 layers: dead"
    assert report.findings[1] == "100 % of the channels behind 'dead' are dead (1 layer above 30 %)"
    model.get_layer("dead").kernel.assign(np.full((4, 4), np.nan))
    broken = ortho_keras.signal_report(model, x, y, LOGITS)
    assert str(broken).startswith(f"{model.name}: the loss is nan")
    assert math.isnan(broken.layers[0].kernel_largest) and math.isnan(broken.layers[0].operator_largest)


def test_files_and_table(tmp_path):
    x, y = batch((8, 8, 1))
    report = ortho_keras.signal_report(ortho_keras.plain_cnn(8, (8, 8, 1), seed=0), x, y, LOGITS)
    report.to_csv(tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [layer.name for layer in report.layers]
    assert [float(row["backward_moment"]) for row in rows] == [layer.backward_moment for layer in report.layers]
    report.plot(tmp_path / "report.png")
    picture = matplotlib.image.imread(tmp_path / "report.png")
    assert picture.shape[0] > 500 and len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 20
    lines = str(report).splitlines()
    assert len(lines) == 3 + 8 and lines[3].startswith("classifier") and lines[-1].startswith("stem_conv")
    try:
        import pandas
    except ImportError:
        with pytest.raises(ImportError, match="pip install pandas"):
            report.to_pandas()
    else:
        assert isinstance(report.to_pandas(), pandas.DataFrame)
