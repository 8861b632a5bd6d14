"""Orthonormal decay: the penalty's gradient step, decoupled from the loss and the optimizer."""

import contextlib

import keras
from keras import ops

from ortho_keras.method import backend
from ortho_keras.method.checks import check_number
from ortho_keras.method.kernels import model_kernels
from ortho_keras.method.regularizers import find_regularizer
from ortho_keras.method.state import StepCounter


class OrthonormalDecay(keras.callbacks.Callback):
    """Moves every kernel towards orthonormal columns, decoupled from the loss and the optimizer, as AdamW decouples L2.

    After every `every` training steps, each trainable kernel W becomes

        W - 2 * factor * rate * steps * W (W^T W - I),

    a gradient step on `factor / 2 * ||W^T W - I||_F^2` with the optimizer's current learning rate, times the number of steps
    since the last update. Its gradient does not enter the optimizer's moments. Do not give the kernels a regularizer as well.

    The update is stable for any factor and learning rate: the step is limited, at most to the Newton-Schulz step
    `W - W (W^T W - I) / 2`, so that no singular value moves away from 1. With another `regularizer`, the update is
    `W - factor * rate * steps * gradient of its penalty`, without a limit.

    Args:
        factor: float, at least 0. The strength. With SGD's momentum m, `factor / (1 - m)` has in the long run the effect that
            the regularizer has with `factor`.
        every: int, at least 1. Training steps between two updates, which are at multiples of `every` of the optimizer's steps,
            and at the end of training.
        regularizer: See `orthonormalize`.

    Raises:
        ValueError: If an argument is none of the above; in training, if the model has no trainable kernel to update, trains by
            other optimizers than its own, or takes several steps per execution of which `every` is no multiple.

    Example:

    >>> model.fit(x, y, callbacks=[OrthonormalDecay(1e-3, every=10)])

    Reference:
        The penalty: Xie, Xiong, Pu 2017, Eq. 3 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)). The decoupling is ours,
        after Loshchilov and Hutter 2019 ([arXiv:1711.05101](https://arxiv.org/abs/1711.05101)).
    """

    def __init__(self, factor=1e-3, every=10, regularizer="orthonormal"):
        super().__init__()
        self.factor = check_number("factor", factor, least=0)
        self.every = check_number("every", every, least=1, integer=True)
        self.regularizer = find_regularizer(regularizer)
        self._finished = (None, 0)  # the optimizer of the last training that ended, and its steps

    def on_train_begin(self, logs=None):
        self._counter = None

    def on_train_batch_begin(self, batch, logs=None):
        if self._counter is None:  # not before: another callback's `on_train_begin` may restore a checkpoint
            self._counter = StepCounter(self.model)
            self._counter.check_multiple("every", self.every)
            steps, (optimizer, finished) = self._counter.steps, self._finished
            # A run that was interrupted after its last update makes up for the steps since then.
            self._last = finished if optimizer is self.model.optimizer and finished == steps else self._multiple(steps)
            self._update = self._make_update()
        self._counter.begin(batch)

    def on_train_batch_end(self, batch, logs=None):
        self._counter.end(batch)
        due = self._counter.reached(self._multiple(self._last) + self.every)
        model = self._counter.model  # on JAX, `self.model` would have Keras write the step's state back to all variables
        if model.optimizer is None or ((due or backend.NAME != "jax") and self._counter.idle):
            raise ValueError(
                "OrthonormalDecay needs the learning rate of the model's optimizer, and this model trains by others. "
                f"Received: model={model.name!r} with optimizer={model.optimizer!r}"
            )
        if due:
            self._catch_up()

    def steps_to_due(self, step):
        """Returns how many more steps a loop may take in one call, after `step` of them."""
        return self.every - step % self.every

    def on_train_end(self, logs=None):
        if self._counter:
            self._counter.ask()
            self._catch_up()
            self._finished = (self.model.optimizer, self._counter.steps)

    def _multiple(self, steps):
        return steps // self.every * self.every

    def _catch_up(self):
        steps = self._counter.steps - self._last
        if steps:
            self._last += steps
            rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
            self._update(ops.convert_to_tensor(self.factor * rate * steps, "float32"))

    def _make_update(self):
        """Returns a compiled function of a step size that moves all trainable kernels of the model."""
        trained = {id(variable) for variable in self.model.trainable_variables}
        found = []
        for kernel in model_kernels(self.model):
            if id(kernel.variable) in trained:
                with contextlib.suppress(ValueError):  # the regularizer is not defined for this kernel
                    found.append((kernel.variable, self.regularizer.for_kernel(1.0, kernel)))
        if not found:
            name = self.regularizer.__name__
            raise ValueError(f"`model` must have a trainable kernel for {name}. Received: model={self.model.name!r}")

        def update(step):
            for kernel, regularizer in found:
                penalty, gradient = backend.value_and_gradient(regularizer.penalty, kernel)
                size = ops.minimum(ops.cast(step, penalty.dtype), regularizer.largest_step(penalty))
                value = kernel.value - ops.cast(size, kernel.dtype) * gradient
                kernel.assign(value if kernel.constraint is None else kernel.constraint(value))

        return backend.compiled(self.model, update, [kernel for kernel, _ in found])

    def __deepcopy__(self, memo):
        return type(self)(self.factor, self.every, self.regularizer)
