"""Where Keras's backends differ: gradients written by hand, branches, settings that compiled steps read, float64, replicas.

What `keras.ops` does on every backend alike is not here. On JAX, variables are current only after `sync`, as `fit` keeps them
in its own state.
"""

import contextlib
import functools
import weakref

import keras
from keras import ops

NAME = keras.config.backend()
if NAME not in ("tensorflow", "jax", "torch"):
    raise ImportError(f"ortho_keras needs Keras's backend tensorflow, jax or torch. Received: KERAS_BACKEND={NAME!r}")


def require_tensorflow(what):
    """Raises `ImportError` in one line where another backend is used."""
    if NAME != "tensorflow":
        raise ImportError(f"{what} needs Keras's TensorFlow backend. Received: KERAS_BACKEND={NAME}")


if NAME == "tensorflow":
    import tensorflow as tf

    Trackable = tf.__internal__.tracking.Trackable  # what Keras's own layers and variables derive from
    custom_gradient = closed_form = tf.custom_gradient
    half_square = tf.nn.l2_loss

    class LiveScalar(Trackable):
        """A float that can be set between steps and is read by graphs that were traced before.

        A Python float would be frozen into a graph, and a Keras variable would be one of the model's weights. A SavedModel has
        its value. A checkpoint does not: it is a setting, such as the factor of `keras.regularizers.L2`.
        """

        def __init__(self, value):
            self._value = float(value)
            aggregation = tf.VariableAggregation.ONLY_FIRST_REPLICA
            with tf.init_scope():
                self._variable = tf.Variable(self._value, trainable=False, dtype=tf.float32, aggregation=aggregation)

        @property
        def value(self):
            return self._value

        @value.setter
        def value(self, value):
            self._value = float(value)
            self._variable.assign(self._value)

        def read(self):
            """Returns the current value, a float32 tensor of shape `()`; in a graph, the value at run time."""
            return self._variable.read_value()

        def _trackable_children(self, save_type="checkpoint", **kwargs):
            return {"variable": self._variable} if save_type == "savedmodel" else {}

        def __reduce__(self):  # for copies, too
            return LiveScalar, (self._value,)

    def either(condition, then, otherwise):
        """Returns the tensors of one of two functions; an accelerator runs both and selects, as a branch would have to wait."""
        if any(device.device_type != "CPU" for device in tf.config.list_logical_devices()):
            return tf.where(condition, then(), otherwise())
        return tf.cond(condition, then, otherwise)

    def one_node(function):
        """Makes a call one node of a graph, where thirty per layer cost memory, and time before the first step."""
        kept = weakref.WeakKeyDictionary()  # of each graph: a second derivative rewrites `tf.cond`, and others cannot use that

        def call(*args):
            if tf.executing_eagerly():
                return function(*args)
            graph = tf.compat.v1.get_default_graph()
            if graph not in kept:
                kept[graph] = tf.function(function, autograph=False, experimental_attributes={"_noinline": True})
            return kept[graph](*args)

        return call

    def gram(columns):
        return tf.matmul(columns, columns, transpose_a=True)

    def wide_root_mean_square(values):
        """In float64, where the squares are out of float32's range."""
        wide = tf.cast(values, tf.float64)
        return tf.cast(tf.sqrt(2 * tf.nn.l2_loss(wide) / tf.cast(tf.size(wide), tf.float64)), tf.float32)

    def mean_over_replicas(root):
        """Returns the root of the replicas' mean square; of one replica, the value itself."""
        replica = tf.distribute.get_replica_context()
        if replica is None or replica.num_replicas_in_sync == 1:
            return root
        moment = replica.all_reduce(tf.distribute.ReduceOp.MEAN, tf.square(tf.cast(root, tf.float64)))
        return tf.cast(tf.sqrt(moment), tf.float32)

    def normal_float64(shape, seed):
        return keras.random.normal(shape, dtype="float64", seed=seed)

    def value_and_gradient(function, value):
        value = tf.convert_to_tensor(value)
        with tf.GradientTape() as tape:
            tape.watch(value)
            result = function(value)
        return result, tape.gradient(result, value)

    def compiled(model, function, variables):
        """Returns `function` of one argument, which reads and sets these variables, as one graph on all replicas."""
        strategy = model.distribute_strategy
        return tf.function(lambda argument: strategy.run(function, args=(argument,)), reduce_retracing=True)

    def sums_over_replicas(model, shapes):
        """Returns variables of zeros to which each replica adds its own, and which are read as the total."""
        replica_local = {"synchronization": tf.VariableSynchronization.ON_READ, "aggregation": tf.VariableAggregation.SUM}
        with scope(model):
            return [tf.Variable(tf.zeros(shape, tf.float64), trainable=False, **replica_local) for shape in shapes]

    INPUT_ERRORS = (ValueError, TypeError, tf.errors.InvalidArgumentError)  # not a device that was lost

    def scope(model):
        return model.distribute_strategy.scope()

    def sync(model):
        pass

