"""Memory that kernels need beside their arguments: made once per device and stream, used again by every call.

Launches on one stream follow one another, so they can share it. Tickets are 0 between launches: the last block of
each group puts them back.
"""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbbn.cuda import memory
from nbbn.cuda.jit import SIMULATED

#: Tickets and pairs of float64 that a workspace has at least.
LEAST_TICKETS, LEAST_PAIRS = 4096, 65536


@dataclass(slots=True)
class Workspace:
    """`tickets` int32 zeros, the first of which counts channels that were skipped; `pairs` of float64."""

    tickets: Any
    ticket_count: int
    pairs: Any
    pair_count: int
    #: Addresses: of the count of skipped channels, of the tickets after it, of the pairs.
    skipped: int
    first_ticket: int
    sums: int


#: The per-thread default stream, as streams are numbered: one number for as many streams as there are threads.
PER_THREAD = 2

_spaces: dict[tuple[int | None, int | tuple[int, int]], Workspace] = {}
#: What was outgrown: a captured graph may still use it. Sizes double, so all of it is no more than what is in use.
_outgrown: list[Workspace] = []


def workspace(device: int | None, stream: int, tickets: int, pairs: int) -> Workspace:
    """The workspace of a stream, with room for that many tickets and pairs."""
    key = device, stream if stream != PER_THREAD else (stream, threading.get_ident())
    found = _spaces.get(key)
    if found is None or found.ticket_count <= tickets or found.pair_count < pairs:
        tickets, pairs = max(LEAST_TICKETS, 2 * tickets), max(LEAST_PAIRS, 2 * pairs)
        if found is not None:
            _outgrown.append(found)
            pairs, tickets = max(pairs, 2 * found.pair_count), max(tickets, 2 * found.ticket_count)
        with memory.there(device):
            counters, room = memory.zeros(tickets + 1), memory.allocate(16 * pairs)
        start = memory.address_of(counters)
        found = Workspace(counters, tickets + 1, room, pairs, start, start + 4, memory.address_of(room))
        _spaces[key] = found
    return found


def read_skipped(space: Workspace, stream: int) -> int:
    """How many channels the launches on this stream skipped since it was read last. Waits for them."""
    if SIMULATED:
        count = space.tickets.view(np.int32)
        number, count[0] = int(count[0]), 0
        return number
    queue = memory.queue_of(stream)
    first = space.tickets[:1]
    number = int(first.copy_to_host(stream=queue)[0]) if queue == 0 else _read(first, queue)
    if number:
        first.copy_to_device(np.zeros(1, np.int32), stream=queue)
    return number


def _read(first: Any, queue: Any) -> int:
    host = first.copy_to_host(stream=queue)
    queue.synchronize()
    return int(host[0])
