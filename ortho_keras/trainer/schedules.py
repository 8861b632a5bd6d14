"""The learning rate over a run."""

import math

import keras
import tensorflow as tf

SHAPES = ("step", "thirds", "cosine", "constant")
DROPS = {"step": (1 / 2, 3 / 4), "thirds": (1 / 3, 2 / 3)}  # where the rate is divided by 10, as shares of the steps


@keras.saving.register_keras_serializable(package="ortho_keras")
class LearningRate(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly, then stays, drops twice, or falls by half a cosine.

    Args:
        peak: float, the highest learning rate.
        total_steps: int, the run's length.
        shape: `"constant"`; `"step"`, divided by 10 at 1/2 and again at 3/4 of the steps, as He et al. 2016 and, by its
            figures, Xie et al. 2017 do over 64k steps; `"thirds"`, the same at 1/3 and 2/3, as they do on ImageNet (epochs 30
            and 60 of 90); `"cosine"`, down to 0 at the last step.
        warmup_steps: int. Over the optimizer's first steps the rate rises from 0, and is multiplied with the shape.
        first_step: int. Steps of the run that came before the optimizer's first: another optimizer took them.

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
        if self.shape == "cosine":
            share = 0.5 * (1 + tf.cos(math.pi * done))
        elif self.shape in DROPS:
            first, second = DROPS[self.shape]
            share = tf.where(done < first, 1.0, tf.where(done < second, 0.1, 0.01))
        else:
            share = 1.0
        if self.warmup_steps:
            share *= tf.minimum((step + 1) / self.warmup_steps, 1.0)
        return self.peak * share

    def get_config(self):
        names = ("peak", "total_steps", "shape", "warmup_steps", "first_step")
        return {name: getattr(self, name) for name in names}
