"""Configurations read from YAML or JSON: flat dataclasses whose keys and types are checked where they are made."""

from dataclasses import fields
from types import UnionType
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_origin


class Dataclass(Protocol):
    """What every dataclass has."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Config = TypeVar("Config", bound=Dataclass)


def from_dict(kind: type[Config], values: dict[str, Any], name: str) -> Config:
    """A config dataclass from a mapping.

    Args:
        kind: the dataclass.
        values: its fields; those left out keep their defaults.
        name: what to call the mapping in an error.

    Raises:
        ValueError: for something else than a mapping, or a key that is no field.
    """
    known = [field.name for field in fields(kind)]
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a mapping, got {values!r}")
    if unknown := set(values) - set(known):
        raise ValueError(f"{name} has unknown keys {sorted(map(str, unknown))}, expected some of {known}")
    return kind(**values)


def check_types(config: Any) -> None:
    """Make each field of a dataclass what it is annotated as: lists become tuples, whole numbers floats.

    Raises:
        ValueError: for a value of another type.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        try:
            setattr(config, field.name, _converted(value, field.type))
        except ValueError as error:
            kind = field.type.__name__ if isinstance(field.type, type) and not get_args(field.type) else field.type
            raise ValueError(f"{field.name} must be {kind}, got {value!r}") from error


def _converted(value: Any, kind: Any) -> Any:
    if isinstance(kind, UnionType):
        return _converted_to_one_of(value, get_args(kind))
    if get_origin(kind) is tuple:
        items = get_args(kind)
        if not isinstance(value, (list, tuple)) or (items[-1] is not ... and len(value) != len(items)):
            raise ValueError
        return tuple(_converted(item, items[0]) for item in value)
    if kind is float and type(value) in (int, str):  # YAML reads 1e-3 as a string
        return float(value)
    if type(value) is not (get_origin(kind) or kind):
        raise ValueError
    return value


def _converted_to_one_of(value: Any, kinds: tuple[Any, ...]) -> Any:
    for kind in kinds:
        try:
            return _converted(value, kind)
        except ValueError:
            continue
    raise ValueError


def check_choice(config: Any, **choices: tuple[str, ...]) -> None:
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} must be one of {known}, got {getattr(config, name)!r}")
