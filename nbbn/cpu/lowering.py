"""How formulas become LLVM code: variables that are assigned once are values, not memory.

Numba gives every variable that is read in another block of the function than it was assigned in a place in memory,
reads what is there before each assignment and overwrites it when the variable ends, so that no reference is lost.
Numbers have no references, and nor has anything in a function that counts none. And wherever an array is taken apart
it is written to memory first, after all ways to make one were tried. What is left out here is a quarter of the code,
which LLVM would find out to do nothing once it has read it, and an eighth of the time a kernel takes to compile.
"""

from numba import types
from numba.core import cgutils, ir
from numba.core.analysis import compute_use_defs
from numba.core.lowering import Lower
from numba.np.arrayobj import load_item, store_item

from nbbn.cpu.fields import field, lengths
from nbbn.cpu.typing import operator_type

#: Attributes of an array, and what of it they are.
_ATTRIBUTES = {"shape": "shape", "strides": "strides", "size": "nitems", "itemsize": "itemsize"}


class FormulaLower(Lower):
    """Numba's, without what only variables with references need."""

    def _find_singly_assigned_variable(self):
        """Of the variables without references also those that are read in later blocks."""
        self._blk_local_varmap = {}
        self._singly_assigned_vars = set()
        if self.func_ir.func_id.is_generator:
            return
        assignments: dict[str, list[int]] = {}
        first_use: dict[str, int] = {}
        use_defs = compute_use_defs(self.blocks)
        for offset, block in self.blocks.items():
            for statement in block.find_insts(ir.Assign):
                assignments.setdefault(statement.target.name, []).append(offset)
            for name in use_defs.usemap[offset]:  # what the block reads of others, or of its own last turn
                first_use[name] = min(offset, first_use.get(name, offset))
        for name, offsets in assignments.items():
            # a use that comes first in the order of blocks is reached by a jump back, and may come first in time
            before_use = name not in first_use or (offsets[0] < first_use[name] and not self._counted(name))
            if len(offsets) == 1 and before_use:
                self._singly_assigned_vars.add(name)

    def _counted(self, name):
        """Whether references are counted to what a variable holds."""
        context = self.context
        return context.enable_nrt and context.data_model_manager[self.typeof(name)].contains_nrt_meminfo()

    def storevar(self, value, name, argidx=None):
        """Without a look at what was there before, if that is no reference."""
        if name in self._singly_assigned_vars or argidx is not None or self._counted(name):
            super().storevar(value, name, argidx)
        else:
            self._alloca_var(name, self.typeof(name))
            self.builder.store(value, self.getvar(name))

    def delvar(self, name):
        """Nothing, if what ends is no reference."""
        if self._counted(name):
            super().delvar(name)

    def lower_binop(self, resty, expr, op):
        """As the operator was typed, without looking for what is special about constants: only powers have that."""
        operator = operator_type(self.context.typing_context, op)
        signature = self.fndesc.calltypes[expr]
        operands = [
            self.context.cast(self.builder, self.loadvar(side.name), self.typeof(side.name), kind)
            for side, kind in zip((expr.lhs, expr.rhs), signature.args, strict=True)
        ]
        try:
            operator.get_impl_key(signature)
        except KeyError:  # typed as `+=`, and these are the first two to be added
            operator.get_call_type(self.context.typing_context, signature.args, {})
        result = self.context.get_function(operator, signature)(self.builder, operands)
        return self.context.cast(self.builder, result, signature.return_type, resty)

    def lower_expr(self, resty, expr):
        """Attributes and elements of arrays without a detour; no index is negative but a constant written there."""
        if expr.op == "getattr" and expr.attr in _ATTRIBUTES:
            kind = self.typeof(expr.value.name)
            if isinstance(kind, types.Array):
                return field(self.context, self.builder, kind, self.loadvar(expr.value.name), _ATTRIBUTES[expr.attr])
        if expr.op == "getitem":
            kind, place = self._element(expr.value, expr.index)
            if place is not None:
                value = load_item(self.context, self.builder, kind, place)
                return self.context.cast(self.builder, value, kind.dtype, resty)
        return super().lower_expr(resty, expr)

    def lower_setitem(self, target_var, index_var, value_var, signature):
        """The same."""
        kind, place = self._element(target_var, index_var)
        if place is None:
            super().lower_setitem(target_var, index_var, value_var, signature)
        else:
            value, of = self.loadvar(value_var.name), self.typeof(value_var.name)
            store_item(self.context, self.builder, kind, self.context.cast(self.builder, value, of, kind.dtype), place)

    def _element(self, array, index):
        """(type of the array, pointer to the number that `index` says, or None if it is not one number)."""
        kind, by = self.typeof(array.name), self.typeof(index.name)
        each = tuple(by) if isinstance(by, types.BaseTuple) else (by,)
        if not (isinstance(kind, types.Array) and isinstance(kind.dtype, types.Number | types.Boolean)):
            return kind, None
        if len(each) != kind.ndim or not all(map(_counts_from_the_start, each)):
            return kind, None
        context, builder = self.context, self.builder
        array, index = self.loadvar(array.name), self.loadvar(index.name)
        axes = cgutils.unpack_tuple(builder, index) if isinstance(by, types.BaseTuple) else (index,)
        place = cgutils.get_item_pointer2(
            context,
            builder,
            field(context, builder, kind, array, "data"),
            lengths(context, builder, kind, array, "shape"),
            lengths(context, builder, kind, array, "strides"),
            kind.layout,
            [context.cast(builder, axis, of, types.intp) for axis, of in zip(axes, each, strict=True)],
            boundscheck=context.enable_boundscheck,
        )
        return kind, place


def _counts_from_the_start(index):
    """Whether what has this type is an index, and no negative constant."""
    return isinstance(index, types.Integer) and getattr(index, "literal_value", 0) >= 0
