"""What is measured of a net's signal, layer by layer, and what it says."""

import csv
import dataclasses
import math
import statistics

from ortho_keras.diagnosis.plots import plot_signals
from ortho_keras.method.files import whole_file

LINES = 120  # of a printed table


@dataclasses.dataclass(frozen=True)
class LayerSignal:
    """One call of a parametric layer; figures that do not apply are NaN."""

    name: str
    kind: str  # the layer's class
    positions: bool  # the output has positions (a convolution's pixels) beside batch and channels
    forward_moment: float  # mean of squares of the output, before the layer's own activation
    backward_moment: float  # q, mean of squares of the error there, which is what the kernel's gradient is made of
    error_to_next: float  # magnitude (root of q) over that of the next parametric layer up
    error_to_top: float  # the same over the topmost parametric layer's
    gradient_ratio: float  # norm of the kernel's gradient over the kernel's norm
    mean_cosine: float  # mean cosine similarity of pairs of filters
    mean_abs_cosine: float  # the same of absolute values, which cannot cancel
    kernel_smallest: float  # singular values of W
    kernel_largest: float
    operator_smallest: float  # singular values of the layer's linear map on this input size
    operator_largest: float
    image_share: float  # share of the output's variance that lies between images; the rest is one pattern over positions
    dead_share: float  # share of channels that the following activation makes constant
    scale: float  # what modulation multiplies the error by, or would
    fired: bool


