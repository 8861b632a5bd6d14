"""Small photographs as files: odd sizes, grayscale, CMYK, PNG, and files that are none."""

import io

import numpy as np
from PIL import Image


def ramp(width=60, height=40):
    """An image whose first two channels are its own coordinates: each pixel's middle, over the image's size, times 240."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    red, green = np.meshgrid(240 * x, 240 * y)
    return np.round(np.stack([red, green, np.full_like(red, 120)], -1)).astype(np.uint8)


# How an upright image is stored in a file of each EXIF orientation.
STORED = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"}
STORED |= {5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}


def turned(image, orientation, kind="JPEG", endian="<"):
    """The bytes of a file that viewers show as `image`, with this EXIF orientation among other entries, before and after it."""
    picture = Image.fromarray(image)
    exif = picture.getexif()
    exif.endian = endian
    exif.update({0x010F: "Maker", 0x0110: "Camera", 0x0112: orientation, 0x011A: 72.0, 0x0131: "Software 1.0"})
    if STORED[orientation]:
        picture = picture.transpose(Image.Transpose[STORED[orientation]])
    return encoded(np.asarray(picture), kind, exif=exif)


def encoded(image, kind="JPEG", mode=None, **extra):
    """The bytes of a file of an image `(height, width, channels)` or `(height, width)`."""
    picture = Image.fromarray(image)
    stream = io.BytesIO()
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    options |= extra
    (picture.convert(mode) if mode else picture).save(stream, kind, **options)
    return stream.getvalue()


def corrupt(data, number):
    """One of several ways in which a file can be no image."""
    return (data[: len(data) // 2], b"", b"no image at all", data[:200], data[:-2])[number % 5]


def write_photographs(root, counts, classes=12, broken=0.0, seed=0):
    """Writes `root/split/class/number.jpg`, `counts` images a class in each split; returns the names of the corrupt ones.

    Images are noisy and of different sizes; their brightness gives the class. A tenth is grayscale, a tenth CMYK, a tenth PNG.
    """
    rng, names = np.random.default_rng(seed), []
    for split, count in counts.items():
        for label in range(classes):
            folder = root / split / f"class{label:02d}"
            folder.mkdir(parents=True)
            for number in range(count):
                kind = rng.integers(10)
                noise = rng.normal(20 + 200 * label / classes, 25, (*rng.integers(48, 120, 2), 3))
                path = folder / f"{number}.{'png' if kind == 2 else 'jpg'}"
                image = np.clip(noise, 0, 255).astype(np.uint8)
                data = encoded(image, "PNG" if kind == 2 else "JPEG", {0: "L", 1: "CMYK"}.get(kind))
                if rng.random() < broken:
                    data = corrupt(data, len(names))
                    names.append(str(path.relative_to(root)))
                path.write_bytes(data)
    return names
