"""modulate: which models it takes, that they stay what they were, and that it says what it does not take."""

import keras
import numpy as np
import pytest
import references
import tensorflow as tf
from chains import assert_same_bits, batch, dense_chain, gradients, mismatched_chain, modulations
from keras import layers

from ortho_keras import ErrorModulation, modulate, plain_cnn, residual_cnn

# The forward pass


def functional_chain():
    x = inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Rescaling(0.5)(x)
    x = layers.SeparableConv2D(4, 3, padding="same", activation="relu")(x)
    x = layers.DepthwiseConv2D(3)(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2DTranspose(5, 3)(x)
    x = layers.Dropout(0.3)(keras.ops.relu(x) * 1.5)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(x))


def sequential_chain():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(7, activation="tanh"),
            layers.Dense(3),
        ]
    )


def nested_sequential_chain():
    inner = keras.Sequential([layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()])
    return keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3), inner, layers.Dropout(0.5), layers.Flatten(), layers.Dense(3)]
    )


def nested_functional_chain(training=None):
    inner_inputs = keras.Input((6, 6, 4))
    x = layers.Conv2D(4, 3)(inner_inputs)
    inner = keras.Model(inner_inputs, layers.Conv2D(5, 3)(layers.BatchNormalization()(x)))
    inputs = keras.Input((8, 8, 3))
    x = inner(layers.Conv2D(4, 3)(inputs), training=training)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


def small_plain_cnn():
    return plain_cnn(8, (8, 8, 3), width=4)


CHAINS = [functional_chain, sequential_chain, nested_sequential_chain, nested_functional_chain, small_plain_cnn]


@pytest.mark.parametrize(("chain", "policy"), [*((chain, "float32") for chain in CHAINS), (sequential_chain, "mixed_float16")])
def test_outputs_and_weights_are_the_models_own(chain, policy):
    keras.config.set_dtype_policy(policy)
    model = chain()
    modulated = modulate(model)
    x, _ = batch(4, 8, 8, 3)
    assert_same_bits(modulated.predict(x, verbose=0), model.predict(x, verbose=0))
    state = [variable.numpy() for variable in model.variables]  # the averages of BatchNormalization, the seeds of Dropout
    expected = model(x, training=True)
    for variable, value in zip(model.variables, state, strict=True):
        variable.assign(value)
    assert_same_bits(modulated(x, training=True), expected)
    assert len(modulated.weights) == len(model.weights)
    assert {id(variable) for variable in modulated.weights} == {id(variable) for variable in model.weights}


def test_masks_pass_through():
    model = keras.Sequential(
        [keras.Input((5,), dtype="int32"), layers.Embedding(7, 4, mask_zero=True), layers.Dense(4), layers.LSTM(3)]
    )
    tokens = np.random.default_rng(0).integers(0, 3, (6, 5))
    assert_same_bits(modulate(model)(tokens), model(tokens))
    model.pop()
    assert_same_bits(modulate(model)(tokens)._keras_mask, tokens != 0)


def test_a_nested_models_own_training_argument_stays():
    model = nested_functional_chain(training=True)
    x, _ = batch(4, 8, 8, 3)
    assert_same_bits(modulate(model)(x), model(x))


@pytest.mark.filterwarnings("error")
def test_named_inputs_and_outputs_stay():
    inputs = keras.Input((6,), name="image")
    model = keras.Model({"image": inputs}, {"logits": layers.Dense(3)(inputs)})
    x, _ = batch(4, 6)
    outputs = modulate(model)({"image": x})
    assert list(outputs) == ["logits"]
    assert_same_bits(outputs, model({"image": x}))


def test_only_the_named_layers():
    model = mismatched_chain()
    names = ["dense1", "dense3", "dense5"]
    modulated = modulate(model, tolerance=1.0, layers=names)
    assert [layer.name for layer in modulations(modulated)] == [f"{name}_modulation" for name in names]
    x, y = batch(8, 12)
    expected, scales = references.modulated_gradients(model, x, y, names, 1.0, 1000.0, "anchor")
    assert scales["dense5"] == 1 and scales["dense3"] != 1 and scales["dense1"] != 1
    for path, gradient in gradients(modulated, x, y).items():
        np.testing.assert_allclose(gradient, expected[path], 1e-4, 1e-5 * np.abs(expected[path]).max(), err_msg=path)


