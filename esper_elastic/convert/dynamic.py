"""Classes made for converted modules: the module's own class with an elastic one before it, and properties for what follows dims.

A converted module stays the object that it was; only its class changes, to a subclass of its own. Such a class is made once for each
combination and travels through pickle and deepcopy as the recipe that it was made by.

Edits make classes over those of modules too. Such a class has an attribute ``original``, the class beneath, and a class method
``laid_over(kind)`` that gives its like over another one; a module of it has a method ``put_edits_on(module, memo)``. Conversion and export
change what is beneath, and leave the edits on top.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..errors import CapacityError, ElasticError
from ..layers import ElasticView, Switchable

_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)


class Recipe(NamedTuple):
    """What a class is made of.

    Attributes:
        original: the module's own class.
        elastic: the class of layers that takes its place, :class:`ElasticView`, or ``None``.
        tensors: parameters and buffers of a view that are read through properties.
        sizes: attributes that follow axes.
        switched: whether a switch can turn the module off.
    """

    original: type[nn.Module]
    elastic: type[nn.Module] | None
    tensors: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    switched: bool = False


class Converted:
    """Marks the classes of converted modules."""

    recipe: Recipe

    def __reduce_ex__(self, protocol: Any) -> Any:
        getstate = getattr(self, "__getstate__", None)
        return revive, (self.recipe,), getstate() if getstate is not None else self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """As pickle would copy it, and with its state even where torch refuses to pickle that, as of parametrized modules."""
        made = memo[id(self)] = revive(self.recipe)
        state = dict(self.__dict__) if "parametrizations" in self.__dict__["_modules"] else self.__reduce_ex__(4)[2]
        made.__setstate__(copy.deepcopy(state, memo))
        return made


def revive(recipe: Recipe) -> nn.Module:
    """An object of the class of a recipe, for pickle to fill."""
    made = make_class(recipe)
    return made.__new__(made)


class _Switched(Switchable):
    """A converted module with a switch: what it computes is the forward of its own class."""

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        return super(Switchable, self).forward(*args, **kwargs)


@functools.cache
def make_class(recipe: Recipe) -> type[nn.Module]:
    """The class of a recipe."""
    bases: list[type] = [Converted]
    if recipe.switched:
        bases.append(_Switched)
    if recipe.elastic is not None:
        bases.append(recipe.elastic)
    if not any(issubclass(base, recipe.original) for base in bases):
        bases.append(recipe.original)
    body: dict[str, Any] = {"recipe": recipe, "__module__": recipe.original.__module__, "__doc__": recipe.original.__doc__}
    body |= {name: _tensor(name) for name in recipe.tensors} | {name: _size(name) for name in recipe.sizes}
    plain = recipe.elastic is ElasticView and not recipe.tensors
    name = recipe.original.__name__
    if not plain and recipe.elastic is not None and not name.startswith("Elastic"):
        name = f"Elastic{name}"
    made = type(name, tuple(bases), body)
    made.__qualname__ = name
    return made


def _tensor(name: str) -> property:
    return property(lambda self: _told(self, name, self.visible_tensor))


def _told(module: Any, name: str, read: Callable[[str], Any]) -> Any:
    """What ``read`` says of an attribute. An ``AttributeError`` from here would be taken for its absence, and the storage read instead."""
    try:
        return read(name)
    except AttributeError as error:
        raise ElasticError(f"{type(module).__name__}.{name}: reading its active part failed: {error}. Is the module whole?") from error


def _size(name: str) -> property:
    def get(self: Any) -> Any:
        return _told(self, name, self.visible_size)

    def set(self: Any, value: Any) -> None:
        if value != self.visible_size(name):
            raise CapacityError(f"{type(self).__name__}.{name} follows the dims of the model: resize them to change it, got {value!r}.")

    return property(get, set)


def beneath(kind: Any) -> Any:
    """The class that another one was made over; the class itself, if it was not."""
    return kind.original if hasattr(kind, "laid_over") else kind


def with_top_of(kind: Any, below: Any) -> Any:
    """``below``, with what a class has over the one beneath it."""
    return kind.laid_over(below) if hasattr(kind, "laid_over") else below


def elastic_class(module: nn.Module, elastic: Any, **further: Any) -> Any:
    """The class of a module that becomes elastic: the elastic layer's own where nothing else is to be kept.

    Args:
        module: as it is.
        elastic: class of layers, or ``None``.
        further: fields of :class:`Recipe`.
    """
    plain = beneath(type(module))
    whole = not any(further.values()) and getattr(elastic, "dense_class", None) is plain
    return with_top_of(type(module), elastic if whole else make_class(Recipe(plain, elastic, **further)))


def become_layer(module: Any, kind: Any, donor: Any) -> None:
    """Let a module, whose tensors are at capacity already, be what an elastic layer made from it is.

    Args:
        module: that keeps its identity, tensors and hooks.
        kind: its new class.
        donor: the layer, which is given up.
    """
    training = module.training
    module.__class__ = kind
    for name in [name for name in module.__dict__ if isinstance(getattr(kind, name, None), property)]:
        del module.__dict__[name]
    for name, value in donor.__dict__.items():
        if name not in _MODULE_ATTRIBUTES and name not in module.__dict__:
            module.__dict__[name] = value
    module._widths = donor._widths
    for axis in module._widths.axes:
        for dim in axis.dims:
            dim.attach(module)
    module.bind_control()
    module.training = training


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before conversion."""
    return module.recipe.original if isinstance(module, Converted) else type(module)
