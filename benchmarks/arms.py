"""What the benchmarks compare: nets, and the penalties of others written from their papers' formulas."""

import keras
import tensorflow as tf
from runs import ROOT  # noqa: F401  (makes the package importable)

from ortho_keras import (
    ErrorModulation,
    FusedBatchNormalization,
    OrthonormalDecay,
    OrthonormalRegularizer,
    ShiftedReLU,
    modulate,
    plain_cnn,
    plain_imagenet,
)
from ortho_keras.method.kernels import as_matrices, at_least_float32, gram_deviations, matrix_shape, model_kernels
from ortho_keras.method.regularizers import REGULARIZERS, KernelRegularizer
from ortho_keras.trainer.penalty import lazy_penalty

SEED = 0


class Maximum(ShiftedReLU):
    """The same values with TensorFlow's own gradient."""

    def call(self, inputs):
        return tf.maximum(inputs, tf.cast(-self.shift, inputs.dtype))


class SoftOrthogonality(KernelRegularizer):
    """`factor * ||W^T W - I||^2` as it is commonly written, differentiated by TensorFlow (Bansal et al. 2018)."""

    def penalty(self, kernel):
        matrix = tf.reshape(kernel, (-1, kernel.shape[-1]))
        return tf.reduce_sum(tf.square(tf.matmul(matrix, matrix, transpose_a=True) - tf.eye(matrix.shape[-1])))


class KerasOrthogonal(keras.regularizers.OrthogonalRegularizer):
    """Keras's, on the kernel as a matrix: it takes no other rank. The sum of the absolute cosines between columns."""

    def __call__(self, x):
        return super().__call__(tf.reshape(x, (-1, x.shape[-1])))


class SingularValues(KernelRegularizer):
    """The squares of the singular values' distances to 1, by a decomposition of every kernel (after Jia et al. 2017)."""

    def penalty(self, kernel):
        matrices = as_matrices(at_least_float32(kernel), self.layout, self.groups)
        return tf.reduce_sum(tf.square(tf.linalg.svd(matrices, compute_uv=False) - 1))


class StraightModulation(ErrorModulation):
    """The rule as one would write it first: every moment in float64, and a selection between the error and its multiple."""

    def call(self, inputs, token=None):
        @tf.custom_gradient
        def modulated(inputs, token):
            def backward(error, above):
                moment = 2 * tf.nn.l2_loss(tf.cast(error, tf.float64)) / tf.cast(tf.size(error), tf.float64)
                scale, fires, down = self.decide(tf.cast(tf.sqrt(moment), tf.float32), above)
                return tf.where(fires, tf.cast(tf.cast(error, tf.float32) * scale, error.dtype), error), down

            return (tf.identity(inputs), tf.identity(token)), backward

        return modulated(inputs, tf.zeros(()) if token is None else token)


def with_layers(model, replaced):
    """The same model with other layers: `replaced` maps types to the types in their place."""

    def clone(layer):
        return replaced.get(type(layer), type(layer)).from_config(layer.get_config())

    return keras.models.clone_model(model, clone_function=clone)


def wide_net(input_shape):
    """A function from a regularizer to the plain net of 101 layers for photographs: kernels of up to 2,048 filters."""
    return lambda regularizer: plain_imagenet(101, input_shape, regularizer=regularizer, initializer="he_normal", seed=SEED)


def plain_net(depth, input_shape):
    """A function from a regularizer to a plain net, as the recipes start it."""
    options = {"initializer": "dirac", "relu_shift": 1.0, "seed": SEED}
    return lambda regularizer: plain_cnn(depth, input_shape, regularizer=regularizer, **options)


# Name -> a function from a factor to a regularizer. L2's is its half, as in factor / 2 * ||W||^2.
PENALTIES = {
    "L2": lambda factor: keras.regularizers.L2(factor / 2),
    **{kind.__name__: kind for kind in REGULARIZERS.values()},
    "soft orthogonality, as commonly written": SoftOrthogonality,
    "Keras's OrthogonalRegularizer": lambda factor: KerasOrthogonal(factor, "columns"),
    "singular values": SingularValues,
}


