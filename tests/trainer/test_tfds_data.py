"""TFDS sets: what is read, what is prepared, and what is refused and how."""

import time

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from loaded import refusal, values

from ortho_keras.trainer import sources
from ortho_keras.trainer.data import load_data


@pytest.fixture(autouse=True)
def fresh_state():
    """Nothing: no test here makes a layer, and clearing Keras takes longer than most of them."""


def prepare(data_dir, name, splits, shape=(4, 6, 1), dtype=np.uint8, **features):
    """Prepares a TFDS data set without code: `splits` maps names to `(images, labels)`."""
    features = features or {
        "image": tfds.features.Image(shape=shape, dtype=dtype),
        "label": tfds.features.ClassLabel(names=["a", "b"]),
    }
    first, second = features
    examples = {
        split: [(i, {first: image, second: label}) for i, (image, label) in enumerate(zip(*content, strict=True))]
        for split, content in splits.items()
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name, version="1.0.0", features=tfds.features.FeaturesDict(features), split_datasets=examples, data_dir=data_dir
    )


def gradients(n, channels=1, start=0, size=(4, 6)):
    """`n` images that differ, with labels 0, 1, 0, ..."""
    index = start + np.arange(n)
    return (index[:, np.newaxis, np.newaxis, np.newaxis] + np.zeros((1, *size, channels))).astype(np.uint8), index % 2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("test", ["test", "validation"])
def test_tfds_data(tmp_path, channels, test):
    splits = {"train": gradients(20, channels), test: gradients(5, channels, 100)}
    prepare(tmp_path, "tiny", splits, (4, 6, channels))
    data = load_data("tiny", tmp_path)
    assert data.image_shape == (4, 6, channels) and data.class_names == ("a", "b")
    assert sorted(values(data.test)) == [100, 101, 102, 103, 104]
    assert (len(data.train), len(data.validation)) == (18, 2)
    assert sorted(values(data.train) + values(data.validation)) == list(range(20))
    for split in (data.train, data.validation, data.test):
        assert split.labels.tolist() == [value % 2 for value in values(split)]
    again = load_data("tiny:1.0.0", tmp_path)
    assert values(again.train) == values(data.train) and values(again.validation) == values(data.validation)
    assert load_data("tiny", tmp_path, 9).image_shape == (9, 9, channels)


def test_tfds_validation_is_used_where_there_is_one(tmp_path):
    prepare(tmp_path, "tiny", {"train": gradients(20), "validation": gradients(3, 1, 50), "test": gradients(4, 1, 100)})
    data = load_data("tiny", tmp_path)
    assert [sorted(values(s)) for s in (data.train, data.validation, data.test)] == [
        list(range(20)), [50, 51, 52], [100, 101, 102, 103],
    ]  # fmt: skip


def test_tfds_of_many_sizes_needs_image_size(tmp_path):
    mixed = [*gradients(2)[0], *gradients(2, size=(5, 5))[0]]
    prepare(tmp_path, "mixed", {"train": (mixed, [0, 1, 0, 1]), "test": gradients(2)}, (None, None, 1))
    assert "--image_size" in refusal("mixed", tmp_path)
    assert load_data("mixed", tmp_path, 6).image_shape == (6, 6, 1)
    prepare(tmp_path, "apart", {"train": gradients(4), "test": gradients(2, size=(5, 5))}, (None, None, 1))
    assert "--image_size" in refusal("apart", tmp_path)


