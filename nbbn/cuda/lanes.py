"""A vector's lanes and the columns of a tile: which channel each belongs to, and shared memory per column or channel.

Tuples have a length that the compiler must know, so each function stands here once per number of lanes.
"""

from nbbn.cuda.jit import device


@device
def _repeat_1(value):
    return (value,)


@device
def _repeat_2(value):
    return value, value


@device
def _repeat_4(value):
    return value, value, value, value


@device
def _repeat_8(value):
    return value, value, value, value, value, value, value, value


@device
def _channels_1(j, inner):
    return (j // inner,)


@device
def _channels_2(j, inner):
    return j // inner, (j + 1) // inner


@device
def _channels_4(j, inner):
    return j // inner, (j + 1) // inner, (j + 2) // inner, (j + 3) // inner


@device
def _channels_8(j, inner):
    a, b, c, d = _channels_4(j, inner)
    e, f, g, h = _channels_4(j + 4, inner)
    return a, b, c, d, e, f, g, h


@device
def _take_1(array, k):
    return (array[k[0]],)


@device
def _take_2(array, k):
    return array[k[0]], array[k[1]]


@device
def _take_4(array, k):
    return array[k[0]], array[k[1]], array[k[2]], array[k[3]]


@device
def _take_8(array, k):
    return (
        array[k[0]], array[k[1]], array[k[2]], array[k[3]], array[k[4]], array[k[5]], array[k[6]], array[k[7]],
    )  # fmt: skip


@device
def _put_1(array, j, values):
    array[j] = values[0]


@device
def _put_2(array, j, values):
    array[j] = values[0]
    array[j + 1] = values[1]


@device
def _put_4(array, j, values):
    array[j] = values[0]
    array[j + 1] = values[1]
    array[j + 2] = values[2]
    array[j + 3] = values[3]


@device
def _put_8(array, j, values):
    _put_4(array, j, (values[0], values[1], values[2], values[3]))
    _put_4(array, j + 4, (values[4], values[5], values[6], values[7]))


@device
def _increase_1(array, j, values):
    array[j] += values[0]


@device
def _increase_2(array, j, values):
    array[j] += values[0]
    array[j + 1] += values[1]


@device
def _increase_4(array, j, values):
    array[j] += values[0]
    array[j + 1] += values[1]
    array[j + 2] += values[2]
    array[j + 3] += values[3]


@device
def _increase_8(array, j, values):
    _increase_4(array, j, (values[0], values[1], values[2], values[3]))
    _increase_4(array, j + 4, (values[4], values[5], values[6], values[7]))


#: By number of lanes. repeat(value): the same in every lane.
REPEAT = {1: _repeat_1, 2: _repeat_2, 4: _repeat_4, 8: _repeat_8}
#: channels(j, inner): the channels, counted from the tile's first, of columns j, j + 1, ...
CHANNELS = {1: _channels_1, 2: _channels_2, 4: _channels_4, 8: _channels_8}
#: take(array, k): the elements numbered k, a tuple.
TAKE = {1: _take_1, 2: _take_2, 4: _take_4, 8: _take_8}
#: put(array, j, values): store lanes from element j on; increase(array, j, values): add them there.
PUT = {1: _put_1, 2: _put_2, 4: _put_4, 8: _put_8}
INCREASE = {1: _increase_1, 2: _increase_2, 4: _increase_4, 8: _increase_8}