def penalty_arms(net, factor=1e-4):
    """Name -> a function that makes (model, callbacks of each step), L2 first."""
    arms = {name: lambda made=made: (net(made(factor)), []) for name, made in PENALTIES.items()}
    arms["OrthonormalDecay(every=1)"] = lambda: (net(None), [OrthonormalDecay(10 * factor, every=1)])
    return arms


def modulation_arms(net, factor=1e-4, forms=(False, True)):
    """L2, the penalty, and the penalty with modulation by each reference, as it is and as one would write it first: `forms`."""

    def modulated(reference, straight):
        model = modulate(net(OrthonormalRegularizer(factor)), reference=reference)
        return (with_layers(model, {ErrorModulation: StraightModulation}) if straight else model), []

    arms = {name: lambda made=PENALTIES[name]: (net(made(factor)), []) for name in ("L2", "OrthonormalRegularizer")}
    for reference in ("neighbour", "anchor"):
        for straight in forms:
            name = f"OrthonormalRegularizer and modulation by the {reference}{', straightforward' * straight}"
            arms[name] = lambda reference=reference, straight=straight: modulated(reference, straight)
    return arms


def layer_arms(net, factor=1e-4):
    """The nets' own layers against Keras's and TensorFlow's."""
    slow = {FusedBatchNormalization: keras.layers.BatchNormalization, ShiftedReLU: Maximum}
    return {
        "keras.layers.BatchNormalization, tf.maximum": lambda: (with_layers(net(OrthonormalRegularizer(factor)), slow), []),
        "FusedBatchNormalization, tf.maximum": lambda: (
            with_layers(net(OrthonormalRegularizer(factor)), {ShiftedReLU: Maximum}),
            [],
        ),
        "FusedBatchNormalization, ShiftedReLU": lambda: (net(OrthonormalRegularizer(factor)), []),
    }


ARMS = {
    "layers": layer_arms,
    "regularizers": penalty_arms,
    "modulation": modulation_arms,
    "method": lambda net: modulation_arms(net, forms=(False,)),
}


def training_step(model, callbacks=(), alone=False, every=1, jit_compile=False, rate=0.01):
    """A function of images and labels that trains `model` by one step and returns the loss; its `trace` only traces.

    `alone` trains the kernels by their penalty alone: nothing of the net is computed. `every` is that of `lazy_penalty`.
    """
    model.compile(keras.optimizers.SGD(rate, 0.9))
    optimizer = model.optimizer
    trained = [variable for variable in model.trainable_variables if len(variable.shape) > 1 or not alone]
    optimizer.build(trained)
    for callback in callbacks:
        callback.set_model(model)
        callback.on_train_begin()

    @tf.function(jit_compile=jit_compile)
    def compiled(images, labels):
        with tf.GradientTape() as tape:
            loss = 0.0
            if not alone:
                logits = model(images, training=True)
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
            loss += lazy_penalty(model, every)
        optimizer.apply(tape.gradient(loss, trained), trained)
        return loss

    def step(images, labels):
        for callback in callbacks:
            callback.on_train_batch_begin(0)
        loss = float(compiled(images, labels))
        for callback in callbacks:
            callback.on_train_batch_end(0)
        return loss

    step.trace = compiled.get_concrete_function
    return step


def residual(model):
    """The mean of `||W^T W - I||_F` over the kernels for which it can be 0."""
    norms = []
    for kernel in model_kernels(model):
        _, f_in, f_out = matrix_shape(kernel.variable.shape, kernel.layout, kernel.groups)
        if f_out <= f_in:
            (deviation,) = gram_deviations(kernel.variable, kernel.layout, kernel.groups)
            norms.append(float(tf.norm(deviation)))
    return sum(norms) / len(norms)
