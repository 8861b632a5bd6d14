"""Where images come from: scikit-learn's digits, TFDS, a folder. Read whole into memory, or left on the disk."""

import logging
import os
import pathlib
import socket
import tempfile
import urllib.parse
import urllib.request

import numpy as np
import tensorflow as tf

from ortho_keras.method.checks import require
from ortho_keras.method.errors import InputError, first_line
from ortho_keras.trainer.streaming import ImageFiles, ImageRecords

SPLIT_SEED = 0  # fixed, so that every run has the same validation and test images
VALIDATION_NAMES = ("validation", "val", "valid")
RESIZED_AT_ONCE = 1 << 24  # bytes of images: one by one, small ones take longer to hand over than to resize
SUFFIXES = (".jpg", ".jpeg", ".png")  # as TFDS's ImageFolder


def read_digits(image_size):
    """Returns scikit-learn's handwritten digits: `({split: (images, labels)}, class names)`; images are uint8."""
    require("--dataset digits", "sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    if image_size:
        images = _resized(images, image_size)
    labels = digits.target.astype(np.int64)
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=SPLIT_SEED)
    splits = {key: (images[part], labels[part]) for key, part in zip(("train", "test"), parts)}
    return splits, [str(name) for name in digits.target_names]


def read_tfds(name, data_dir, image_size):
    """Returns a TFDS classification set, downloaded first if it is not prepared; as `read_digits`."""
    flag = f"--dataset {name}"
    builder, wanted = _tfds_splits(name, data_dir)
    dtype = np.dtype(builder.info.features["image"].np_dtype)
    if dtype != np.uint8:
        raise InputError(f"--dataset must have images of 8 bits. Received: {name!r} with {dtype.name}")
    try:
        splits = {
            key: _in_memory(builder.as_dataset(split=split, shuffle_files=False), image_size, flag)
            for key, split in wanted.items()
        }
    except (OSError, tf.errors.OpError) as error:
        raise InputError(f"{flag} must be whole in {builder.data_path}. Received: {first_line(error)}") from error
    return splits, builder.info.features["label"].names


def stream_tfds(name, data_dir):
    """Returns `({split: ImageRecords}, class names)` of a TFDS classification set of encoded photographs."""
    flag = f"--dataset {name}"
    builder, wanted = _tfds_splits(name, data_dir)
    kind = builder.info.file_format.value
    if kind != "tfrecord":
        raise InputError(f"{flag} must be prepared as TFRecord files for --augment resized_crop. Received: {kind}")

    def records(split):
        return ImageRecords(flag, builder.info.splits[split].filepaths, builder.info.features)

    try:
        splits = {key: records(split) for key, split in wanted.items()}
        if "validation" in splits and len(splits["test"]) and splits["test"].first_label() < 0:
            splits["test"] = splits.pop("validation")  # as ImageNet's, whose test labels are not public
    except (OSError, tf.errors.OpError) as error:
        raise InputError(f"{flag} must be whole in {builder.data_path}. Received: {first_line(error)}") from error
    return splits, builder.info.features["label"].names


def _tfds_splits(name, data_dir):
    """Returns a prepared set's builder, and which of its splits is `train`, `test` and, where there is one, `validation`."""
    require(f"--dataset {name}", "tensorflow_datasets")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # by the name's form TFDS raises almost anything
        raise InputError(
            f"--dataset must be digits, folder:PATH or the name of a TFDS data set. Received: {name!r} ({first_line(error)})"
        ) from error
    features = builder.info.features
    if "image" not in features or "label" not in features or not hasattr(features["label"], "names"):
        raise InputError(
            f"--dataset must have an image and a class label for each example. Received: {name!r} with {list(features)}"
        )
    if not builder.is_prepared():
        _prepare(builder, f"--dataset {name}")
    names = list(builder.info.splits)
    validation = next((split for split in VALIDATION_NAMES if split in names), None)
    test = "test" if "test" in names else validation
    if "train" not in names or test is None:
        raise InputError(f"--dataset must have a training and a test split. Received: {name!r} with the splits {names}")
    wanted = {"train": "train", "test": test}
    if validation not in (None, test):
        wanted["validation"] = validation
    return builder, wanted


def _prepare(builder, flag):
    from tensorflow_datasets.core.download import downloader

    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its retries; the error itself is told
    downloader.MAX_RETRIES = 3  # 10 take minutes where there is no network
    try:
        if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            _check_hosts(builder)
        builder.download_and_prepare()
    except Exception as error:  # TFDS passes on whatever its downloader meets
        by_hand = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        told = f"; its files are to be fetched by hand: {' '.join(by_hand.split())}" if by_hand else ""
        raise InputError(
            f"{flag} must be prepared in --data_dir or downloadable. Received: nothing prepared in "
            f"{builder.data_path}, and the download failed ({first_line(error)}){told}"
        ) from error


def _check_hosts(builder):
    """Tries a download's hosts first, so that a machine without network is told at once and nothing is begun."""
    if urllib.request.getproxies():
        return  # a proxy resolves names itself
    ports = {"http": 80, "https": 443, "ftp": 21}
    urls = [urllib.parse.urlsplit(url) for url in builder.url_infos or ()]
    hosts = sorted({(url.hostname, url.port or ports[url.scheme]) for url in urls if url.scheme in ports})
    last = None
    for host in hosts:
        try:
            socket.create_connection(host, timeout=5).close()
            return
        except OSError as error:
            last = error
    if last is not None:
        raise ConnectionError(f"no connection to {hosts[-1][0]}: {last}")


