"""orthonormalize: what it covers, skips, reports and refuses, and that the model trains on with the penalty."""

import keras
import numpy as np
import pytest
import references
from keras import layers
from layout_models import FACTOR, LAYOUTS, images, oracle, small_model, weights

from ortho_keras import OrthonormalRegularizer, modulate, orthonormalize

pytestmark = pytest.mark.every_backend


def model_of(*stack, shape=(4,)):
    return keras.Sequential([keras.Input(shape), *stack])


def test_mobile_net():
    model = keras.applications.MobileNetV2(input_shape=(32, 32, 3), alpha=0.35, weights=None, classes=10)
    report = orthonormalize(model, factor=FACTOR, verbose=False)
    layouts = {}
    for layer in model.layers:
        if isinstance(layer, (layers.DepthwiseConv2D, layers.Conv2D, layers.Dense)):
            layouts[layer.kernel.path] = "depthwise" if isinstance(layer, layers.DepthwiseConv2D) else "standard"
    assert {kernel.path: kernel.regularizer.layout for kernel in report.covered} == layouts
    assert len(report.covered) == len(layouts) == 53 and report.skipped == []  # 52 convolutions and the classifier
    np.testing.assert_allclose(sum(model.losses), oracle(model, layouts, FACTOR), rtol=1e-5)


def test_small_model_equals_the_oracle_and_one_regularizer_serves_a_layout():
    model = small_model()
    before = model.get_weights()
    orthonormalize(model, factor=1.0, verbose=False)
    report = orthonormalize(model, factor=FACTOR, verbose=False)  # a second call replaces the factor
    assert {kernel.replaced for kernel in report.covered} == {"OrthonormalRegularizer"}
    assert {kernel.path: kernel.regularizer.layout for kernel in report.covered} == LAYOUTS
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    np.testing.assert_allclose(sum(model.losses), oracle(model, LAYOUTS, FACTOR), rtol=1e-5)
    assert sorted(str(regularizer.layout) for regularizer in report.regularizers) == sorted(map(str, set(LAYOUTS.values())))
    for regularizer in report.regularizers:
        regularizer.factor = 0.5
    np.testing.assert_allclose(sum(model.losses), oracle(model, LAYOUTS, 0.5), rtol=1e-5)


def test_a_fitted_model_takes_effect_at_the_next_fit_and_evaluation():
    model = small_model()
    model.compile(keras.optimizers.SGD(0.0, momentum=0.9), "mse", metrics=["mae"])
    x, y = images(model), np.ones((4, 7), "float32")
    plain = model.fit(x, y, validation_data=(x, y), verbose=0).history["loss"]
    report = orthonormalize(model, factor=3.0, verbose=False)
    expected = [plain[0] + oracle(model, LAYOUTS, 3.0)]
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0)[:1], expected, rtol=1e-5)
    ours = model.fit(x, y, validation_data=(x, y), verbose=0).history
    np.testing.assert_allclose(ours["loss"] + ours["val_loss"], expected * 2, rtol=1e-5)
    assert model.optimizer.iterations == 2

    for regularizer in report.regularizers:  # a warm-up, without retracing
        regularizer.factor = 0.0
    train_function = model.train_function
    np.testing.assert_allclose(model.fit(x, y, verbose=0).history["loss"], plain, rtol=1e-6)
    assert model.train_function is train_function


def test_grouped_convolutions_get_a_regularizer_of_their_own():
    model = model_of(layers.Conv2D(6, 2, groups=3), layers.Conv2D(4, 2), shape=(4, 4, 6))
    report = orthonormalize(model, factor=1.0, verbose=False)
    assert [(r.layout, r.groups) for r in report.regularizers] == [("standard", 3), ("standard", 1)]
    assert [kernel.matrices for kernel in report.covered] == [(3, 8, 2), (1, 24, 4)]
    grouped, whole = (layer.kernel.numpy() for layer in model.layers)
    parts = [*np.split(grouped, 3, axis=-1), whole]
    expected = sum(references.penalty_and_gradient(part, "standard", 1.0)[0] for part in parts)
    np.testing.assert_allclose(sum(model.losses), expected, rtol=1e-5)


