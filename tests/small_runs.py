"""A small run on digits, and a callback that stops it."""

import dataclasses
import os
import signal

import keras

from ortho_keras.trainer.recipes import find_preset

RECIPE = dataclasses.replace(
    find_preset("digits").recipe,
    image_size=0,
    depth=8,
    width=4,
    epochs=4,
    batch_size=128,
    learning_rate=0.05,
    rate_depth=0,
    warmup_steps=0,
    bn_batches=2,
    modulation="anchor",
    evaluate_every=3,
)


def silent(line):
    pass


class StopAt(keras.callbacks.Callback):
    """Ends the run within a step's end: by a signal, which leaves a checkpoint at the next step, or hard, which leaves none."""

    def __init__(self, step, hard=False):
        super().__init__()
        self.step, self.hard = step, hard

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.step:
            if self.hard:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
