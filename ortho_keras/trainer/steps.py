"""One step of training and one of evaluation, under any strategy."""

import tensorflow as tf

TOP = 5  # of top-5 accuracy


def train_function(model, batch_size, label_smoothing, runtime):
    """A training step: `(images, labels, request)` to sums `[smoothed, cross-entropy, correct, penalty, request]`."""
    optimizer, replicas, strategy = model.optimizer, runtime.replicas, runtime.strategy

    def step(images, labels, request):
        with tf.GradientTape() as tape:
            crossentropy, correct, smoothed = scores(labels, model(images, training=True), label_smoothing)
            total = tf.reduce_sum(smoothed)
            penalty = tf.cast(sum(model.losses), tf.float32) / replicas  # each replica has the whole penalty
            loss = optimizer.scale_loss(total / batch_size + penalty)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)  # sums the gradients over replicas
        return tf.stack([total, tf.reduce_sum(crossentropy), tf.reduce_sum(correct), penalty, request])

    if runtime.jit_compile:
        step = tf.function(step, jit_compile=True)

    @tf.function
    def train(images, labels, request):
        return strategy.reduce("SUM", strategy.run(step, args=(images, labels, request)), axis=None)

    return lambda images, labels, request: train(images, labels, tf.constant(request, tf.float32))


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
