"""Images and labels: from TFDS, a folder or scikit-learn to a tf.data pipeline that is a function of the seed alone."""

import dataclasses
import os
import pathlib
import socket
import tempfile
import urllib.parse
import urllib.request

import numpy as np
import tensorflow as tf

from ortho_keras.errors import InputError

VALIDATION_SHARE = 0.1
SPLIT_SEED = 0  # fixed, so that every run has the same validation and test images
TEST_NAMES = ("test", "validation", "val")


@dataclasses.dataclass(frozen=True)
class Split:
    images: np.ndarray  # uint8 (n, height, width, channels)
    labels: np.ndarray  # int64 (n,)

    def __len__(self):
        return len(self.labels)

    def take(self, indices):
        return Split(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set in memory, with the split that chooses (validation) apart from the one that judges (test)."""

    train: Split
    validation: Split
    test: Split
    class_names: tuple

    @property
    def image_shape(self):
        return self.train.images.shape[1:]

    def channel_statistics(self):
        """Returns mean and variance of the training split's pixels by channel, two lists of floats."""
        pixels = self.train.images.reshape(-1, self.image_shape[-1])
        chunks = [chunk.astype(np.float64) for chunk in np.array_split(pixels, max(1, len(pixels) // 1_000_000))]
        mean = sum(chunk.sum(0) for chunk in chunks) / len(pixels)
        variance = sum(np.square(chunk - mean).sum(0) for chunk in chunks) / len(pixels)
        return mean.tolist(), np.maximum(variance, 1e-12).tolist()


def load_data(name, data_dir=None, image_size=0):
    """Loads a data set into memory.

    Args:
        name: `"digits"` (scikit-learn's 1,797 handwritten digits, 8x8), `"folder:PATH"`, or a TFDS name. A folder holds either
            one folder for each class, or `train` and `test` (and `val`) with one folder for each class in each.
        data_dir: TFDS's folder of prepared data. Defaults to TFDS's own, `~/tensorflow_datasets`.
        image_size: int. Resizes to this many pixels a side; 0 keeps the size, which must then be the same for all images.

    Returns:
        An `ImageData`. What the data set does not come with is cut off the training split, the same at every run: a tenth for
        validation and, for a folder without `test`, another tenth for the test.

    Raises:
        InputError: If the data set is unknown, cannot be had or read, or holds no images of one size.
    """
    if name == "digits":
        splits, class_names = _digits()
    elif name.startswith("folder:"):
        splits, class_names = _folder(name.removeprefix("folder:"), image_size)
    else:
        splits, class_names = _tfds(name, data_dir, image_size)
    if name == "digits" and image_size:
        splits = {key: Split(_resized(split.images, image_size), split.labels) for key, split in splits.items()}
    train, test = splits["train"], splits.get("test")
    if test is None:
        train, test = _cut(train, VALIDATION_SHARE)
    validation = splits.get("validation")
    if validation is None:
        train, validation = _cut(train, VALIDATION_SHARE)
    return ImageData(train, validation, test, tuple(class_names))


def training_batches(split, batch_size, augment, seed, start=0, stop=None, mean=0.0, replicas=1, own=(0,)):
    """Returns a `tf.data.Dataset` of training steps `start` to `stop` of the run that `seed` names.

    Step s is a function of the seed and s alone: the order is a new permutation in each epoch (of `len(split) // batch_size`
    whole batches), augmentation draws from the step's own seed. So a run that resumes at step s sees what it would have seen.

    Args:
        split: `Split`, at least one batch.
        batch_size: int.
        augment: `"none"`; `"crop"`, a window of the image's size out of the image padded by an eighth (4 pixels of 32);
            `"crop_flip"`, the same and half of the images mirrored.
        seed: int.
        start: int, the first step.
        stop: int, the step after the last one, or `None` for an endless dataset.
        mean: Pixel value by channel that pads an image. Zero-mean padding is what He et al. 2016 do.
        replicas: int, how many replicas share each batch; divides `batch_size`.
        own: The replicas, from 0, whose shares are wanted. Their shares of step `start` come first, in turn, then those
            of the next step. The shares of all replicas together are the batch that one replica would see.

    Returns:
        Dataset of `(images, labels)`: float32 `(share, height, width, channels)` of 0 to 255, int64 `(share,)`, where
        `share = batch_size / replicas`.
    """
    steps = len(split) // batch_size
    share = batch_size // replicas
    replica_of = tf.constant(own, tf.int64)
    with tf.device("CPU:0"):
        images, labels = tf.constant(split.images), tf.constant(split.labels)

    def batch(number):
        step, replica = number // len(own), replica_of[number % len(own)]
        epoch, within = step // steps, step % steps
        key = tf.constant(seed, tf.int64)
        draws = tf.random.stateless_uniform((batch_size, 3), tf.stack([key, step]))  # the whole batch's, whatever the share
        mine = replica * share + tf.range(share, dtype=tf.int64)
        positions = within * batch_size + mine
        indices = tf.random.experimental.index_shuffle(positions, tf.stack([key, epoch]), len(split) - 1)
        x = tf.cast(tf.gather(images, indices), tf.float32)
        return _augmented(x, augment, tf.gather(draws, mine), mean), tf.gather(labels, indices)

    last = np.iinfo(np.int64).max if stop is None else stop * len(own)
    order = tf.data.Dataset.range(start * len(own), last)
    return order.map(batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(tf.data.AUTOTUNE)


def evaluation_batches(split, batch_size, replicas=1, own=(0,)):
    """Returns a `tf.data.Dataset` of the whole split in order, in batches of one size.

    Args:
        split: `Split`.
        batch_size: int.
        replicas: See `training_batches`.
        own: See `training_batches`.

    Returns:
        Dataset of `(images, labels, weights)`, as in `training_batches`; float32 weights are 1, and 0 for the images that
        fill up the last batch.
    """
    share = batch_size // replicas
    replica_of = tf.constant(own, tf.int64)
    with tf.device("CPU:0"):
        images, labels = tf.constant(split.images), tf.constant(split.labels)

    def batch(number):
        start = number // len(own) * batch_size + replica_of[number % len(own)] * share
        positions = start + tf.range(share, dtype=tf.int64)
        real = positions < len(split)
        indices = tf.where(real, positions, 0)
        return tf.cast(tf.gather(images, indices), tf.float32), tf.gather(labels, indices), tf.cast(real, tf.float32)

    order = tf.data.Dataset.range(-(-len(split) // batch_size) * len(own))
    return order.map(batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(tf.data.AUTOTUNE)


def _augmented(images, augment, draws, mean):
    """Crops and mirrors by three uniform draws for each image, `(batch, 3)`."""
    if augment == "none":
        return images
    height, width = images.shape[1:3]
    pad_y, pad_x = max(1, height // 8), max(1, width // 8)
    padded = tf.pad(images - mean, [[0, 0], [pad_y, pad_y], [pad_x, pad_x], [0, 0]]) + mean
    top = tf.cast(draws[:, 0] * (2 * pad_y + 1), tf.int32)[:, tf.newaxis] + tf.range(height)
    left = tf.cast(draws[:, 1] * (2 * pad_x + 1), tf.int32)[:, tf.newaxis] + tf.range(width)
    if augment == "crop_flip":
        left = tf.where(draws[:, 2:] < 0.5, left, left[:, ::-1])
    rows = tf.gather(padded, top, axis=1, batch_dims=1)
    columns = tf.gather(rows, left, axis=2, batch_dims=1)
    return tf.ensure_shape(columns, images.shape)


def _cut(split, share):
    """Cuts a share off a split, at least one image. The same images whatever the run's seed."""
    if len(split) < 2:
        raise InputError(f"--dataset must have at least 2 training images to hold one out. Received: {len(split)}")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(split))
    held = max(1, round(share * len(split)))
    return split.take(np.sort(order[held:])), split.take(np.sort(order[:held]))


def _digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    whole = Split(images, digits.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(whole)), test_size=0.2, stratify=whole.labels, random_state=SPLIT_SEED)
    return {"train": whole.take(train), "test": whole.take(test)}, [str(name) for name in digits.target_names]


def _tfds(name, data_dir, image_size):
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise InputError(
            f"--dataset must be digits, folder:PATH or the name of a TFDS data set. Received: {name!r} ({_first_line(error)})"
        ) from error
    if not builder.is_prepared():
        try:
            _check_hosts(builder)
            builder.download_and_prepare()
        except Exception as error:  # TFDS passes on whatever its downloader meets
            raise InputError(
                f"--dataset {name} must be prepared in --data_dir or downloadable. Received: nothing prepared in "
                f"{builder.data_path}, and the download failed ({_first_line(error)})"
            ) from error
    features = builder.info.features
    if "image" not in features or "label" not in features or not hasattr(features["label"], "names"):
        raise InputError(
            f"--dataset must have an image and a class label for each example. Received: {name!r} with {list(features)}"
        )
    names = list(builder.info.splits)
    test = next((split for split in TEST_NAMES if split in names), None)
    if "train" not in names or test is None:
        raise InputError(f"--dataset must have a training and a test split. Received: {name!r} with the splits {names}")
    splits = {}
    for key, split in (("train", "train"), ("test", test)):
        read = builder.as_dataset(split=split, shuffle_files=False)
        splits[key] = _in_memory(read, image_size, f"--dataset {name}")
    return splits, features["label"].names


def _check_hosts(builder):
    """Tries the hosts of a download for seconds: TFDS itself goes on for minutes where there is no network."""
    downloads = pathlib.Path(builder.data_path).parents[len(builder.info.full_name.split("/")) - 1] / "downloads"
    if urllib.request.getproxies() or downloads.is_dir():
        return  # a proxy resolves names itself, and what is downloaded already needs no network
    for address in sorted({urllib.parse.urlsplit(url)[:2] for url in builder.url_infos or ()}):
        host, _, port = address[1].partition(":")
        socket.create_connection((host, int(port or {"http": 80, "ftp": 21}.get(address[0], 443))), timeout=10).close()


def _folder(path, image_size):
    import tensorflow_datasets as tfds

    flag = f"--dataset folder:{path}"
    root = pathlib.Path(path).expanduser()
    if not path or not root.is_dir():
        raise InputError(f"{flag} must name a folder that exists. Received: {path!r}")
    try:
        inner = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        with tempfile.TemporaryDirectory() as scratch:
            if "train" not in inner:
                # TFDS's ImageFolder wants a split above the classes: give it one, by a link.
                os.symlink(root.resolve(), os.path.join(scratch, "train"))
            builder = tfds.folder_dataset.ImageFolder(str(root) if "train" in inner else scratch)
            found = {split: info.num_examples for split, info in builder.info.splits.items()}
            if not found.get("train"):
                raise InputError(
                    f"{flag} must hold one folder of JPEG, PNG, BMP or GIF images for each class, or train/ and test/ with "
                    f"such folders in each. Received: no image in {len(inner)} folders"
                )
            names = {"train": "train"}
            if found.get("test"):
                names["test"] = "test"
            held = next((split for split in TEST_NAMES[1:] if found.get(split)), None)
            if held:
                names["validation" if "test" in names else "test"] = held
            # The files' names come first: an unreadable one can then be named.
            raw = {"image": tfds.decode.SkipDecoding()}
            splits = {
                key: _in_memory(_decoded(builder.as_dataset(split=split, decoders=raw), flag), image_size, flag)
                for key, split in names.items()
            }
    except OSError as error:
        raise InputError(f"{flag} must be readable. Received: {_first_line(error)}") from error
    return splits, builder.info.features["label"].names


def _decoded(files, flag):
    """Decodes files to RGB one after the other; the first that is no image is named."""
    for example in files:
        try:
            image = tf.io.decode_image(example["image"], channels=3, expand_animations=False)
        except tf.errors.InvalidArgumentError as error:
            name = pathlib.Path(example["image/filename"].numpy().decode())
            raise InputError(
                f"{flag} must hold readable images. Received: {'/'.join(name.parts[-2:])}, which does not decode "
                f"({_first_line(error)})"
            ) from error
        yield {"image": image, "label": example["label"]}


def _in_memory(examples, image_size, flag):
    """Collects examples into one array. Sizes must agree, unless all are resized."""
    images, labels = [], []
    if isinstance(examples, tf.data.Dataset):
        examples = examples.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
    for example in examples:
        image = np.asarray(example["image"])
        if image_size and image.shape[:2] != (image_size, image_size):
            image = _resized(image[np.newaxis], image_size)[0]
        if images and image.shape != images[0].shape:
            raise InputError(
                f"{flag} must hold images of one size, or --image_size must be given. Received: images of shape "
                f"{images[0].shape} and {image.shape}"
            )
        images.append(image)
        labels.append(int(example["label"]))
    if not images:
        raise InputError(f"{flag} must hold images. Received: an empty split")
    return Split(np.stack(images).astype(np.uint8), np.asarray(labels, np.int64))


def _resized(images, size):
    resized = tf.image.resize(images, (size, size), antialias=True)
    return np.clip(np.round(resized), 0, 255).astype(np.uint8)


def _first_line(error):
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
