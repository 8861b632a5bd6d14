"""Small chains of layers, and the errors on their way down, for the tests of modulation."""

import functools

import keras
import numpy as np
import references
import tensorflow as tf
from keras import layers

from ortho_keras import ErrorModulation

RUNS = {"eager": lambda step: step, "graph": tf.function, "xla": functools.partial(tf.function, jit_compile=True)}
NAMES = ["dense1", "dense2", "dense3", "dense4", "dense5", "top"]


def mismatched_chain():
    """Errors that grow and shrink on the way down: dense3's far above the others, dense2's far below."""
    model = keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(16, activation="relu", name="dense1"),
            layers.Dense(12, activation="relu", name="dense2"),
            layers.Dense(16, activation="tanh", name="dense3"),
            layers.Dense(16, name="dense4"),
            layers.Dense(16, name="dense5"),
            layers.Dense(3, name="top"),
        ]
    )
    for name, gain in {"dense2": 6.0, "dense3": 0.02, "dense4": 8.0, "dense5": 1.2, "top": 1.5}.items():
        kernel = model.get_layer(name).kernel
        kernel.assign(gain * kernel)
    return model


def dense_chain(**kwargs):
    """a, b, c with tanh between; the errors of a and b are far above c's."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, activation="tanh", name="a"),
            layers.Dense(5, activation="tanh", name="b"),
            layers.Dense(3, name="c", kernel_initializer=keras.initializers.RandomNormal(stddev=9.0, seed=1)),
        ],
        **kwargs,
    )
    return model


def batch(*shape):
    rng = np.random.default_rng(0)
    return rng.normal(size=shape).astype("float32"), rng.integers(0, 3, shape[0])


def modulations(model):
    return [layer for layer in model.layers if isinstance(layer, ErrorModulation)]


def bits(tensor):
    array = np.asarray(tensor)
    return array.view(f"uint{8 * array.itemsize}")


def assert_same_bits(actual, expected):
    for one, other in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(bits(one), bits(other))


def gradients(model, x, y, run=RUNS["eager"]):
    return backward(model, x, y, run)[0]


def backward(model, x, y, run):
    """Returns {path: gradient} and, for each `ErrorModulation` of the model's graph, {name: (error above, error below)}."""
    variables = [variable.value for variable in model.trainable_variables]
    ends = [(layer.output[0], keras.tree.flatten(layer.input)[0]) for layer in modulations(model)]
    probe = keras.Model(model.input, [model.output, ends]) if ends else lambda x, training: (model(x, training=training), [])

    @run
    def step(x, y):
        with tf.GradientTape() as tape:
            logits, ends = probe(x, training=True)
            loss = mean_crossentropy(y, logits)
        return tape.gradient(loss, [variables, ends])

    found, errors = step(tf.constant(x), tf.constant(y))
    paths, names = (variable.path for variable in model.trainable_variables), (layer.name for layer in modulations(model))
    return dict(zip(paths, found)), dict(zip(names, errors))


def descend(rules, errors, run=RUNS["eager"]):
    """Gives each of a ladder of `ErrorModulation`s an error of its own, topmost first, and returns what comes out below."""
    rules, errors = rules[::-1], [tf.convert_to_tensor(error) for error in errors[::-1]]

    @run
    def step(errors):
        inputs = [tf.zeros_like(error) for error in errors]
        outputs, token = [], None
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            for rule, x in zip(rules, inputs):
                y, token = rule(x, token)
                outputs.append(y)
        return tape.gradient(outputs, inputs, output_gradients=errors)

    return step(errors)[::-1]


def root_mean_square(tensor):
    return np.sqrt(np.mean(np.asarray(tensor).astype(np.float64) ** 2))


def modulated_gradients(model, x, y, names, tolerance, max_scale, reference):
    """Kernel gradients under the rule, by hand: one layer's vector-Jacobian product at a time, top to bottom, q in float64.

    `model` is a chain without modulation, `names` its modulated layers. Returns ({kernel path: gradient}, {name: scale}).
    """
    chain = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    activations = [tf.convert_to_tensor(x)]
    for layer in chain:
        activations.append(call(layer, activations[-1]))
    with tf.GradientTape() as tape:
        tape.watch(activations[-1])
        loss = mean_crossentropy(y, activations[-1])
    error = tape.gradient(loss, activations[-1])
    above, gradients, scales = None, {}, {}
    for layer, inputs in zip(reversed(chain), reversed(activations[:-1])):
        if layer.name in names:
            own = np.sqrt(np.mean(np.asarray(error, np.float64) ** 2))
            scale, above = references.scale_and_reference(own, above, tolerance, max_scale, reference)
            scales[layer.name] = scale
            error = tf.cast(np.asarray(error, np.float64) * scale, error.dtype)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = call(layer, inputs)
        variables = [v.value for v in layer.trainable_variables]
        down, own_gradients = tape.gradient(outputs, (inputs, variables), output_gradients=error)
        gradients |= {v.path: np.asarray(g, np.float64) for v, g in zip(layer.trainable_variables, own_gradients)}
        error = down
    return gradients, scales


def call(layer, inputs):
    return layer(inputs, training=True) if isinstance(layer, keras.layers.BatchNormalization) else layer(inputs)


def mean_crossentropy(y, logits):
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, tf.cast(logits, tf.float32)))
