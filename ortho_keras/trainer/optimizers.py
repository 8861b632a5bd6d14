"""What a recipe trains by: the learning rate over a run, the Muon optimizer, and loss scaling over replicas."""

import math

import keras
import tensorflow as tf
from keras import ops

from ortho_keras.method.checks import check_number
from ortho_keras.method.kernels import as_kernel, as_matrices
from ortho_keras.method.regularizers import KernelRegularizer

EXCLUDED = ("bias", "embeddings")
DROPS = {"step": (1 / 2, 3 / 4), "thirds": (1 / 3, 2 / 3)}  # where the rate is divided by 10, as shares of the steps
SHAPES = (*DROPS, "cosine", "constant")
FLOAT16_EPSILON = 6e-5  # float16 rounds a smaller one to 0, or as coarsely as it does squared gradients


@keras.saving.register_keras_serializable(package="ortho_keras")
class LearningRate(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that is constant, drops twice, or falls by half a cosine, after a linear warm-up.

    Args:
        peak: float, the highest learning rate.
        total_steps: int, the run's length.
        shape: `"constant"`; `"step"`, divided by 10 at 1/2 and again at 3/4 of the steps, as He et al. 2016 and, by its
            figures, Xie et al. 2017 do over 64k steps; `"thirds"`, the same at 1/3 and 2/3, as they do on ImageNet (epochs 30
            and 60 of 90); `"cosine"`, down to 0 at the last step.
        warmup_steps: int. Over the optimizer's first steps a factor rises linearly to 1, by which the shape is multiplied.
        first_step: int. Steps of the run that another optimizer took before this one.

    Raises:
        ValueError: If `shape` is none of these.
    """

    def __init__(self, peak, total_steps, shape="step", warmup_steps=0, first_step=0):
        if shape not in SHAPES:
            raise ValueError(f"`shape` must be one of {SHAPES}. Received: shape={shape!r}")
        self.peak = peak
        self.total_steps = total_steps
        self.shape = shape
        self.warmup_steps = warmup_steps
        self.first_step = first_step

    def __call__(self, step):
        step = tf.cast(step, tf.float32)
        done = tf.minimum((step + self.first_step) / self.total_steps, 1.0)
        first, second = DROPS.get(self.shape, (math.inf, math.inf))
        share = tf.where(done < first, 1.0, tf.where(done < second, 0.1, 0.01))
        if self.shape == "cosine":
            share = 0.5 * (1 + tf.cos(math.pi * done))
        if self.warmup_steps:
            share *= tf.minimum((step + 1) / self.warmup_steps, 1.0)
        return self.peak * share

    def get_config(self):
        return dict(vars(self))


@keras.saving.register_keras_serializable(package="ortho_keras")
class Muon(keras.optimizers.Muon):
    """Muon for kernels of any rank: each step is the orthonormalized momentum.

    `keras.optimizers.Muon` applies Muon to kernels of rank 2, and Adam to convolutions. Here a kernel is read as a matrix W
    of shape `(f_in, f_out)`, or as several, by the layout and groups of its regularizer: `orthonormalize`, with a factor of 0
    too, gives each kernel one with the layout that fits its layer. A kernel without one is read in the standard layout, a
    Conv2D's `(kh, kw, cin, cout)` as `(kh * kw * cin, cout)`. With G the gradient of W,

        M = momentum * M + G
        W = W - learning_rate * orthonormal(G + momentum * M)

    where `orthonormal` sets all singular values to about 1 by five Newton-Schulz iterations. The size of a step therefore does
    not depend on the gradient's. With orthonormal kernels, `learning_rate` is the relative change of a kernel in one step.
    Variables of rank 0 and 1 (BatchNormalization's gamma and beta), and those that `exclude` lists, are trained by Adam at
    `vector_rate * learning_rate`.

    Args:
        learning_rate: float or schedule. Deeper nets need a smaller one: at 44 layers 0.01 was best on digits, 0.0035 on
            CIFAR-10; the default is Jordan et al.'s.
        momentum: float, at least 0 and below 1. Also Adam's `beta_1`.
        vector_rate: float, at least 0. Adam's learning rate, relative to `learning_rate`.
        beta_2: float, at least 0 and below 1. Adam's decay of squared gradients.
        epsilon: float, above 0. Adam's; at least 6e-5 is used where variables are float16.
        exclude: List or tuple of strings, whose variables Adam trains whatever their rank: names of variables or layers, or
            paths (`"block1/conv"`). Each must have a trainable variable, except `"bias"` and `"embeddings"`.

    Raises:
        ValueError: If an argument is outside its range, or, when the optimizer is built, no variable has a name in `exclude`.

    Reference:
        Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Not a part of Xie et al. 2017.
    """

    def __init__(
        self,
        learning_rate=0.02,
        momentum=0.9,
        vector_rate=1.0,
        beta_2=0.99,
        epsilon=1e-8,
        exclude=EXCLUDED,
        name=None,
        weight_decay=None,
        **kwargs,
    ):
        if not isinstance(exclude, (list, tuple)) or not all(isinstance(one, str) for one in exclude):
            raise ValueError(f"`exclude` must be a list or tuple of names. Received: exclude={exclude!r}")
        momentum = check_number("momentum", momentum, least=0, below=1)
        super().__init__(
            learning_rate=learning_rate,
            momentum=momentum,
            adam_beta_1=momentum,
            adam_beta_2=check_number("beta_2", beta_2, least=0, below=1),
            adam_lr_ratio=check_number("vector_rate", vector_rate, least=0),
            epsilon=check_number("epsilon", epsilon, above=0),
            weight_decay=weight_decay,
            adam_weight_decay=weight_decay,
            rms_rate=None,
            name=name,
            **kwargs,
        )
        self.exclude = tuple(exclude)

    def build(self, variables):
        """Creates the optimizer's variables: a momentum for each variable, then Adam's squared gradients."""
        if self.built:
            return
        for name in self.exclude:
            if name not in EXCLUDED and not any(_has_name(one, name) for one in variables):
                expected = "`exclude` must list names or paths of trainable variables or of their layers"
                raise ValueError(f"{expected}. Received: exclude={self.exclude}, where no variable has the name {name!r}")
        keras.optimizers.Optimizer.build(self, variables)
        add = self.add_variable_from_reference
        self.momentums = [add(one, name="momentum") for one in variables]
        self.adam_velocities = [add(one, name="squares") if self._should_use_adamw(one) else None for one in variables]

    def update_step(self, gradient, variable, learning_rate):
        gradient = tf.convert_to_tensor(tf.cast(gradient, variable.dtype))  # an embedding's is sparse
        super().update_step(gradient, variable, ops.cast(learning_rate, variable.dtype))

    def _adamw_update_step(self, gradient, variable, learning_rate, m, v):
        """Adam, with epsilon added after the correction of the bias, as its Algorithm 1 does; Keras adds it before."""
        step = ops.cast(self.iterations + 1, variable.dtype)
        self.assign_add(m, (gradient - m) * (1 - self.adam_beta_1))
        self.assign_add(v, (ops.square(gradient) - v) * (1 - self.adam_beta_2))
        mean = m / (1 - ops.power(ops.cast(self.adam_beta_1, variable.dtype), step))
        square = v / (1 - ops.power(ops.cast(self.adam_beta_2, variable.dtype), step))
        epsilon = max(self.epsilon, FLOAT16_EPSILON) if variable.dtype == "float16" else self.epsilon
        self.assign_sub(variable, learning_rate * mean / (ops.sqrt(square) + epsilon))

    def _muon_update_step(self, gradient, variable, lr, m):
        self.assign_add(m, gradient + m * (self.momentum - 1))
        regularizer = self._trainable_variables[self._get_variable_index(variable)].regularizer
        known = isinstance(regularizer, KernelRegularizer)
        reading = (regularizer.layout, regularizer.groups) if known else ("standard", 1)
        self.assign_sub(variable, lr * self._orthonormal(gradient + self.momentum * m, *reading))

    @tf.function(autograph=False)  # the graph of a deep net then traces the iteration once for each shape of kernel
    def _orthonormal(self, x, layout, groups):
        kernel = ops.reshape(x, (-1, x.shape[-1])) if layout == "standard" else x  # of any rank
        matrices = as_matrices(kernel, layout, groups)
        matrices = matrices[0] if matrices.shape[0] == 1 else matrices  # a plain product is faster than a batch of one
        # Keras adds 1e-7 to the norm, and the squares of 1e-30 and 1e30 leave float32.
        matrices = ops.divide_no_nan(matrices, ops.max(ops.abs(matrices), axis=(-2, -1), keepdims=True))
        matrices = self.zeropower_via_newtonschulz5(matrices, self.ns_steps)
        return ops.reshape(as_kernel(matrices, kernel.shape, layout, groups), x.shape)

    def _should_use_adamw(self, variable):
        return len(variable.shape) < 2 or any(_has_name(variable, name) for name in self.exclude)

    def get_config(self):
        own = {"momentum": self.momentum, "vector_rate": self.adam_lr_ratio, "beta_2": self.adam_beta_2}
        return {**keras.optimizers.Optimizer.get_config(self), **own, "epsilon": self.epsilon, "exclude": self.exclude}


def _has_name(variable, name):
    """Whether a name is a variable's, its layer's, or a part of its path."""
    return f"/{name}/" in f"/{variable.path}/"


@keras.saving.register_keras_serializable(package="ortho_keras")
class AllReplicaLossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Keras's `LossScaleOptimizer`, which skips a step where *any* replica's gradient is not finite.

    Keras (3.15) checks the first replica alone: an inf on another one then reaches the weights of all, and the scale stays.
    Here the step is skipped on all replicas, and the scale is halved.

    Args:
        inner_optimizer: The `keras.optimizers.Optimizer` that takes the steps.
        initial_scale: float, the loss scale at the start.
        dynamic_growth_steps: int. After this many finite steps in a row the scale is doubled.

    Example:

    >>> keras.config.set_dtype_policy("mixed_float16")
    >>> model.compile(AllReplicaLossScaleOptimizer(keras.optimizers.SGD(0.1)), "mse")
    """

    def check_finite(self, grads):
        finite = super().check_finite(grads)
        replica = tf.distribute.get_replica_context()
        if replica is None or replica.num_replicas_in_sync == 1:
            return finite
        refused = replica.all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(tf.logical_not(finite), tf.float32))
        return tf.equal(refused, 0.0)
