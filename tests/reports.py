"""Reports of small models on one random batch."""

import keras
import numpy as np

import ortho_keras

LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def batch(shape, count=8, classes=10):
    rng = np.random.default_rng(1)
    return rng.normal(size=(count, *shape)).astype("float32"), rng.integers(classes, size=count)


def report_of(model, shape=(6,), loss=LOGITS, **kwargs):
    return ortho_keras.signal_report(model, *batch(shape, 16), loss, **kwargs)
