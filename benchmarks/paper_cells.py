"""The cells of the paper's table: arms, depths, how a cell's rate and factor are chosen, and the table of what is there."""

import dataclasses
import json
import math
import pathlib

from runs import ROOT, quality, table

from ortho_keras.trainer.recipes import RECIPES
from ortho_keras.trainer.result import hardware

RESULTS = ROOT / "benchmarks" / "results" / "paper"
BASE = "plain44_cifar10"
STEPS, WARMUP, SEARCH_STEPS, CHANCE_STEPS = 8000, 400, 800, 2000
EPOCHS = 23  # of 351 steps: more than 8,000 steps
SEARCH_SEED = 100  # none of the reported seeds
GRID = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
FIRST_DEPTH, FIRST_RATES = 44, (0.1, 0.03, 0.01)
FACTORS = (1e-4, 1e-2)  # of the penalty: whichever has the higher validation accuracy after CHANCE_STEPS at FIRST_DEPTH
DEPTHS = (20, 44, 110)


@dataclasses.dataclass(frozen=True)
class Arm:
    about: str
    values: dict  # of the recipe, where they differ from orthonormal initialization and penalty
    depths: tuple = DEPTHS
    paper: dict = dataclasses.field(default_factory=dict)  # depth -> the paper's figure with its standing

    @property
    def penalized(self):
        return self.values.get("regularizer") != "l2"


_L2 = {"initializer": "he_normal", "regularizer": "l2"}
_OURS = {"initializer": "dirac", "relu_shift": 1.0}