else:
    import numpy as np

    Trackable = object

    class LiveScalar:
        """A float that is a setting: see TensorFlow's. What JAX compiled has it as a constant, so a change discards that."""

        def __init__(self, value):
            self._value = float(value)

        @property
        def value(self):
            return self._value

        @value.setter
        def value(self, value):
            if float(value) != self._value:
                self._value = float(value)
                forget_compiled()

        def read(self):
            return ops.convert_to_tensor(self.value, "float32")

    def half_square(values):
        return ops.sum(ops.square(values)) / 2

    def one_node(function):
        return function

    def gram(columns):
        return ops.matmul(ops.swapaxes(columns, -1, -2), columns)

    def wide_root_mean_square(values):
        """In multiples of the largest value, as there may be no float64."""
        largest = ops.max(ops.abs(values))
        unit = ops.where(largest > 0, largest, 1.0)
        return unit * ops.sqrt(ops.mean(ops.square(values / unit)))

    def mean_over_replicas(root):
        return root  # a distributed step sees the whole batch

    def sums_over_replicas(model, shapes):
        return [keras.Variable(np.zeros(shape), dtype="float32", trainable=False) for shape in shapes]

    def scope(model):
        return contextlib.nullcontext()


if NAME == "jax":
    import jax

    def custom_gradient(function):
        """As TensorFlow's: `function` returns its outputs and a function from their gradients to those of its arguments."""

        @jax.custom_gradient
        def call(*args):
            outputs, backward = function(*args)

            def gradients(upstream):
                found = backward(*upstream) if isinstance(outputs, tuple) else backward(upstream)
                found = found if isinstance(found, tuple) else (found,)
                return tuple(ops.zeros_like(arg) if one is None else one for arg, one in zip(args, found))

            return outputs, gradients

        return call

    closed_form = custom_gradient

    def normal_float64(shape, seed):
        with jax.ensure_compile_time_eval():  # where Keras traces a model that `fit` builds
            return np.asarray(keras.random.normal(shape, dtype="float32", seed=seed), np.float64)

    def either(condition, then, otherwise):
        if jax.default_backend() != "cpu":
            return ops.where(condition, then(), otherwise())
        return jax.lax.cond(condition, then, otherwise)

    def value_and_gradient(function, value):
        return jax.value_and_grad(function)(ops.convert_to_tensor(value))

    INPUT_ERRORS = (ValueError, TypeError)

    def compiled(model, function, variables):
        @jax.jit
        def pure(values, argument):
            with keras.StatelessScope(zip(variables, values)) as scope:
                function(argument)
            return [scope.get_current_value(variable) for variable in variables]

        def call(argument):
            for variable, value in zip(variables, pure([variable.value for variable in variables], argument)):
                variable.assign(value)

        return call

    forget_compiled = jax.clear_caches

    def sync(model):
        """Gives the model's variables the values that they have in `fit`."""
        if getattr(model, "_jax_state", None):
            model.jax_state_sync()


if NAME == "torch":
    import torch

    def custom_gradient(function):
        """As TensorFlow's: `function` returns its outputs and a function from their gradients to those of its arguments."""

        return functools.partial(_WithGradient.apply, function)

    class _WithGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, function, *args):
            outputs, ctx.gradients = function(*args)
            return outputs

        @staticmethod
        def backward(ctx, *upstream):
            found = ctx.gradients(*upstream)
            return None, *(found if isinstance(found, tuple) else (found,))

    def normal_float64(shape, seed):
        return ops.convert_to_numpy(keras.random.normal(shape, dtype="float32", seed=seed)).astype(np.float64)

    def closed_form(function):
        """The value alone: the gradients of what a function keeps from its forward pass would lack a second derivative."""
        return lambda *args: function(*args)[0]

    def either(condition, then, otherwise):
        if condition.device.type != "cpu":
            return ops.where(condition, then(), otherwise())
        return then() if condition else otherwise()

    def value_and_gradient(function, value):
        value = ops.convert_to_tensor(value).detach().requires_grad_()
        with torch.enable_grad():
            result = function(value)
            (gradient,) = torch.autograd.grad(result, value)
        return result.detach(), gradient

    INPUT_ERRORS = (ValueError, TypeError, RuntimeError)

    def compiled(model, function, variables):
        return torch.no_grad()(function)

    def forget_compiled():
        pass

    def sync(model):
        pass
