"""What orthonormalize reports, skips and refuses."""

import keras
import numpy as np
import pytest
import references
from keras import layers
from layout_models import FACTOR, LAYOUTS, oracle, small_model

from ortho_keras import orthonormalize


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
    assert "embedding" in reasons["words/embeddings"]
    assert reasons["heads/bias"] == "a bias"
    assert "Table" in reasons["unknown/table"] and "layout is not known" in reasons["unknown/table"]
    title, *lines = str(report).split("\n")
    assert title == "orthonormalize: 4 kernels covered, 3 weights skipped"
    assert len(lines) == 7
    for line, kernel in zip(lines, report.covered):
        assert line.startswith("  covered  ") and f"{kernel.path} ({kernel.layer_type}) {kernel.shape}: " in line
        assert f"layout {kernel.regularizer.layout}, " in line
    for line, weight in zip(lines[4:], report.skipped):
        assert line == f"  skipped  {weight.path} ({weight.layer_type}) {weight.shape}: {weight.reason}"
    assert lines[0].endswith("4 x 9, in groups of 4 columns")
    assert lines[1].endswith(", 9 x 9")
    assert lines[2].endswith(", 9 x 6")
    assert lines[3].endswith(", 3 of 2 x 1")


def test_verbose_prints_the_report(capsys):
    report = orthonormalize(small_model())
    assert capsys.readouterr().out == f"{report}\n"
    orthonormalize(small_model(), verbose=False)
    assert capsys.readouterr().out == ""


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


@pytest.mark.parametrize(
    ("equation", "output_shape"),
    [
        ("abc,bc->a", ()),  # no output axis
        ("abc,c->abc", (3, 4)),  # a gain for each channel
        ("abc,bc->abc", (3, 4)),
        ("abc,bcdefg->adefg", (2, 2, 2, 2)),  # rank 6
    ],
)
def test_einsum_kernels_that_are_no_matrices_are_skipped_with_a_reason(equation, output_shape):
    model = keras.Sequential([keras.Input((3, 4)), layers.Dense(4), layers.EinsumDense(equation, output_shape)])
    report = orthonormalize(model, verbose=False)
    assert report.covered[0].path == model.layers[0].kernel.path
    others = [weight.path for weight in (*report.covered[1:], *report.skipped)]
    assert others == ([model.layers[1].kernel.path] if len(model.layers[1].kernel.shape) > 1 else [])
    assert np.isfinite(float(sum(model.losses)))


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


@pytest.mark.parametrize(
    "make", [lambda: keras.Sequential([layers.Dense(3)]), Subclassed, lambda: layers.Dense(3), lambda: "model"]
)
def test_wrong_model(make):
    with pytest.raises(ValueError, match="`model` must be a built Keras model"):
        orthonormalize(make())


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf"), "much", None])
def test_wrong_factor_changes_nothing(factor):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.1))])
    model.compile("sgd", "mse")
    model.evaluate(np.zeros((1, 4)), np.zeros((1, 3)), verbose=0)
    layer, test_function = model.layers[0], model.test_function
    with pytest.raises(ValueError, match="`factor` must be"):
        orthonormalize(model, factor)
    assert type(layer.kernel.regularizer) is type(layer.kernel_regularizer) is keras.regularizers.L2
    assert model.test_function is test_function
    with pytest.raises(ValueError, match="`factor` must be"):
        orthonormalize(keras.Sequential([keras.Input((4,)), layers.ReLU()]), factor)  # also where there is no kernel
