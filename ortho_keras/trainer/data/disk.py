"""Images of one split that stay on the disk: read, cropped and decoded when a step needs them."""

import hashlib
import itertools
import os

import numpy as np
import tensorflow as tf

from ortho_keras.method.errors import InputError
from ortho_keras.trainer.data.crops import decoded_crop
from ortho_keras.trainer.runtime import cpu_cores

SAMPLE = 512  # images from which the pixels' mean and variance are estimated


def shown(path):
    """Returns a path, or a part of it, as text; bytes that are not UTF-8 as `\\xff`."""
    return os.fsencode(path).decode(errors="backslashreplace")


class DiskSplit:
    """Images of one split that stay on the disk; the counterpart of `MemorySplit`.

    Args:
        source: `ImageFiles` or `ImageRecords`.
        image_size: int, pixels a side of the decoded crops.
        numbers: The images' numbers in the source, an int64 array; all of them by default.
    """

    parallel_batches = 2  # each batch is decoded by all cores

    def __init__(self, source, image_size, numbers=None):
        self.source = source
        self.image_shape = (image_size, image_size, 3)
        self.numbers = np.arange(len(source), dtype=np.int64) if numbers is None else numbers
        with tf.device("CPU:0"):
            self._numbers = tf.constant(self.numbers)  # outside of any graph, which takes it by reference
        self.skipped = {}  # by the names of images that could not be read or decoded so far

    def __len__(self):
        return len(self.numbers)

    @property
    def known_labels(self):
        """The labels that are known before an image is read."""
        return self.source.known_labels

    def take(self, indices):
        return DiskSplit(self.source, self.image_shape[0], self.numbers[indices])

    def digests(self):
        """Yields a SHA-256 for each image, by which changed data is recognized without decoding it."""
        return (hashlib.sha256(repr(self.source.identity(number)).encode()).digest() for number in self.numbers.tolist())

    def sample(self, count=SAMPLE):
        """Returns the central parts of `count` images that decode (uint8), and their labels: always the same ones.

        They are drawn from the whole split: the first images of a folder would be of one class.
        """
        order = tf.data.Dataset.from_tensor_slices(np.random.default_rng(SAMPLE).permutation(len(self)))
        one_by_one = order.batch(min(count, 64)).map(self.read).unbatch()
        found = list(one_by_one.filter(lambda image, label, decoded: decoded).take(count).as_numpy_iterator())
        if not found:
            raise InputError(f"{self.source.flag} must contain images that decode. Received: {len(self)} that do not")
        images, labels, _ = zip(*found)
        return np.clip(np.round(images), 0, 255).astype(np.uint8), np.array(labels)

    def read(self, indices, keys=None, replace=False):
        """Returns float32 images, labels, and whether each was decoded, of int64 `(n,)` indices; called in a graph.

        `keys`, int64 `(n, 2)`, are the seeds of random crops; `None`: the central parts. With `replace`, the next image that
        decodes takes the place of one that does not.
        """
        if not replace:
            return self._decoded(indices, keys)

        def decode_missing(images, labels, decoded, indices, tries):
            with tf.control_dependencies([tf.debugging.Assert(tries <= len(self), ["no image decodes"])]):
                rows = tf.where(~decoded)
            new = self._decoded(tf.gather_nd(indices, rows), None if keys is None else tf.gather_nd(keys, rows))
            values = [tf.tensor_scatter_nd_update(old, rows, part) for old, part in zip((images, labels, decoded), new)]
            return *values, (indices + 1) % len(self), tries + 1

        nothing = (tf.zeros(indices.shape + self.image_shape), tf.zeros_like(indices), tf.zeros_like(indices, tf.bool))
        return tf.while_loop(lambda _, __, decoded, *rest: ~tf.reduce_all(decoded), decode_missing, (*nothing, indices, 0))[:3]

    def _decoded(self, indices, keys):
        numbers, count = tf.gather(self._numbers, indices), tf.size(indices, tf.int64)

        def decode(row, number, handle, key=None):
            encoded, label = self.source.open(handle, number)
            return decoded_crop(encoded, key, self.image_shape[:2]), label, row

        slices = (tf.range(count), numbers, self.source.handles(numbers), *([] if keys is None else [keys]))
        one_by_one = tf.data.Dataset.from_tensor_slices(slices)
        good = one_by_one.map(decode, num_parallel_calls=cpu_cores(), deterministic=True).ignore_errors()
        # `get_single_element` needs one element: with an extra row, -1, there is one also where nothing was decoded.
        extra = tf.data.Dataset.from_tensors((tf.zeros(self.image_shape), np.int64(0), np.int64(-1)))
        images, labels, rows = good.concatenate(extra).batch(count + 1).get_single_element()
        values = (images, labels, tf.ones_like(rows))
        images, labels, decoded = (tf.math.unsorted_segment_sum(value, rows, count) for value in values)  # drops row -1
        decoded = decoded > 0
        tf.numpy_function(self._note, [tf.boolean_mask(numbers, ~decoded)], [])
        return [tf.ensure_shape(value, indices.shape + value.shape[1:]) for value in (images, labels, decoded)]

    def _note(self, numbers):
        self.skipped |= dict.fromkeys(map(self.source.name, numbers), True)


