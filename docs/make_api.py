"""Writes docs/api.md from the docstrings of `ortho_keras.__all__`.

python docs/make_api.py
"""

import dataclasses
import inspect
import pathlib
import re
import sys
import textwrap

# Fences here are `py`: tests/test_docs.py runs those of the other pages, which are `python`.
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ortho_keras

PAGE = ROOT / "docs" / "api.md"
HEAD = "<!-- Written by docs/make_api.py from the docstrings: change those, then run it. -->\n\n# API\n"
# Heading -> modules, in the order of the page. A module that is in none of them ends the script.
GROUPS = {
    "Orthonormality": "regularizers orthonormalize decay kernels design initializers patch_pca related_regularizers",
    "Modulation, callbacks": "modulation callbacks",
    "Where the signal goes": "signal_report signals",
    "Nets and layers": "networks growth shifted_relu batchnorm",
    "Training, pictures, files": "optimizers features fold loading",
}
SECTIONS = ("Args", "Call arguments", "Returns", "Raises", "Example", "Reference")
LISTS = ("Args", "Call arguments", "Raises")  # of `name: text` items


def page():
    """Returns the page's text."""
    things = {name: getattr(ortho_keras, name) for name in ortho_keras.__all__ if not name.startswith("__")}
    sections, index = [], []
    for heading, modules in GROUPS.items():
        modules = modules.split()
        found = [name for name, thing in things.items() if _module(thing) in modules]
        found.sort(key=lambda name: modules.index(_module(things[name])))
        index.append(f"- {heading}: {', '.join(_link(name) for name in found)}")
        sections += [f"## {heading}", *(_entry(name, things.pop(name)) for name in found)]
    if things:
        sys.exit(f"docs/make_api.py: GROUPS must have a place for the modules of {', '.join(things)}")
    return "\n\n".join([HEAD + "\n" + "\n".join(index), *sections]) + "\n"


def _module(thing):
    return thing.__module__.rpartition(".")[2]


def _link(name):
    return f"[`{name}`](#{name.lower()})"


def _entry(name, thing):
    module = thing.__module__.replace(".", "/")
    parts = [f"### `{name}`", f"[{module}.py](../{module}.py)"]
    if dataclasses.is_dataclass(thing):
        parts += [_linked(_markdown(thing), name), _fields(thing)]
    else:
        parts += [f"```py\n{_signature(name, thing)}\n```", _linked(_markdown(thing), name)]
    members = vars(thing).items() if inspect.isclass(thing) else ()
    for member, value in members:
        value = getattr(value, "__func__", value)  # of a class method
        if value.__doc__ and (inspect.isfunction(value) or isinstance(value, property)) and not _is_private(member):
            shown = f"{name}.{member}" if isinstance(value, property) else _signature(f"{name}.{member}", value)
            parts += [f"#### `{shown}`", _linked(_markdown(value), name)]
    return "\n\n".join(parts)


def _is_private(member):
    return member.startswith("_") and member != "__call__"


def _signature(name, thing):
    """The call with its defaults; of a class whose arguments are those of its parent, the parent's name."""
    function = thing.__init__ if inspect.isclass(thing) else thing
    if function.__module__.partition(".")[0] != "ortho_keras":
        return f"{name}(...)  # the arguments of {inspect.getmro(thing)[1].__name__}"
    parameters = inspect.signature(function).parameters.values()
    given = [str(p).replace("'", '"') for p in parameters if p.name not in ("self", "cls")]  # as ruff would have it
    line = f"{name}({', '.join(given)})"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {one},\n" for one in given) + ")"


def _fields(thing):
    """A dataclass's fields, with the comments behind them."""
    comments = dict(re.findall(r"^    (\w+): [^#\n]+# (.+)$", inspect.getsource(thing), re.MULTILINE))
    fields = [(f.name, getattr(f.type, "__name__", f.type)) for f in dataclasses.fields(thing)]
    told = [f"- `{name}` ({kind}){': ' + comments[name] if name in comments else ''}" for name, kind in fields]
    return "\n".join(["**Fields**\n", *told])


def _markdown(thing):
    """A docstring's sections as Markdown: lists for arguments, a fence for the example, the rest as it is."""
    body, *sections = re.split(rf"^({'|'.join(SECTIONS)}):\n", inspect.getdoc(thing), flags=re.MULTILINE)
    parts = [body.strip()]
    for title, text in zip(sections[::2], sections[1::2]):
        parts.append(f"**{title}**")
        text = textwrap.dedent(text).strip()
        if title in LISTS:
            parts.append(re.sub(r"^([\w, ]+):", r"- `\1`:", re.sub(r"\n +", "\n  ", text), flags=re.MULTILINE))
        else:
            parts.append(f"```py\n{text}\n```" if title == "Example" else text)
    return "\n\n".join(parts)


def _linked(text, own):
    """Names of the page in backticks become links, outside of fences."""
    outside = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    names = re.compile(f"`({'|'.join(name for name in ortho_keras.__all__ if name not in (own, '__version__'))})`")
    return "".join(part if part.startswith("```") else names.sub(lambda match: _link(match[1]), part) for part in outside)


if __name__ == "__main__":
    PAGE.write_text(page())
