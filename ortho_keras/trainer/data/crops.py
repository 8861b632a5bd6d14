"""Image files, decoded and turned upright, and their crops: a random part for training, the central one for evaluation."""

import pathlib

import tensorflow as tf

# Random parts after Szegedy et al. 2015: a share of the area, and width over height. TensorFlow's sampling, with which most
# ImageNet nets in it were trained, takes the height uniformly, so that small parts are more frequent than with a uniform area.
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
CENTRE = 224 / 256  # evaluation: the central share of the shorter side, as by resizing it to 256 and cropping 224
MIRROR = (0, 1 << 62)  # added to the seed of the window, so that mirroring is independent of it
DECODED_AT = (1, 2, 4, 8)  # libjpeg decodes at the full resolution divided by these
EXACT = "INTEGER_ACCURATE"  # as other readers of JPEG; TensorFlow's default deviates by several levels
END_OF_JPEG = b"\xff\xd9"
# The EXIF orientation, 1 to 8, of a JPEG or PNG file: the entry with tag 0x0112 in the first directory, whose entries, of 12
# bytes, are sorted by tag; in either byte order.
HEAD = 1 << 12  # bytes at a file's beginning that are searched for it
ORIENTATION = (
    r"^\C*?(?:Exif\x00\x00|eXIf)"
    r"(?:II\*\x00\x08\x00\x00\x00\C\C(?:\C[\x00\x01]\C{10})*?\x12\x01\x03\x00\x01\x00\x00\x00"
    r"|MM\x00\*\x00\x00\x00\x08\C\C(?:[\x00\x01]\C{11})*?\x01\x12\x00\x03\x00\x00\x00\x01\x00)([\x01-\x08])\C*$"
)


def read_image(file):
    """Returns an image file, given by its path or as bytes, as a uint8 array `(height, width, 3)`, upright as viewers show it.

    Raises `OSError` if it cannot be read, and `tf.errors.InvalidArgumentError` if it is not an image.
    """
    with tf.device("CPU:0"):
        return decoded_image(file if isinstance(file, bytes) else pathlib.Path(file).read_bytes()).numpy()


def decoded_image(encoded, channels=3):
    """Returns a whole file as a uint8 tensor, upright; of an animation, the first image."""
    return _upright(tf.io.decode_image(encoded, channels, expand_animations=False), _orientation(encoded))


def resized_crop(image, key, size):
    """Returns a crop of a uint8 image `(height, width, channels)`, resized to `size`, `(height, width)`; float32.

    `key`, int64 `(2,)`, is the seed of a random part that is mirrored in half of the cases; `None`: the central part.
    """
    top, left, height, width = tf.unstack(_window(tf.shape(image), key))
    crop = tf.image.resize(image[top : top + height, left : left + width], size, antialias=True)
    return _mirrored(crop, key)


def decoded_crop(encoded, key, size):
    """Returns a crop of a JPEG or PNG file as float32 RGB, as `resized_crop`, upright.

    Of a JPEG file that is stored upright nothing outside of the crop is decoded, and no more of the resolution than is needed.
    """
    jpeg, ends = tf.io.is_jpeg(encoded), tf.equal(tf.strings.substr(encoded, -2, 2), END_OF_JPEG)

    def decoded_whole():
        # A JPEG file that was cut off would decode as far as the crop goes; one with more bytes after its end is whole.
        complete = tf.size(tf.strings.split(encoded, END_OF_JPEG)) > 1
        with tf.control_dependencies([tf.debugging.Assert(complete | ~jpeg, ["a JPEG file without its end"])]):
            return resized_crop(decoded_image(encoded), key, size)

    def decoded_part():
        return _mirrored(_jpeg_crop(encoded, key, size), key)

    image = tf.cond(jpeg & ends & (_orientation(encoded) < 2), decoded_part, decoded_whole)
    return tf.ensure_shape(image, (*size, 3))


def _jpeg_crop(encoded, key, size):
    """Decodes a crop at the lowest resolution that has `size` pixels of it; the rest, a factor below 2, is bilinear."""
    shape = tf.io.extract_jpeg_shape(encoded)
    window = _window(shape, key)
    begin, extent = window[:2], window[2:]
    enough = tf.reduce_min(extent) >= [max(size) * ratio for ratio in DECODED_AT[1:]]

    def reduced(ratio):
        """The window's edges lie between the pixels of the reduced resolution: its values are interpolated at their places."""
        first = begin // ratio
        count = tf.minimum(-(-(begin + extent) // ratio), -(-shape[:2] // ratio)) - first
        image = tf.io.decode_and_crop_jpeg(encoded, tf.concat([first, count], 0), 3, ratio, dct_method=EXACT)
        pixels = tf.constant(size, tf.float32)
        spacing = tf.cast(extent, tf.float32) / (pixels * ratio)
        start = tf.cast(begin, tf.float32) / ratio - tf.cast(first, tf.float32) + (spacing - 1) / 2
        box = tf.stack([start, start + (pixels - 1) * spacing]) / tf.cast(tf.maximum(count - 1, 1), tf.float32)
        return tf.image.crop_and_resize(image[tf.newaxis], tf.reshape(box, (1, 4)), [0], size)[0]

    def full():
        return tf.image.resize(tf.io.decode_and_crop_jpeg(encoded, window, 3, dct_method=EXACT), size)

    branches = [full, *(lambda ratio=ratio: reduced(ratio) for ratio in DECODED_AT[1:])]
    return tf.switch_case(tf.math.count_nonzero(enough, dtype=tf.int32), branches)


def _orientation(encoded):
    """Returns the EXIF orientation of a file, 1 to 8, or 0 where it has none; a regular expression needs no Python thread."""
    found = tf.strings.regex_replace(tf.strings.substr(encoded, 0, HEAD), ORIENTATION, r"\1", replace_global=False)
    return tf.argmax(tf.cast(found == [bytes([value]) for value in range(9)], tf.int32), output_type=tf.int32)


def _upright(image, orientation):
    """Turns an image: exchanges rows and columns where the orientation is above 4, then reverses either of them or both."""
    height, width = tf.unstack(tf.shape(image)[:2])

    def exchanged():  # not by `tf.transpose`, which logs an error on processors without AVX-512
        pixels = tf.reshape(image, (height * width, image.shape[2]))
        return tf.gather(pixels, tf.range(width)[:, tf.newaxis] + width * tf.range(height))

    image = tf.cond(orientation > 4, exchanged, lambda: image)
    mirrors = tf.stack([tf.reduce_any(orientation == values) for values in ([3, 4, 7, 8], [2, 3, 6, 7])])
    return tf.reverse(image, tf.where(mirrors)[:, 0])


def _window(shape, key):
    """The crop of an image `(height, width, channels)`: `(top, left, height, width)`."""
    if key is None:
        side = tf.cast(tf.round(CENTRE * tf.cast(tf.reduce_min(shape[:2]), tf.float32)), tf.int32)
        return tf.concat([(shape[:2] - side) // 2, [side, side]], 0)
    options = {"aspect_ratio_range": ASPECT, "area_range": AREA, "max_attempts": 10, "use_image_if_no_bounding_boxes": True}
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape, tf.zeros((1, 0, 4)), key, min_object_covered=0.0, **options
    )
    return tf.concat([begin[:2], extent[:2]], 0)


def _mirrored(image, key):
    """Mirrors an image horizontally in half of the cases, by the seed."""
    if key is None:
        return image
    return tf.cond(tf.random.stateless_uniform((), tf.add(key, MIRROR)) < 0.5, lambda: tf.reverse(image, [1]), lambda: image)
