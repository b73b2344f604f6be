"""How what only compiled functions call is compiled: typed and turned into LLVM code, no further.

Numba takes every function by itself down to machine code, and optimizes it once more in each of its callers. A kernel
here is made of up to a hundred small functions, and of two more that Numba makes of every `prange` loop; none of them
ever runs by itself. They are linked and optimized where they end up, in the kernel, once. That, and what `Inner`
leaves out, is a third of the time that a kernel takes to compile.
"""

from contextlib import contextmanager
from functools import cached_property

from numba.core import compiler, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_machinery import register_pass
from numba.core.registry import CPUDispatcher
from numba.core.targetconfig import ConfigStack
from numba.core.typed_passes import InlineOverloads, NativeLowering, NativeParforLowering, NopythonRewrites
from numba.core.types.containers import BaseTuple
from numba.core.types.misc import unliteral
from numba.core.untyped_passes import InlineClosureLikes

from nbbn.cpu.lowering import FormulaLower
from nbbn.cpu.typing import Typing

#: What makes an array, by the names that our sources use.
_ALLOCATORS = frozenset(("empty", "zeros", "scratch", "scratch_rows", "zero_rows", "expanded", "shared", "variances"))


def makes_arrays(function):
    """Whether a function has to count references.

    Who makes no array owns none: counting references to those of the caller is a fourth of the time. Wrongly left
    out, it is an error when compiled: Numba's ("NRT required but not enabled"), or `_refuse_arrays`.
    """
    return not _ALLOCATORS.isdisjoint(function.__code__.co_names)


class Inner:
    """A function that compiled functions may call, and Python may not.

    Numba learns of it when a kernel that calls it is compiled: a process that finds its kernels compiled saves the
    half millisecond that each costs.
    """

    def __init__(self, function):
        self.py_func = function
        self.__doc__, self.__name__ = function.__doc__, function.__name__

    @cached_property
    def _numba_type_(self):
        self._kept = _Inner(self.py_func)  # the type refers to it only weakly
        return types.Dispatcher(self._kept)


class _Inner(CPUDispatcher):
    def __init__(self, function):
        options = {
            "nopython": True,
            "nogil": True,
            "error_model": "numpy",
            "no_cpython_wrapper": True,
            "no_cfunc_wrapper": True,
            "boundscheck": None,  # as NUMBA_BOUNDSCHECK says
            "_nrt": makes_arrays(function),
        }
        super().__init__(function, targetoptions=options, pipeline_class=_Compiler)

    def get_call_template(self, args, kws):
        """What Numba does, but a literal 0 is an integer, not a type of its own to compile everything again for."""
        template = super().get_call_template(tuple(map(unliteral, args)), kws)
        if not (ConfigStack().top().nrt and makes_arrays(self.py_func)):
            _refuse_arrays(self.py_func, template[0].cases)
        return template

    def add_overload(self, result):
        """Remember what was compiled; there is nothing in it for Python to call."""
        self.overloads[tuple(result.signature.args)] = result


def _refuse_arrays(function, signatures):
    """Raise an error if arrays are returned to, or from, who counts no references: nobody would free them."""
    for signature in signatures:
        result = signature.return_type
        kinds = result if isinstance(result, BaseTuple) else (result,)
        if any(isinstance(kind, types.Array) for kind in kinds):
            name = function.__qualname__
            raise TypeError(f"{name} returns arrays: name it in _ALLOCATORS, so that its callers free them")


#: Steps that look for what formulas do not have: functions within functions, expressions of whole arrays, calls of
#: functions that Numba would paste in. A twentieth of the time.
_NEEDLESS = frozenset((InlineClosureLikes, InlineOverloads, NopythonRewrites))


class _Compiler(compiler.CompilerBase):
    """Numba's steps but the needless, and the last one only as far as LLVM code."""

    def __init__(self, typingctx, *rest):
        super().__init__(Typing(typingctx), *rest)

    def define_pipelines(self):
        (pipeline,) = _with_instead(self.state, {NativeLowering: _Lowering})
        pipeline.passes[:] = [step for step in pipeline.passes if step[0] not in _NEEDLESS]
        return [pipeline]


class KernelCompiler(compiler.CompilerBase):
    """Numba's steps for what Python calls, with the parts of a parallel loop as far as LLVM code."""

    def define_pipelines(self):
        """Numba's, with the last step, which is one of two, replaced."""
        return _with_instead(self.state, {NativeLowering: _SerialLowering, NativeParforLowering: _ParallelLowering})


def _with_instead(state, ours):
    pipeline = compiler.DefaultPassBuilder.define_nopython_pipeline(state)
    pipeline.passes[:] = [(ours.get(step, step), text) for step, text in pipeline.passes]
    return [pipeline]


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(NativeLowering):
    _name = "nbbn_inner_lowering"
    lowering_class = FormulaLower

    def run_pass(self, state):
        state.library = _Library(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        entry_point = object()  # Numba looks compiled functions up by it, and asks no more of it
        state.cr = state.cr._replace(cfunc=entry_point)
        state.targetctx.insert_user_function(entry_point, state.cr.fndesc, [state.library])
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class _SerialLowering(NativeLowering):
    _name = "nbbn_serial_lowering"
    lowering_class = FormulaLower

    def run_pass(self, state):
        state.library = _Whole(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return super().run_pass(state)


@register_pass(mutates_CFG=True, analysis_only=False)
class _ParallelLowering(NativeParforLowering):
    _name = "nbbn_parallel_lowering"

    def run_pass(self, state):
        state.library = _Whole(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        with _parts(state.targetctx):
            return super().run_pass(state)


@contextmanager
def _parts(context):
    """All that is made in `context` meanwhile, and in copies of it, is part of a library made before.

    The context is one compilation's own; what that has to compile on the way, such as `min`, has another.
    """
    codegen, executable = context.codegen(), context.get_executable
    context.codegen = lambda: _PartsOnly(codegen)
    context.get_executable = lambda library, *rest: (
        object() if isinstance(library, _Library) else executable(library, *rest)
    )
    try:
        yield
    finally:
        del context.codegen, context.get_executable


class _PartsOnly:
    """A code generator whose libraries are parts of another."""

    def __init__(self, codegen):
        self._codegen = codegen

    def create_library(self, name):
        return _Library(self._codegen, name)

    def __getattr__(self, name):
        return getattr(self._codegen, name)


class _AsWritten(JITCodeLibrary):
    """LLVM code that is not optimized function by function when it is added."""

    def _optimize_functions(self, module):
        module.data_layout = self._codegen._data_layout


class _Library(_AsWritten):
    """LLVM code that is neither linked to what it calls, nor optimized, nor compiled: who is compiled does that."""

    def finalize(self):
        self._raise_if_finalized()
        self._finalize_dynamic_globals()
        self._finalized = True


class _Whole(_AsWritten):
    """A kernel with all that it consists of, each part linked once."""

    def add_linking_library(self, library):
        if library in self._linking_libraries:
            return
        super().add_linking_library(library)
        if isinstance(library, _Library):
            for part in library._linking_libraries:
                self.add_linking_library(part)
