"""Training steps and a step of evaluation, under any strategy."""

import keras
import tensorflow as tf

from ortho_keras.trainer.penalty import lazy_penalty

TOP = 5  # of top-5 accuracy
CALL_SECONDS = 0.25  # that a call with several steps takes, about; a run stops within the next one
MOST_STEPS = 1024  # of a call


class StepsPerCall:
    """How many training steps the next call of `train_function` takes.

    They are as many as take a quarter of a second, and no more than any callback waits for. A callback of ours says how many
    those are (`steps_to_due`); any other that is called at each step gets calls of one step. All workers must take the same
    number: the chief's wish, which comes to them with the sums of the call before.

    Attributes:
        steps: int, the number.
        calls: int, the calls so far.
        waiting: List of the callbacks that are called at each step.
    """

    def __init__(self, callbacks, runtime):
        self._runtime, self._callbacks = runtime, [callback for callback in callbacks if hasattr(callback, "steps_to_due")]
        self.waiting = [callback for callback in callbacks if callback not in self._callbacks and _is_called_at_steps(callback)]
        self.steps, self.calls, self._seconds = 1, 0, 0.0

    def wish(self, step):
        """Returns the number for the call that begins after `step` training steps; on workers but the chief 0."""
        if self.calls < 2 or self.waiting:  # the first call traces the graph
            steps = 1
        else:
            due = (callback.steps_to_due(step) for callback in self._callbacks)
            steps = max(1, min(int(CALL_SECONDS / self._seconds), MOST_STEPS, *due))
        return steps * self._runtime.is_chief

    def update(self, seconds, agreed):
        """Sets `steps` from the sum of wishes over replicas, and takes note of the seconds that each step took."""
        self.steps = round(agreed / self._runtime.local_replicas)
        self.calls, self._seconds = self.calls + 1, seconds


def _is_called_at_steps(callback):
    hooks = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")
    own = (getattr(getattr(callback, hook), "__func__", None) for hook in hooks)  # `None`: LambdaCallback's
    return any(one is not getattr(keras.callbacks.Callback, hook) for one, hook in zip(own, hooks))


def train_function(model, batch_size, label_smoothing, runtime, penalty_every=1):
    """Training steps in one call of a graph: `(batches, count, request, wish)` to sums over replicas, float32 `(count, 6)`.

    `batches` is an iterator. A row is a step's `[smoothed, cross-entropy, correct, penalty, request, wish]`; the last two are
    this worker's numbers, which the steps bring to all workers. `penalty_every` is that of `lazy_penalty`.
    """
    optimizer, replicas, strategy = model.optimizer, runtime.replicas, runtime.strategy

    def step(images, labels, *numbers):
        with tf.GradientTape() as tape:
            crossentropy, correct, smoothed = scores(labels, model(images, training=True), label_smoothing)
            total = tf.reduce_sum(smoothed)
            penalty = lazy_penalty(model, penalty_every) / replicas  # each replica has the whole penalty
            loss = optimizer.scale_loss(total / batch_size + penalty)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)  # sums the gradients over replicas
        return tf.stack([total, tf.reduce_sum(crossentropy), tf.reduce_sum(correct), penalty, *numbers])

    if runtime.jit_compile:
        step = tf.function(step, jit_compile=True)

    @tf.function
    def train(batches, count, *numbers):
        rows = tf.TensorArray(tf.float32, count, element_shape=(6,))
        for index in tf.range(count):
            sums = strategy.reduce("SUM", strategy.run(step, args=(*next(batches), *numbers)), axis=None)
            rows = rows.write(index, sums)
        return rows.stack()

    return lambda batches, count, *numbers: train(batches, tf.constant(count), *(tf.constant(n, tf.float32) for n in numbers))


def score_function(model, runtime, mirrored=False, confusion=False):
    """An evaluation step from `(images, labels, weights)` to sums over replicas `[cross-entropy, correct, in top 5, weight]`.

    With `confusion` the confusion matrix follows, row by row: a row for each true class, a column for each predicted one. With
    `mirrored` there is one more at the end, correct by the mean of the logits of each image and of its mirror image (left to
    right), as Krizhevsky, Sutskever and Hinton 2012 average over reflections.
    """

    def step(images, labels, weights):
        logits = tf.cast(model(images, training=False), tf.float32)
        crossentropy, correct, _ = scores(labels, logits)
        among = tf.cast(tf.math.in_top_k(labels, logits, min(TOP, logits.shape[-1])), tf.float32)
        sums = [tf.stack([tf.reduce_sum(weights * one) for one in (crossentropy, correct, among, tf.ones_like(weights))])]
        if confusion:
            matrix = tf.math.confusion_matrix(labels, tf.argmax(logits, -1), logits.shape[-1], weights, tf.float32)
            sums.append(tf.reshape(matrix, (-1,)))
        if mirrored:
            logits += tf.cast(model(tf.reverse(images, [2]), training=False), tf.float32)
            sums.append([tf.reduce_sum(weights * scores(labels, logits)[1])])
        return tf.concat(sums, 0)

    @tf.function(reduce_retracing=True)
    def score(images, labels, weights):
        return runtime.strategy.reduce("SUM", runtime.strategy.run(step, args=(images, labels, weights)), axis=None)

    return score


def scores(labels, logits, label_smoothing=0.0):
    """Each image's cross-entropy, correctness and cross-entropy against smoothed labels: three float32 tensors `(batch,)`."""
    logits = tf.cast(logits, tf.float32)
    crossentropy = smoothed = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    if label_smoothing:
        over_all = -tf.reduce_mean(tf.nn.log_softmax(logits), -1)
        smoothed = (1 - label_smoothing) * crossentropy + label_smoothing * over_all
    return crossentropy, tf.cast(tf.equal(tf.argmax(logits, -1), labels), tf.float32), smoothed
