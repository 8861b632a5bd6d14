"""The search space: which of a recipe's values are searched, in which range, and how a point becomes a recipe."""

import dataclasses

from ortho_keras.method.errors import InputError
from ortho_keras.trainer.recipe import READ_FOR, Recipe

DIGITS = 4  # significant digits of a sampled value


@dataclasses.dataclass(frozen=True)
class Range:
    """Every number from `low` to `high`, sampled uniformly in its logarithm."""

    low: float
    high: float

    def __contains__(self, value):
        return self.low <= value <= self.high

    def __str__(self):
        return f"{self.low:g}:{self.high:g}"

    def nearest(self, value):
        return min(max(value, self.low), self.high)

    def with_value(self, value):
        return Range(min(self.low, value), max(self.high, value)) if value > 0 else self

    def narrowed(self, text):
        """Returns the part of this range that `"LOW:HIGH"` describes, or raises `ValueError`."""
        low, high = (float(part) for part in text.split(":"))
        if not (low < high and low in self and high in self):
            raise ValueError(text)
        return Range(low, high)


@dataclasses.dataclass(frozen=True)
class Choices:
    """A few values; numbers are in order."""

    values: tuple

    def __contains__(self, value):
        return value in self.values

    def __str__(self):
        return "|".join(f"{value:g}" if isinstance(value, float) else str(value) for value in self.values)

    def nearest(self, value):
        if value in self.values or isinstance(value, str):
            return value if value in self.values else self.values[0]
        return min(self.values, key=lambda own: abs(own - value))

    def with_value(self, value):
        values = self.values if value in self.values else (*self.values, value)
        return Choices(values if isinstance(value, str) else tuple(sorted(values)))

    def narrowed(self, text):
        """Returns the choices that `"VALUE|VALUE"` lists, or raises `ValueError`."""
        values = tuple(dict.fromkeys(type(self.values[0])(part) for part in text.split("|")))
        if not all(value in self for value in values):
            raise ValueError(text)
        return Choices(values)


# The one place where the space is declared.
SPACE = {
    "learning_rate": Range(1e-4, 1.0),
    "factor": Range(1e-6, 10.0),
    "initializer": Choices(("orthonormal", "delta_orthonormal", "dirac")),
    "relu_shift": Choices((-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)),
    "modulation": Choices(("off", "neighbour", "anchor")),
    "tolerance": Choices((1.001, 1.1, 1.5, 2.0, 4.0, 8.0)),
    "modulation_steps": Choices((0, 100, 300, 1000, 3000)),
}
OF_MODULATION = tuple(name for name in SPACE if READ_FOR.get(name, ("",))[0] == "modulation")  # read only where it is on


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """A recipe and what is searched around it.

    Attributes:
        base: `Recipe`, the values of the hyperparameters' defaults and of everything that is not searched.
        parameters: Dict of names in `SPACE` to `Range` or `Choices`.
    """

    base: Recipe
    parameters: dict

    def recipe(self, hp):
        """Returns the recipe of a `keras_tuner.HyperParameters`, in which it declares the hyperparameters.

        Fresh hyperparameters give `base`. Hyperband's number of epochs, if there is one, replaces the recipe's; a network
        that grows does so after the same share of them.
        """
        values = {}
        for name, allowed in self.parameters.items():
            if name in OF_MODULATION and "modulation" in self.parameters:
                on = [value for value in self.parameters["modulation"].values if value != "off"]
                with hp.conditional_scope("modulation", on):
                    values[name] = self._value(hp, name, allowed)
            else:
                values[name] = self._value(hp, name, allowed)
        if "tuner/epochs" in hp.values:
            epochs = values["epochs"] = int(hp.values["tuner/epochs"])
            if self.base.start_depth:  # a single epoch has the full depth
                share = round(self.base.grow_epoch * epochs / self.base.epochs)
                values |= {"grow_epoch": min(max(share, 1), epochs - 1), "start_depth": self.base.start_depth * (epochs > 1)}
        return dataclasses.replace(self.base, **values)

    def _value(self, hp, name, allowed):
        default = getattr(self.base, name)
        if isinstance(allowed, Range):
            value = hp.Float(name, allowed.low, allowed.high, sampling="log", default=default)
        else:
            value = hp.Choice(name, list(allowed.values), default=default)
        if value is None:
            return default  # not active
        return float(f"{value:.{DIGITS}g}") if isinstance(value, float) and value != default else value

    def to_json(self):
        return {"base": self.base.to_json(), "parameters": {name: str(allowed) for name, allowed in self.parameters.items()}}


def search_space(recipe, fixed=(), narrowed=()):
    """Returns the `SearchSpace` around a recipe.

    A value of the recipe that `SPACE` lacks is added to it; one that a narrowed space lacks is replaced by the nearest that it
    has. Values without effect are not searched: modulation's where it is off, modulation itself in a residual network, the
    factor where there is no penalty.

    Args:
        recipe: `Recipe`, whose values the search starts from.
        fixed: Names of values that are not searched.
        narrowed: Strings `NAME=LOW:HIGH` or `NAME=VALUE|VALUE|...`.

    Raises:
        InputError: If a fixed or narrowed value does not lie in `SPACE`, or nothing is left to search.
    """
    for name in (name for name in fixed if name in SPACE):
        value, allowed = getattr(recipe, name), SPACE[name]
        numbers = isinstance(value, (int, float)) and not isinstance(allowed, Range)
        if not (min(allowed.values) <= value <= max(allowed.values) if numbers else value in allowed):
            raise InputError(f"--{name} must lie in the search space, {allowed}. Received: {value!r}")
    parameters = _with_effect({name: SPACE[name] for name in SPACE if name not in fixed}, recipe)
    parameters = {name: allowed.with_value(getattr(recipe, name)) for name, allowed in parameters.items()}
    for text in narrowed:
        name, _, values = text.partition("=")
        if name not in parameters:
            raise InputError(f"--narrow must name one of the searched values, {', '.join(parameters)}. Received: {text!r}")
        allowed = parameters[name]
        try:
            parameters[name] = allowed.narrowed(values)
        except ValueError as error:
            form = f"{name}=LOW:HIGH within" if isinstance(allowed, Range) else f"{name}=VALUE|VALUE of"
            raise InputError(f"--narrow must be {form} {allowed}. Received: {text!r}") from error
        recipe = dataclasses.replace(recipe, **{name: parameters[name].nearest(getattr(recipe, name))})
    parameters = _with_effect(parameters, recipe)
    if not parameters:
        raise InputError("--narrow and the fixed values must leave something to search. Received: every value is fixed")
    return SearchSpace(recipe.check(), parameters)


def _with_effect(parameters, recipe):
    """Leaves out what has a single choice or no effect in this recipe."""
    left_out = [name for name, allowed in parameters.items() if isinstance(allowed, Choices) and len(allowed.values) == 1]
    if recipe.network == "residual":
        left_out.append("modulation")
    if "factor" in recipe.without_effect() or recipe.factor == 0:
        left_out.append("factor")
    if recipe.modulation == "off" and ("modulation" not in parameters or "modulation" in left_out):
        left_out += OF_MODULATION
    return {name: allowed for name, allowed in parameters.items() if name not in left_out}
