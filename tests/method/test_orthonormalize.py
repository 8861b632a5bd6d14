"""orthonormalize: what it covers, skips, reports and refuses, and that the model trains on with the penalty."""

import keras
import numpy as np
import pytest
import references
from keras import layers
from layout_models import FACTOR, LAYOUTS, images, oracle, small_model, weights

from ortho_keras import OrthonormalRegularizer, orthonormalize


def test_mobile_net():
    model = keras.applications.MobileNetV2(input_shape=(32, 32, 3), alpha=0.35, weights=None, classes=10)
    before = model.get_weights()
    report = orthonormalize(model, factor=FACTOR, verbose=False)
    layouts = {}
    for layer in model.layers:
        if isinstance(layer, (layers.DepthwiseConv2D, layers.Conv2D, layers.Dense)):
            layouts[layer.kernel.path] = "depthwise" if isinstance(layer, layers.DepthwiseConv2D) else "standard"
    assert {kernel.path: kernel.regularizer.layout for kernel in report.covered} == layouts
    assert len(report.covered) == len(layouts) == 53 and report.skipped == []  # 52 convolutions and the classifier
    assert {regularizer.layout for regularizer in report.regularizers} == {"standard", "depthwise"}
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    np.testing.assert_allclose(sum(model.losses), oracle(model, layouts, FACTOR), rtol=1e-5)


def test_small_model_equals_the_oracle_and_one_regularizer_serves_a_layout():
    model = small_model()
    before, x = model.get_weights(), images(model)
    outputs = model.predict(x, verbose=0)
    orthonormalize(model, factor=1.0, verbose=False)
    report = orthonormalize(model, factor=FACTOR, verbose=False)  # a second call replaces the factor
    assert {kernel.replaced for kernel in report.covered} == {"OrthonormalRegularizer"}
    assert {kernel.path: kernel.regularizer.layout for kernel in report.covered} == LAYOUTS
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    np.testing.assert_array_equal(model.predict(x, verbose=0), outputs)
    assert len(model.losses) == 5
    np.testing.assert_allclose(sum(model.losses), oracle(model, LAYOUTS, FACTOR), rtol=1e-5)
    assert sorted(str(regularizer.layout) for regularizer in report.regularizers) == sorted(map(str, set(LAYOUTS.values())))
    for regularizer in report.regularizers:
        regularizer.factor = 0.5
    np.testing.assert_allclose(sum(model.losses), oracle(model, LAYOUTS, 0.5), rtol=1e-5)


def test_a_training_step_follows_the_penalty_s_gradient():
    model = small_model()
    orthonormalize(model, factor=0.3, verbose=False)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = {path: weights(model)[path].numpy() for path in LAYOUTS}
    model.train_on_batch(np.zeros((2, 3, 4, 2)), np.zeros((2, 7)))  # the data have no gradient, only the penalty has
    for path, layout in LAYOUTS.items():
        gradient = references.penalty_and_gradient(before[path], layout, 0.3)[1]
        np.testing.assert_allclose(weights(model)[path].numpy(), before[path] - 0.1 * gradient, rtol=1e-5, atol=1e-6)


def test_a_fitted_model_takes_effect_at_the_next_fit_and_evaluation():
    model = small_model()
    model.compile(keras.optimizers.SGD(0.0, momentum=0.9), "mse", metrics=["mae"])
    x, y = images(model), np.ones((4, 7), "float32")
    plain = model.fit(x, y, validation_data=(x, y), verbose=0).history
    assert model.evaluate(x, y, verbose=0)[0] == plain["val_loss"][0]
    optimizer = model.optimizer
    report = orthonormalize(model, factor=3.0, verbose=False)
    penalty = oracle(model, LAYOUTS, 3.0)
    assert model.optimizer is optimizer and optimizer.iterations == 1

    np.testing.assert_allclose(model.evaluate(x, y, verbose=0)[0], plain["loss"][0] + penalty, rtol=1e-5)
    ours = model.fit(x, y, validation_data=(x, y), verbose=0).history
    np.testing.assert_allclose(ours["loss"] + ours["val_loss"], [plain["loss"][0] + penalty] * 2, rtol=1e-5)
    assert optimizer.iterations == 2

    for regularizer in report.regularizers:  # a warm-up, without retracing
        regularizer.factor = 0.0
    train_function, test_function = model.train_function, model.test_function
    np.testing.assert_allclose(model.fit(x, y, verbose=0).history["loss"], plain["loss"], rtol=1e-6)
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0)[0], plain["loss"][0], rtol=1e-6)
    assert model.train_function is train_function and model.test_function is test_function


