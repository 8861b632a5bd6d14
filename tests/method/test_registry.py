"""One way to add a regularizer: a named subclass is available wherever a regularizer is chosen."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from ortho_keras import KernelRegularizer, OrthonormalDecay, OrthonormalRegularizer, check_design, load_model, orthonormalize
from ortho_keras.method.regularizers import REGULARIZERS
from ortho_keras.trainer.build import build_model
from ortho_keras.trainer.data import load_data
from ortho_keras.trainer.recipe import Recipe


@pytest.fixture
def fourth():
    class FourthPowers(KernelRegularizer, name="fourth"):
        """All that is needed for a new regularizer."""

        def penalty(self, kernel):
            return tf.reduce_sum(kernel**4)

    yield FourthPowers
    del REGULARIZERS["fourth"]


def small_model(**settings):
    stack = [layers.Conv2D(4, 2, name="conv", **settings), layers.GlobalAveragePooling2D(), layers.Dense(3, name="dense")]
    return keras.Sequential([keras.Input((5, 5, 2)), *stack])


def test_the_names():
    assert list(REGULARIZERS) == ["orthonormal", "double_soft_orthogonal", "mutual_coherence", "srip", "conv_orthogonal"]
    with pytest.raises(ValueError, match="`name` must not be the name of another regularizer. Received: name='srip'"):
        type("Other", (KernelRegularizer,), {}, name="srip")
    for wrong in ("l2", KernelRegularizer(), keras.regularizers.L2):
        with pytest.raises(ValueError, match="`regularizer` must be one of orthonormal, .* Received: regularizer="):
            orthonormalize(small_model(), regularizer=wrong)


def test_a_new_regularizer_in_orthonormalize_check_design_and_a_saved_model(fourth, tmp_path):
    model = small_model()
    report = orthonormalize(model, 0.5, regularizer="fourth", verbose=False)
    assert {type(regularizer) for regularizer in report.regularizers} == {fourth} and len(report.covered) == 2
    expected = 0.5 * sum(np.sum(model.get_layer(name).kernel.numpy() ** 4) for name in ("conv", "dense"))
    np.testing.assert_allclose(sum(model.losses), expected, rtol=1e-5)
    assert check_design(model).notes == []
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(sum(load_model(tmp_path / "model.keras").losses), expected, rtol=1e-5)

    mixed = keras.Sequential([model, layers.Dense(3, kernel_regularizer=OrthonormalRegularizer(), name="head")])
    (note,) = check_design(mixed).notes
    assert note.startswith("OrthonormalRegularizer on 1 kernel (") and "FourthPowers on 2: the paper discourages" in note
    orthonormalize(mixed, regularizer=fourth, verbose=False)  # the class does as well as its name
    assert check_design(mixed).notes == []


def test_a_new_regularizer_in_the_decay(fourth):
    model = small_model(use_bias=False)
    model.compile(keras.optimizers.SGD(0.1), lambda y, prediction: 0 * tf.reduce_sum(prediction))
    before = model.get_layer("conv").kernel.numpy()
    callback = OrthonormalDecay(0.02, every=2, regularizer="fourth")
    model.fit(np.zeros((4, 5, 5, 2)), np.zeros(4), batch_size=2, callbacks=[callback], verbose=0)
    expected = before - 0.02 * 0.1 * 2 * 4 * before**3
    np.testing.assert_allclose(model.get_layer("conv").kernel, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["fourth", "conv_orthogonal", "l2", "none"])
def test_a_recipe_takes_any_of_them(fourth, name):
    recipe = Recipe(image_size=8, depth=8, width=2, regularizer=name, factor=0.01).check()
    assert ("factor" in recipe.without_effect()) == (name == "none")
    model = build_model(recipe, load_data("digits", None, 8))
    kinds = {type(layer.kernel_regularizer) for layer in model.layers if hasattr(layer, "kernel")}
    assert kinds == {REGULARIZERS.get(name, keras.regularizers.L2 if name == "l2" else type(None))}


def test_conv_orthogonal_takes_the_strides_of_its_layer_and_skips_other_layouts():
    x = keras.Input((8, 8, 2))
    y = layers.Conv2D(4, 3, strides=(2, 1), groups=2, name="strided")(x)
    y = layers.SeparableConv2D(4, 3, strides=2, name="separable")(y)
    model = keras.Model(x, layers.Conv2DTranspose(3, 2, name="up")(y))
    before = model.get_layer("up").kernel_regularizer = keras.regularizers.L2(0.1)
    report = orthonormalize(model, 0.1, regularizer="conv_orthogonal", verbose=False)
    found = {kernel.path: (kernel.regularizer.strides, kernel.regularizer.groups) for kernel in report.covered}
    assert found == {"strided/kernel": ((2, 1), 2), "separable/pointwise_kernel": ((1,), 1)}
    assert [weight.path for weight in report.skipped] == ["separable/depthwise_kernel", "up/kernel"]
    assert "defined for kernels of layout 'standard' only, not 'transposed'" in report.skipped[1].reason
    assert model.get_layer("up").kernel_regularizer is before


@pytest.mark.parametrize("floatx", ["float16", "bfloat16"])
def test_penalties_in_keras_floatx(floatx):
    """Keras adds the losses of a model in its floatx; the penalty itself is computed in float32."""
    before = keras.config.floatx()
    keras.config.set_floatx(floatx)
    try:
        for regularizer in REGULARIZERS.values():
            kernel = tf.cast(np.random.default_rng(0).normal(size=(6, 3)), floatx)
            value = regularizer(1e-2)(kernel)
            assert value.dtype == floatx
            assert float(value) == float(tf.cast(1e-2 * regularizer(1.0).penalty(kernel), floatx))
            model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, kernel_regularizer=regularizer(1e-2))])
            model.compile("sgd", "mse")
            (loss,) = model.fit(np.ones((8, 6)), np.ones((8, 3)), verbose=0).history["loss"]
            assert 0 < float(loss) < np.inf
    finally:
        keras.config.set_floatx(before)
