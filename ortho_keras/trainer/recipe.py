"""A recipe: a frozen set of values that describes one training run completely."""

import collections
import dataclasses
import json
import math
import pathlib

from ortho_keras.method.errors import InputError
from ortho_keras.method.regularizers import REGULARIZERS
from ortho_keras.nets.networks import BLOCKS, BOTTLENECK_DEPTHS
from ortho_keras.trainer.schedules import SHAPES

OPTIMIZERS = ("sgd", "nesterov", "adagrad", "adadelta", "rmsprop", "adam", "adamw", "muon")

FACTORED = collections.ChainMap({"l2": None}, REGULARIZERS)  # penalties with a factor; regularizers may still be added

MIRRORING = ("crop_flip", "resized_crop")  # the choices of augment that mirror images

# A value that is not always read -> the value that decides whether it is, and for which of that one's choices.
READ_FOR = {
    "momentum": ("optimizer", ("sgd", "nesterov", "rmsprop", "muon")),
    "vector_rate": ("optimizer", ("muon",)),
    "weight_decay": ("optimizer", ("adamw",)),
    "factor": ("regularizer", FACTORED),
    **dict.fromkeys(("padding", "crop_border", "cutout"), ("augment", ("crop", "crop_flip"))),
    "grow_epoch": ("start_depth", range(8, 2**31)),
    **dict.fromkeys(("tolerance", "max_scale", "modulation_steps", "modulation_sync"), ("modulation", ("neighbour", "anchor"))),
}


# Values that recipes once had: a stored recipe that has one at its default is the same recipe without it.
RETIRED = {"bn_shift": 0.0, "mirror_symmetry": False, "widening_initializer": "same"}


