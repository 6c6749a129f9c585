"""Constants of kernels whose values are known only when a server starts, such as a number of cache blocks.

A bundle cannot have such a specialization. It has what is needed to compile it in a moment: all of the specialization but
these values. The server compiles them when it knows the values, before any capture (`runtime.late_compile`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aot_cache.artifact.key import function_of
from aot_cache.artifact.manifest import Kernel, KernelUnit, StartVariant
from aot_cache.artifact.specialization import parameter_names
from aot_cache.errors import DeclarationError
from aot_cache.store import JsonValue


@dataclass(frozen=True)
class Mark:
    """A constexpr parameter that is known at start.

    Args:
        kernel: `module:qualname`; empty for every kernel that has such a parameter.
        argument: the parameter's name.
    """

    kernel: str
    argument: str

    @classmethod
    def parse(cls, text: str) -> Mark:
        """Parse `ARGUMENT` or `module:kernel.ARGUMENT`.

        Raises:
            DeclarationError: it is neither.
        """
        kernel, _, argument = text.rpartition(".") if ":" in text else ("", "", text)
        if not argument.isidentifier() or (kernel and not all(kernel.split(":"))):
            expected = "a constant as argument, or as module:kernel.argument"
            raise DeclarationError(expected, repr(text), "write --at-start num_blocks")
        return cls(kernel, argument)

    def positions(self, name: str, parameters: Sequence[str]) -> list[int]:
        """The parameter's position, if the kernel called `name` is meant and has it."""
        if self.kernel not in ("", function_of(name)):
            return []
        return [number for number, parameter in enumerate(parameters) if parameter == self.argument]


def variants(marks: Sequence[Mark], kernels: Sequence[Kernel], units: Sequence[KernelUnit]) -> list[StartVariant]:
    """The specializations of the marked kernels, each once, without the values of the marked constants.

    Raises:
        DeclarationError: no kernel has a marked parameter, or it is no constexpr.
    """
    out: dict[str, StartVariant] = {}
    used: set[Mark] = set()
    for number, kernel in enumerate(kernels):
        mine = [unit for unit in units if unit.kernel == number]
        parameters = parameter_names(kernel.name, kernel.closure) if mine else ()
        places = {at: mark for mark in marks for at in mark.positions(kernel.name, parameters)}
        if not places:
            continue
        used.update(places.values())
        for unit in mine:
            one = _variant(unit, places)
            out.setdefault(repr(one), one)
    unused = [mark.argument for mark in marks if mark not in used]
    if unused:
        names = ", ".join(sorted({function_of(kernel.name) for kernel in kernels})) or "none"
        raise DeclarationError(
            f"no kernel has a parameter {', '.join(unused)}",
            hint=f"the kernels here are: {names}; is their source installed?",
        )
    return list(out.values())


def _variant(unit: KernelUnit, places: Mapping[int, Mark]) -> StartVariant:
    pairs: list[Any] = [list(pair["t"]) for pair in unit.specialization]
    for at, mark in places.items():
        if pairs[at][0] != "constexpr":
            raise DeclarationError(
                f"--at-start {mark.argument} to be a tl.constexpr", f"a value of type {pairs[at][0]}"
            )
        pairs[at] = ["constexpr", None]
    options = [(name, unit.options[name]) for name in unit.option_order]
    arguments = {mark.argument: at for at, mark in sorted(places.items())}
    return StartVariant(kernel=unit.kernel, arguments=arguments, specialization=pairs, options=options)


def filled(variant: StartVariant, values: Mapping[str, JsonValue]) -> list[list[Any]] | None:
    """The variant's (type, value) pairs with these values; None if one of them is not known."""
    if not set(variant.arguments) <= set(values):
        return None
    pairs = [list(pair) for pair in variant.specialization]
    for name, at in variant.arguments.items():
        pairs[at][1] = values[name]
    return pairs


def learned(
    variants_of_kernel: Sequence[StartVariant], pairs: Sequence[Sequence[Any]], options: Mapping[str, Any]
) -> dict[str, JsonValue]:
    """The values with which one of the variants is a launch of these (type, value) pairs and options; empty if none is."""
    for variant in variants_of_kernel:
        values = {name: pairs[at][1] for name, at in variant.arguments.items() if at < len(pairs)}
        if filled(variant, values) == [list(pair) for pair in pairs] and dict(variant.options) == dict(options):
            return values
    return {}