def test_a_layer_that_the_chain_calls_twice(tmp_path):
    shared, top = layers.Dense(6, activation="tanh", name="shared"), layers.Dense(3)
    inputs = keras.Input((6,))
    model = keras.Model(inputs, top(shared(layers.ReLU()(shared(inputs)))))
    first, second, third = (layers.Dense(6, activation="tanh"), layers.Dense(6, activation="tanh"), layers.Dense(3))
    unrolled = keras.Sequential([keras.Input((6,)), first, layers.ReLU(), second, third])
    for layer, source in ((first, shared), (second, shared), (third, top)):
        layer.set_weights(source.get_weights())

    modulated = modulate(model, tolerance=1.0)
    modulated.save(tmp_path / "model.keras")
    x, y = batch(8, 6)
    names = [layer.name for layer in (first, second, third)]
    expected, _ = references.modulated_gradients(unrolled, x, y, names, 1.0, 1000.0, "anchor")
    for net in (modulated, keras.models.load_model(tmp_path / "model.keras")):
        assert_same_bits(net(x), model(x))
        assert len(modulations(net)) == 3
        found = gradients(net, x, y)[net.get_layer("shared").kernel.path]
        np.testing.assert_allclose(found, expected[first.kernel.path] + expected[second.kernel.path], 1e-4, 1e-6)


def test_a_compiled_model_stays_compiled_and_trains():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = dense_chain()
    model.compile(
        keras.optimizers.SGD(0.3, momentum=0.5, nesterov=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
        steps_per_execution=2,
    )
    model.optimizer.learning_rate = 0.01
    modulated = modulate(model)
    assert modulated.get_compile_config() == model.get_compile_config()
    assert modulated.optimizer is not model.optimizer and type(modulated.optimizer) is type(model.optimizer)
    assert float(modulated.optimizer.learning_rate) == np.float32(0.01)
    x, _ = batch(96, 6)
    y = np.argmax(x[:, :3], axis=1)
    before = model.get_weights()
    losses = modulated.fit(x, y, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    assert all(np.any(old != new) for old, new in zip(before, model.get_weights()))  # it trains the model


def test_compile_settings_that_cannot_be_copied_give_a_warning():
    model = dense_chain()
    model.compile("sgd", lambda y, logits: tf.reduce_mean(tf.square(y - logits)))
    with pytest.warns(UserWarning, match="call compile on the new model"):
        modulated = modulate(model)
    assert not modulated.compiled


def test_a_custom_functional_class_keeps_its_train_step():
    class Model(keras.Model):
        def train_step(self, data):
            return {"loss": 7.0}

    inputs = keras.Input((6,))
    model = Model(inputs, layers.Dense(3)(inputs))
    assert type(modulate(model)) is type(model)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 6), "float32"))
    return model


def two_inputs():
    inputs = [keras.Input((6,)), keras.Input((6,))]
    return keras.Model(inputs, layers.Dense(3)(layers.Add()(inputs)), name="pair")


def two_outputs():
    inputs = keras.Input((6,))
    hidden = layers.Dense(4)(inputs)
    return keras.Model(inputs, [hidden, layers.Dense(3)(hidden)], name="pair")


def layer_with_two_outputs():
    inputs = keras.Input((5, 6))
    outputs, _ = layers.GRU(4, return_state=True, name="gru")(inputs)
    return keras.Model(inputs, layers.Dense(3)(outputs))


def branch_inside_a_nested_model():
    inner_inputs = keras.Input((6,))
    hidden = layers.Dense(6, name="fork")(inner_inputs)
    inner = keras.Model(inner_inputs, layers.Add(name="join")([hidden, layers.ReLU()(hidden)]))
    return keras.Sequential([keras.Input((6,)), inner, layers.Dense(3)])


