"""Images of one split, held in memory as arrays."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import tensorflow as tf

from ortho_keras.method.errors import InputError
from ortho_keras.trainer.data.crops import resized_crop

RESIZED_AT_ONCE = 1 << 24  # bytes of images


@dataclasses.dataclass(frozen=True)
class MemorySplit:
    """Images of one split as arrays: uint8 `(n, height, width, channels)`, and int64 labels `(n,)`."""

    images: np.ndarray
    labels: np.ndarray
    skipped = ()  # all images in memory were decoded
    parallel_batches = tf.data.AUTOTUNE

    def __len__(self):
        return len(self.labels)

    @property
    def image_shape(self):
        return self.images.shape[1:]

    def sample(self, count=None):
        """Returns the first `count` images and their labels; all of them by default."""
        return self.images[:count], self.labels[:count]

    def take(self, indices):
        return MemorySplit(self.images[indices], self.labels[indices])

    def read(self, indices, keys=None, replace=False):
        """Returns float32 images, labels, and that each was decoded; the arguments are those of `DiskSplit.read`."""
        images, labels = (tf.gather(values, indices) for values in self._tensors)
        if keys is not None:
            shape, signature = images.shape, tf.TensorSpec(self.image_shape)
            images = tf.map_fn(lambda pair: resized_crop(*pair, shape[1:3]), (images, keys), fn_output_signature=signature)
        return tf.cast(images, tf.float32), labels, tf.ones_like(labels, tf.bool)

    @functools.cached_property
    def _tensors(self):
        with tf.init_scope(), tf.device("CPU:0"):  # outside of any graph, which takes them by reference
            return tf.constant(self.images), tf.constant(self.labels)


def read_into_memory(examples, image_size, flag):
    """Returns `{split: MemorySplit}` of `{split: pairs of a uint8 image and a label}`, resized unless `image_size` is 0."""
    stacks = {split: list(_stacks(pairs, image_size)) for split, pairs in examples.items()}
    shapes = sorted({images.shape[1:] for found in stacks.values() for images, _ in found})
    if len(shapes) > 1:
        raise InputError(f"{flag} must have images of one size, or --image_size must be given. Received: {shapes[:4]}")
    empty = [split for split, found in stacks.items() if not found]
    if empty:
        raise InputError(f"{flag} must have images in each split. Received: none in {', '.join(empty)}")
    return {split: MemorySplit(*map(np.concatenate, zip(*found))) for split, found in stacks.items()}


def _stacks(pairs, image_size):
    """Arrays of images and of labels: one by one, small images would take longer to pass on than to resize."""
    for shape, group in itertools.groupby(pairs, key=lambda pair: pair[0].shape):
        while found := list(itertools.islice(group, max(1, RESIZED_AT_ONCE // math.prod(shape)))):
            images, labels = map(np.stack, zip(*found))
            if image_size and shape[:2] != (image_size, image_size):
                resized = tf.image.resize(images, (image_size, image_size), antialias=True)
                images = np.clip(np.round(resized), 0, 255).astype(np.uint8)
            yield images, labels.astype(np.int64)