@pytest.mark.parametrize("at_once", [1, 200, 1 << 24])
def test_images_are_resized_as_one_by_one_and_stay_in_order(at_once, monkeypatch):
    monkeypatch.setattr(sources, "RESIZED_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    shapes = [(4, 6, 3), (5, 5, 3), (6, 4, 3), (9, 9, 3)]
    images = [rng.integers(0, 256, shapes[kind], dtype=np.uint8) for kind in rng.choice(4, 60, p=[0.5, 0.2, 0.1, 0.2])]
    found, labels = sources._in_memory([{"image": image, "label": i} for i, image in enumerate(images)], 5, "--dataset x")
    assert labels.tolist() == list(range(60)) and found.dtype == np.uint8
    for image, resized in zip(images, found, strict=True):
        alone = image if image.shape[:2] == (5, 5) else tf.image.resize(image, (5, 5), antialias=True).numpy()
        assert np.abs(resized - alone.astype(np.float64)).max() <= 0.5 + 1e-4


def test_tfds_without_a_test_split(tmp_path):
    prepare(tmp_path, "tiny", {"train": gradients(4)})
    assert "'tiny' with the splits ['train']" in refusal("tiny", tmp_path)


def test_tfds_images_of_16_bits_are_not_wrapped_round(tmp_path):
    wide = (np.full((4, 4, 6, 1), 256 * 100 + 3, np.uint16), [0, 1, 0, 1])
    prepare(tmp_path, "wide", {"train": wide, "test": wide}, dtype=np.uint16)
    assert "uint16" in refusal("wide", tmp_path)


def test_tfds_without_images_or_classes(tmp_path):
    image, label = tfds.features.Image(shape=(4, 6, 1)), tfds.features.ClassLabel(names=["a", "b"])
    texts = {"train": (["one", "two"], [0, 1]), "test": (["one"], [0])}
    prepare(tmp_path, "reviews", texts, text=tfds.features.Text(), label=label)
    assert "class label" in (message := refusal("reviews", tmp_path)) and "'text'" in message
    prepare(tmp_path, "pictures", {"train": gradients(3), "test": gradients(3)}, image=image, label=np.int64)
    assert "class label" in refusal("pictures", tmp_path)


def test_damaged_tfds_data(tmp_path):
    prepare(tmp_path, "tiny", {"train": gradients(20), "test": gradients(5)})
    (record,) = tmp_path.glob("tiny/1.0.0/tiny-train.tfrecord*")
    record.write_bytes(record.read_bytes()[:-40])
    assert "tiny" in refusal("tiny", tmp_path)
    record.unlink()
    assert "tiny" in refusal("tiny", tmp_path)


class GeneratedTiny(tfds.core.GeneratorBasedBuilder):
    """A data set with code, that prepares itself without a download."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(4, 6, 1)), "label": tfds.features.ClassLabel(names=["a", "b"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10, 0), "test": self._generate_examples(4, 100)}

    def _generate_examples(self, n, start):
        for image, label in zip(*gradients(n, start=start)):
            yield int(image[0, 0, 0]), {"image": image, "label": label}


class MissingTiny(GeneratedTiny):
    """Its source is not there."""

    def _split_generators(self, dl_manager):
        dl_manager.download("file:///nowhere/tiny.tar.gz")


UNREACHABLE = {
    "http://localhost:9/tiny.tar.gz": tfds.core.download.checksums.UrlInfo(tfds.core.utils.Size(9), "00" * 32, "tiny.tar.gz")
}


class UnreachableTiny(GeneratedTiny):
    """Its source is on a port where nothing listens."""

    url_infos = UNREACHABLE

    def _split_generators(self, dl_manager):
        dl_manager.download(*UNREACHABLE)


class ByHandTiny(UnreachableTiny):
    """Its files are to be fetched by hand, as ImageNet's."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    Register somewhere, and put tiny.tar
    into manual_dir.
    """

    def _split_generators(self, dl_manager):
        return super()._split_generators(dl_manager) if list(dl_manager.manual_dir.glob("tiny.tar")) else {}


class BrokenTiny(GeneratedTiny):
    """Fails half-way through preparing."""

    def _generate_examples(self, n, start):
        yield from super()._generate_examples(n, start)
        raise OSError(28, "No space left on device\nand a second line")


class GeneratedTexts(GeneratedTiny):
    """No images; the download, if tried, fails."""

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["a", "b"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        dl_manager.download("file:///nowhere/texts.tar.gz")


def files_below(path):
    return [file for file in path.rglob("*") if not file.is_dir()]


def test_files_that_are_to_be_fetched_by_hand(tmp_path):
    """The message has TFDS's instructions; no host is tried first."""
    message = refusal("by_hand_tiny", tmp_path)
    assert "Manual directory" in message and "no connection" not in message
    assert message.endswith("its files are to be fetched by hand: Register somewhere, and put tiny.tar into manual_dir.")


def test_tfds_data_is_prepared_once(tmp_path):
    data = load_data("generated_tiny", tmp_path)
    assert sorted(values(data.train) + values(data.validation)) == list(range(10))
    assert sorted(values(data.test)) == [100, 101, 102, 103]
    before = {file: file.stat().st_mtime_ns for file in files_below(tmp_path)}
    again = load_data("generated_tiny", tmp_path)
    assert values(again.train) == values(data.train)
    assert {file: file.stat().st_mtime_ns for file in files_below(tmp_path)} == before


@pytest.mark.parametrize("name", ["missing_tiny", "broken_tiny"])
def test_tfds_data_that_cannot_be_prepared(tmp_path, name):
    message = refusal(name, tmp_path)
    assert str(tmp_path / name / "1.0.0") in message and "--data_dir" in message
    assert ("nowhere/tiny.tar.gz" if name == "missing_tiny" else "No space left on device") in message
    assert files_below(tmp_path) == []


def test_tfds_data_without_images_is_refused_before_the_download(tmp_path):
    assert "class label" in (message := refusal("generated_texts", tmp_path)) and "'text'" in message
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        "nosuchset",
        "",
        "no such set",
        "Folder",
        "generated_tiny:9.9.9",
        "generated_tiny/none",
        "generated_tiny/a=3",
        "huggingface:x",
    ],
)
def test_unknown_tfds_name(tmp_path, name):
    assert repr(name) in refusal(name, tmp_path)
    assert files_below(tmp_path) == []


def test_data_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refusal("generated_tiny", tmp_path / "file")


@pytest.mark.parametrize("used", [False, True])  # whether other data has been downloaded there before
def test_unreachable_host_is_told_soon(tmp_path, used):
    before = [tmp_path / "downloads" / "other.tar.gz"] if used else []
    for file in before:
        file.parent.mkdir()
        file.touch()
    started = time.monotonic()
    message = refusal("unreachable_tiny", tmp_path)
    assert time.monotonic() - started < 30
    assert "connection" in message.lower() and str(tmp_path / "unreachable_tiny") in message
    assert files_below(tmp_path) == before
