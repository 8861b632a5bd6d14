"""Loss scaling for float16 that sees every replica's gradients."""

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="ortho_keras")
class AllReplicaLossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Keras's `LossScaleOptimizer`, which skips a step where *any* replica's gradient is not finite.

    Keras (3.15) looks at the first replica alone: an inf on another one then reaches the weights of all, and the scale stays.
    Here the replicas agree: the step is skipped on all of them and the scale is halved. The same as Keras's with one replica.

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