def branch_around_a_nested_model():
    inner_inputs = keras.Input((6,))
    inner = keras.Model(inner_inputs, layers.Dense(6, name="inside")(inner_inputs), name="inner")
    inputs = keras.Input((6,))
    hidden = layers.Dense(6, name="fork")(inputs)
    return keras.Model(inputs, layers.Add(name="join")([inner(hidden), hidden]))


def branch_at_the_input():
    inputs = keras.Input((6,))
    return keras.Model(inputs, layers.Add()([layers.Dense(6)(inputs), inputs]))


def same_names_in_two_nested_models():
    inner = [keras.Sequential([keras.Input((6,)), layers.Dense(6, name="twin")]) for _ in range(2)]
    return keras.Sequential([keras.Input((6,)), *inner])


NO_CHAINS = [
    (lambda: residual_cnn(8), "branches at 'stem_conv_relu', .* both 'stage1_conv01' and 'stage1_add01'"),
    (branch_inside_a_nested_model, "branches at 'fork'"),
    (branch_around_a_nested_model, "branches at 'fork', .* both 'inside' and 'join'"),
    (branch_at_the_input, "branches at 'the input'"),
    (two_inputs, "needs a chain: model 'pair' has 2 inputs and 1 outputs"),
    (two_outputs, "needs a chain: model 'pair' has 1 inputs and 2 outputs"),
    (layer_with_two_outputs, "needs a chain: layer 'gru' has more than one output"),
    (lambda: modulate(dense_chain()), "is modulated already: it has an ErrorModulation layer 'a_modulation'"),
    (lambda: keras.Sequential([keras.Input((6,)), modulate(dense_chain())]), "is modulated already"),
    (lambda: keras.Sequential([keras.Input((6,)), layers.ReLU()], name="bare"), "no parametric layer .* in model 'bare'"),
    (lambda: keras.Sequential([layers.Dense(3)]), "`model` must be a built Keras model"),
    (lambda: layers.Dense(3), "`model` must be a built Keras model"),
    (subclassed, "must be a Functional or Sequential model .* Received: 'subclassed', a Subclassed"),
    (lambda: keras.Sequential([keras.Input((6,)), subclassed()]), "Received: 'subclassed', a Subclassed"),
    (same_names_in_two_nested_models, "twin"),
]


@pytest.mark.parametrize(("build", "message"), NO_CHAINS)
def test_model_that_is_no_chain(build, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        modulate(model)


def test_wrong_arguments():
    for names, missing in ((["c", "e", "d"], r"\['d', 'e'\]"), (["a", "b", "flatten"], r"\['flatten'\]")):
        with pytest.raises(ValueError, match=rf"`layers` must be names of parametric layers of the model. Received: {missing}"):
            modulate(dense_chain(), layers=names)
    for make in (ErrorModulation, lambda **settings: modulate(dense_chain(), **settings)):
        for name, value in (("tolerance", 0.999), ("tolerance", float("nan")), ("max_scale", 0), ("max_scale", "2")):
            with pytest.raises(ValueError, match=f"`{name}` must be a finite number, at least 1. Received: {name}="):
                make(**{name: value})
        with pytest.raises(ValueError, match=r"`reference` must be one of .* Received: reference='Anchor'"):
            make(reference="Anchor")


# What it is for


def test_kernel_gradients_of_a_deep_plain_network_are_of_one_magnitude_at_initialization():
    model = plain_cnn(56, (16, 16, 3), width=8, seed=0)
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype("float32")
    labels = np.arange(8) % 10
    ratios = []
    for net in (model, modulate(model)):
        found = gradients(net, images, labels, tf.function)
        norms = [np.linalg.norm(found[layer.kernel.path]) for layer in model.layers if isinstance(layer, layers.Conv2D)]
        assert len(norms) == 55
        ratios.append(max(norms[1:]) / min(norms[1:]))
    assert ratios[0] > 1e3 and ratios[1] < 10
