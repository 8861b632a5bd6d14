"""The penalty at some of the steps only, as in lazy regularization, where it costs as much as the images do."""

import math

import tensorflow as tf

from ortho_keras.method.kernels import layer_kernels, matrix_shape
from ortho_keras.method.regularizers import REGULARIZERS

MOST_ARITHMETIC = 0.05  # of a step's, that the penalty may take by itself
MOST_STEPS = 10  # from one penalty to the next, where the recipe does not say


def arithmetic_share(model, batch_size):
    """Returns the multiplications of an orthonormal penalty and its gradient, over those of the layers that have a kernel.

    For a kernel `(f_in, f_out)`, the penalty takes two matrix products of `f_in * f_out * min(f_in, f_out)` multiplications;
    forward pass and gradients take three of `f_in * f_out` at each position of the layer's output and for each image. Hence
    the penalty matters in wide networks with small images and small batches only.
    """
    penalty = layers = 0
    for layer in model.layers:
        for kernel in layer_kernels(layer):
            count, f_in, f_out = matrix_shape(kernel.variable.shape, kernel.layout, kernel.groups)
            penalty += 2 * count * f_in * f_out * min(f_in, f_out)
            layers += 3 * count * f_in * f_out * batch_size * math.prod(layer.output.shape[1:-1])
    return penalty / layers


def penalty_interval(recipe, model):
    """Returns the number of steps from one penalty to the next: the recipe's, or as many as `arithmetic_share` demands."""
    if recipe.penalty_every or recipe.regularizer not in REGULARIZERS:
        return recipe.penalty_every or 1
    return min(max(round(arithmetic_share(model, recipe.batch_size) / MOST_ARITHMETIC), 1), MOST_STEPS)


def lazy_penalty(model, every):
    """Returns the sum of the model's penalties, in a training step: at each `every`-th, `every` times as large, otherwise 0.

    Reference: Karras et al. 2020, lazy regularization ([arXiv:1912.04958](https://arxiv.org/abs/1912.04958), appendix B).
    """

    def penalty():
        return every * tf.cast(sum(model.losses), tf.float32)

    return penalty() if every == 1 else tf.cond(tf.equal(model.optimizer.iterations % every, 0), penalty, lambda: 0.0)
