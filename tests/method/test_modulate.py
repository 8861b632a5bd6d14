"""modulate: which models it takes, that they stay what they were, also in copies and files, and what it refuses."""

import copy

import chains
import keras
import numpy as np
import pytest
import tensorflow as tf
from chains import NAMES, assert_same_bits, batch, dense_chain, gradients, mismatched_chain, modulations
from keras import layers

from ortho_keras import ErrorModulation, modulate, plain_cnn, residual_cnn, switch_modulation


def functional(build, shape=(6,), name=None):
    inputs = keras.Input(shape, name="input")
    return keras.Model(inputs, build(inputs), name=name)


def many_layers(x):
    x = layers.SeparableConv2D(4, 3, padding="same", activation="relu")(layers.Rescaling(0.5)(x))
    x = layers.MaxPooling2D()(layers.DepthwiseConv2D(3)(x))
    x = layers.Conv2DTranspose(5, 3)(x)
    x = layers.Dropout(0.3)(keras.ops.relu(x) * 1.5)
    return layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling2D()(x))


def with_a_nested_model(x, training=None):
    inner = functional(lambda x: layers.Conv2D(5, 3)(layers.BatchNormalization()(layers.Conv2D(4, 3)(x))), (6, 6, 4))
    return layers.Dense(3)(layers.Flatten()(inner(layers.Conv2D(4, 3)(x), training=training)))


def nested_sequential_chain():
    inner = keras.Sequential([layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()])
    return keras.Sequential([keras.Input((8, 8, 3)), inner, layers.Dropout(0.5), layers.Flatten(), layers.Dense(3)])


CHAINS = [
    (lambda: functional(many_layers, (8, 8, 3)), "float32"),
    (lambda: functional(with_a_nested_model, (8, 8, 3)), "float32"),
    (nested_sequential_chain, "float32"),
    (nested_sequential_chain, "mixed_float16"),
]


@pytest.mark.parametrize(("chain", "policy"), CHAINS)
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
    model = keras.Sequential([keras.Input((5,), dtype="int32"), layers.Embedding(7, 4, mask_zero=True), layers.Dense(4)])
    tokens = np.random.default_rng(0).integers(0, 3, (6, 5))
    assert_same_bits(modulate(model)(tokens)._keras_mask, tokens != 0)


def test_a_nested_models_own_training_argument_stays():
    model = functional(lambda x: with_a_nested_model(x, training=True), (8, 8, 3))
    x, _ = batch(4, 8, 8, 3)
    assert_same_bits(modulate(model)(x), model(x))


@pytest.mark.filterwarnings("error")
def test_named_inputs_and_outputs_and_a_custom_class_stay():
    class Model(keras.Model):
        def train_step(self, data):
            return {"loss": 7.0}

    inputs = keras.Input((6,), name="image")
    model = Model({"image": inputs}, {"logits": layers.Dense(3)(inputs)})
    modulated = modulate(model)
    x, _ = batch(4, 6)
    assert type(modulated) is Model and list(modulated({"image": x})) == ["logits"]
    assert_same_bits(modulated({"image": x}), model({"image": x}))


def test_only_the_named_layers():
    model = mismatched_chain()
    names = ["dense1", "dense3", "dense5"]
    modulated = modulate(model, tolerance=1.0, layers=names)
    assert [layer.name for layer in modulations(modulated)] == [f"{name}_modulation" for name in names]
    x, y = batch(8, 12)
    expected, _ = chains.modulated_gradients(model, x, y, names, 1.0, 1000.0, "anchor")
    for path, gradient in gradients(modulated, x, y).items():
        np.testing.assert_allclose(gradient, expected[path], 1e-4, 1e-5 * np.abs(expected[path]).max(), err_msg=path)


def test_a_layer_that_the_chain_calls_twice():
    shared = layers.Dense(6, activation="tanh", name="shared")
    model = functional(lambda x: layers.Dense(3)(shared(shared(x))))
    unrolled = keras.Sequential([keras.Input((6,)), *(layers.Dense(6, activation="tanh") for _ in "ab"), layers.Dense(3)])
    unrolled.set_weights([*shared.get_weights(), *model.get_weights()])
    modulated = modulate(model, tolerance=1.0)
    x, y = batch(8, 6)
    expected, _ = chains.modulated_gradients(unrolled, x, y, [layer.name for layer in unrolled.layers], 1.0, 1e3, "anchor")
    first, second, _ = (expected[layer.kernel.path] for layer in unrolled.layers)
    assert len(modulations(modulated)) == 3
    np.testing.assert_allclose(gradients(modulated, x, y)[shared.kernel.path], first + second, 1e-4, 1e-6)


