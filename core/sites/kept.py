"""What one call of a denoiser leaves for later calls that reuse its encoder; see `reuse`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from .routing import Samples
from .site import Call


class Knowing(Protocol):
    """An attached tuner: what it knows of the call under way, and the samples that it acts on in it."""

    call: Call
    samples: Samples


@dataclass(eq=False)
class Kept:
    """Outputs of the encoder's modules by name, the decoder's edited inputs, and what the tuners knew of the call.

    `kind` is what a later call must have in common with this one to reuse it.
    """

    kind: Any
    outputs: dict[str, Any] = field(default_factory=dict)
    _edited: dict[Any, Tensor] = field(default_factory=dict)
    _calls: dict[Knowing, tuple[Call, Samples]] = field(default_factory=dict)

    def edited(self, site: Any, make: Callable[[], Tensor]) -> Tensor:
        """The edited value of `site`; made where it is not there yet."""
        if site not in self._edited:
            self._edited[site] = make()
        return self._edited[site]

    def note(self, attached: Sequence[Knowing]) -> None:
        """Keeps what each tuner knows of the call that is under way."""
        self._calls = {one: (one.call, one.samples) for one in attached}

    def prepare(self, attached: Sequence[Knowing]) -> bool:
        """Gives the tuners what they knew of the kept call; False where any of them was not there."""
        if any(one not in self._calls for one in attached):
            return False
        for one in attached:
            one.call, one.samples = self._calls[one]
        return True