def test_penalties_of_kernels_are_replaced_and_those_of_biases_kept_also_in_a_saved_model(tmp_path):
    model = small_model(keras.regularizers.L2(0.1), keras.regularizers.L1(0.2))
    model.get_layer("classifier").bias.assign(-np.arange(7.0))
    report = orthonormalize(model, factor=FACTOR, verbose=False)
    np.testing.assert_allclose(sum(model.losses), oracle(model, LAYOUTS, FACTOR) + 0.2 * 21, rtol=1e-5)
    replaced = {kernel.path for kernel in report.covered if kernel.replaced == "L2"}
    assert replaced == {"separable/depthwise_kernel", "separable/pointwise_kernel", "classifier/kernel"}
    assert str(report).count("replaces L2") == 3

    model.save(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for copy in (clone, keras.models.load_model(tmp_path / "model.keras", safe_mode=True)):
        for path, layout in LAYOUTS.items():
            regularizer = weights(copy)[path].regularizer
            assert type(regularizer) is OrthonormalRegularizer and (regularizer.factor, regularizer.layout) == (FACTOR, layout)
        assert type(copy.get_layer("classifier").bias.regularizer) is keras.regularizers.L1
        assert float(sum(copy.losses)) == float(sum(model.losses))


class Table(layers.Layer):
    def build(self, input_shape):
        self.table = self.add_weight(shape=(input_shape[-1], 3), name="table")

    def call(self, x):
        return x @ self.table


class Pair(layers.Layer):
    """A composite layer that Keras saves without its inner layers' regularizers; one of them is not used."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.unused = layers.Dense(3), layers.Dense(4)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(x)


def test_report(capsys):
    model = model_of(
        layers.Embedding(11, 4, name="words"),
        layers.LayerNormalization(name="norm"),
        layers.Dense(9, name="wide"),
        layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de", name="heads"),
        Table(name="unknown"),
        layers.DepthwiseConv2D((2, 1), name="channels"),
        shape=(5,),
    )
    report = orthonormalize(model)
    assert capsys.readouterr().out == f"{report}\n"
    assert str(report).replace("sequential/", "") == (
        "orthonormalize: 3 kernels covered, 3 weights skipped\n"
        "  covered  wide/kernel (Dense) (4, 9): layout standard, 4 x 9, in groups of 4 columns\n"
        "  covered  heads/kernel (EinsumDense) (9, 2, 3): layout (1, 2), 9 x 6\n"
        "  covered  channels/kernel (DepthwiseConv2D) (2, 1, 3, 1): layout depthwise, 3 of 2 x 1\n"
        "  skipped  words/embeddings (Embedding) (11, 4): an embedding is a table, not a linear map\n"
        "  skipped  heads/bias (EinsumDense) (2, 3): a bias\n"
        "  skipped  unknown/table (Table) (3, 3): Table is not a convolution, dense or einsum layer: its layout is unknown"
    )


def test_a_frozen_kernel_has_no_penalty_until_it_is_trainable():
    model = small_model()
    model.get_layer("up").trainable = False
    report = orthonormalize(model, factor=FACTOR, verbose=False)
    assert [kernel.path for kernel in report.covered if "frozen" in kernel.note] == ["up/kernel"]
    free = {path: layout for path, layout in LAYOUTS.items() if path != "up/kernel"}
    np.testing.assert_allclose(sum(model.losses), oracle(model, free, FACTOR), rtol=1e-5)
    model.get_layer("up").trainable = True
    np.testing.assert_allclose(sum(model.losses), oracle(model, LAYOUTS, FACTOR), rtol=1e-5)


def test_kernels_that_no_config_holds_are_noted():
    x = keras.Input((5, 4))
    y = layers.MultiHeadAttention(2, 3)(x, x)
    y = layers.TimeDistributed(layers.Dense(4, name="wrapped"))(Pair()(y))
    model = keras.Model(x, keras.Sequential([layers.Dense(2, name="nested")])(y))
    report = orthonormalize(model, factor=FACTOR, verbose=False)
    covered = {kernel.path.split("/")[-2]: kernel for kernel in report.covered}
    noted = {name for name, kernel in covered.items() if "call orthonormalize again after loading" in kernel.note}
    assert noted == {"query", "key", "value", "attention_output", "dense"}
    copy = keras.Model.from_config(model.get_config(), {"Pair": Pair})
    kept = {weight.path.split("/")[-2] for weight in copy.weights if weight.regularizer is not None}
    assert kept == set(covered) - noted == {"wrapped", "nested"}  # the note is right
    assert len(orthonormalize(copy, factor=FACTOR, verbose=False).covered) == 7


def test_einsum_kernels_that_are_not_matrices_are_skipped_with_a_reason():
    for equation, output_shape in [
        ("abc,bc->a", ()),  # no output axis
        ("abc,bc->abc", (3, 4)),  # a gain for each entry
        ("abc,bcdefg->adefg", (2, 2, 2, 2)),  # rank 6
    ]:
        model = model_of(layers.EinsumDense(equation, output_shape), shape=(3, 4))
        report = orthonormalize(model, verbose=False)
        assert report.covered == [] and "makes it no matrix" in report.skipped[0].reason, equation


def test_adapted_and_quantized_kernels_are_skipped_with_a_true_reason():
    model = model_of(layers.Dense(4), layers.Dense(4))
    model.layers[0].enable_lora(2)
    model.layers[1].quantize("int8")
    report = orthonormalize(model, verbose=False)
    assert report.covered == []
    reasons = {weight.reason.split(":")[0] for weight in report.skipped}
    assert reasons == {"Dense with LoRA or quantization", "not a float weight (int8)"}


def test_what_is_refused_changes_nothing():
    for wrong in (keras.Sequential([layers.Dense(3)]), layers.Dense(3), "model"):
        with pytest.raises(ValueError, match="`model` must be a built Keras model"):
            orthonormalize(wrong)
    model = model_of(layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.1)))
    with pytest.raises(ValueError, match="`factor` must be"):
        orthonormalize(model, -1.0)
    assert type(model.layers[0].kernel.regularizer) is keras.regularizers.L2
    with pytest.raises(ValueError, match="`factor` must be"):
        orthonormalize(model_of(layers.ReLU()), -1.0)  # also where there is no kernel


class Backbone(keras.Model):
    """A Functional subclass that is rebuilt from its own arguments, as keras-hub's models are."""

    def __init__(self, width=4, penalty=None, **kwargs):
        inputs = keras.Input((6,))
        hidden = layers.Dense(width, kernel_regularizer=penalty, name="first")(inputs)
        super().__init__(inputs, layers.Dense(3, name="last")(hidden), **kwargs)
        self.width, self.penalty = width, penalty

    def get_config(self):
        return {"name": self.name, "width": self.width, "penalty": self.penalty}


def test_a_subclass_that_is_rebuilt_from_its_arguments():
    model = Backbone()
    report = orthonormalize(model, factor=FACTOR, verbose=False)
    assert [kernel.note for kernel in report.covered] == 2 * [
        "not in the config of Backbone: call orthonormalize again after loading"
    ]
    assert len(model.losses) == 2 and not Backbone.from_config(model.get_config()).losses  # the note is right
    kept = Backbone(penalty=OrthonormalRegularizer(FACTOR))
    report = orthonormalize(kept, factor=FACTOR, verbose=False)
    assert [bool(kernel.note) for kernel in report.covered] == [False, True]
    assert len(Backbone.from_config(kept.get_config()).losses) == 1
    with pytest.raises(ValueError, match="`model` must be of a class that is made as .*Received: 'backbone.*', a Backbone"):
        modulate(model)


def test_initialized_kernels_are_orthonormal_by_their_layouts():
    """The queries of an attention layer are an isometry as a whole, which its own `kernel_initializer` cannot make them."""
    inputs = keras.Input((5, 16))
    attention = layers.MultiHeadAttention(4, 4)
    model = keras.Model(inputs, layers.Dense(3)(attention(inputs, inputs)))
    before = [np.array(layer.bias) for layer in (attention.query_dense, model.layers[-1])]
    report = orthonormalize(model, factor=1.0, verbose=False, initialize=True)
    assert len(report.covered) == 5 and sum(model.losses) < 1e-9
    matrix = np.reshape(attention.query_dense.kernel, (16, 16)).astype("float64")  # 16 features to 4 heads of 4
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(16), atol=1e-5)
    drawn = [np.array(kernel.kernel) for kernel in (attention.query_dense, attention.key_dense)]
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1
    for bias, layer in zip(before, (attention.query_dense, model.layers[-1])):
        np.testing.assert_array_equal(layer.bias, bias)
