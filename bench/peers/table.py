"""What a peer is."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata, util
from typing import Any

import numpy as np
from inputs import Array, Inputs

#: One call, everything that can be allocated before is: returns results in the order of `Operation.results`.
Call = Callable[[], tuple[Any, ...]]

#: What makes a call for a case; None if the peer does not serve it.
Build = Callable[[Inputs], Call | None]


def as_arrays(answer: tuple[Any, ...], given: Inputs) -> list[Array]:
    return [np.asarray(result) for result in answer]


@dataclass(frozen=True)
class Peer:
    """A library and a way to use it."""

    label: str
    #: The name that Python imports, and the one that pip installs.
    module: str
    distribution: str
    calls: Mapping[str, Build]
    #: Who of nbbn's ways it is compared with; where there is no result to allocate, with the first.
    against: str = "nbbn"
    #: Brings what a call returned to arrays in the order of x's axes, for the check.
    read: Callable[[tuple[Any, ...], Inputs], list[Array]] = as_arrays
    #: Threads and modes while measuring.
    setting: Callable[[], AbstractContextManager[Any]] | None = None

    @cached_property
    def installed(self) -> bool:
        return util.find_spec(self.module) is not None


def versions(peers: Mapping[str, Peer]) -> dict[str, str]:
    """Version of every installed library, by the name of its distribution."""
    return {p.distribution: metadata.version(p.distribution) for p in peers.values() if p.installed}
