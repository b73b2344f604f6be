"""What a call launches: kernels, grids and constant arguments, found once for the geometries that it is made with.

A recipe is called with where to run, with addresses, and with the numbers that change from call to call.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nbbn.cuda import (
    affine_columns,
    affine_rows,
    formulas,
    gradient_sums,
    input_gradient,
    launch,
    moments_columns,
    moments_rows,
)
from nbbn.cuda.arguments import find_plan, shares_of, steps_of, tile_of
from nbbn.cuda.geometry import Geometry
from nbbn.cuda.launch import Rows
from nbbn.cuda.launcher import Launch, Place
from nbbn.cuda.workspace import Workspace, workspace

#: A canonical view: its geometry, and its address modulo the widest load.
View = tuple[Geometry, int]

#: Addresses of running arrays that are not there, momentum, ddof.
NOT_RUNNING = (0, 0, 0.0, 0)


@dataclass(frozen=True, slots=True)
class Statistics:
    """One launch: moments of every channel, and the moving averages."""

    launch: Launch
    head: tuple[int, ...]
    flags: int
    tickets: int
    pairs: int

    def __call__(self, place: Place, x: int, results: tuple[int, ...], running: tuple[Any, ...]) -> Workspace:
        space = workspace(place.device, place.stream, self.tickets, self.pairs)
        self.launch(place, x, *self.head, space.sums, space.first_ticket, *results, *running, self.flags, space.skipped)
        return space


@lru_cache(1024)
def statistics(x: View, flags: int, device: launch.Device) -> Statistics:
    """Moments of `x`; `flags` says which running arrays there are."""
    whole, _ = x
    plan = find_plan((x,), device, True)
    kernel = moments_rows if isinstance(plan, Rows) else moments_columns
    compiled = Launch(kernel.compiled(_kind(whole), plan.lanes), plan.blocks, plan.threads)
    return Statistics(compiled, _head(plan, whole, whole), flags, plan.blocks, whole.shape[1] * shares_of(plan))


@dataclass(frozen=True, slots=True)
class Affine:
    """One launch: (x - mean) * scale + shift."""

    launch: Launch
    x_steps: tuple[int, ...]
    residual_steps: tuple[int, ...]
    out_steps: tuple[int, ...]
    flags: int

    def __call__(self, place: Place, x: int, residual: int, out: int, *coefficients: Any) -> None:
        """Coefficients: mean, var, divisor, weight, bias, eps, floor."""
        self.launch(
            place, x, *self.x_steps, residual, *self.residual_steps, out, *self.out_steps, *coefficients, self.flags
        )


@lru_cache(1024)
def affine(x: View, residual: View | None, out: View, flags: int, device: launch.Device) -> Affine:
    """Normalization; `flags` says which parameters there are."""
    addend = x if residual is None else residual
    views = (x, out) if residual is None else (x, residual, out)
    flags |= formulas.HAS_RESIDUAL if residual is not None else 0
    plan = find_plan(views, device, False)
    kernel = affine_rows if isinstance(plan, Rows) else affine_columns
    kinds = [_kind(whole) for whole, _ in (x, addend, out)]
    compiled = Launch(kernel.compiled(*kinds, plan.lanes), plan.blocks, plan.threads)
    return Affine(compiled, _steps(plan, x[0]), _steps(plan, addend[0]), _head(plan, x[0], out[0]), flags)


@dataclass(frozen=True, slots=True)
class Training:
    """Two launches: statistics with the moving averages, then normalization, which begins where the first ended."""

    statistics: Statistics
    affine: Affine
    values: float

    def __call__(
        self, place: Place, x: int, residual: int, out: int, results: tuple[int, ...], weight: int, bias: int,
        eps: float, floor: float, running: tuple[Any, ...],
    ) -> Workspace:  # fmt: skip
        """Results: count, mean, m2."""
        space = self.statistics(place, x, results, running)
        _, mean, m2 = results
        self.affine(place, x, residual, out, mean, m2, self.values, weight, bias, eps, floor)
        return space


@lru_cache(1024)
def training(
    x: View, residual: View | None, out: View, running_flags: int, flags: int, device: launch.Device
) -> Training:
    """Training; `flags` says which parameters there are, `running_flags` which running arrays."""
    outer, _, inner = x[0].shape
    normalize = affine(x, residual, out, flags | formulas.WIDE_MEAN | formulas.WIDE_VAR, device)
    return Training(statistics(x, running_flags, device), normalize, float(outer * inner))


@dataclass(frozen=True, slots=True)
class Gradients:
    """Two launches: the sums with the parameter gradients, then the input gradient."""

    sums: Launch
    sums_steps: tuple[int, ...]
    sums_head: tuple[int, ...]
    tickets: int
    pairs: int
    apply: Launch
    apply_steps: tuple[tuple[int, ...], tuple[int, ...]]
    apply_head: tuple[int, ...]
    flags: int

    def __call__(
        self, place: Place, g: int, x: int, out: int, parameters: tuple[Any, ...], results: tuple[int, ...]
    ) -> None:
        """Parameters: totals, mean, var, weight, eps. Results: the gradients of weight and bias."""
        self.reduce(place, g, x, *parameters, *results)
        g_steps, x_steps = self.apply_steps
        self.apply(place, g, *g_steps, x, *x_steps, out, *self.apply_head, *parameters, self.flags)

    def reduce(
        self, place: Place, g: int, x: int, totals: int, mean: int, var: int, weight: int, eps: float, *results: int
    ) -> None:
        """Only the first launch: all there is to do where mean and var are constants."""
        space = workspace(place.device, place.stream, self.tickets, self.pairs)
        self.sums(
            place, g, *self.sums_steps, x, *self.sums_head, space.sums, space.first_ticket, totals, mean, var, weight,
            eps, self.flags, *results,
        )  # fmt: skip


@lru_cache(1024)
def gradients(g: View, x: View, out: View, flags: int, device: launch.Device) -> Gradients:
    """Both launches of the backward call in training."""
    whole = x[0]
    kinds = _kind(g[0]), _kind(whole)
    first = find_plan((g, x), device, True)
    second = find_plan((g, x, out), device, False)
    reducing = gradient_sums.rows if isinstance(first, Rows) else gradient_sums.columns
    applying = input_gradient.rows if isinstance(second, Rows) else input_gradient.columns
    return Gradients(
        Launch(reducing(*kinds, first.lanes), first.blocks, first.threads),
        _steps(first, g[0]), _head(first, whole, whole), first.blocks, whole.shape[1] * shares_of(first),
        Launch(applying(*kinds, _kind(out[0]), second.lanes), second.blocks, second.threads),
        (_steps(second, g[0]), _steps(second, whole)), _head(second, whole, out[0]), flags,
    )  # fmt: skip


def _kind(whole: Geometry) -> str:
    assert whole.kind is not None  # what kernels cannot read was refused
    return whole.kind.name


def _steps(plan: launch.Plan, whole: Geometry) -> tuple[int, ...]:
    """Strides in values as kernels of the plan's family take them: rows of the columns family are packed."""
    steps = steps_of(whole)
    return steps if isinstance(plan, Rows) else steps[:1]


def _head(plan: launch.Plan, x: Geometry, last: Geometry) -> tuple[int, ...]:
    """What follows the address of the last array: its strides, sizes of `x`, and how blocks share them."""
    outer, _, inner = x.shape
    sizes = (outer, inner, plan.parts) if isinstance(plan, Rows) else (*x.shape, *tile_of(plan))
    return *_steps(plan, last), *sizes
