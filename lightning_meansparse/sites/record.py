"""`Site`: the name of one tensor inside a model, and the shape of its statistics."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Side = Literal["in", "out"]
Role = Literal["activation", "gate", "residual", "other"]

_ROLES = ("activation", "gate", "residual", "other")
_CALL = re.compile(r"[A-Za-z_]\w*\[\d+\]|\d+\[\d+\]")
_NAME = re.compile(
    r"(?P<module>[^:@\[\]]*)(?:::(?P<call>[^:@]+))?@(?P<side>in|out)(?:\[(?P<index>\d+)\])?"
)


@dataclass(frozen=True)
class Site:
    """One place in a model: a module's first input, its output, or one call in a module's code.

    Attributes:
        module: Name of the module as in `model.named_modules()`; with `call`, the module in whose
            code the call stands.
        side: `"in"` (the tensor that goes in) or `"out"` (the tensor that comes out).
        shape: Shape of one statistic, broadcastable against the tensor from the right and beginning
            at the first channel axis: `(64, 1, 1)` for NCHW, `(384,)` for channels last,
            `(8, 1, 16)` for 8 heads of 16 channels around a token axis, `(1,)` for one channel.
        call: Which call in the owner's code, `"relu[1]"` for the second call of `relu`, or None.
        index: Which element of a tuple output, or None for a plain tensor.
        role: What the tensor is to the network: the input of an `"activation"`, of an activation
            that only gates another tensor (`"gate"`), a `"residual"` sum, or `"other"`.
        kind: Class or function name of what stands there (`"GELU"`), for display.

    Examples:
        >>> site = Site("layer1.0.act1", "in", (64, 1, 1))
        >>> str(site), site.channels, site.axis
        ('layer1.0.act1@in', 64, (-3,))
        >>> str(Site.parse("blocks.2@out[0]", (384,)))
        'blocks.2@out[0]'
    """

    module: str
    side: Side
    shape: tuple[int, ...]
    call: str | None = None
    index: int | None = None
    role: Role = "activation"
    kind: str = ""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            TypeError: If `shape` is not a sequence of integers.
            ValueError: If a field has a value that no site can have.
        """
        if self.side not in ("in", "out"):
            raise ValueError(f"side must be 'in' or 'out', got {self.side!r}.")
        if self.role not in _ROLES:
            raise ValueError(f"role must be one of {', '.join(_ROLES)}, got {self.role!r}.")
        shape: object = self.shape
        if not isinstance(shape, (tuple, list)) or not all(type(size) is int for size in shape):
            raise TypeError(f"shape must be a tuple of integers, got {shape!r}.")
        object.__setattr__(self, "shape", tuple(shape))  # JSON makes lists of tuples
        if any(size < 1 for size in self.shape):
            raise ValueError(f"shape must hold positive sizes, got {self.shape}.")
        if self.call is not None and not _CALL.fullmatch(self.call):
            raise ValueError(f"call must look like 'relu[1]', got {self.call!r}.")
        if self.index is not None and (self.side != "out" or self.index < 0):
            raise ValueError(
                f"index is the place in a tuple output, so it needs side='out' and must not be "
                f"negative; got index={self.index}, side={self.side!r}."
            )

    def __str__(self) -> str:
        """Name of the site: `layer1.0.act1@in`, `blocks.2@out[0]`, `layer1.0::relu[1]@in`."""
        call = "" if self.call is None else f"::{self.call}"
        index = "" if self.index is None else f"[{self.index}]"
        return f"{self.module}{call}@{self.side}{index}"

    @property
    def channels(self) -> int:
        """Number of channels, that is, of means and of standard deviations."""
        return math.prod(self.shape)

    @property
    def axis(self) -> tuple[int, ...]:
        """Channel axes of the tensor, counted from the right (negative)."""
        several = tuple(d - len(self.shape) for d, size in enumerate(self.shape) if size > 1)
        return several or tuple(range(-len(self.shape), 0))[:1]

    @classmethod
    def parse(
        cls, name: str, shape: tuple[int, ...], *, role: Role = "activation", kind: str = ""
    ) -> Site:
        """Read a site's name back: `str(Site.parse(name, shape)) == name`.

        Args:
            name: A name as `str(site)` gives it.
            shape: Shape of one statistic, see `Site`. A name does not tell it.
            role: Role, which a name does not tell either.
            kind: Class or function name, for display.

        Returns:
            The site.

        Raises:
            ValueError: If the name does not have the form of a site's name.

        Examples:
            >>> Site.parse("layer1.0::relu[1]@in", (64, 1, 1)).call
            'relu[1]'
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(
                f"name must be a site's name such as 'layer1.0.act1@in', 'blocks.2@out[0]' or "
                f"'layer1.0::relu[1]@in', got {name!r}."
            )
        index = found["index"]
        return cls(
            module=found["module"],
            side="in" if found["side"] == "in" else "out",
            shape=shape,
            call=found["call"],
            index=None if index is None else int(index),
            role=role,
            kind=kind,
        )


def match(glob: str, names: Iterable[str]) -> list[str]:
    """The names that a glob means: `*` and `?` only, for brackets are part of names.

    Examples:
        >>> match("blocks.*@out[0]", ["blocks.0@out[0]", "blocks.0@out[1]", "head@in"])
        ['blocks.0@out[0]']
    """
    literal = glob.replace("[", "[[]")
    return [name for name in names if fnmatch.fnmatchcase(name, literal)]