def read_folder(path, image_size):
    """Returns the images of a folder of class folders, or of `train`, `val` and `test` with such folders; as `read_digits`."""
    import tensorflow_datasets as tfds

    flag = f"--dataset folder:{path}"
    root = _checked_folder(path, flag)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folders = _linked(root, pathlib.Path(scratch))
            builder = tfds.folder_dataset.ImageFolder(scratch)
            found = [split for split, info in builder.info.splits.items() if info.num_examples]
            if "train" not in found:
                raise _no_images(flag, folders)
            # The files' names come with the undecoded bytes: an unreadable one can then be named.
            raw = {"image": tfds.decode.SkipDecoding()}
            splits = {
                split: _in_memory(_decoded(builder.as_dataset(split=split, decoders=raw), flag), image_size, flag)
                for split in found
            }
    except (OSError, tf.errors.OpError) as error:
        raise InputError(f"{flag} must be readable. Received: {first_line(error)}") from error
    return splits, builder.info.features["label"].names


def stream_folder(path):
    """Returns `({split: ImageFiles}, class names)` of a folder as `read_folder` takes it."""
    flag = f"--dataset folder:{path}"
    root = _checked_folder(path, flag)
    try:
        found = {
            split: {
                source.name: [file for file in sorted(source.iterdir()) if file.suffix.lower() in SUFFIXES]
                for source in _visible_folders(folder)
            }
            for split, folder in _folder_parts(root).items()
        }
    except OSError as error:
        raise InputError(f"{flag} must be readable. Received: {first_line(error)}") from error
    names = sorted({name for classes in found.values() for name in classes})
    splits = {}
    for split, classes in found.items():
        labelled = [(file, names.index(name)) for name in sorted(classes) for file in classes[name]]
        if labelled:
            splits[split] = ImageFiles(flag, root, *zip(*labelled))
    if "train" not in splits:
        raise _no_images(flag, sum(map(len, found.values())))
    return splits, names


def _checked_folder(path, flag):
    root = pathlib.Path(path).expanduser()
    if not path or not root.is_dir():
        raise InputError(f"{flag} must name a folder that exists. Received: {path!r}")
    return root


def _no_images(flag, folders):
    return InputError(
        f"{flag} must hold one folder of JPEG or PNG images for each class, or train/ and test/ with such folders in each. "
        f"Received: no image in {folders} folder(s)"
    )


def _visible_folders(folder):
    """Hidden folders (`.ipynb_checkpoints`) are no classes."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _folder_parts(root):
    """Returns `{split: folder}`. `train` is a split only if it holds folders itself; otherwise all is training."""
    if not (root / "train").is_dir() or not _visible_folders(root / "train"):
        return {"train": root}
    validation = next((name for name in VALIDATION_NAMES if (root / name).is_dir()), None)
    places = {"train": "train", "test": "test", "validation": validation}
    return {split: root / name for split, name in places.items() if name and (root / name).is_dir()}


def _linked(root, scratch):
    """Links a folder's class folders where TFDS's ImageFolder expects them, `scratch/split/class`; returns their number."""
    count = 0
    for split, folder in _folder_parts(root).items():
        (scratch / split).mkdir()
        for source in _visible_folders(folder):
            next(source.iterdir(), None)  # an unreadable folder is told here
            os.symlink(source.resolve(), scratch / split / source.name)
            count += 1
    return count


def _decoded(files, flag):
    """Decodes files to RGB one after the other; the first that is no image is named."""
    for example in files:
        try:
            image = tf.io.decode_image(example["image"], channels=3, expand_animations=False)
        except tf.errors.InvalidArgumentError as error:
            name = pathlib.Path(example["image/filename"].numpy().decode())
            raise InputError(
                f"{flag} must hold readable images. Received: {'/'.join(name.parts[-2:])}, which does not decode "
                f"({first_line(error)})"
            ) from error
        yield {"image": image, "label": example["label"]}


def _in_memory(examples, image_size, flag):
    """Collects examples into `(images, labels)`. Sizes must agree, unless all are resized."""
    images, labels, waiting = [], [], []

    def keep(new):
        for image in new:
            if images and image.shape != images[0].shape:
                raise InputError(
                    f"{flag} must hold images of one size, or --image_size must be given. Received: images of shape "
                    f"{images[0].shape} and {image.shape}"
                )
            images.append(image)

    def keep_waiting():
        if waiting:
            keep(_resized(np.stack(waiting), image_size))
            waiting.clear()

    if isinstance(examples, tf.data.Dataset):
        examples = examples.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
    for example in examples:
        image = np.asarray(example["image"])
        labels.append(int(example["label"]))
        fits = not image_size or image.shape[:2] == (image_size, image_size)
        full = len(waiting) * image.nbytes >= RESIZED_AT_ONCE
        if fits or full or (waiting and image.shape != waiting[0].shape):
            keep_waiting()
        if fits:
            keep([image])
        else:
            waiting.append(image)
    keep_waiting()
    if not images:
        raise InputError(f"{flag} must hold images. Received: an empty split")
    return np.stack(images), np.asarray(labels, np.int64)


def _resized(images, size):
    resized = tf.image.resize(images, (size, size), antialias=True)
    return np.clip(np.round(resized), 0, 255).astype(np.uint8)