class ImageFiles:
    """Image files with their labels, two lists; `flag` names the data in messages, and `root` is left out of the names."""

    def __init__(self, flag, root, paths, labels):
        self.flag, self.root, self.paths, self.known_labels = flag, root, [*map(os.fsencode, paths)], np.array(labels)
        with tf.device("CPU:0"):
            self._paths, self._labels = tf.constant(self.paths, tf.string), tf.constant(self.known_labels, tf.int64)

    def __len__(self):
        return len(self.paths)

    def handles(self, numbers):  # what `open` needs of each image
        return tf.gather(self._paths, numbers)

    def open(self, handle, number):
        return tf.io.read_file(handle), tf.gather(self._labels, number)

    def name(self, number):
        return shown(self.paths[number].removeprefix(os.fsencode(self.root) + b"/"))

    def identity(self, number):
        path = self.paths[number]
        return self.name(number), os.path.exists(path) and os.path.getsize(path), int(self.known_labels[number])


class ImageRecords:
    """Encoded images in a TFDS split's TFRecord files, with the interface of `ImageFiles`; `features` are the set's."""

    def __init__(self, flag, files, features):
        self.flag, self.files, self.features = flag, [str(path) for path in files], features
        places = itertools.chain.from_iterable(map(self._record_places, range(len(self.files))))
        self.places = np.fromiter(places, np.dtype((np.int64, 4)))  # file, offset, length, checksum of the data
        first = self.handles(np.arange(min(1, len(self)), dtype=np.int64))  # others are read when they are needed
        self.known_labels = np.array([self._example(handle)["label"] for handle in first])

    def __len__(self):
        return len(self.places)

    def handles(self, numbers):
        return tf.ensure_shape(tf.numpy_function(self._read, [numbers], tf.string), (None,))

    def open(self, handle, number):
        example = self._example(handle)
        with tf.control_dependencies([tf.debugging.assert_non_negative(example["label"])]):  # -1: an image without a label
            return tf.identity(example["image"]), example["label"]

    def name(self, number):
        file, offset, *_ = self.places[number]
        return f"{os.path.basename(self.files[file])}, record at byte {offset}"

    def identity(self, number):
        return self.places[number, 2:].tolist()

    def _example(self, handle):
        import tensorflow_datasets as tfds

        return self.features.deserialize_example(handle, decoders={"image": tfds.decode.SkipDecoding()})

    def _read(self, numbers):
        records = []
        for file, offset, length, _ in self.places[numbers]:
            with open(self.files[file], "rb", buffering=0) as opened:
                opened.seek(offset)
                records.append(opened.read(length))
        return np.array(records, object)

    def _record_places(self, number):
        """A record has its length (8 bytes), a checksum (4), the data, and a checksum (4)."""
        path, at = self.files[number], 0
        size = os.path.getsize(path)
        with open(path, "rb", buffering=0) as opened:
            while at < size:
                opened.seek(at)
                length = int.from_bytes(opened.read(8), "little")
                end = at + length + 16
                if end > size:
                    received = f"{path}, of {size} bytes, whose last record ends at {end}"
                    raise InputError(f"{self.flag} must be complete. Received: {received}")
                opened.seek(end - 4)
                yield number, at + 12, length, int.from_bytes(opened.read(4), "little")
                at = end