@dataclasses.dataclass(frozen=True)
class SignalReport:
    """What `signal_report` measured. `print(report)` begins with what is wrong, in words."""

    model: str
    loss: float
    layers: tuple  # of LayerSignal, from input to output
    modulated: bool  # `scale` is what modulation did, not what it would do
    unmeasured: tuple = ()  # names of layers with weights of other kinds: recurrent ones, embeddings

    @property
    def growth(self):
        """The error's growth going down, `(total, per layer, number of steps)`: its magnitude at one end over the other.

        There are two kinds of layers, convolutions (whose output has positions) and the others, and the one whose error changes
        most is told; never from one kind to the other: pooling shrinks the error by arithmetic alone. Of three or more layers
        the lowest is left out: it reads the input, whose scale is arbitrary, and so is its error's. Where the least-squares
        line through all layers' logarithms has more than twice or less than half of the ends' slope, and either comes to more
        than a factor of 10, one odd layer stands at an end, and the line is told instead. NaN where nothing compares.
        """
        growths = [_growth(kind) for kind in self._kinds]
        return max(growths, key=lambda growth: abs(math.log(growth[0])), default=(math.nan, math.nan, 0))

    @property
    def _kinds(self):
        """Layers between which errors compare, each with its place: those with positions, and the others."""
        kinds = [[layer for layer in self.layers if layer.positions is positions] for positions in (True, False)]
        kinds = [kind[1:] if len(kind) > 2 else kind for kind in kinds]
        kinds = [[pair for pair in enumerate(kind) if 0 < pair[1].backward_moment < math.inf] for kind in kinds]
        return [kind for kind in kinds if len(kind) > 1]

    @property
    def findings(self):
        """What is wrong, the gravest first, a list of sentences; empty if nothing is."""
        found = []
        if not math.isfinite(self.loss):
            found.append(f"the loss is {self.loss}: nothing below it can be trusted")
        blown = [layer.name for layer in self.layers if not math.isfinite(layer.forward_moment)]
        if blown:
            found.append(f"the activations are not finite at {_count(blown, 'layer')}, from {blown[0]!r} up")
        broken = [layer.name for layer in self.layers if not math.isfinite(layer.backward_moment)]
        if broken:
            found.append(f"the error is not finite at {_count(broken, 'layer')}, from {broken[-1]!r} down")
        silent = [layer.name for layer in self.layers if layer.backward_moment == 0]
        if silent:
            found.append(f"no error reaches {len(silent)} of {len(self.layers)} layers: {_named(silent)}")
        for kind in self._kinds:
            low, *_, high = sorted((layer for _, layer in kind), key=lambda layer: layer.backward_moment)
            apart = ratio(high.backward_moment, low.backward_moment) ** 0.5
            if apart > 1000 and apart > 10 * max(_growth(kind)[0], 1 / _growth(kind)[0]):
                found.append(f"the error is {apart:.2g} times as large at {high.name!r} as at {low.name!r}")
        total, per_layer, steps = self.growth
        if steps and not silent and not broken and not 0.1 <= total <= 10:
            change = f"grows {per_layer:.3g} times" if total > 1 else f"shrinks to {per_layer:.3g} of itself"
            found.append(f"the error {change} a layer going down: {total:.2g} over {_count(steps, 'layer')}")
        shares = [(layer.image_share, layer.name, layer.kind) for layer in self.layers if layer.image_share < 0.2]
        if shares:
            share, name, kind = min(shares)
            between, like = ("images", ", as zero-padded borders draw it") if "Conv" in kind else ("samples", "")
            found.append(
                f"only {100 * share:.2g} % of the variance at {name!r} is between {between}, the rest is one pattern over "
                f"positions{like} ({_count(shares, 'layer')} below 20 %)"
            )
        dead = [(layer.dead_share, layer.name) for layer in self.layers if layer.dead_share > 0.3]
        if dead:
            share, name = max(dead)
            found.append(f"{100 * share:.0f} % of the channels behind {name!r} are dead ({_count(dead, 'layer')} above 30 %)")
        return found

    def __str__(self):
        total, _, steps = self.growth
        healthy = f"nothing is wrong: the error keeps its magnitude ({total:.2g} over {_count(steps, 'layer')} going down)"
        healthy = healthy if steps else "nothing is wrong, and there are too few layers to tell the error's growth"
        fired = sum(layer.fired for layer in self.layers)
        did = f"modulation {'did' if self.modulated else 'would do'}: {fired} layers rescaled"
        if all(math.isnan(layer.scale) for layer in self.layers):
            did = "modulation does not apply, the model branches"
        lines = [f"{self.model}: {'; '.join(self.findings) or healthy}"]
        if self.unmeasured:
            lines[0] += f" (not measured: {_named(self.unmeasured)})"
        lines.append(
            f"{len(self.layers)} parametric layers, loss {self.loss:.4g}; {did}. Top layer first; "
            "error: its magnitude over the top layer's; gradient: the kernel's, over its norm; W, operator: singular values"
        )
        width = max(len(layer.name) for layer in self.layers)
        header = ("forward", "error", "gradient", "|cosine|", "W", "operator", "images", "dead", "scale")
        sizes = (9, 9, 9, 9, 13, 13, 6, 5, 9)
        lines.append(" ".join(["layer".ljust(width), *(name.rjust(size) for name, size in zip(header, sizes))]))
        table = []
        for layer in reversed(self.layers):
            cells = (
                f"{layer.forward_moment**0.5:.3g}",
                f"{layer.error_to_top:.3g}",
                f"{layer.gradient_ratio:.3g}",
                f"{layer.mean_abs_cosine:.3g}",
                f"{layer.kernel_smallest:.2g}-{layer.kernel_largest:.2g}",
                f"{layer.operator_smallest:.2g}-{layer.operator_largest:.2g}",
                _percent(layer.image_share),
                _percent(layer.dead_share),
                f"{layer.scale:.3g}" if layer.fired else "",
            )
            cells = ["" if cell in ("nan", "nan-nan") else cell for cell in cells]
            table.append(" ".join([layer.name.ljust(width), *(cell.rjust(size) for cell, size in zip(cells, sizes))]).rstrip())
        left_out = len(table) - LINES
        if left_out > 0:
            table[LINES // 2 : -LINES // 2] = [f"... {left_out} layers between: to_csv and to_pandas have all of them ..."]
        return "\n".join(lines + table)

    def to_csv(self, path):
        """Writes one line for each layer, with a header.

        Args:
            path: Path of the file, in a folder that exists.

        Raises:
            ValueError: If there cannot be a file.
        """
        with whole_file(path) as own, own.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(LayerSignal)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(layer) for layer in self.layers)

    def to_pandas(self):
        """Returns a `pandas.DataFrame` with one row for each layer.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas (to_csv does without)") from error
        return pandas.DataFrame([dataclasses.asdict(layer) for layer in self.layers])

    def plot(self, path):
        """Draws the figures over the layers, as a PNG file.

        Args:
            path: Path of the file, in a folder that exists.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there cannot be a file.
        """
        plot_signals(self, path)


def _growth(layers):
    """See `SignalReport.growth`; of `(place, layer)` of one kind, from input to output."""
    places, layers = zip(*layers)
    logarithms = [0.5 * math.log(layer.backward_moment) for layer in layers]
    steps, ends = places[-1] - places[0], logarithms[0] - logarithms[-1]
    line = -steps * statistics.linear_regression(places, logarithms).slope
    borne_out = max(abs(ends), abs(line)) <= math.log(10) or 0.5 <= ratio(line, ends) <= 2
    total = ends if borne_out else line
    return math.exp(total), math.exp(total / steps), steps


def ratio(numerator, denominator):
    """Of two magnitudes; NaN for 0 / 0."""
    if denominator == 0:
        return math.inf if numerator > 0 else math.nan
    return numerator / denominator


def _percent(share):
    return "" if math.isnan(share) else f"{100 * share:.0f} %"


def _count(things, noun):
    number = things if isinstance(things, int) else len(things)
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _named(names, shown=3):
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