def test_a_compiled_model_stays_compiled_and_trains():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = dense_chain()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.3, momentum=0.5), loss, metrics=["accuracy"], jit_compile=False, steps_per_execution=2)
    model.optimizer.learning_rate = 0.01
    modulated = modulate(model)
    assert modulated.get_compile_config() == model.get_compile_config()
    assert modulated.optimizer is not model.optimizer and float(modulated.optimizer.learning_rate) == np.float32(0.01)
    x, _ = batch(96, 6)
    before = model.get_weights()
    losses = modulated.fit(x, np.argmax(x[:, :3], axis=1), epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    assert all(np.any(old != new) for old, new in zip(before, model.get_weights()))  # it trains the model


def test_compile_settings_that_cannot_be_copied_give_a_warning():
    model = dense_chain()
    model.compile("sgd", lambda y, logits: tf.reduce_mean(tf.square(y - logits)))
    with pytest.warns(UserWarning, match="call compile on the new model"):
        assert not modulate(model).compiled


# Copies

RULE = {"tolerance": 3.0, "max_scale": 7.0, "reference": "neighbour", "enabled": False, "synchronized": True}


def test_deepcopies_have_switches_of_their_own():
    model = modulate(dense_chain(), tolerance=1.0)
    copied = copy.deepcopy(model)
    x, y = batch(8, 6)
    assert_same_bits(list(gradients(copied, x, y).values()), list(gradients(model, x, y).values()))
    switch_modulation(copied, False)
    assert all(layer.enabled for layer in modulations(model)) and not any(layer.enabled for layer in modulations(copied))


@pytest.mark.parametrize(("policy", "enabled"), [("float32", True), ("mixed_float16", False)])
def test_survives_a_saved_model(tmp_path, policy, enabled):
    keras.config.set_dtype_policy(policy)
    modulated = modulate(mismatched_chain(), **RULE)
    switch_modulation(modulated, enabled)
    modulated.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    x, y = batch(8, 12)
    assert_same_bits(loaded(x), modulated(x))
    assert [layer.name for layer in modulations(loaded)] == [f"{name}_modulation" for name in NAMES]
    for layer in modulations(loaded):
        assert {key: getattr(layer, key) for key in RULE} == {**RULE, "enabled": enabled}
    for net in (modulated, loaded):
        switch_modulation(net, not enabled)
    assert_same_bits([*gradients(loaded, x, y).values()], [*gradients(modulated, x, y).values()])


def test_survives_an_export(tmp_path):
    modulated = modulate(dense_chain())
    x, _ = batch(8, 6)
    modulated.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(exported.serve(x), modulated(x), rtol=1e-5, atol=1e-5)


# What is refused


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.dense = layers.Dense(3)
        self.dense.build((None, 6))
        self.built = True

    def call(self, inputs):
        return self.dense(inputs)


def branch(x):
    hidden = layers.Dense(6, name="fork")(x)
    return layers.Add(name="join")([hidden, layers.ReLU()(hidden)])


def branch_around_a_nested_model(x):
    hidden = layers.Dense(6, name="fork")(x)
    return layers.Add(name="join")([functional(layers.Dense(6, name="inside"))(hidden), hidden])


def two_inputs():
    inputs = [keras.Input((6,)), keras.Input((6,))]
    return keras.Model(inputs, layers.Dense(3)(layers.Add()(inputs)))


def stack(*inner):
    return keras.Sequential([keras.Input((6,)), *inner], name="stack")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: residual_cnn(8), "branches at 'stem_conv_relu', .* both 'stage1_conv01' and 'stage1_add01'"),
        (lambda: stack(functional(branch), layers.Dense(3)), "branches at 'fork'"),
        (lambda: functional(branch_around_a_nested_model), "branches at 'fork', .* both 'inside' and 'join'"),
        (lambda: functional(lambda x: layers.Add()([layers.Dense(6)(x), x])), "branches at 'the input'"),
        (two_inputs, "needs a chain: model .* has 2 inputs and 1 outputs"),
        (lambda: functional(lambda x: [layers.Dense(4)(x), layers.Dense(3)(x)]), "has 1 inputs and 2 outputs"),
        (lambda: functional(lambda x: layers.GRU(4, return_state=True, name="gru")(x)[0], (5, 6)), "'gru' has more than one"),
        (lambda: stack(modulate(dense_chain())), "is modulated already: it has an ErrorModulation layer 'a_modulation'"),
        (lambda: stack(layers.ReLU()), "no parametric layer .* in model 'stack'"),
        (lambda: keras.Sequential([layers.Dense(3)]), "`model` must be a built Keras model"),
        (Subclassed, "must be a Functional or Sequential model .* Received: 'subclassed', a Subclassed"),
        (lambda: stack(Subclassed()), "Received: 'subclassed', a Subclassed"),
        (lambda: stack(*(functional(layers.Dense(6, name="twin"), name=name) for name in "ab")), "twin"),
    ],
)
def test_model_that_is_no_chain(build, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        modulate(model)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"`layers` must be names of parametric layers of the model. Received: \['d', 'e'\]"):
        modulate(dense_chain(), layers=["c", "e", "d"])
    for make in (ErrorModulation, lambda **settings: modulate(dense_chain(), **settings)):
        for name, value in {"tolerance": 0.999, "max_scale": "2"}.items():
            with pytest.raises(ValueError, match=f"`{name}` must be a finite number, at least 1. Received: {name}="):
                make(**{name: value})
        with pytest.raises(ValueError, match=r"`reference` must be one of .* Received: reference='Anchor'"):
            make(reference="Anchor")


# What it is for


def test_kernel_gradients_of_a_deep_plain_network_are_of_one_magnitude_at_initialization():
    model = plain_cnn(56, (16, 16, 3), width=8, seed=0)
    ratios = []
    for net in (model, modulate(model)):
        found = gradients(net, batch(8, 16, 16, 3)[0], np.arange(8) % 10, tf.function)
        norms = [np.linalg.norm(found[layer.kernel.path]) for layer in model.layers if isinstance(layer, layers.Conv2D)]
        ratios.append(max(norms[1:]) / min(norms[1:]))
    assert ratios[0] > 1e3 and ratios[1] < 10
