"""A recipe: a frozen set of values that describes one training run completely."""

import collections
import dataclasses
import pathlib
import reprlib

from ortho_keras.method.checks import check_number
from ortho_keras.method.errors import InputError
from ortho_keras.method.files import read_json
from ortho_keras.method.regularizers import REGULARIZERS
from ortho_keras.nets.networks import BLOCKS, BOTTLENECK_DEPTHS
from ortho_keras.trainer.optimizers import SHAPES

OPTIMIZERS = ("sgd", "nesterov", "adagrad", "adadelta", "rmsprop", "adam", "adamw", "muon")
INITIALIZERS = ("orthonormal", "delta_orthonormal", "dirac", "he_normal", "glorot_uniform")

FACTORED = collections.ChainMap({"l2": None}, REGULARIZERS)  # penalties with a factor; regularizers may still be added

MIRRORING = ("crop_flip", "resized_crop")  # the choices of augment that mirror images

# Values that only some choices of another value read: name -> that value's name, and those choices.
READ_FOR = {
    "momentum": ("optimizer", ("sgd", "nesterov", "rmsprop", "muon")),
    "vector_rate": ("optimizer", ("muon",)),
    "weight_decay": ("optimizer", ("adamw",)),
    **dict.fromkeys(("factor", "penalty_every"), ("regularizer", FACTORED)),
    **dict.fromkeys(("padding", "crop_border", "cutout"), ("augment", ("crop", "crop_flip"))),
    "grow_epoch": ("start_depth", range(8, 2**31)),
    **dict.fromkeys(("tolerance", "max_scale", "modulation_steps", "modulation_sync"), ("modulation", ("neighbour", "anchor"))),
}

# The form of a file that holds a recipe: run.json, result.json, a search's best.json.
STORED = {
    "recipe": {str: (bool, int, float, str)},
    "recipe_name": (str, type(None)),
    "data_sha256": (str, type(None)),  # runs of earlier versions have none
}

# Values of earlier versions: a stored recipe that has one of them at its default is the same recipe without it.
RETIRED = {"bn_shift": 0.0, "mirror_symmetry": False, "widening_initializer": "same", "stem_initializer": "same"}


