"""What an argument of a layer spec may be, as small objects that read a value or refuse it.

Values are checked by their exact type, so that no method of a value from outside is ever called.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Size

#: No float beyond it is taken, so that float32 holds each.
_REAL = 1e30


class Unfit(Exception):
    """A value that an argument does not admit."""


class Values(Protocol):
    """The values that an argument admits; its ``str`` describes them."""

    def read(self, value: Any) -> Any:
        """The value as the layer keeps it.

        Raises:
            Unfit: it is not admitted.
        """


class Integer(NamedTuple):
    """An exact integer; ``True`` is none."""

    low: int
    high: int

    def read(self, value: Any) -> int:
        if type(value) is not int or not self.low <= value <= self.high:
            raise Unfit
        return value

    def __str__(self) -> str:
        return f"an integer from {self.low} to {self.high}"


class Number(NamedTuple):
    """A finite float or an exact integer."""

    low: float = -_REAL
    high: float = _REAL

    def read(self, value: Any) -> float:
        if type(value) not in (int, float) or not self.low <= value <= self.high:  # NaN is in no interval
            raise Unfit
        return value

    def __str__(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"


class Flag(NamedTuple):
    """``True`` or ``False``."""

    def read(self, value: Any) -> bool:
        if type(value) is not bool:
            raise Unfit
        return value

    def __str__(self) -> str:
        return "true or false"


class Choice:
    """One of a few strings."""

    def __init__(self, *strings: str) -> None:
        self.strings = strings

    def read(self, value: Any) -> str:
        if type(value) is not str or value not in self.strings:
            raise Unfit
        return value

    def __str__(self) -> str:
        return " or ".join(map(repr, self.strings))


class Text(NamedTuple):
    """Any string."""

    longest: int = 1024

    def read(self, value: Any) -> str:
        if type(value) is not str or len(value) > self.longest:
            raise Unfit
        return value

    def __str__(self) -> str:
        return f"a string of at most {self.longest} characters"


class Json(NamedTuple):
    """An object of JSON: exact dicts, lists, strings, numbers, booleans and nulls, of which it gives a copy."""

    deepest: int = 8
    most: int = 2**16

    def read(self, value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise Unfit
        left = self.most

        def copied(part: Any, levels: int) -> Any:
            nonlocal left
            left -= 1
            if left < 0 or levels < 0:  # so that a cycle ends
                raise Unfit
            kind = type(part)
            if kind is dict:
                return {Text().read(key): copied(inner, levels - 1) for key, inner in part.items()}
            if kind in (list, tuple):
                return [copied(inner, levels - 1) for inner in part]
            if part is None or kind is bool:
                return part
            return _scalar.read(part)

        made: dict[str, Any] = copied(value, self.deepest)
        return made

    def __str__(self) -> str:
        return f"a dict of JSON with finite numbers, at most {self.deepest} levels deep and of {self.most} parts"


class Nothing(NamedTuple):
    """``None``."""

    def read(self, value: Any) -> None:
        if value is not None:
            raise Unfit

    def __str__(self) -> str:
        return "None"


class Each(NamedTuple):
    """A tuple whose items all admit the same values; a list is taken for one."""

    item: Values
    shortest: int
    longest: int

    def read(self, value: Any) -> tuple[Any, ...]:
        if type(value) not in (tuple, list, Size) or not self.shortest <= len(value) <= self.longest:
            raise Unfit
        return tuple(self.item.read(item) for item in value)

    def __str__(self) -> str:
        count = f"{self.longest}" if self.shortest == self.longest else f"{self.shortest} to {self.longest}"
        return f"a tuple of {count}, each {self.item}"


class Either:
    """What any of several admits; the first that does reads it."""

    def __init__(self, *choices: Values) -> None:
        self.choices = choices

    def read(self, value: Any) -> Any:
        for choice in self.choices:
            try:
                return choice.read(value)
            except Unfit:
                continue
        raise Unfit

    def __str__(self) -> str:
        return ", or ".join(map(str, self.choices))


class Spread(NamedTuple):
    """An item that stands for ``length`` equal ones, as layers keep it that expand it themselves."""

    item: Values
    length: int

    def read(self, value: Any) -> tuple[Any, ...]:
        return (self.item.read(value),) * self.length

    def __str__(self) -> str:
        return str(self.item)


class AsFloat(NamedTuple):
    """A number that the layer turns into a float."""

    item: Values

    def read(self, value: Any) -> float:
        return float(self.item.read(value))

    def __str__(self) -> str:
        return str(self.item)


def one_or(length: int, item: Values) -> Values:
    """An item for all, or a tuple of ``length``, kept as it was given."""
    return Either(item, Each(item, length, length))


def spread(length: int, item: Values) -> Values:
    """An item for all, or a tuple of ``length``, kept as the tuple."""
    return Either(Spread(item, length), Each(item, length, length))


_scalar = Either(Text(2**16), Integer(-(2**63), 2**63 - 1), Number())