def test_grouped_convolutions_get_a_regularizer_of_their_own():
    x = keras.Input((4, 4, 6))
    y = layers.Conv2D(6, 2, groups=3, name="grouped")(x)
    model = keras.Model(x, layers.Conv2D(4, 2, name="whole")(y))
    report = orthonormalize(model, factor=1.0, verbose=False)
    assert [(r.layout, r.groups) for r in report.regularizers] == [("standard", 3), ("standard", 1)]
    assert [kernel.matrices for kernel in report.covered] == [(3, 8, 2), (1, 24, 4)]
    grouped, whole = (model.get_layer(name).kernel.numpy() for name in ("grouped", "whole"))
    parts = [grouped[..., at : at + 2] for at in (0, 2, 4)] + [whole]
    expected = sum(references.penalty_and_gradient(part, "standard", 1.0)[0] for part in parts)
    np.testing.assert_allclose(sum(model.losses), expected, rtol=1e-5)


def test_penalties_of_kernels_are_replaced_and_those_of_biases_kept():
    bias_regularizer = keras.regularizers.L1(0.2)
    model = small_model(keras.regularizers.L2(0.1), bias_regularizer)
    model.get_layer("classifier").bias.assign(-np.arange(7.0))
    report = orthonormalize(model, factor=FACTOR, verbose=False)
    np.testing.assert_allclose(sum(model.losses), oracle(model, LAYOUTS, FACTOR) + 0.2 * 21, rtol=1e-5)
    replaced = {kernel.path for kernel in report.covered if kernel.replaced == "L2"}
    assert replaced == {"separable/depthwise_kernel", "separable/pointwise_kernel", "classifier/kernel"}
    classifier, separable = model.get_layer("classifier"), model.get_layer("separable")
    assert classifier.bias_regularizer is bias_regularizer
    for layer, name in (
        (classifier, "kernel_regularizer"),
        (separable, "depthwise_regularizer"),
        (separable, "pointwise_regularizer"),
    ):
        assert type(getattr(layer, name)) is OrthonormalRegularizer
    assert str(report).count("replaces L2") == 3


def test_survives_a_saved_model(tmp_path):
    model = small_model(keras.regularizers.L2(0.1), keras.regularizers.L1(0.2))
    model.compile("sgd", "mse")
    orthonormalize(model, factor=FACTOR, verbose=False)
    x, y = images(model), np.ones((4, 7), "float32")
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    for path, layout in LAYOUTS.items():
        regularizer = weights(loaded)[path].regularizer
        assert type(regularizer) is OrthonormalRegularizer and (regularizer.factor, regularizer.layout) == (FACTOR, layout)
    assert float(sum(loaded.losses)) == float(sum(model.losses))
    bias = loaded.get_layer("classifier").bias
    assert type(bias.regularizer) is keras.regularizers.L1
    assert loaded.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert float(sum(clone.losses)) == float(sum(model.losses))


class Table(layers.Layer):
    def build(self, input_shape):
        self.table = self.add_weight(shape=(input_shape[-1], 3), name="table")

    def call(self, x):
        return x @ self.table


