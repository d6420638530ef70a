"""What runs beside the packed layers of one model. Kept on the model, which the clones of a patcher share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ...models.linear import PackedLeaf
from ...models.lora import Side
from .branches import Plan
from .exchange import is_loaded
from .patches import Patch

Make = Callable[[str, Plan], Side | None]


@dataclass
class Made:
    """A layer's side, and the plan that it was made by."""

    plan: Plan
    side: Side | None

    @property
    def nbytes(self) -> int:
        return 0 if self.side is None else self.side.nbytes()


@dataclass
class Sides:
    """packed: state-dict key of every packed weight -> leaf. own: from a patcher's patches. hooked: from those and the weight hooks that

    are on, where hooks touch a key. `host` is what the host's own code has merged meanwhile: see exchange.py.
    """

    packed: dict[str, PackedLeaf]
    own: dict[str, Made] = field(default_factory=dict)
    hooked: dict[str, Side | None] = field(default_factory=dict)
    host: dict[str, object] = field(default_factory=dict)
    settings: tuple = ()
    _shown: dict[str, Side] = field(default_factory=dict)  # what the leaves have

    def exchange(self, plans: dict[str, Plan], make: Make) -> None:
        """Makes the sides of these plans in place of those that are there; layers whose patches are the same keep theirs."""
        for key in [key for key, made in self.own.items() if key not in plans or plans[key].print != made.plan.print]:
            del self.own[key]
        self.place()  # what goes is gone before anything new takes memory
        for key, plan in plans.items():
            if key not in self.own:
                side = make(key, plan)  # where the model computes; it goes at once where its layer is
                self.own[key] = Made(plan, None if side is None else side.to(self.packed[key].home))
        self.place()

    def hook(self, sides: dict[str, Side | None]) -> None:
        """Shows these in place of the layers' own."""
        self.hooked = sides
        self.place()

    def place(self) -> None:
        """Gives every leaf its side, where it computes."""
        wanted = {key: made.side for key, made in self.own.items()} | self.hooked
        wanted = {key: side.to(self.packed[key].home) for key, side in wanted.items() if side is not None}
        for key in self._shown.keys() - wanted.keys():
            self.packed[key].set_side(None)
        for key, side in wanted.items():
            if self._shown.get(key) is not side:
                self.packed[key].set_side(side)
            if key in self.hooked:
                self.hooked[key] = side
            else:
                self.own[key].side = side
        self._shown = wanted

    def patches(self, key: str) -> list[Patch]:
        """The patches that a layer's own side is made from."""
        return [patch for patch, _ in self.own[key].plan.patches] if key in self.own else []

    def is_loaded(self, key: str) -> bool:
        """Whether the host counts the layer as loaded, or it is streamed: then its side lies on the device."""
        return is_loaded(self.packed[key]) or self.packed[key].streamer is not None

    def loaded(self, sides: dict[str, Side | None]) -> int:
        """Bytes of those whose layers are loaded."""
        return sum(side.nbytes() for key, side in sides.items() if side is not None and self.is_loaded(key))

    def nbytes(self) -> int:
        """Bytes of all that is loaded."""
        return self.loaded({key: made.side for key, made in self.own.items()}) + self.loaded(self.hooked)

    def sizes(self, plans: dict[str, Plan]) -> tuple[int, int]:
        """(total, loaded) bytes as a patcher with these plans has to see them.

        Where another clone's side is beside a layer, the loaded bytes are those that making its own would reuse.
        """
        total = loaded = 0
        for key, plan in plans.items():
            made = self.own.get(key)
            here = made.nbytes if made is not None and self.is_loaded(key) else 0
            size = made.nbytes if made is not None and made.plan.print == plan.print else plan.nbytes
            total, loaded = total + size, loaded + min(here, size)
        return total, loaded