def _field(default, help, choices=None, least=None, most=None, above=None):
    """A recipe's field: its default, the flag's help, and the range that a value must lie in."""
    limits = {"help": help, "choices": choices, "least": least, "most": most, "above": above}
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Every value that decides what a run computes. Each field is a flag of `train.py`; `check` says what is allowed."""

    dataset: str = _field("digits", "digits, a TFDS name (cifar10, cifar100, fashion_mnist, ...) or folder:PATH")
    image_size: int = _field(0, "resizes images to this many pixels a side; 0 keeps their size", least=0, most=4096)
    hold_out: bool = _field(
        True, "a tenth of the training images is held out for validation (where the data has no such split); without, all train"
    )
    augment: str = _field(
        "none",
        "training images: random crop of a padded image; flip. resized_crop: a random part of a photograph, resized to "
        "image_size, and flip; images then stay on the disk and are decoded as they are needed",
        ("none", "crop", "crop_flip", "resized_crop"),
    )
    padding: str = _field("mean", "what pads an image before the crop: its mean, or its mirrored border", ("mean", "symmetric"))
    crop_border: int = _field(
        0, "pixels by which each side of an image is padded before the crop; 0: an eighth of the side (4 of 32)", least=0
    )
    cutout: int = _field(
        0, "pixels a side of a square of each cropped image that is filled with the mean (DeVries and Taylor 2017); 0: none",
        least=0,
    )  # fmt: skip
    network: str = _field("plain", "network without or with shortcuts", ("plain", "residual"))
    family: str = _field(
        "cifar", "He et al.'s nets for small images (three stages) or for photographs (four)", ("cifar", "imagenet")
    )
    depth: int = _field(44, "layers: 6n + 2 (8, 14, 20, ..., 44, ..., 110), or of imagenet 34, 44 or 101", least=8)
    start_depth: int = _field(
        0, "a plain net begins with so many layers and grows to depth by identities after grow_epoch epochs (ours); 0: depth",
        least=0,
    )  # fmt: skip
    grow_epoch: int = _field(0, "epochs of start_depth layers", least=0)
    width: int = _field(16, "filters of the first stage (doubled at each of the others); imagenet: 64 in He et al.", least=1)
    initializer: str = _field(
        "orthonormal", "kernels at the start (dirac: the identity where it fits, ours)",
        ("orthonormal", "delta_orthonormal", "dirac", "he_normal", "glorot_uniform"),
    )  # fmt: skip
    stem_initializer: str = _field(
        "same", "the first convolution at the start: as the others, or the images' principal patches (ours)", ("same", "pca")
    )
    relu_shift: float = _field(
        0.0, "the ReLUs are max(x, -relu_shift) (ours; 0: the ReLU; -1: the shift for the depth)", least=-1
    )
    regularizer: str = _field("orthonormal", "penalty on every kernel", collections.ChainMap({"none": None}, FACTORED))
    factor: float = _field(
        1e-4,
        "strength of the penalty: factor / 2 * ||W^T W - I||^2; l2: factor / 2 * ||W||^2; others: factor times their formula",
        least=0,
    )
    modulation: str = _field(
        "off", "backward error of the convolutions: not touched, or held to the next one up or to the topmost",
        ("off", "neighbour", "anchor"),
    )  # fmt: skip
    tolerance: float = _field(2.0, "modulation: the ratio of magnitudes beyond which a layer is rescaled", least=1)
    max_scale: float = _field(1000.0, "modulation: the largest rescaling of one layer", least=1)
    modulation_steps: int = _field(0, "modulation: switched off after this many steps; 0: never", least=0)
    modulation_sync: bool = _field(True, "moments of the modulation over all replicas, or each replica's own")
    label_smoothing: float = _field(
        0.0, "training: this share of each label is spread evenly over all classes", least=0, most=0.9
    )
    optimizer: str = _field("sgd", "optimizer (muon: orthonormal steps, after Jordan et al. 2024)", OPTIMIZERS)
    learning_rate: float = _field(0.1, "learning rate at its highest", above=0)
    rate_depth: int = _field(
        0, "layers that learning_rate is meant for: it is multiplied by rate_depth / depth; 0: taken as it is", least=0
    )
    vector_rate: float = _field(
        1.0, "muon: learning rate of BatchNormalization's gamma and beta and of biases, over that of kernels", least=0
    )
    momentum: float = _field(0.9, "momentum of sgd, nesterov, rmsprop and muon", least=0, most=1)
    weight_decay: float = _field(0.0, "decoupled weight decay of adamw", least=0)
    schedule: str = _field(
        "step", "learning rate: divided by 10 at 1/2 and 3/4 of the steps, at 1/3 and 2/3, half a cosine to 0, or constant",
        SHAPES,
    )  # fmt: skip
    warmup_steps: int = _field(0, "steps over which the learning rate rises from 0", least=0)
    epochs: int = _field(60, "passes over the training split", least=1)
    max_steps: int = _field(0, "ends the run after this many steps, to which the schedule is fitted; 0: no such limit", least=0)
    batch_size: int = _field(128, "images a step", least=1)
    precision: str = _field("float32", "type of the layers' arithmetic", ("float32", "mixed_bfloat16", "mixed_float16"))
    bn_batches: int = _field(
        16, "training batches that re-estimate BatchNormalization's averages before an evaluation; 0: the moving averages",
        least=0,
    )  # fmt: skip
    bn_sync: bool = _field(True, "BatchNormalization's statistics over all replicas, or each replica's own")
    evaluate_every: int = _field(
        1, "epochs from one validation to the next (the last always has one, where images are held out)", least=1
    )
    seed: int = _field(0, "seed of kernels, order of images and augmentation", least=0, most=2**31 - 1)

    def check(self):
        """Raises `InputError`, which names the flag, what was expected and what came, at the first value that is wrong."""
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata
            wrong = (
                (limits["choices"] and value not in limits["choices"] and f"one of {', '.join(limits['choices'])}")
                or (isinstance(value, float) and not math.isfinite(value) and "a finite number")
                or (limits["least"] is not None and value < limits["least"] and f"at least {limits['least']}")
                or (limits["most"] is not None and value > limits["most"] and f"at most {limits['most']}")
                or (limits["above"] is not None and value <= limits["above"] and f"more than {limits['above']}")
            )
            if wrong:
                raise InputError(f"--{field.name} must be {wrong}. Received: {value!r}")
        if -1 < self.relu_shift < 0:
            raise InputError(f"--relu_shift must be at least 0, or -1. Received: {self.relu_shift!r}")
        for name in ("depth", "start_depth"):
            self._check_depth(name, getattr(self, name))
        if self.start_depth:
            self._check_growth()
        if self.optimizer == "muon" and self.momentum == 1:
            raise InputError("--momentum must be below 1 with --optimizer muon. Received: 1.0")
        if self.augment == "resized_crop" and not self.image_size:
            raise InputError("--image_size must be given with --augment resized_crop, which resizes to it. Received: 0")
        if self.network == "residual" and self.modulation != "off":
            raise InputError(
                "--modulation must be off for --network residual: modulation is defined on a chain, and shortcuts branch. "
                f"Received: {self.modulation!r}"
            )
        return self

    def _check_depth(self, name, depth):
        if name == "start_depth" and not depth:
            return
        if self.family == "imagenet":
            if depth not in BLOCKS:
                told = ", ".join(map(str, BLOCKS))
                raise InputError(f"--{name} must be one of {told} with --family imagenet. Received: {depth!r}")
        elif depth < 8 or (depth - 2) % 6:
            below = max(depth - (depth - 2) % 6, 8)
            raise InputError(f"--{name} must be 6n + 2; the nearest are {below} and {below + 6}. Received: {depth!r}")

    def _check_growth(self):
        if self.network == "residual":
            raise InputError(f"--start_depth must be 0 for --network residual. Received: {self.start_depth!r}")
        if self.family == "imagenet" and self.depth in BOTTLENECK_DEPTHS:
            raise InputError(f"--start_depth must be 0 for --depth {self.depth} of imagenet. Received: {self.start_depth!r}")
        if self.start_depth >= self.depth:
            raise InputError(f"--start_depth must be less than --depth, {self.depth}. Received: {self.start_depth!r}")
        if not 0 < self.grow_epoch < self.epochs:
            raise InputError(
                f"--grow_epoch must be at least 1 and less than --epochs, {self.epochs}, with --start_depth. "
                f"Received: {self.grow_epoch!r}"
            )

    def without_effect(self):
        """Returns `{name: why}` of the values that are not read as the others are: `{"momentum": "--optimizer adam"}`, say."""
        return {
            name: f"--{ruler} {getattr(self, ruler)}"
            for name, (ruler, readers) in READ_FOR.items()
            if getattr(self, ruler) not in readers
        }

    @property
    def peak_learning_rate(self):
        return self.learning_rate * (self.rate_depth / self.depth if self.rate_depth else 1)

    def to_json(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values):
        """Returns the recipe of a dict that `to_json` once gave: a value that it lacks has its default.

        Raises:
            ValueError: If a value is unknown, or retired and not at its default; such a recipe can only be read as text.
        """
        kept = {name: value for name, value in values.items() if name not in RETIRED or value != RETIRED[name]}
        unknown = sorted(set(kept) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            shown = ", ".join(f"{name}={kept[name]!r}" for name in unknown)
            raise ValueError(f"a recipe of this version has no such value: {shown}")
        return cls(**kept)


def read_recipe(path):
    """Returns name and `Recipe` of a JSON file `{"recipe_name": ..., "recipe": {...}}`; a value that it lacks has its default.

    Raises:
        InputError: If the file is none, or a value is not what was expected.
    """
    refused = f"--recipe_file must be a JSON file with a recipe, as a run's run.json. Received: {str(path)!r}"
    try:
        content = json.loads(pathlib.Path(path).read_text())
        recipe, name = Recipe.from_json(content["recipe"]), content.get("recipe_name") or pathlib.Path(path).stem
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{refused} ({type(error).__name__}: {error})") from error
    if not isinstance(name, str):
        raise InputError(f"{refused} (recipe_name={name!r} is no str)")
    wrong = [field for field in dataclasses.fields(Recipe) if not _fits(getattr(recipe, field.name), field.type)]
    if wrong:
        told = ", ".join(f"{field.name}={getattr(recipe, field.name)!r} is no {field.type.__name__}" for field in wrong)
        raise InputError(f"{refused} ({told})")
    return name, recipe.check()


def _fits(value, kind):
    return type(value) is kind or (kind is float and type(value) is int)