class Pair(layers.Layer):
    """A composite layer that Keras saves without its inner layers' regularizers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(x)


def test_report():
    x = keras.Input((5,))
    y = layers.Embedding(11, 4, name="words")(x)
    y = layers.LayerNormalization(name="norm")(y)
    y = layers.Dense(9, name="wide")(y)
    y = layers.Dense(9, name="square")(y)
    y = layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de", name="heads")(y)
    y = Table(name="unknown")(y)
    model = keras.Model(x, layers.DepthwiseConv2D((2, 1), name="channels")(y))
    report = orthonormalize(model, verbose=False)
    assert [kernel.path for kernel in report.covered] == ["wide/kernel", "square/kernel", "heads/kernel", "channels/kernel"]
    reasons = {weight.path: weight.reason for weight in report.skipped}
    assert list(reasons) == ["words/embeddings", "heads/bias", "unknown/table"]
    assert "embedding" in reasons["words/embeddings"] and reasons["heads/bias"] == "a bias"
    assert "Table" in reasons["unknown/table"] and "layout is unknown" in reasons["unknown/table"]
    title, *lines = str(report).split("\n")
    assert title == "orthonormalize: 4 kernels covered, 3 weights skipped"
    assert len(lines) == 7
    for line, kernel in zip(lines, report.covered):
        assert line.startswith("  covered  ") and f"{kernel.path} ({kernel.layer_type}) {kernel.shape}: " in line
        assert f"layout {kernel.regularizer.layout}, " in line
    for line, weight in zip(lines[4:], report.skipped):
        assert line == f"  skipped  {weight.path} ({weight.layer_type}) {weight.shape}: {weight.reason}"
    for line, end in zip(lines, ["4 x 9, in groups of 4 columns", ", 9 x 9", ", 9 x 6", ", 3 of 2 x 1"]):
        assert line.endswith(end)


def test_verbose_prints_the_report(capsys):
    report = orthonormalize(small_model())
    assert capsys.readouterr().out == f"{report}\n"


def test_a_shared_layer_counts_once():
    x = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="shared")], name="inner")
    model = keras.Model(x, layers.Dense(3, name="head")(inner(inner(x))))
    report = orthonormalize(model, factor=FACTOR, verbose=False)
    assert len(report.covered) == 2
    kernels = [inner.layers[0].kernel, model.get_layer("head").kernel]
    expected = sum(references.penalty_and_gradient(kernel.numpy(), "standard", FACTOR)[0] for kernel in kernels)
    np.testing.assert_allclose(sum(model.losses), expected, rtol=1e-5)


def test_a_frozen_kernel_has_no_penalty_until_it_is_trainable():
    model = small_model()
    model.get_layer("up").trainable = False
    report = orthonormalize(model, factor=FACTOR, verbose=False)
    assert [kernel.path for kernel in report.covered if "frozen" in kernel.note] == ["up/kernel"]
    free = {path: layout for path, layout in LAYOUTS.items() if path != "up/kernel"}
    np.testing.assert_allclose(sum(model.losses), oracle(model, free, FACTOR), rtol=1e-5)
    model.get_layer("up").trainable = True
    np.testing.assert_allclose(sum(model.losses), oracle(model, LAYOUTS, FACTOR), rtol=1e-5)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, x):
        return self.dense(x)


def test_kernels_that_no_config_holds_are_noted():
    x = keras.Input((5, 4))
    y = layers.MultiHeadAttention(2, 3)(x, x)
    y = layers.TimeDistributed(layers.Dense(4, name="wrapped"))(Pair()(y))
    model = keras.Model(x, keras.Sequential([layers.Dense(2, name="nested")])(y))
    report = orthonormalize(model, factor=FACTOR, verbose=False)
    covered = {kernel.path.split("/")[-2]: kernel for kernel in report.covered}
    noted = {name for name, kernel in covered.items() if "call again after loading" in kernel.note}
    assert noted == {"query", "key", "value", "attention_output", "dense"}
    copy = keras.Model.from_config(model.get_config(), {"Pair": Pair})
    kept = {weight.path.split("/")[-2] for weight in copy.weights if weight.regularizer is not None}
    assert kept == set(covered) - noted == {"wrapped", "nested"}  # the note is right
    assert len(orthonormalize(copy, factor=FACTOR, verbose=False).covered) == 7

    subclassed = Subclassed()
    subclassed(np.zeros((1, 4)))
    (kernel,) = orthonormalize(subclassed, verbose=False).covered
    assert "call again after loading" in kernel.note


def test_einsum_kernels_that_are_not_matrices_are_skipped_with_a_reason():
    for equation, output_shape in [
        ("abc,bc->a", ()),  # no output axis
        ("abc,c->abc", (3, 4)),  # a gain for each channel
        ("abc,bc->abc", (3, 4)),
        ("abc,bcdefg->adefg", (2, 2, 2, 2)),  # rank 6
    ]:
        model = keras.Sequential([keras.Input((3, 4)), layers.Dense(4), layers.EinsumDense(equation, output_shape)])
        report = orthonormalize(model, verbose=False)
        dense, einsum = (layer.kernel for layer in model.layers)
        assert [kernel.path for kernel in report.covered] == [dense.path], equation
        assert [weight.path for weight in report.skipped] == [einsum.path] * (len(einsum.shape) > 1)


def test_an_unused_layer_is_passed_over():
    model = Subclassed()
    model.unused = layers.Dense(3)
    model(np.zeros((1, 4)))
    assert [kernel.path for kernel in orthonormalize(model, verbose=False).covered] == [model.dense.kernel.path]


def test_adapted_and_quantized_kernels_are_skipped_with_a_true_reason():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4, name="adapted"), layers.Dense(4, name="quantized")])
    model.layers[0].enable_lora(2)
    model.layers[1].quantize("int8")
    reasons = {weight.path.split("/", 1)[1]: weight.reason for weight in orthonormalize(model, verbose=False).skipped}
    assert "int8" in reasons["quantized/kernel"]
    assert "LoRA" in reasons["adapted/kernel"]  # a Dense layer is a dense layer: its layout is known


def test_what_is_refused_changes_nothing():
    for wrong in (keras.Sequential([layers.Dense(3)]), Subclassed(), layers.Dense(3), "model"):
        with pytest.raises(ValueError, match="`model` must be a built Keras model"):
            orthonormalize(wrong)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.1))])
    model.compile("sgd", "mse")
    model.evaluate(np.zeros((1, 4)), np.zeros((1, 3)), verbose=0)
    layer, test_function = model.layers[0], model.test_function
    with pytest.raises(ValueError, match="`factor` must be"):
        orthonormalize(model, -1.0)
    assert type(layer.kernel.regularizer) is type(layer.kernel_regularizer) is keras.regularizers.L2
    assert model.test_function is test_function
    with pytest.raises(ValueError, match="`factor` must be"):
        orthonormalize(keras.Sequential([keras.Input((4,)), layers.ReLU()]), -1.0)  # also where there is no kernel
