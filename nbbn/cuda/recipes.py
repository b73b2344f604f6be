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
    gradients_rows,
    input_gradient,
    launch,
    moments_columns,
    moments_rows,
    train_rows,
)
from nbbn.cuda.arguments import find_plan, layout_of, shares_of, steps_of, tile_of
from nbbn.cuda.geometry import Geometry
from nbbn.cuda.launch import Rows
from nbbn.cuda.launcher import Launch, Place
from nbbn.cuda.workspace import Workspace, workspace

#: A canonical view: its geometry, and its address modulo the widest load.
View = tuple[Geometry, int]


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
        self.launch(place, *self._arguments(x, residual, out, coefficients))

    def load(self, place: Place, x: int, residual: int, out: int, *coefficients: Any) -> None:
        """What a call with these takes seconds for at first."""
        if not self.launch.is_ready(place):
            self.launch.load(place, *self._arguments(x, residual, out, coefficients))

    def _arguments(self, x: int, residual: int, out: int, coefficients: tuple[Any, ...]) -> tuple[Any, ...]:
        return x, *self.x_steps, residual, *self.residual_steps, out, *self.out_steps, *coefficients, self.flags


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
        _, mean, m2 = results
        normalized = place, x, residual, out, mean, m2, self.values, weight, bias, eps, floor
        self.affine.load(*normalized)  # Ctrl-C while it compiles shall not find the running arrays moved
        space = self.statistics(place, x, results, running)
        self.affine(*normalized)
        return space


@dataclass(frozen=True, slots=True)
class TrainingAtOnce:
    """One launch, a block for each channel."""

    launch: Launch
    x_steps: tuple[int, ...]
    residual_steps: tuple[int, ...]
    head: tuple[int, ...]
    running_flags: int
    flags: int

    def __call__(
        self, place: Place, x: int, residual: int, out: int, results: tuple[int, ...], weight: int, bias: int,
        eps: float, floor: float, running: tuple[Any, ...],
    ) -> Workspace:  # fmt: skip
        """As that of `Training`."""
        space = workspace(place.device, place.stream, 0, 0)
        self.launch(
            place, x, *self.x_steps, residual, *self.residual_steps, out, *self.head, *results, *running,
            self.running_flags, space.skipped, weight, bias, eps, floor, self.flags,
        )  # fmt: skip
        return space


@lru_cache(1024)
def training(
    x: View, residual: View | None, out: View, running_flags: int, flags: int, device: launch.Device
) -> Training | TrainingAtOnce:
    """Training; `flags` says which parameters there are, `running_flags` which running arrays."""
    whole = x[0]
    outer, _, inner = whole.shape
    flags |= formulas.WIDE_MEAN | formulas.WIDE_VAR
    addend = x if residual is None else residual
    plan = find_plan((x,), device, True)
    # sums are taken with as many lanes as batch_stats takes them with: fewer would be other bits
    all_lanes = find_plan((x, addend, out), device, True).lanes
    if launch.in_one_launch(layout_of((x,)), plan, device) and all_lanes == plan.lanes:
        kinds = [_kind(each) for each, _ in (x, addend, out)]
        compiled = Launch(train_rows.compiled(*kinds, plan.lanes), plan.blocks, plan.threads)
        flags |= formulas.HAS_RESIDUAL if residual is not None else 0
        head = *steps_of(out[0]), outer, inner
        return TrainingAtOnce(compiled, steps_of(whole), steps_of(addend[0]), head, running_flags, flags)
    normalize = affine(x, residual, out, flags, device)
    return Training(statistics(x, running_flags, device), normalize, float(outer * inner))


@dataclass(frozen=True, slots=True)
class GradientSums:
    """One launch: sums of gradients and products per channel, and the parameter gradients."""

    launch: Launch
    g_steps: tuple[int, ...]
    head: tuple[int, ...]
    tickets: int
    pairs: int
    flags: int

    def __call__(
        self, place: Place, g: int, x: int, parameters: tuple[Any, ...], results: tuple[int, ...]
    ) -> None:  # fmt: skip
        """Parameters: totals, mean, var, weight, eps. Results: the gradients of weight and bias."""
        space = workspace(place.device, place.stream, self.tickets, self.pairs)
        self.launch(
            place, g, *self.g_steps, x, *self.head, space.sums, space.first_ticket, *parameters, self.flags, *results
        )


@dataclass(frozen=True, slots=True)
class Gradients:
    """Two launches: the sums with the parameter gradients, then the input gradient."""

    sums: GradientSums
    apply: Launch
    steps: tuple[tuple[int, ...], tuple[int, ...]]
    head: tuple[int, ...]
    flags: int

    def __call__(
        self, place: Place, g: int, x: int, out: int, parameters: tuple[Any, ...], results: tuple[int, ...]
    ) -> None:
        """Parameters: totals, mean, var, weight, eps. Results: the gradients of weight and bias."""
        self.sums(place, g, x, parameters, results)
        g_steps, x_steps = self.steps
        self.apply(place, g, *g_steps, x, *x_steps, out, *self.head, *parameters, self.flags)


@dataclass(frozen=True, slots=True)
class GradientsAtOnce:
    """One launch, a block for each channel."""

    launch: Launch
    steps: tuple[tuple[int, ...], tuple[int, ...]]
    head: tuple[int, ...]
    flags: int

    def __call__(
        self, place: Place, g: int, x: int, out: int, parameters: tuple[Any, ...], results: tuple[int, ...]
    ) -> None:
        """As that of `Gradients`."""
        g_steps, x_steps = self.steps
        self.launch(place, g, *g_steps, x, *x_steps, out, *self.head, *parameters, self.flags, *results)


@lru_cache(1024)
def gradient_totals(g: View, x: View, flags: int, device: launch.Device) -> GradientSums:
    """The sums of the backward call."""
    whole = x[0]
    plan = find_plan((g, x), device, True)
    kernel = gradient_sums.rows if isinstance(plan, Rows) else gradient_sums.columns
    compiled = Launch(kernel(_kind(g[0]), _kind(whole), plan.lanes), plan.blocks, plan.threads)
    pairs = whole.shape[1] * shares_of(plan)
    return GradientSums(compiled, _steps(plan, g[0]), _head(plan, whole, whole), plan.blocks, pairs, flags)


@lru_cache(1024)
def gradients(g: View, x: View, out: View, flags: int, device: launch.Device) -> Gradients | GradientsAtOnce:
    """The backward call in training."""
    whole = x[0]
    kinds = [_kind(each) for each, _ in (g, x, out)]
    sums = find_plan((g, x), device, True)
    plan = find_plan((g, x, out), device, False)
    steps = _steps(plan, g[0]), _steps(plan, whole)
    if launch.in_one_launch(layout_of((g, x)), sums, device) and isinstance(plan, Rows) and plan.lanes == sums.lanes:
        compiled = Launch(gradients_rows.compiled(*kinds, plan.lanes), sums.blocks, sums.threads)
        outer, _, inner = whole.shape
        return GradientsAtOnce(compiled, steps, (*steps_of(out[0]), outer, inner), flags)
    kernel = input_gradient.rows if isinstance(plan, Rows) else input_gradient.columns
    apply = Launch(kernel(*kinds, plan.lanes), plan.blocks, plan.threads)
    return Gradients(gradient_totals(g, x, flags, device), apply, steps, _head(plan, whole, out[0]), flags)


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
