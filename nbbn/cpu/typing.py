"""How formulas are typed: what Numba once found out about numbers is not asked again.

For `a + b` Numba tries some thirty implementations, of arrays, strings and dates too, in every function and for every
place where two numbers are added. What comes out depends on nothing but the types.
"""

from types import BuiltinFunctionType
from typing import Any

from numba import types

_found: dict[Any, Any] = {}


def operator_type(context, function):
    """The type of an operator, such as `operator.add`, without asking first whether it is a constant."""
    return context._lookup_global(function) or context.resolve_value_type(function)


class Typing:
    """Numba's typing context, with a memory for functions of numbers: operators and conditions mostly."""

    def __init__(self, context):
        self._context = context

    def __getattr__(self, name):
        return getattr(self._context, name)

    def refresh(self):
        """Nothing: the target context does it as well."""

    def resolve_value_type(self, value):
        """The type of a constant."""
        if isinstance(value, BuiltinFunctionType):
            return operator_type(self._context, value)
        return self._context.resolve_value_type(value)

    def resolve_function_type(self, function, arguments, keywords):
        """The signature of a call."""
        if keywords or not isinstance(function, types.Function) or not all(map(_is_number, arguments)):
            return self._context.resolve_function_type(function, arguments, keywords)
        call = function, arguments
        if call not in _found:
            _found[call] = self._context.resolve_function_type(function, arguments, keywords)
        return _found[call]


def _is_number(kind):
    return isinstance(kind, types.Number | types.Boolean)
