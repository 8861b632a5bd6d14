"""signal_report on inputs, targets and losses as `fit` and `compile` take them, and what it refuses."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reports import LOGITS, batch, report_of

import ortho_keras


def dense():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((4,)), layers.Dense(10)])


def test_inputs_by_name_in_order_and_in_their_types():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b", dtype="uint8")
    c, d = keras.Input((4,), name="a"), keras.Input((4,), name="b", dtype="float32")
    inner = keras.Model([d, c], layers.Subtract()([d, c]))
    model = keras.Model([b, a], layers.Dense(10)(inner({"a": a, "b": b})))  # the nested model, too, by name
    (xa, y), xb = batch((4,)), np.random.default_rng(2).integers(9, size=(8, 4))
    by_name, in_order = (ortho_keras.signal_report(model, x, y, LOGITS) for x in ({"a": xa, "b": xb}, [xb, xa]))
    assert by_name == in_order and by_name.loss == pytest.approx(float(LOGITS(y, model([xb, xa]))), rel=1e-5)
    with pytest.raises(ValueError, match=r"`x` must have an entry for each of the inputs \['b', 'a'\]. Received: a dict with"):
        ortho_keras.signal_report(model, {"a": xa}, y, LOGITS)
    with pytest.raises(ValueError, match="Received: 3 arrays"):
        ortho_keras.signal_report(model, [xb, xa, xa], y, LOGITS)


def test_images_without_an_axis_of_channels():
    base = keras.Sequential([keras.Input((5, 5, 1)), layers.Conv2D(2, 3), layers.Flatten()])
    pixels = keras.Input((5, 5, 1), dtype="uint8")
    model = keras.Model(pixels, layers.Dense(10)(base(pixels)))  # cast for the nested model
    x, (_, y) = np.random.default_rng(0).integers(256, size=(8, 5, 5)).astype("uint8"), batch((4,))
    flat, full = (ortho_keras.signal_report(model, each, y, LOGITS) for each in (x, x[..., None].astype("float32")))
    assert flat == full and flat.loss == pytest.approx(float(LOGITS(y, model(x[..., None]))), rel=1e-5)


def test_layers_called_by_keyword():
    inputs = keras.Input((5, 6))
    base = keras.Sequential([keras.Input((5, 6)), layers.Dense(6, name="inside")])
    x = layers.MultiHeadAttention(2, 3, name="attention")(query=inputs, value=base(inputs=inputs))
    model = keras.Model(inputs, layers.Dense(10, name="top")(layers.Flatten()(x)))
    assert [layer.name for layer in report_of(model, (5, 6)).layers] == ["inside", "attention", "top"]


def test_several_inputs_and_outputs_in_dicts_and_lists():
    left, right = keras.Input((4,)), keras.Input((6,))
    x = layers.Concatenate()([layers.Dense(5, name="l")(left), layers.Dense(5, name="r")(right)])
    model = keras.Model({"right": right, "left": left}, [layers.Dense(10)(x), layers.Dense(1)(x)])
    rng = np.random.default_rng(0)
    x = {"left": rng.normal(size=(8, 4)), "right": rng.normal(size=(8, 6)), "unused": np.zeros(8)}
    y = [rng.integers(10, size=8), rng.normal(size=(8, 1)).astype("float32")]

    def loss(y, outputs):
        return LOGITS(y[0], outputs[0]) + 0.5 * keras.losses.mean_squared_error(y[1], outputs[1])

    report = ortho_keras.signal_report(model, x, y, loss)
    outputs = model({name: x[name] for name in ("left", "right")})
    expected = float(LOGITS(y[0], outputs[0])) + 0.5 * np.mean((outputs[1].numpy() - y[1]) ** 2)
    assert report.loss == pytest.approx(expected, rel=1e-5) and len(report.layers) == 4

    ortho_keras.orthonormalize(model, 0.1, verbose=False)  # a penalty, which is no part of the error
    model.compile("sgd", [LOGITS, "mean_squared_error"], loss_weights=[1.0, 0.5])
    compiled = ortho_keras.signal_report(model, x, y)
    assert compiled.loss == pytest.approx(expected, rel=1e-5)
    for mine, theirs in zip(compiled.layers, report.layers):
        assert mine.backward_moment == pytest.approx(theirs.backward_moment, rel=1e-4)
    assert not any(variable.numpy() for metric in model.metrics for variable in metric.variables)


@pytest.mark.parametrize("loss", ["mse", keras.losses.mean_squared_error, keras.losses.MeanSquaredError()])
def test_a_mask_counts_as_in_evaluate(loss):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 6, 3)).astype("float32"), rng.normal(size=(8, 6, 2)).astype("float32")
    x[:, 3:] = 0
    model = keras.Sequential([keras.Input((6, 3)), layers.Masking(), layers.LSTM(4, return_sequences=True), layers.Dense(2)])
    report = ortho_keras.signal_report(model, x, y, loss)
    assert report.loss == pytest.approx(np.mean(np.square(np.asarray(model(x), np.float64) - y)[:, :3]), rel=1e-5)
    model.compile("sgd", loss)
    assert report.layers == ortho_keras.signal_report(model, x, y).layers


@pytest.mark.parametrize("pack", [lambda one: [one], lambda one: (one,), lambda one: {"only": one}])
def test_one_output_in_a_list_or_dict(pack):
    base, (x, y) = dense(), batch((4,))
    expected = ortho_keras.signal_report(base, x, y, LOGITS)
    packed = keras.Model(base.inputs, pack(base.outputs[0]), name=base.name)
    for inputs, targets in ((x, y), (x, pack(y)), ([x], y)):
        assert ortho_keras.signal_report(packed, inputs, targets, LOGITS) == expected


def test_a_custom_loss_gets_the_structures_as_they_are():
    base, (x, y) = dense(), batch((4,))
    weights = np.arange(1, 9, dtype="float32")
    named = keras.Model(base.inputs, {"only": base.outputs[0]}, name=base.name)

    def weighted(given, outputs):
        return LOGITS(given["y"], outputs["only"], sample_weight=given["weights"])

    report = ortho_keras.signal_report(named, x, {"y": y, "weights": weights}, weighted)
    assert report.loss == pytest.approx(float(LOGITS(y, base(x), sample_weight=weights)), rel=1e-5)


FUNCTIONS = ["binary_crossentropy", "binary_focal_crossentropy", "poisson"]
COMPILED = {
    **{name: (1, {"loss": name}) for name in FUNCTIONS},
    "custom": (1, {"loss": lambda y, outputs: tf.reduce_mean(tf.square(y - outputs), -1)}),
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
    x = layers.Dense(8, "relu", kernel_regularizer=penalty, activity_regularizer=penalty)(inputs)
    sizes, activation = ([10], "softmax") if outputs == 10 else ([1] * outputs, "sigmoid")
    tensors = [layers.Dense(size, activation)(x) for size in sizes]
    model = keras.Model(inputs, tensors if len(tensors) > 1 else tensors[0])
    model.compile(keras.optimizers.SGD(1.0), **settings)
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(16, 6)).astype("float32"), [rng.integers(max(2, outputs), size=16) for _ in sizes]
    return model, x, y if len(y) > 1 else y[0]


@pytest.mark.parametrize("case", COMPILED)
def test_the_compiled_loss_is_the_one_of_training(case):
    model, x, y = heads(case, "l2")
    bare, *_ = heads(case)  # the same without penalties, which are no part of the error
    model.fit(x, y, verbose=0)  # leaves tensors of its graph among the model's losses
    bare.set_weights(model.get_weights())
    report = ortho_keras.signal_report(model, x, y)
    assert report.loss == pytest.approx(bare.test_on_batch(x, y, return_dict=True)["loss"], rel=1e-5)
    if case in (*FUNCTIONS, "custom"):  # a function gets targets of its outputs' rank
        assert ortho_keras.signal_report(model, x, y, COMPILED[case][1]["loss"]).loss == pytest.approx(report.loss, rel=1e-5)
    bare.train_on_batch(x, y)  # at a rate of 1 a kernel loses its gradient
    after = {layer.name: other.kernel for layer, other in zip(model.layers[1:], bare.layers[1:])}
    for layer in report.layers:
        kernel = model.get_layer(layer.name).kernel.numpy()
        expected = np.linalg.norm(kernel - after[layer.name]) / np.linalg.norm(kernel)
        assert np.nan_to_num(layer.gradient_ratio) == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_penalty_far_above_the_loss():
    model, x, y = heads("binary_crossentropy")
    expected = ortho_keras.signal_report(model, x, y)
    model.layers[1].kernel.regularizer = keras.regularizers.L2(1e6)
    before = float(model.losses[0])
    for loss in (None, "binary_crossentropy"):
        report = ortho_keras.signal_report(model, x, y, loss)
        assert before > 1e5 and float(model.losses[0]) == before
        assert report.loss == pytest.approx(expected.loss, rel=1e-5)
        for mine, theirs in zip(report.layers, expected.layers):
            assert mine.gradient_ratio == pytest.approx(theirs.gradient_ratio, rel=1e-5)


def my_crossentropy(y, outputs):
    return keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)


class MyCrossentropy(keras.losses.Loss):
    def call(self, y, outputs):
        return my_crossentropy(y, outputs)


@pytest.mark.parametrize("loss", [my_crossentropy, MyCrossentropy()], ids=["function", "object"])
def test_a_custom_loss_may_be_called_a_crossentropy(loss):
    model, (x, y) = dense(), batch((4,))
    expected = ortho_keras.signal_report(model, x, y, LOGITS)
    given = ortho_keras.signal_report(model, x, y, loss)
    model.compile("sgd", loss)
    for report in (given, ortho_keras.signal_report(model, x, y)):
        assert report.loss == pytest.approx(expected.loss, rel=1e-6)
        assert report.layers[0].backward_moment == pytest.approx(expected.layers[0].backward_moment, rel=1e-4)


KERAS = [
    "sparse_categorical_crossentropy",
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.SparseCategoricalCrossentropy,
    keras.losses.SparseCategoricalCrossentropy(),
]


@pytest.mark.parametrize("loss", KERAS, ids=["name", "function", "class", "object"])
def test_a_crossentropy_of_probabilities_does_not_fit_logits(loss):
    model, (x, y) = dense(), batch((4,))
    model.compile("sgd", loss)
    for given in (None, loss):
        with pytest.raises(ValueError, match="these outputs are logits: give the loss object, with from_logits=True"):
            ortho_keras.signal_report(model, x, y, given)


def test_shares_that_do_not_sum_to_one_are_no_logits():
    x, y = batch((4,))
    model = keras.Sequential([keras.Input((4,)), layers.Dense(10, activation=lambda z: 5 * keras.ops.softplus(z))])
    shares = np.asarray(model(x), np.float64)
    expected = -np.mean(np.log(shares[np.arange(8), y] / shares.sum(1)))
    report = ortho_keras.signal_report(model, x, np.eye(10)[y], "categorical_crossentropy")
    assert shares.max() > 1 and report.loss == pytest.approx(expected, rel=1e-5)
    for loss, targets in (("binary_crossentropy", np.eye(10)[y]), ("sparse_categorical_crossentropy", y)):  # clipped to 1
        with pytest.raises(ValueError, match="with from_logits=True"):
            ortho_keras.signal_report(model, x, targets, loss)


class OwnCall(keras.Model):
    """A Functional model that computes something else than its graph."""

    def call(self, x):
        return 1000 * super().call(x)


def own_call():
    inputs = keras.Input((4,))
    return OwnCall(inputs, layers.Dense(10)(inputs))


def no_kernels():
    return keras.Sequential([keras.Input((4,)), layers.ReLU()])


@pytest.mark.parametrize(
    ("model", "x", "y", "loss", "message"),
    [
        (lambda: keras.Sequential([layers.Dense(3)]), 8, 8, LOGITS, "`model` must be a built Keras model"),
        (no_kernels, 8, 8, LOGITS, "must call a convolution, dense or"),
        (own_call, 8, 8, LOGITS, "Sequential model that does not override `call`"),
        (dense, 1, 1, LOGITS, r"`x` must be a batch of at least 2 .* \(1, 4\)"),
        (lambda: keras.Sequential([keras.Input((5,)), layers.Dense(10)]), 8, 8, LOGITS, r"`x` .* \(None, 5\). .* \(8, 4\)"),
        (dense, 8, 8, None, "`loss` must be given for a model that is not compiled"),
        (dense, 8, 8, "nonsense", "`loss` must be one Keras loss, .* Received: loss='nonsense'"),
        (dense, 8, 8, {"a": "mse"}, "`loss` must be one Keras loss, its name, or a function"),
        (dense, 8, 5, LOGITS, r"`y` must hold a target for each of the 8 samples.*\(5,\)"),
        (dense, 8, (8, 3), "mse", r"`y` and `loss` must suit .*\(8, 10\)"),
    ],
)
def test_bad_input(model, x, y, loss, message):
    """`x` and `y` are the number of samples, or a shape."""
    with pytest.raises(ValueError, match=message):
        ortho_keras.signal_report(model(), np.ones((x, 4), np.float32), np.zeros(y, np.int64), loss)
