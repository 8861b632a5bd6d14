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
            size = self.image_shape[:2]
            crops = tf.map_fn(lambda pair: resized_crop(*pair, size), (images, keys), fn_output_signature=tf.float32)
            images = tf.ensure_shape(crops, images.shape)
        return tf.cast(images, tf.float32), labels, tf.ones_like(labels, tf.bool)

    @functools.cached_property
    def _tensors(self):
        with tf.init_scope(), tf.device("CPU:0"):  # outside of any graph, which takes them by reference
            return tf.constant(self.images), tf.constant(self.labels)


def read_into_memory(examples, image_size, flag):
    """Returns a `MemorySplit` of pairs of a uint8 image and a label, resized to `image_size` unless that is 0."""
    images, labels = [], []
    for shape, group in itertools.groupby(examples, key=lambda pair: pair[0].shape):
        while pairs := list(itertools.islice(group, max(1, RESIZED_AT_ONCE // math.prod(shape)))):
            stack = np.stack([image for image, _ in pairs])
            if image_size and shape[:2] != (image_size, image_size):
                resized = tf.image.resize(stack, (image_size, image_size), antialias=True)
                stack = np.clip(np.round(resized), 0, 255).astype(np.uint8)
            images.append(stack)
            labels.extend(int(label) for _, label in pairs)
    shapes = sorted({stack.shape[1:] for stack in images})
    if len(shapes) != 1:
        raise InputError(
            f"{flag} must have images, and those of one size unless --image_size is given. Received: the shapes {shapes[:3]}"
        )
    return MemorySplit(np.concatenate(images), np.asarray(labels, np.int64))
