"""A small model with kernels of every layout, and its penalty by the oracle."""

import keras
import numpy as np
import references
from keras import layers

FACTOR = 1e-2
EINSUM = (1, 2)  # the output axes of "abc,cde->abde"
# Kernel -> layout in `small_model`.
LAYOUTS = {
    "up/kernel": "transposed",
    "separable/depthwise_kernel": "depthwise",
    "separable/pointwise_kernel": "standard",
    "einsum/kernel": EINSUM,
    "classifier/kernel": "standard",
}


def small_model(kernel_regularizer=None, bias_regularizer=None):
    x = keras.Input((3, 4, 2))
    y = layers.Conv2DTranspose(5, (2, 3), name="up")(x)
    y = layers.SeparableConv2D(
        6,
        2,
        depth_multiplier=2,
        depthwise_regularizer=kernel_regularizer,
        pointwise_regularizer=kernel_regularizer,
        name="separable",
    )(y)
    y = layers.Reshape((-1, 6))(y)
    y = layers.EinsumDense("abc,cde->abde", (None, 4, 3), bias_axes="de", name="einsum")(y)
    y = layers.GlobalAveragePooling2D()(y)
    y = layers.Dense(7, kernel_regularizer=kernel_regularizer, bias_regularizer=bias_regularizer, name="classifier")(y)
    return keras.Model(x, y)


def weights(model):
    return {weight.path: weight for weight in model.weights}


def oracle(model, layouts, factor):
    found = weights(model)
    return sum(references.penalty_and_gradient(found[path].numpy(), layout, factor)[0] for path, layout in layouts.items())


def images(model, count=4):
    return np.random.default_rng(0).normal(size=(count, *model.input_shape[1:])).astype("float32")
