"""signal_report on inputs, targets and losses as `fit` and `compile` take them, and what it refuses."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reports import LOGITS, batch

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
    base = keras.Sequential([keras.Input((5, 5, 1)), layers.Flatten()])
    pixels = keras.Input((5, 5, 1), dtype="uint8")
    model = keras.Model(pixels, layers.Dense(10)(base(pixels)))  # cast for the nested model
    x, (_, y) = np.random.default_rng(0).integers(256, size=(8, 5, 5)).astype("uint8"), batch((4,))
    flat, full = (ortho_keras.signal_report(model, each, y, LOGITS) for each in (x, x[..., None].astype("float32")))
    assert flat == full and flat.loss == pytest.approx(float(LOGITS(y, model(x[..., None]))), rel=1e-5)


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
    found, wanted = ([layer.backward_moment for layer in each.layers] for each in (compiled, report))
    assert found == pytest.approx(wanted, rel=1e-4)
    assert not any(variable.numpy() for metric in model.metrics for variable in metric.variables)


def test_a_mask_counts_as_in_evaluate():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 6, 3)).astype("float32"), rng.normal(size=(8, 6, 2)).astype("float32")
    x[:, 3:] = 0
    model = keras.Sequential([keras.Input((6, 3)), layers.Masking(), layers.LSTM(4, return_sequences=True), layers.Dense(2)])
    model.compile("sgd", "mse")
    expected = np.mean(np.square(np.asarray(model(x), np.float64) - y)[:, :3])
    for loss in (None, keras.losses.mean_squared_error, keras.losses.MeanSquaredError()):
        assert ortho_keras.signal_report(model, x, y, loss, singular_values=False).loss == pytest.approx(expected, rel=1e-5)


def test_one_output_in_a_list_or_dict():
    base, (x, y) = dense(), batch((4,))
    expected = ortho_keras.signal_report(base, x, y, LOGITS)
    for pack in (lambda one: [one], lambda one: {"only": one}):
        packed = keras.Model(base.inputs, pack(base.outputs[0]), name=base.name)
        for inputs, targets in ((x, y), (x, pack(y)), ([x], y)):
            assert ortho_keras.signal_report(packed, inputs, targets, LOGITS) == expected

    def weighted(given, outputs):  # gets the structures as they are
        return LOGITS(given["y"], outputs["only"], sample_weight=given["weights"])

    weights = np.arange(1, 9, dtype="float32")
    report = ortho_keras.signal_report(packed, x, {"y": y, "weights": weights}, weighted)
    assert report.loss == pytest.approx(float(LOGITS(y, base(x), sample_weight=weights)), rel=1e-5)


FUNCTIONS = ["binary_crossentropy", "poisson"]
COMPILED = {
    **{name: (1, {"loss": name}) for name in FUNCTIONS},
    "custom": (1, {"loss": lambda y, outputs: tf.reduce_mean(tf.square(y - outputs), -1)}),
    "sum": (1, {"loss": keras.losses.MeanSquaredError(reduction="sum")}),
    "two": (2, {"loss": ["mse", "binary_crossentropy"], "loss_weights": [0.25, 2.0]}),
    "none for the second": (2, {"loss": ["mse", None]}),
    "classes": (10, {"loss": "crossentropy"}),
}


def heads(case, penalty=None):
    """A compiled model of one output or two of shape (16, 1), or one of 10 classes; its batch, with targets of shape (16,)."""
    outputs, settings = COMPILED[case]
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    x = layers.Dense(8, "relu", kernel_regularizer=penalty, activity_regularizer="l2")(inputs)
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
    bare, *_ = heads(case)  # the same without the penalty on weights, which is no part of the error
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


class Latent(layers.Layer):
    """Adds the KL divergence of a variational autoencoder, without its noise."""

    def call(self, inputs):
        mean, log = inputs
        self.add_loss(-0.5 * keras.ops.mean(keras.ops.sum(1 + log - mean**2 - keras.ops.exp(log), -1)))
        return mean


@pytest.mark.parametrize("loss", [None, "mse", lambda y, outputs: tf.reduce_mean(tf.square(y - outputs))])
def test_what_a_layer_adds_to_the_loss_is_part_of_the_error(loss):
    inputs = keras.Input((16,))
    hidden = layers.Dense(12, name="encoder")(inputs)
    mean, log = (layers.Dense(2, name=name, bias_initializer="ones")(hidden) for name in ("mean", "log"))
    model = keras.Model(inputs, layers.Dense(16, name="decoder")(Latent()([mean, log])))
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).random((32, 16)).astype("float32")
    report = ortho_keras.signal_report(model, x, x, loss)

    weights = {layer.name: [np.asarray(w, float) for w in layer.weights] for layer in model.layers if layer.weights}
    hidden = x @ weights["encoder"][0] + weights["encoder"][1]
    mean, log = (hidden @ weights[name][0] + weights[name][1] for name in ("mean", "log"))
    outputs = mean @ weights["decoder"][0] + weights["decoder"][1]
    divergence = -0.5 * (1 + log - mean**2 - np.exp(log)).sum(-1).mean()
    assert report.loss == pytest.approx(((outputs - x) ** 2).mean() + divergence, rel=1e-5)
    gradient = hidden.T @ (0.5 * (np.exp(log) - 1) / len(x))  # by hand; the reconstruction does not depend on `log`
    (found,) = [layer.gradient_ratio for layer in report.layers if layer.name == "log"]
    assert found == pytest.approx(np.linalg.norm(gradient) / np.linalg.norm(weights["log"][0]), rel=1e-4)


def test_a_model_that_trains_by_add_loss_alone():
    class Reconstruction(layers.Layer):
        def call(self, inputs):
            self.add_loss(keras.ops.mean((inputs[0] - inputs[1]) ** 2))
            return inputs[1]

    inputs = keras.Input((16,))
    model = keras.Model(inputs, Reconstruction()([inputs, layers.Dense(16)(layers.Dense(4)(inputs))]))
    model.compile("sgd")
    x = np.random.default_rng(0).random((32, 16)).astype("float32")
    reports = [ortho_keras.signal_report(model, x, y) for y in (None, x)]
    expected = np.mean((x - model.predict(x, verbose=0)) ** 2)
    assert [report.loss for report in reports] == pytest.approx(2 * [expected], rel=1e-5)
    assert all(layer.gradient_ratio > 0 for report in reports for layer in report.layers)
    with pytest.raises(ValueError, match="`y` must hold a target for each of the 32 samples. Received: None"):
        ortho_keras.signal_report(model, x, None, "mse")


def test_a_penalty_far_above_the_loss():
    model, x, y = heads("binary_crossentropy")
    expected = ortho_keras.signal_report(model, x, y)
    kernel, penalty = model.layers[1].kernel, keras.regularizers.L2(1e6)
    kernel.regularizer = penalty
    for loss in (None, "binary_crossentropy"):
        report = ortho_keras.signal_report(model, x, y, loss)
        assert kernel.regularizer is penalty and penalty(kernel) > 1e5
        found, wanted = ([layer.gradient_ratio for layer in each.layers] for each in (report, expected))
        assert [report.loss, *found] == pytest.approx([expected.loss, *wanted], rel=1e-5)


def my_crossentropy(y, outputs):
    return keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)


class MyCrossentropy(keras.losses.Loss):
    call = staticmethod(my_crossentropy)


def test_a_custom_crossentropy_may_take_logits_and_one_of_keras_must_be_told():
    model, (x, y) = dense(), batch((4,))
    expected = ortho_keras.signal_report(model, x, y, LOGITS)
    for loss in (my_crossentropy, MyCrossentropy()):
        model.compile("sgd", loss)
        for given in (None, loss):
            report = ortho_keras.signal_report(model, x, y, given)
            assert report.loss == pytest.approx(expected.loss, rel=1e-6)
            assert report.layers[0].backward_moment == pytest.approx(expected.layers[0].backward_moment, rel=1e-4)
    kind = keras.losses.SparseCategoricalCrossentropy
    for loss in ("sparse_categorical_crossentropy", keras.losses.sparse_categorical_crossentropy, kind, kind()):
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


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (tf.sparse.eye(8, 4), "SparseTensor"),
        (tf.ragged.constant([[1.0], [2.0, 3.0]] * 4), "RaggedTensor"),
        ([[1], [2, 3]], "list"),
    ],
)
def test_arrays_that_are_not_dense(value, kind):
    with pytest.raises(ValueError, match=r"^`y` must be dense arrays of numbers. Received: " + kind + "$"):
        ortho_keras.signal_report(dense(), np.ones((8, 4)), value, "mse")
    with pytest.raises(ValueError, match=rf"^`x` must be a batch of at least 2 for inputs .* Received: {kind} \(.*\)$"):
        ortho_keras.signal_report(dense(), value, np.ones((8, 10)), "mse")


def test_bad_input():
    """`x` and `y` are the number of samples, or a shape."""
    inputs = keras.Input((4,))
    model, wide = dense(), keras.Sequential([keras.Input((5,)), layers.Dense(10)])
    for given, x, y, loss, message in (
        (keras.Sequential([layers.Dense(3)]), 8, 8, LOGITS, "`model` must be a built Keras model"),
        (keras.Sequential([keras.Input((4,)), layers.ReLU()]), 8, 8, LOGITS, "must call a convolution, dense or"),
        (OwnCall(inputs, layers.Dense(10)(inputs)), 8, 8, LOGITS, "Sequential model that does not override `call`"),
        (model, 1, 1, LOGITS, r"`x` must be a batch of at least 2 .* arrays of shape \[\(1, 4\)\]"),
        (wide, 8, 8, LOGITS, r"`x` .* \[\(None, 5\)\]. .* \[\(8, 4\)\]"),
        (model, 8, 8, None, "`loss` must be given for a model that is not compiled"),
        (model, 8, 8, "nonsense", "`loss` must be one Keras loss, .* Received: loss='nonsense'"),
        (model, 8, 8, {"a": "mse"}, "`loss` must be one Keras loss, its name, or a function"),
        (model, 8, 5, LOGITS, r"`y` must hold a target for each of the 8 samples.*\(5,\)"),
        (model, 8, (8, 3), "mse", r"`y` and `loss` must suit .*\(8, 10\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ortho_keras.signal_report(given, np.ones((x, 4), np.float32), np.zeros(y, np.int64), loss)
