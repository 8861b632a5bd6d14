"""The orthonormal penalty apart from the loss: a step of its own on the kernels, every few training steps."""

import math

import keras
import tensorflow as tf

from ortho_keras.method.kernels import model_kernels
from ortho_keras.method.live import steps_taken
from ortho_keras.method.regularizers import OrthonormalRegularizer


class OrthonormalDecay(keras.callbacks.Callback):
    """Moves every kernel towards orthonormal columns, decoupled from the loss and the optimizer: as AdamW's decay is to L2.

    After every `every` training steps, each trainable kernel W becomes

        W - 2 * factor * rate * steps * W (W^T W - I),

    the descent of `factor / 2 * ||W^T W - I||_F^2` by the optimizer's present learning rate, over the steps since the last
    time. The penalty is not in the loss, so its gradient is not in the optimizer's momentum, nor divided by Adam's second
    moments, nor paid for at each step.

    It is stable at any factor and rate: the step is cut to what leaves each singular value no further from 1 than it was. At
    its largest it is the Newton-Schulz step `W - W (W^T W - I) / 2`, which makes a nearly orthonormal kernel orthonormal.

    Kernels read as by `orthonormalize`: all convolution, dense and einsum kernels of the model, by their layers' layouts. Give
    them no `OrthonormalRegularizer` beside it, or both act.

    Args:
        factor: float, at least 0. The strength; with the momentum m of SGD, `factor / (1 - m)` does in the long run what
            the penalty does with `factor`.
        every: int, at least 1. Training steps from one time to the next. What remains at the end of training is made up for.

    Raises:
        ValueError: If an argument is outside its range; in training, if the model has no trainable kernel.

    Example:

    >>> model.fit(x, y, callbacks=[OrthonormalDecay(1e-3, every=10)])

    Reference:
        The penalty: Xie, Xiong, Pu 2017, Eq. 3 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)). The decoupling is ours,
        after Loshchilov and Hutter 2019 ([arXiv:1711.05101](https://arxiv.org/abs/1711.05101)).
    """

    def __init__(self, factor=1e-3, every=10):
        super().__init__()
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
            raise ValueError(f"`factor` must be a finite number, at least 0. Received: factor={factor!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"`every` must be an integer, at least 1. Received: every={every!r}")
        self.factor = float(factor)
        self.every = every

    def on_train_begin(self, logs=None):
        self._last = None
        self._move = _mover(self.model) if self.model.built else None

    def on_train_batch_begin(self, batch, logs=None):
        if self._last is None:
            self._last = steps_taken(self.model)  # not before: another callback's `on_train_begin` may bring steps back

    def on_train_batch_end(self, batch, logs=None):
        if steps_taken(self.model) - self._last >= self.every:
            self._catch_up()

    def on_train_end(self, logs=None):
        if self._last is not None:
            self._catch_up()

    def _catch_up(self):
        steps, self._last = steps_taken(self.model) - self._last, steps_taken(self.model)
        if steps:
            self._move = self._move or _mover(self.model)
            rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
            self._move(tf.constant(4 * self.factor * rate * steps, tf.float32))

    def __deepcopy__(self, memo):
        return type(self)(self.factor, self.every)


def _mover(model):
    """A compiled function of the share of a Newton-Schulz step that moves all trainable kernels of the model."""
    trained = {id(variable) for variable in model.trainable_variables}
    found = [
        (kernel.variable, OrthonormalRegularizer(layout=kernel.layout, groups=kernel.groups))
        for kernel in model_kernels(model)
        if id(kernel.variable) in trained
    ]
    if not found:
        raise ValueError(f"OrthonormalDecay found no trainable kernel (convolution, dense or einsum) in model {model.name!r}")

    def move(share):
        for kernel, regularizer in found:
            value = tf.convert_to_tensor(kernel)
            with tf.GradientTape() as tape:
                tape.watch(value)
                penalty = regularizer.penalty(value)  # 1 / 2 * ||D||^2 with D = W^T W - I; its gradient is 2 W D
            # A singular value s becomes s (1 - share / 2 * (s^2 - 1)): at least s / 2 where share * ||D|| is at most 1.
            cut = tf.minimum(tf.minimum(tf.cast(share, penalty.dtype), 1), tf.math.rsqrt(2 * penalty))
            value -= tf.cast(cut / 4, value.dtype) * tape.gradient(penalty, value)
            kernel.assign(value if kernel.constraint is None else kernel.constraint(value))

    strategy = model.distribute_strategy
    return tf.function(lambda share: strategy.run(move, args=(share,)))
