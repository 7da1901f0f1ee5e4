"""What a user wrote becomes a checked object, and every mistake names its field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from narrowly.errors import NarrowlyError
from narrowly.registry import unknown

Path = tuple[str, ...]
M = TypeVar("M", bound=BaseModel)


class FieldError(NarrowlyError):
    """A mistake in one field.

    Attributes:
        path: the field's place, such as ("defenses", "0", "ablate", "strength"); whoever read a
            file can name the line.
    """

    def __init__(self, path: Path, message: str):
        super().__init__(f"{'.'.join(path)}: {message}" if path else message)
        self.path = path


def build(cls: type[M], arguments: Mapping[str, Any], where: Path = ()) -> M:
    """Make a pydantic object from its fields.

    Raises:
        FieldError: a field is unknown (with the nearest known one), missing or of a wrong type.
    """
    for key in arguments:
        if key not in cls.model_fields:
            raise FieldError((*where, str(key)), str(unknown("key", str(key), [*cls.model_fields])))
    try:
        return cls.model_validate(dict(arguments))
    except ValidationError as error:
        # A union fails once per member: the first is the plainest.
        first = error.errors(include_url=False)[0]
        place = tuple(str(part) for part in first["loc"][:1])
        given = "" if first["type"] in ("missing", "value_error") else f", not {first['input']!r}"
        message = first["msg"].removeprefix("Value error, ") + given
        raise FieldError((*where, *place), f"{message}.") from None
