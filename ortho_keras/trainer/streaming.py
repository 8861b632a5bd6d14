"""Photographs that stay on the disk: read, cropped and decoded as the steps need them, each a function of the seed alone."""

import os
import threading

import numpy as np
import tensorflow as tf

from ortho_keras.method.errors import InputError
from ortho_keras.trainer.runtime import cpu_cores

# Random parts after Szegedy et al. 2015: a share of the area, and width over height. TensorFlow's sampling, which most ImageNet
# nets in it were trained with, takes the height uniformly, so that small parts are more frequent than with a uniform area.
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
CENTRE = 224 / 256  # evaluation: the central share of the shorter side, as by resizing it to 256 and cutting 224
SAMPLE = 512  # images whose pixels give mean and variance
MIRROR = (0, 1 << 62)  # tells the seed of this draw from that of the part
DECODED_AT = (1, 2, 4, 8)  # libjpeg decodes at the resolution over these
EXACT = "INTEGER_ACCURATE"  # what other readers of JPEG take; TensorFlow's default is several levels off
END_OF_JPEG = b"\xff\xd9"


class StreamedSplit:
    """Images of one split, by number; what `Split` is for data in memory.

    An image that cannot be read or decoded is skipped: in training the next one that can takes its place, in an evaluation it
    does not count. Which they were is in `skipped`.

    Args:
        source: `ImageFiles` or `ImageRecords`.
        image_size: int, pixels a side of what comes out.
        numbers: The images' numbers in the source, an int64 array; all of them by default.
    """

    def __init__(self, source, image_size, numbers=None):
        self.source = source
        self.image_size = image_size
        self.numbers = np.arange(len(source), dtype=np.int64) if numbers is None else np.asarray(numbers, np.int64)
        with tf.device("CPU:0"):
            self._numbers = tf.constant(self.numbers)  # a graph takes it in by reference
        self._skipped, self._lock = {}, threading.Lock()

    def __len__(self):
        return len(self.numbers)

    def take(self, indices):
        return StreamedSplit(self.source, self.image_size, self.numbers[indices])

    @property
    def image_shape(self):
        return (self.image_size, self.image_size, 3)

    @property
    def skipped(self):
        """Names of the images that did not decode so far."""
        with self._lock:
            return list(self._skipped)

    def sample(self, count=SAMPLE):
        """Returns the central parts of `count` images that decode, always the same ones, from all over the split.

        A folder's images are in the order of their classes: its first ones would be of one class.

        Returns:
            uint8 `(n, size, size, 3)`, and int64 labels `(n,)`.

        Raises:
            InputError: If none does.
        """
        batch = min(count, 64)
        found = [[], []]
        for images, labels, weights in self._mixed().evaluation_batches(batch):
            for part, values in zip(found, (images, labels)):
                part.append(values.numpy()[weights.numpy() > 0])
            if sum(map(len, found[1])) >= count:
                break
        images, labels = (np.concatenate(part)[:count] for part in found)
        if not len(labels):
            raise InputError(f"{self.source.flag} must hold images that decode. Received: {len(self)} that do not")
        return np.clip(np.round(images), 0, 255).astype(np.uint8), labels

    def _mixed(self):
        """The same images in another order; what does not decode is told by both."""
        mixed = self.take(np.random.default_rng(SAMPLE).permutation(len(self)))
        mixed._skipped, mixed._lock = self._skipped, self._lock
        return mixed

    def training_batches(self, batch_size, seed, start, stop, replicas, own):
        """See `ortho_keras.data.training_batches`; always random parts of the images, half of them mirrored."""
        steps, share, count = len(self) // batch_size, batch_size // replicas, len(own)

        def epoch_batches(epoch):
            """Step, replica and images' numbers of every share from `start` on."""
            key = tf.stack([tf.constant(seed, tf.int64), epoch])
            order = tf.random.experimental.stateless_shuffle(tf.range(len(self), dtype=tf.int64), key)
            shares = tf.reshape(order[: steps * batch_size], (steps, replicas, share))
            first = tf.maximum(start - epoch * steps, 0) * count
            turns = tf.range(first, steps * count, dtype=tf.int64)
            mine = tf.reshape(tf.gather(shares, own, axis=1), (steps * count, share))[first:]
            replica = tf.gather(tf.constant(own, tf.int64), turns % count)
            return tf.data.Dataset.from_tensor_slices((epoch * steps + turns // count, replica, mine))

        def batch(step, replica, indices):
            places = step * batch_size + replica * share + tf.range(share, dtype=tf.int64)
            keys = tf.stack([tf.fill((share,), tf.constant(seed, tf.int64)), places], 1)
            images, labels, found = self._decoded(indices, keys)

            def replaced(images, labels, found, indices, tries):
                indices = (indices + 1) % len(self)
                with tf.control_dependencies([tf.debugging.Assert(tries < len(self), ["no image decodes"])]):
                    places = tf.where(~found)
                new = [tf.gather_nd(values, places) for values in (indices, keys)]
                parts = self._decoded(*new)
                values = [tf.tensor_scatter_nd_update(*pair) for pair in zip((images, labels, found), [places] * 3, parts)]
                return *values, indices, tries + 1

            state = (images, labels, found, indices, 0)
            images, labels, *_ = tf.while_loop(lambda _, __, found, *rest: ~tf.reduce_all(found), replaced, state)
            return images, labels

        epochs = tf.data.Dataset.range(start // steps, np.iinfo(np.int64).max)
        shares = epochs.flat_map(epoch_batches)
        if stop is not None:
            shares = shares.take((stop - start) * count)
        return shares.map(batch, num_parallel_calls=2, deterministic=True).prefetch(2)

    def evaluation_batches(self, batch_size, replicas=1, own=(0,)):
        """See `ortho_keras.data.evaluation_batches`; central parts of the images. One that does not decode has weight 0."""
        share, count = batch_size // replicas, len(own)

        def batch(turn):
            start = turn // count * batch_size + tf.gather(tf.constant(own, tf.int64), turn % count) * share
            places = start + tf.range(share, dtype=tf.int64)
            real = places < len(self)
            indices = tf.boolean_mask(places, real)
            images, labels, found = self._decoded(indices, None)
            shape = tf.constant([share, *self.image_shape], tf.int64)
            rows = tf.where(real)
            return (
                tf.ensure_shape(tf.scatter_nd(rows, images, shape), (share, *self.image_shape)),
                tf.scatter_nd(rows, labels, shape[:1]),
                tf.scatter_nd(rows, tf.cast(found, tf.float32), shape[:1]),
            )

        turns = tf.data.Dataset.range(-(-len(self) // batch_size) * count)
        return turns.map(batch, num_parallel_calls=2, deterministic=True).prefetch(2)

    def _decoded(self, indices, keys):
        """Images, labels, and whether each was decoded, of images' indices in this split.

        With a `(n, 2)` seed for each a random part, mirrored or not; without the central part.
        """
        count = tf.size(indices, tf.int64)
        numbers = tf.gather(self._numbers, indices)
        seeds = tf.zeros((count, 2), tf.int64) if keys is None else keys

        def one(place, number, handle, key):
            encoded, label = self.source.open(handle, number)
            return place, _part(encoded, self.image_size, None if keys is None else key), label

        one_by_one = tf.data.Dataset.from_tensor_slices((tf.range(count), numbers, self.source.handles(numbers), seeds))
        good = one_by_one.map(one, num_parallel_calls=cpu_cores(), deterministic=True).ignore_errors()
        # `get_single_element` wants one: a last row ends the batch also where nothing was decoded.
        last = (count, tf.zeros(self.image_shape), tf.zeros((), tf.int64))
        good = good.concatenate(tf.data.Dataset.from_tensors(last)).batch(count + 1)
        places, images, labels = (values[:-1] for values in good.get_single_element())

        def spread():
            rows, found = places[:, tf.newaxis], tf.scatter_nd(places[:, tf.newaxis], tf.ones_like(places), [count]) > 0
            with tf.control_dependencies([tf.numpy_function(self._note, [tf.boolean_mask(numbers, ~found)], [])]):
                shape = tf.stack([count, *self.image_shape])
                return tf.scatter_nd(rows, images, shape), tf.scatter_nd(rows, labels, [count]), tf.identity(found)

        whole = tf.equal(tf.size(places, tf.int64), count)
        images, labels, found = tf.cond(whole, lambda: (images, labels, tf.ones_like(labels, tf.bool)), spread)
        length = indices.shape[0]
        return (
            tf.ensure_shape(images, (length, *self.image_shape)),
            tf.ensure_shape(labels, (length,)),
            tf.ensure_shape(found, (length,)),
        )

    def _note(self, numbers):
        with self._lock:
            self._skipped.update(dict.fromkeys(self.source.name(number) for number in numbers))


def _part(encoded, size, key):
    """A part of an encoded image, resized: random and perhaps mirrored by a seed `(2,)`, or central where it is `None`.

    What lies outside is not decoded, and no more of the resolution than is needed.
    """
    jpeg, ends = tf.io.is_jpeg(encoded), tf.equal(tf.strings.substr(encoded, -2, 2), END_OF_JPEG)

    def decoded_whole():
        # A JPEG file that was cut off would decode as far as the part goes; one with something behind its end is whole.
        held = tf.size(tf.strings.split(encoded, END_OF_JPEG)) > 1
        with tf.control_dependencies([tf.debugging.Assert(held | ~jpeg, ["a JPEG file without its end"])]):
            image = tf.io.decode_image(encoded, 3, expand_animations=False)
        top, left, height, width = tf.unstack(_window(tf.shape(image), key))
        return tf.image.resize(image[top : top + height, left : left + width], (size, size), antialias=True)

    image = tf.cond(jpeg & ends, lambda: _jpeg_part(encoded, size, key), decoded_whole)
    if key is not None:
        mirrored = tf.random.stateless_uniform((), tf.add(key, MIRROR)) < 0.5
        image = tf.cond(mirrored, lambda: tf.reverse(image, [1]), lambda: image)
    return tf.ensure_shape(image, (size, size, 3))


def _jpeg_part(encoded, size, key):
    """Decodes a part at the least resolution that has `size` pixels of it; the rest, a factor below 2, is bilinear."""
    shape = tf.io.extract_jpeg_shape(encoded)
    window = _window(shape, key)
    fraction = tf.reduce_sum(tf.cast(tf.reduce_min(window[2:]) >= [size * ratio for ratio in DECODED_AT[1:]], tf.int32))

    def at(ratio):
        """The window lies between the pixels of a reduced resolution: the values are taken at the very places."""
        begin = window[:2] // ratio
        extent = tf.minimum(-(-(window[:2] + window[2:]) // ratio), -(-shape[:2] // ratio)) - begin
        image = tf.io.decode_and_crop_jpeg(encoded, tf.concat([begin, extent], 0), 3, ratio, dct_method=EXACT)
        spacing = tf.cast(window[2:], tf.float32) / (size * ratio)
        first = tf.cast(window[:2], tf.float32) / ratio - tf.cast(begin, tf.float32) + (spacing - 1) / 2
        box = tf.stack([first, first + (size - 1) * spacing]) / tf.cast(tf.maximum(extent - 1, 1), tf.float32)
        return tf.image.crop_and_resize(image[tf.newaxis], tf.reshape(box, (1, 4)), [0], (size, size))[0]

    def whole():
        return tf.image.resize(tf.io.decode_and_crop_jpeg(encoded, window, 3, dct_method=EXACT), (size, size))

    return tf.switch_case(fraction, [whole, *(lambda ratio=ratio: at(ratio) for ratio in DECODED_AT[1:])])


def _window(shape, key):
    """The part of an image `(height, width, channels)`: `(top, left, height, width)`."""
    if key is None:
        side = tf.cast(tf.round(CENTRE * tf.cast(tf.reduce_min(shape[:2]), tf.float32)), tf.int32)
        side = tf.maximum(side, 1)
        return tf.stack([(shape[0] - side) // 2, (shape[1] - side) // 2, side, side])
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.zeros((1, 0, 4)),
        key,
        min_object_covered=0.0,
        aspect_ratio_range=ASPECT,
        area_range=AREA,
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], extent[:2]], 0)


class ImageFiles:
    """Image files with the labels of their folders.

    Args:
        flag: How messages name the data.
        root: Path that names in messages are relative to.
        paths: Paths of the files, a list.
        labels: Their classes, a list of ints.
    """

    def __init__(self, flag, root, paths, labels):
        self.flag = flag
        self.root = root
        self.paths = [str(path) for path in paths]
        with tf.device("CPU:0"):
            self._paths, self._labels = tf.constant(self.paths, tf.string), tf.constant(labels, tf.int64)

    def __len__(self):
        return len(self.paths)

    def handles(self, numbers):
        return tf.gather(self._paths, numbers)

    def open(self, handle, number):
        return tf.io.read_file(handle), tf.gather(self._labels, number)

    def name(self, number):
        return os.path.relpath(self.paths[number], self.root)


class ImageRecords:
    """Images of a TFDS set in TFRecord files, by the places of their records.

    A TFRecord is its length (8 bytes), a checksum of it (4), the data, and a checksum of them (4).

    Args:
        flag: How messages name the data.
        files: Paths of the split's files, a list.
        features: The set's TFDS features.

    Raises:
        InputError: If a file does not end where its last record does.
    """

    def __init__(self, flag, files, features):
        self.flag = flag
        self.files = [str(path) for path in files]
        self.features = features
        places = [_record_places(path, number, flag) for number, path in enumerate(self.files)]
        self.places = np.concatenate(places) if places else np.zeros((0, 3), np.int64)  # file, offset, length

    def __len__(self):
        return len(self.places)

    def handles(self, numbers):
        return tf.ensure_shape(tf.numpy_function(self._read, [numbers], tf.string), (None,))

    def open(self, handle, number):
        import tensorflow_datasets as tfds

        example = self.features.deserialize_example(handle, decoders={"image": tfds.decode.SkipDecoding()})
        return example["image"], tf.cast(example["label"], tf.int64)

    def name(self, number):
        file, offset, _ = self.places[number]
        return f"{os.path.basename(self.files[file])}, record {int(np.sum(self.places[:number, 0] == file))} (byte {offset})"

    def first_label(self):
        number = tf.zeros((1,), tf.int64)
        return int(self.open(self.handles(number)[0], number[0])[1])

    def _read(self, numbers):
        records = []
        for file, offset, length in self.places[numbers]:
            with open(self.files[file], "rb", buffering=0) as opened:
                opened.seek(offset)
                records.append(opened.read(length))
        return np.array(records, object)


def _record_places(path, number, flag):
    """Reads the lengths of a TFRecord file's records, nothing of the records themselves."""
    places, size, at = [], os.path.getsize(path), 0
    with open(path, "rb", buffering=0) as opened:
        while at + 12 <= size:
            opened.seek(at)
            length = int.from_bytes(opened.read(8), "little")
            places.append((number, at + 12, length))
            at += length + 16
    if at != size:
        raise InputError(f"{flag} must be whole. Received: {path}, of {size} bytes where its records end at {at}")
    return np.array(places, np.int64).reshape(-1, 3)