ARMS = {
    "he_l2": Arm(
        "He initialization, L2 (the paper's baseline)",
        _L2,
        paper={44: "83.8 (read off a figure)", 110: "does not train (as cited by others)"},
    ),
    "orthonormal": Arm(
        "orthonormal initialization and penalty (the paper's first half)",
        {},
        paper={44: "87.2 (read off a figure), best 88.42 (as cited by others)"},
    ),
    "neighbour": Arm(
        "`orthonormal` with modulation between neighbors, tolerance 1.1 (the paper's method)",
        {"modulation": "neighbour", "tolerance": 1.1},
        (44, 110),
        {110: "81.6 (as cited by others)"},
    ),
    "anchor": Arm("`orthonormal` with modulation by the anchor (ours)", {"modulation": "anchor"}, (44, 110)),
    "ours": Arm("orthonormal penalty, identities, ShiftedReLU (ours)", _OURS),
    "ours_anchor": Arm("`ours` with modulation by the anchor (ours)", {**_OURS, "modulation": "anchor"}, (44, 110)),
    "residual_l2": Arm(
        "residual network, He initialization, L2",
        {**_L2, "network": "residual"},
        paper={44: "87.9 (read off a figure)", 110: "86.5 (read off a figure)"},
    ),
    "residual_orthonormal": Arm(
        "residual network, orthonormal initialization and penalty",
        {"network": "residual"},
        paper={110: "90.0 (read off a figure)"},
    ),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a search of the rate, a trial of the factor, or a reported one."""

    arm: str
    depth: int
    factor: float
    rate: float
    steps: int
    seed: int

    @property
    def name(self):
        return f"{self.arm}-depth{self.depth}-factor{self.factor}-rate{self.rate}-steps{self.steps}-seed{self.seed}"

    def recipe(self, precision):
        """The recipe of the run; a search is the beginning of the reported one, before the rate is first divided."""
        values = {"depth": self.depth, "factor": self.factor, "learning_rate": self.rate, "seed": self.seed}
        values |= {"modulation": "off", "tolerance": 2.0}  # unless the arm says otherwise
        values |= {"max_steps": self.steps, "epochs": EPOCHS, "warmup_steps": WARMUP, "evaluate_every": 3}
        if self.steps < STEPS:
            values["schedule"] = "constant"
        return dataclasses.replace(RECIPES[BASE].recipe, **{**values, **ARMS[self.arm].values}, precision=precision)


class Table:
    """The results in a folder, and what they decide."""

    def __init__(self, folder=RESULTS):
        self.folder = pathlib.Path(folder)

    def path(self, cell):
        return self.folder / f"{cell.name}.json"

    def result(self, cell):
        path = self.path(cell)
        return json.loads(path.read_text()) if path.exists() else None

    def best(self, cells):
        """The best of some cells by validation accuracy, then cross-entropy; `None` where a result is missing."""
        results = {cell: self.result(cell) for cell in cells}
        if not results or None in results.values():
            return None
        return max(results, key=lambda cell: quality(results[cell]))

    def searches(self, arm, depth, factor):
        """The runs that choose a rate: three at the first depth; elsewhere the two nearest to its choice times 44 / depth."""
        rates = FIRST_RATES
        if depth != FIRST_DEPTH:
            chosen = self.rate(arm, FIRST_DEPTH, factor)
            aim = chosen * FIRST_DEPTH / depth if chosen else None
            rates = sorted(GRID, key=lambda rate: abs(math.log(rate / aim)))[:2] if aim else ()
        return [Cell(arm, depth, factor, rate, SEARCH_STEPS, SEARCH_SEED) for rate in sorted(rates, reverse=True)]

    def rate(self, arm, depth, factor):
        chosen = self.best(self.searches(arm, depth, factor))
        return chosen.rate if chosen else None

    def factor_trials(self):
        """The two runs that choose the penalty's factor; fewer while rates are missing."""
        rates = {factor: self.rate("orthonormal", FIRST_DEPTH, factor) for factor in FACTORS}
        return [
            Cell("orthonormal", FIRST_DEPTH, factor, rate, CHANCE_STEPS, SEARCH_SEED) for factor, rate in rates.items() if rate
        ]

    def factor(self, arm):
        if not ARMS[arm].penalized:
            return FACTORS[0]
        trials = self.factor_trials()
        chosen = self.best(trials) if len(trials) == len(FACTORS) else None
        return chosen.factor if chosen else None

    def reported(self, arm, depth, seed):
        """The reported run of a cell; `None` where its factor or rate is not chosen yet."""
        factor = self.factor(arm)
        rate = self.rate(arm, depth, factor) if factor else None
        return Cell(arm, depth, factor, rate, STEPS, seed) if rate else None

    def by_depth(self, seed=0):
        """The table: a row for each arm, with test and training accuracy at each depth beside the paper's figures."""
        rows = []
        for arm, settings in ARMS.items():
            cells = [self._accuracies(arm, depth, seed) if depth in settings.depths else "" for depth in DEPTHS]
            paper = "; ".join(f"{depth}: {figure}" for depth, figure in settings.paper.items())
            rows.append([f"`{arm}`", settings.about, *cells, paper])
        return table(["arm", "what it is", *(f"{depth} layers" for depth in DEPTHS), "the paper's accuracy, %"], rows)

    def _accuracies(self, arm, depth, seed):
        cell = self.reported(arm, depth, seed)
        result = self.result(cell) if cell else None
        if result is None:
            return "not yet run"
        if "diverged" in result:
            return f"diverged at {cell.rate:g}"
        ended = "" if result["steps"] == STEPS else f", chance at step {result['steps']}"
        return f"{100 * result['test_accuracy']:.2f} ({100 * result['training_accuracy']:.2f}{ended}) at {cell.rate:g}"

    def runs(self):
        """Every run that is there: its accuracies, time, device, rate, and command."""
        rows = []
        for path in sorted(self.folder.glob("*.json")):
            result = json.loads(path.read_text())
            recipe = result["recipe"]
            names = ("validation_accuracy", "test_accuracy", "training_accuracy")
            figures = [f"{100 * result[name]:.2f}" if result.get(name) is not None else "" for name in names]
            seconds = f"{result['seconds']:.0f}" if "seconds" in result else result["diverged"]
            device = hardware(result["device"]) if "device" in result else ""
            rows.append([f"`{result['arm']}`", recipe["depth"], *figures, seconds, device, f"`{result['command']}`"])
        header = ["arm", "layers", "validation accuracy, %", "test accuracy, %", "training accuracy, %", "seconds", "device"]
        return table([*header, "command"], rows)
