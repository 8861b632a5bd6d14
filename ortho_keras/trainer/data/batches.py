"""Batches of training and evaluation images as tf.data pipelines: each is a function of the seed and the step alone."""

import dataclasses

import numpy as np
import tensorflow as tf

CUTOUT_SEED = 1 << 62  # added to the seed of the crops, so that the squares are independent of them


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """What a run's training batches are: their size, order and augmentation.

    Args:
        batch_size: int.
        augment: `"none"`; `"crop"`, a window of the padded image; `"crop_flip"`, also mirrors half of the images;
            `"resized_crop"`, a random part of the image (Szegedy et al. 2015), resized, and half of them mirrored.
        seed: int, of the order and of the augmentation.
        padding: `"mean"` pads an image with `mean` before the crop, as He et al. 2016; `"symmetric"` mirrors its border.
        crop_border: int, pixels to pad by on each side; 0 for an eighth of each side (4 of 32, as He et al. 2016).
        cutout: int, pixels a side of a square filled with `mean` in each cropped image, its centre anywhere in the image
            (DeVries and Taylor 2017, arXiv 1708.04552); 0 for none.
        mean: Pixel value of each channel, or one for all.
    """

    batch_size: int
    augment: str = "none"
    seed: int = 0
    padding: str = "mean"
    crop_border: int = 0
    cutout: int = 0
    mean: np.ndarray | float = 0.0


def training_batches(split, settings, start=0, stop=None, replicas=1, own=(0,)):
    """Returns a `tf.data.Dataset` of the batches of training steps `start` to `stop`.

    Step s is a function of the seed and s alone: the order is a new permutation in each epoch (of `len(split) // batch_size`
    whole batches), and augmentation draws from the step's own seed. So a run that resumes at step s gets the batches that it
    would have got without the interruption. An image that cannot be decoded is replaced by the next one that can.

    Args:
        split: `MemorySplit` or `DiskSplit` of at least one batch.
        settings: `BatchSettings`.
        start: int, the first step.
        stop: int, the step after the last one, or `None` for an endless dataset.
        replicas: int, how many replicas share each batch; divides `batch_size`.
        own: The replicas, from 0, whose shares are returned, in turn, step by step. The shares of all replicas together are
            the batch that one replica would get.

    Returns:
        Dataset of `(images, labels)`: float32 `(share, height, width, channels)` of 0 to 255, int64 `(share,)`, where
        `share = batch_size / replicas`.
    """
    batch_size, seed = settings.batch_size, tf.constant(settings.seed, tf.int64)
    steps, shares = len(split) // batch_size, _shares(batch_size, replicas, own)

    def epoch_shares(epoch):
        # index_shuffle would need less memory, but uses only 8 bits of each part of its seed (TensorFlow 2.21).
        order = tf.random.experimental.stateless_shuffle(tf.range(len(split), dtype=tf.int64), tf.stack([seed, epoch]))
        batches = tf.reshape(order[: steps * batch_size], (steps, batch_size))
        numbers = tf.repeat(epoch * steps + tf.range(steps, dtype=tf.int64), len(own))
        indices = tf.reshape(tf.gather(batches, shares, axis=1), (-1, batch_size // replicas))
        dataset = tf.data.Dataset.from_tensor_slices((numbers, tf.tile(shares, (steps, 1)), indices))
        return dataset.skip(tf.maximum(start - epoch * steps, 0) * len(own))

    def batch(step, rows, indices):
        keys = tf.stack([tf.fill(rows.shape, seed), step * batch_size + rows], 1)
        images, labels, _ = split.read(indices, keys if settings.augment == "resized_crop" else None, replace=True)
        if settings.augment.startswith("crop"):
            images = _cropped(images, settings, tf.stack([seed, step]), rows)
        return images, labels

    epochs = tf.data.Dataset.range(start // steps, np.iinfo(np.int64).max)
    dataset = epochs.flat_map(epoch_shares).take(-1 if stop is None else (stop - start) * len(own))
    return _parallel(dataset, batch, split)


def evaluation_batches(split, batch_size, replicas=1, own=(0,)):
    """Returns a `tf.data.Dataset` of the whole split in order, in batches of one size, without augmentation.

    The arguments are those of `training_batches`. The elements are `(images, labels, weights)`; float32 weights are 1, and 0
    for images that could not be decoded and for those that fill up the last batch.
    """
    count = -(-len(split) // batch_size) * batch_size
    indices = np.arange(count).reshape(-1, batch_size)[:, _shares(batch_size, replicas, own)]

    def batch(indices):
        real = indices < len(split)
        images, labels, decoded = split.read(tf.where(real, indices, 0))
        return images, labels, tf.cast(real & decoded, tf.float32)

    return _parallel(tf.data.Dataset.from_tensor_slices(indices.reshape(-1, batch_size // replicas)), batch, split)


def _shares(batch_size, replicas, own):
    """Returns the rows of a batch that are each replica's of `own`, int64 `(len(own), share)`."""
    return np.arange(batch_size).reshape(replicas, -1)[list(own)]


def _parallel(dataset, function, split):
    calls = split.parallel_batches
    return dataset.map(function, num_parallel_calls=calls, deterministic=True).prefetch(calls)


def _cropped(images, settings, key, rows):
    """Crops, mirrors and cuts out, by uniform draws for the whole batch of a step, of which `rows` are used."""
    sizes = images.shape[1:3].as_list()
    pads = [settings.crop_border or max(1, size // 8) for size in sizes]
    margins = [[0, 0], *([pad, pad] for pad in pads), [0, 0]]
    mean, mode = (settings.mean, "constant") if settings.padding == "mean" else (0.0, settings.padding)
    padded = tf.pad(images - mean, margins, mode) + mean
    draws = tf.gather(tf.random.stateless_uniform((settings.batch_size, 3), key), rows)[..., tf.newaxis]
    top, left = (tf.cast(draws[:, i] * (2 * pads[i] + 1), tf.int32) + tf.range(sizes[i]) for i in (0, 1))
    if settings.augment == "crop_flip":
        left = tf.where(draws[:, 2] < 0.5, left, left[:, ::-1])
    cropped = tf.gather(tf.gather(padded, top, axis=1, batch_dims=1), left, axis=2, batch_dims=1)
    if settings.cutout:
        draws = tf.random.stateless_uniform((settings.batch_size, 2), tf.add(key, [CUTOUT_SEED, 0]))
        first = tf.cast(tf.gather(draws, rows) * sizes, tf.int32)[..., tf.newaxis] - settings.cutout // 2
        y, x = ((first[:, i] <= range(sizes[i])) & (range(sizes[i]) < first[:, i] + settings.cutout) for i in (0, 1))
        square = y[:, :, tf.newaxis, tf.newaxis] & x[:, tf.newaxis, :, tf.newaxis]
        cropped = tf.where(square, tf.cast(settings.mean, tf.float32), cropped)
    return tf.ensure_shape(cropped, images.shape)
