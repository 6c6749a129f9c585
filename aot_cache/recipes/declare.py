"""Recipes: which callables of a model run, with what arguments, over which declared ranges.

A recipe has three uses: on the virtual device it enumerates what can be launched, on a GPU it tunes and checks, and the
bundle records its name, so that a reader knows what was declared.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as _replace
from importlib import metadata
from pathlib import Path
from typing import Any

from aot_cache.errors import AotCacheError, DeclarationError, UnknownName, did_you_mean, first_cause, one_line
from aot_cache.recipes import options, shipped
from aot_cache.recipes.dimensions import Dimension, Enumeration, Point, describe, enumerate_points

ENTRY_POINTS = "aot_cache.recipes"
MODES = ("inference", "no_grad", "grad")
AUTOCAST = ("bfloat16", "float16")


_device = ["cuda"]


def device() -> str:
    """The device on which a recipe makes its tensors: `cuda`, or `cpu` during a build for the target `cpu`."""
    return _device[0]


def set_device(name: str) -> None:
    """Set the device on which recipes make their tensors. The builder does so before it runs a recipe."""
    _device[0] = name


class Call:
    """A function and its arguments: what a declared case returns.

    >>> Call(torch.add, x, y, alpha=2)
    """

    __slots__ = ("args", "fn", "kwargs")

    def __init__(self, fn: Callable[..., object], /, *args: object, **kwargs: object) -> None:
        self.fn = fn
        self.args = args
        self.kwargs = kwargs

    def __call__(self) -> object:
        return self.fn(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Case:
    """One callable of a recipe, with the function that makes its arguments for a point (on device `cuda`).

    Args:
        name: unique within the recipe.
        make: takes the point's values by name, returns a `Call`.
        dims: the declared dimensions, in order.
        mode: `inference`, `no_grad` or `grad`: the mode under which serving runs it.
        autocast: a dtype name (`"bfloat16"`) if serving runs under `torch.autocast`, else None.
        hint: dimension → the value that compiled graphs are optimized for; default its largest.
        missed: undeclared points that are also visited, because a serving process missed them.
        doc: the first line of the function's docstring.
    """

    name: str
    make: Callable[..., Call]
    dims: Mapping[str, Dimension]
    mode: str = "inference"
    autocast: str | None = None
    hint: Mapping[str, int] = field(default_factory=dict)
    missed: Sequence[Point] = ()
    doc: str = ""

    def points(self) -> Enumeration:
        """Every point that a build visits: the declared ones, then the missed ones that are not among those."""
        found = enumerate_points(self.dims)
        known = {tuple(point.items()) for point in found.points}
        rows = sorted({tuple((name, point[name]) for name in self.dims) for point in self.missed} - known)
        outside = sum(any(value not in self.dims[name] for name, value in row) for row in rows)
        return Enumeration([*found.points, *map(dict, rows)], found.total + outside, found.sampled, len(rows))

    def call(self, point: Point) -> Call:
        """The call at `point`.

        Raises:
            DeclarationError: the recipe's code does not return a `Call`.
        """
        made = self.make(**point)
        if not isinstance(made, Call):
            raise DeclarationError(
                f"aot_cache.Call(function, *arguments) from case {self.name!r}",
                f"an object of type {type(made).__name__}",
            )
        return made

    def hint_of(self, dim: str) -> int:
        """The size of a dimension that Inductor optimizes for: the declared hint, else the largest value."""
        return self.hint.get(dim, max(self.dims[dim].values[0], self.dims[dim].values[-1]))

    @contextlib.contextmanager
    def modes(self, device: str = "cuda") -> Iterator[None]:
        """Enter the grad and autocast mode that the case declares, on `device`."""
        import torch

        grad: Any = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}[self.mode]
        with contextlib.ExitStack() as stack:
            stack.enter_context(grad())
            if self.autocast is not None:
                stack.enter_context(torch.autocast(device, dtype=getattr(torch, self.autocast)))
            yield


def declare(
    *,
    name: str | None = None,
    mode: str = "inference",
    autocast: str | None = None,
    hint: Mapping[str, int] | None = None,
    **dims: Dimension,
) -> Callable[[Callable[..., Call]], Case]:
    """Declare a case: the decorated function makes the `Call` of a point.

    >>> @declare(batch=Range(1, 512), tokens=Range(1, 4))
    ... def decode(batch, tokens):
    ...     q = torch.randn(batch, tokens, 16, 128, dtype=torch.bfloat16, device="cuda")
    ...     return Call(attention_step, q)

    Raises:
        DeclarationError: the mode is unknown, a value is not a dimension, or the names differ from the function's parameters.
    """

    def decorate(make: Callable[..., Call]) -> Case:
        label = name or make.__name__
        if mode not in MODES:
            raise DeclarationError(f"mode of case {label!r} to be one of {', '.join(MODES)}", repr(mode))
        if autocast is not None and autocast not in AUTOCAST:
            raise DeclarationError(
                f"autocast of case {label!r} to be one of {', '.join(AUTOCAST)}, or None", repr(autocast)
            )
        for dim, value in dims.items():
            if not isinstance(value, Dimension):
                raise DeclarationError(f"dimension {dim!r} of case {label!r} to be a Range or Values", repr(value))
        accepted = inspect.signature(make).parameters
        unfit = sorted(set(dims) ^ set(accepted))
        if unfit:
            raise DeclarationError(
                f"the parameters of case {label!r} differ from its dimensions: {', '.join(unfit)}",
                hint="name the same ones in @declare(...) and in the function",
            )
        _check_hint(label, hint or {}, dims)
        doc = (inspect.getdoc(make) or "").partition("\n")[0]
        return Case(label, make, dict(dims), mode, autocast, dict(hint or {}), doc=doc)

    return decorate


def _check_hint(label: str, hint: Mapping[str, int], dims: Mapping[str, Dimension]) -> None:
    for dim, value in hint.items():
        if dim not in dims or value not in dims[dim]:
            has = f"{dim} {dims[dim].text}" if dim in dims else f"dimensions {', '.join(dims) or 'none'}"
            raise DeclarationError(
                f"a hint of case {label!r} that is one of its points", f"{dim}={value} (it has {has})"
            )


@dataclass(frozen=True)
class Recipe:
    """A model's cases under one name.

    Args:
        name: its name for `aot-cache build --model`.
        cases: at least one; names are unique.
        doc: one line of description.
        spec: its name and options as text, set by `load`.
        settings: what its function made of the options, so that the engine serves with the same ones; None if it has none.
        ranks: how many processes share its work and reduce over each other; 1: each runs all of it, in a job of any size.
    """

    name: str
    cases: Sequence[Case]
    doc: str = ""
    spec: str = field(default="", compare=False)
    settings: Any = field(default=None, compare=False, repr=False)
    ranks: int = 1

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        if not names:
            raise DeclarationError(f"recipe {self.name!r} has no case", hint="declare at least one")
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise DeclarationError(f"recipe {self.name!r} has two cases called {', '.join(twice)}", hint="rename one")
        if self.ranks < 1:
            raise DeclarationError(f"a world size of at least 1 for recipe {self.name!r}", str(self.ranks))

    def narrowed(self, ranges: Mapping[str, Dimension]) -> Recipe:
        """The recipe with the dimensions of `ranges` replaced in every case that has them.

        Raises:
            UnknownName: no case has such a dimension.
        """
        known = {dim for case in self.cases for dim in case.dims}
        for dim in ranges:
            if dim not in known:
                raise UnknownName(
                    f"recipe {self.name!r} has no dimension {dim!r}; known: {', '.join(sorted(known))}",
                    hint=did_you_mean(dim, known),
                )
        cases = [
            _replace(case, dims={dim: ranges.get(dim, own) for dim, own in case.dims.items()}) for case in self.cases
        ]
        return _replace(self, cases=cases)

    def widened(self, points: Mapping[str, Iterable[Point]]) -> Recipe:
        """The recipe, with these points visited in addition to the declared ones.

        Args:
            points: case → points, which may lie outside what is declared.

        Raises:
            UnknownName: there is no such case.
            DeclarationError: a point has other dimensions than its case, or a value that no dimension may have.
        """
        for name in points:
            if name not in {case.name for case in self.cases}:
                known = ", ".join(case.name for case in self.cases)
                raise UnknownName(f"recipe {self.name!r} has no case {name!r}; known: {known}")
        cases = []
        for case in self.cases:
            more = list(points.get(case.name, ()))
            describe(more, case.dims)  # raises if one of them is not a point of this case
            cases.append(_replace(case, missed=(*case.missed, *more)))
        return _replace(self, cases=cases)

    def without(self, points: Collection[tuple[str, Point]]) -> Recipe:
        """The recipe without these (case, point) pairs; declared points are visited all the same."""
        cases = [
            _replace(case, missed=[point for point in case.missed if (case.name, point) not in points])
            for case in self.cases
        ]
        return _replace(self, cases=cases)


def names() -> dict[str, str]:
    """Installed recipes: name → `module:object`."""
    return {entry.name: entry.value for entry in metadata.entry_points(group=ENTRY_POINTS)}


def resolve(spec: str) -> str:
    """The `module:object` of a recipe given by its name or as `module:object`, without options. Imports nothing.

    Raises:
        UnknownName: there is no such recipe.
        DeclarationError: its options are not of the form `?name=value&name=value`.
    """
    name, _ = options.parse(spec)
    if ":" in name:
        return name
    known = names()
    if name in known:
        return known[name]
    raise UnknownName(
        f"unknown model {name!r}; known: {', '.join(sorted(known)) or 'none'}",
        hint=did_you_mean(name, known, "name one of these, or module:object"),
    )


def load(spec: str) -> Recipe:
    """Import the recipe `spec`: a name or `module:object`, with options as in `qwen3.5?spec=mtp&max_batch=64`.

    The object is a `Recipe`, a `Case`, or a function that makes one from keyword options. The options' annotations (str, int,
    float, bool, `Literal`) say how to parse them. A `functools.partial` of such a function fixes some of them.

    Returns:
        The recipe. Its `spec` names the options that differ from the function's defaults, sorted.

    Raises:
        UnknownName: the module, the object or an option does not exist, or the object is not a recipe.
        DeclarationError: importing the module or making the recipe raises, or an option's value is invalid.
    """
    path = resolve(spec)
    name, given = options.parse(options.with_file(spec))
    module_name, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if os.environ.get("AOT_CACHE_DEBUG") == "1":
            traceback.print_exception(first_cause(error))
        own = error.name is None or f"{module_name}.".startswith(f"{error.name}.")  # else the recipe imports it
        near = did_you_mean(module_name, _modules_nearby() if own else (), "install it, or set PYTHONPATH")
        hint = shipped.to_do_in(module_name, near)
        missing = f"no module named {error.name!r}" if error.name else one_line(first_cause(error))
        what = f"cannot import module {module_name!r} of recipe {name!r}"
        raise UnknownName(f"{what}: {missing}", hint=hint) from error
    except Exception as error:
        hint = shipped.to_do_in(module_name, "fix the recipe's module")
        what = f"cannot import recipe {name!r}: {type(error).__name__}: {error}"
        raise DeclarationError(what, hint=hint) from error
    module = found
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        hint = did_you_mean(attribute, vars(module), "name a Recipe, a declared case, or a function that makes one")
        raise UnknownName(f"no recipe at {path}: {module_name} has no {attribute!r}", hint=hint)
    found, kept = _made(found, name, given)
    if isinstance(found, Case):
        found = Recipe(found.name, [found])
    if not isinstance(found, Recipe):
        raise UnknownName(
            f"a Recipe at {path}",
            f"an object of type {type(found).__name__}",
            "name a Recipe, a declared case, or a function that makes one",
        )
    return _replace(found, spec=options.text(name, kept))


def _modules_nearby() -> set[str]:
    """Names of modules in the working folder and PYTHONPATH, from which a misspelt name is corrected."""
    folders = [Path.cwd(), *map(Path, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))]
    return {path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.py")}


def _made(found: Any, name: str, given: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
    """(the object, or what it makes from the options; the options that differ from its defaults)."""
    if not options.makes_recipes(found):
        for option in given if isinstance(found, (Recipe, Case)) else ():
            raise options.unknown(option, name, {})
        return found, {}
    try:
        return options.make(found, name, given)
    except AotCacheError:
        raise
    except Exception as error:
        hint = shipped.what_to_do(found, "")
        raise DeclarationError(f"recipe {name!r} raised {type(error).__name__}: {error}", hint=hint) from error