def _field(default, help, choices=None, **limits):
    """A recipe's field: its default, the flag's help, and its choices or the limits that `check_number` checks."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "limits": limits})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Every value that decides what a run computes. Each field is a flag of `train.py`; `check` validates all of them."""

    dataset: str = _field("digits", "digits, a TFDS name (cifar10, cifar100, fashion_mnist, ...) or folder:PATH")
    image_size: int = _field(0, "images are resized to this side in pixels; 0 keeps their size", least=0, most=4096)
    hold_out: bool = _field(True, "hold out a tenth of the training images for validation where the data has no such split")
    augment: str = _field(
        "none",
        "crop: random crop of the padded image; crop_flip: and horizontal flip; resized_crop: a random part of the image, "
        "resized, and flip",
        ("none", "crop", "crop_flip", "resized_crop"),
    )
    storage: str = _field(
        "memory", "where the images are held; disk: every step decodes its images, at image_size", ("memory", "disk")
    )
    padding: str = _field("mean", "padding before the crop: the mean pixel, or the mirrored border", ("mean", "symmetric"))
    crop_border: int = _field(0, "pixels of padding on each side; 0: an eighth of the side (4 of 32)", least=0)
    cutout: int = _field(0, "side in pixels of a random square filled with the mean (DeVries & Taylor 2017); 0: none", least=0)
    network: str = _field("plain", "network without or with shortcuts", ("plain", "residual"))
    family: str = _field(
        "cifar", "He et al.'s networks for small images (three stages) or for photographs (four)", ("cifar", "imagenet")
    )
    depth: int = _field(44, f"layers: 6n + 2 (8, 14, ..., 44, ...); of imagenet {' or '.join(map(str, BLOCKS))}", least=8)
    start_depth: int = _field(0, "layers of a plain net that grows to depth after grow_epoch epochs (ours); 0: depth", least=0)
    grow_epoch: int = _field(0, "epochs of training with start_depth layers", least=0)
    width: int = _field(16, "filters of the first stage, doubled at each later stage (imagenet in He et al.: 64)", least=1)
    initializer: str = _field("orthonormal", "initializer of the kernels (dirac: identity where it fits, ours)", INITIALIZERS)
    initial_weights: str = _field("", "a .keras file of the same network, such as another run's, for its weights")
    relu_shift: float = _field(0.0, "activation max(x, -relu_shift) (ours; 0: ReLU; -1: chosen by depth)", least=-1)
    regularizer: str = _field("orthonormal", "penalty on every kernel", collections.ChainMap({"none": None}, FACTORED))
    factor: float = _field(
        1e-4,
        "strength of the penalty: factor / 2 * ||W^T W - I||^2; l2: factor / 2 * ||W||^2; others: factor times their formula",
        least=0,
    )
    penalty_every: int = _field(
        0, "steps from one penalty to the next, as many times as large; 0: by its share of a step's arithmetic", least=0
    )
    modulation: str = _field(
        "off", "rescales convolutions' error signals to the next layer's or the last one's", ("off", "neighbour", "anchor")
    )
    tolerance: float = _field(2.0, "modulation: ratio of magnitudes beyond which a layer is rescaled", least=1)
    max_scale: float = _field(1000.0, "modulation: largest rescaling of one layer", least=1)
    modulation_steps: int = _field(0, "modulation: switched off after this many steps; 0: never", least=0)
    modulation_sync: bool = _field(True, "modulation: moments over all replicas, or each replica's own")
    label_smoothing: float = _field(0.0, "share of each training label that is spread over all classes", least=0, most=0.9)
    optimizer: str = _field("sgd", "optimizer (muon: orthonormal steps, after Jordan et al. 2024)", OPTIMIZERS)
    learning_rate: float = _field(0.1, "peak learning rate", above=0)
    rate_depth: int = _field(0, "scales the learning rate by rate_depth / depth; 0: no scaling", least=0)
    vector_rate: float = _field(1.0, "muon: learning rate of gamma, beta and biases over that of kernels", least=0)
    momentum: float = _field(0.9, "momentum of sgd, nesterov, rmsprop and muon", least=0, most=1)
    weight_decay: float = _field(0.0, "decoupled weight decay of adamw", least=0)
    schedule: str = _field(
        "step", "learning rate divided by 10 at 1/2 and 3/4 of the steps, at 1/3 and 2/3; half a cosine to 0; constant", SHAPES
    )
    warmup_steps: int = _field(0, "steps of linear warm-up of the learning rate", least=0)
    epochs: int = _field(60, "passes over the training split", least=1)
    max_steps: int = _field(0, "largest number of steps, to which the schedule is fitted; 0: no limit", least=0)
    batch_size: int = _field(128, "images per step, over all replicas", least=1)
    precision: str = _field("float32", "dtype policy of the layers", ("float32", "mixed_bfloat16", "mixed_float16"))
    bn_batches: int = _field(
        16, "training batches that re-estimate BatchNormalization's averages before an evaluation; 0: moving averages", least=0
    )
    bn_sync: bool = _field(True, "BatchNormalization's statistics over all replicas, or each replica's own")
    evaluate_every: int = _field(1, "epochs between validations; the last epoch always has one", least=1)
    seed: int = _field(0, "seed of kernels, order of images and augmentation", least=0, most=2**31 - 1)

    def check(self):
        """Returns the recipe, or raises `InputError` that names the first wrong flag, what was expected and what came."""
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if field.type in (int, float):
                check_number(f"--{field.name}", value, **field.metadata["limits"], integer=field.type is int)
            elif not isinstance(value, field.type) or (choices and value not in choices):
                expected = f"one of {', '.join(choices)}" if choices else f"a {field.type.__name__}"
                raise InputError(f"--{field.name} must be {expected}. Received: {value!r}")
        residual, start = self.network == "residual", self.start_depth
        bottlenecks = self.family == "imagenet" and self.depth in BOTTLENECK_DEPTHS
        for name, wrong, expected in (
            ("relu_shift", -1 < self.relu_shift < 0, "at least 0, or -1"),
            ("depth", self._other_depths(self.depth), self._other_depths(self.depth)),
            ("start_depth", start and self._other_depths(start), self._other_depths(start)),
            ("initial_weights", start and self.initial_weights, "empty with --start_depth"),
            ("start_depth", start and residual, "0 for --network residual"),
            ("start_depth", start and bottlenecks, f"0 for --depth {self.depth} of imagenet"),
            ("start_depth", start >= self.depth, f"less than --depth, {self.depth}"),
            (
                "grow_epoch",
                start and not 0 < self.grow_epoch < self.epochs,
                f"at least 1 and less than --epochs, {self.epochs}, with --start_depth",
            ),
            ("momentum", self.optimizer == "muon" and self.momentum == 1, "below 1 with --optimizer muon"),
            ("image_size", self.storage == "disk" and not self.image_size, "at least 1 with --storage disk"),
            ("storage", self.storage == "disk" and self.dataset == "digits", "memory for --dataset digits"),
            ("modulation", residual and self.modulation != "off", "off for --network residual: shortcuts break its chain"),
        ):
            if wrong:
                raise InputError(f"--{name} must be {expected}. Received: {getattr(self, name)!r}")
        return self

    def _other_depths(self, depth):
        """Which depths the family has, in words; `None` where `depth` is one of them."""
        if self.family == "imagenet":
            return None if depth in BLOCKS else f"one of {', '.join(map(str, BLOCKS))} with --family imagenet"
        below = max(depth - (depth - 2) % 6, 8)
        return None if depth == below else f"6n + 2; the nearest are {below} and {below + 6}"

    def without_effect(self):
        """Returns `{name: why}` of the values that the other values leave unread, as `{"momentum": "--optimizer adam"}`."""
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
        """Returns the recipe of a dict that `to_json` returned; missing values have their defaults.

        Raises:
            ValueError: If a value is unknown, or retired and not at its default.
        """
        kept = {name: value for name, value in values.items() if name not in RETIRED or value != RETIRED[name]}
        unknown = sorted(set(kept) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            shown = reprlib.repr({name: kept[name] for name in unknown})
            raise ValueError(f"a recipe of this version has no such value: {shown}")
        return cls(**kept)


def read_recipe(path):
    """Returns name and `Recipe` of a JSON file `{"recipe_name": ..., "recipe": {...}}`; missing values have their defaults.

    Raises:
        InputError: If the file cannot be read, or a value in it is wrong.
    """
    expected = "--recipe_file must be a JSON file with a recipe, as a run's run.json"
    content = read_json(path, STORED, expected)
    try:
        recipe = Recipe.from_json(content["recipe"]).check()
    except ValueError as error:
        raise InputError(f"{expected}. Received: {str(path)!r} ({error})") from error
    return content.get("recipe_name") or pathlib.Path(path).stem, recipe
