"""Random calls, and what the reference makes of them: `Case(seed)` is the same call every time."""

import numpy as np

import nbbn

#: Kernels that other tests compile anyway, and every one there is.
FEW = ("float32", "float32", "float64", "float16", "uint8")
EVERY = (*FEW, "bool", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


class Case:
    """One call with random arrays and options."""

    def __init__(self, seed, every=False):
        self.seed, self._every = seed, every
        self._rng = rng = np.random.default_rng(seed)
        self.operation = rng.choice(["stats", "normalize", "evaluate", "train", "backward", "ema", "merge"])
        names = EVERY if every else FEW
        if self.operation in ("train", "backward"):
            names = [n for n in names if n.startswith("float")]
        self.dtype = np.dtype(str(rng.choice(names)))
        self.shape = self._shape()
        self.axis = None if rng.random() < 0.1 else int(rng.integers(-len(self.shape), len(self.shape)))
        if len(self.shape) < 2:
            self.axis = None
        self.channels = 1 if self.axis is None else self.shape[self.axis]
        self.x = self._data(self.dtype)

    def __str__(self):
        strides = self.x.strides
        return f"seed {self.seed}: {self.operation} {self.dtype} {self.shape} strides {strides} axis {self.axis}"

    # --- arrays ---------------------------------------------------------------------------------------------------

    def _shape(self):
        rng = self._rng
        kind = rng.random()
        if kind < 0.1:  # a long row, or many short ones
            return (int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(1, 6000)))
        if kind < 0.2:
            return (int(rng.integers(1, 6000)), int(rng.integers(1, 8)))
        return tuple(int(n) for n in rng.integers(0 if kind < 0.25 else 1, 12, rng.integers(1, 6)))

    def _data(self, dtype):
        """Values of some spread around some mean, perhaps some that are not finite, in memory of some layout."""
        rng, dtype = self._rng, np.dtype(dtype)
        if dtype.kind == "f":
            most = 100.0 if dtype.itemsize == 2 or self.operation == "backward" else 1e4
            values = rng.standard_normal(self.shape) + rng.choice([0.0, 1.0, -most])
            values *= rng.choice([1e-3, 1.0, 1.0, 100.0]) if dtype.itemsize > 2 else 1.0
            if rng.random() < 0.05:
                values = np.full(self.shape, values.flat[0] if values.size else 0.0)
            if rng.random() < 0.05 and values.size:
                values.flat[rng.integers(values.size)] = rng.choice([np.nan, np.inf, -np.inf])
        elif dtype.kind == "b":
            values = rng.random(self.shape) < 0.4
        else:
            limits = np.iinfo(dtype)
            values = rng.integers(limits.min, limits.max, self.shape, dtype, endpoint=True)
        return self._laid_out(values.astype(dtype))

    def _laid_out(self, values):
        """The same values, transposed, spaced, reversed, at an odd address or in read-only memory."""
        rng = self._rng
        if rng.random() < 0.3:
            return values
        order = rng.permutation(values.ndim)
        memory = np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))
        if rng.random() < 0.4:
            steps = [int(s) for s in rng.choice([1, 1, 2, -1, -2], values.ndim)]
            spaced = np.zeros([n * abs(s) for n, s in zip(values.shape, steps, strict=True)], values.dtype)
            view = spaced[tuple(slice(None, None, s) for s in steps)]
            view[...] = memory
            memory = view
        elif rng.random() < 0.1 and values.size:
            raw = np.zeros(values.nbytes + 1, np.uint8)
            odd = np.frombuffer(raw, values.dtype, values.size, 1).reshape(values.shape)
            odd[...] = values
            memory = odd
        if rng.random() < 0.1:
            memory.flags.writeable = False
        return memory

    def _parameter(self, positive=False):
        dtype = self._precision if not self._every else self._rng.choice(["f4", "f8"])
        values = self._rng.standard_normal(self.channels)
        return (np.abs(values) + 0.1 if positive else values).astype(dtype)

    def _maybe(self, make, chance=0.5):
        return make() if self._rng.random() < chance else None

    # --- the call -------------------------------------------------------------------------------------------------

    def check(self):
        """Run on the compiled backend and on the reference, and compare; the name of what was refused, if it was."""
        self._precision = str(self._rng.choice(["f4", "f8"]))
        state = self._rng.bit_generator.state
        answers = []
        for backend in ("cpu", "numpy"):
            self._rng.bit_generator.state = state
            with nbbn.use_backend(backend), np.errstate(all="ignore"):
                try:
                    answers.append(getattr(self, f"_{self.operation}")())
                except (ValueError, TypeError, FloatingPointError) as error:
                    answers.append(str(error))
        got, expected = answers
        if isinstance(got, str) or isinstance(expected, str):
            assert got == expected, self
            return got.partition(":")[0]
        for (a, tolerance), (b, _) in zip(got, expected, strict=True):
            assert a.shape == b.shape, self
            assert a.dtype == b.dtype, self
            a, b = a.astype(np.float64), b.astype(np.float64)
            with np.errstate(all="ignore"):
                near = (np.abs(a - b) <= tolerance) | (a == b) | (~np.isfinite(a) & ~np.isfinite(b))
            assert near.all(), f"{self}: {a[~near][:4]}, expected {b[~near][:4]}"
        return None

    def _axis_given(self):
        """As an int, which may go the short way, or as something that does not."""
        return self.axis if self.axis is None or self._rng.random() < 0.5 else np.int64(self.axis)

    def _where(self):
        shape = [n if self._rng.random() < 0.7 else 1 for n in self.shape]
        return self._rng.random(shape) < 0.7

    def _stats(self):
        where = self._maybe(self._where, 0.3)
        return self._moments(nbbn.batch_stats(self.x, axis=self._axis_given(), where=where))

    def _moments(self, m):
        """Tolerances: those that are promised, and float64's own beside the size of the data."""
        size = np.abs(self.x, dtype=np.float64, where=np.isfinite(self.x), out=np.zeros(self.x.shape)).max(initial=0)
        digits = 2e-15 * size
        std = np.nan_to_num(m.std(), nan=0, posinf=0)
        return [
            (m.count, 0),
            (m.mean, 1e-6 * std + digits),
            (m.m2, 2e-6 * np.nan_to_num(m.m2, posinf=0) + 1e-6 * m.count * std * digits + m.count * digits**2),
        ]

    def _out(self):
        """Sometimes an array for the result, of any layout, full of something else."""
        if self._rng.random() < 0.5:
            return None
        dtype = np.dtype(np.float32) if self.dtype.kind in "iub" else self.dtype
        out = self._laid_out(np.full(self.shape, 77, dtype))
        return out.copy() if not out.flags.writeable else out

    def _result(self, y, *terms):
        """Rounding of the sums that make a result, relative to their terms, and of the result itself."""
        with np.errstate(all="ignore"):
            size = 1 + sum(np.abs(np.nan_to_num(t, posinf=0, neginf=0)).max(initial=0) for t in terms)
            exact = np.abs(np.nan_to_num(y.astype(np.float64), posinf=0, neginf=0))
        return y, 4e-6 * (size + exact) + (2.0**-10 * exact + 2.0**-24 if y.dtype.itemsize == 2 else 0)

    def _expanded(self, values):
        if self.axis is None:
            return values
        shape = [1] * len(self.shape)
        shape[self.axis] = -1
        return values.reshape(shape)

    def _normalize(self):
        mean, var = self._parameter(), self._parameter(positive=True)
        weight, bias = self._maybe(self._parameter), self._maybe(self._parameter)
        options = {
            "residual": self._maybe(lambda: self._data(self.dtype), 0.3),
            "activation": "relu" if self._rng.random() < 0.3 else None,
            "eps": float(self._rng.choice([1e-5, 1e-3, 0.0])),
            "axis": self._axis_given(),
            "out": self._out(),
        }
        y = nbbn.normalize(self.x, mean, var, weight, bias, **options)
        scale = 1 if weight is None else self._expanded(weight)
        x_hat = (self.x.astype(np.float64) - self._expanded(mean)) / np.sqrt(self._expanded(var)) * scale
        return [self._result(y, x_hat, *(t for t in (bias, options["residual"]) if t is not None))]

    def _evaluate(self):
        running = self._parameter(), self._parameter(positive=True)
        before = [r.copy() for r in running]
        y, m = nbbn.batch_norm(self.x, *running, axis=self._axis_given(), return_stats=True)
        assert all((r == b).all() for r, b in zip(running, before, strict=True)), self
        x_hat = (self.x.astype(np.float64) - self._expanded(running[0])) / np.sqrt(self._expanded(running[1]))
        return [self._result(y, x_hat), *self._moments(m)]

    def _train(self):
        running = (self._parameter(), self._parameter(positive=True)) if self._rng.random() < 0.8 else (None, None)
        weight, bias = self._maybe(self._parameter), self._maybe(self._parameter)
        residual = self._maybe(lambda: self._data(self.dtype), 0.3)
        y, m = nbbn.batch_norm(
            self.x, *running, weight, bias, True,
            axis=self._axis_given(), residual=residual, where=self._maybe(self._where, 0.2), out=self._out(),
            decay=float(self._rng.choice([0.9, 0.0, 1.0])), ddof=int(self._rng.integers(2)),
            nonfinite=str(self._rng.choice(["propagate", "raise"])), return_stats=True,
        )  # fmt: skip
        std = np.sqrt(m.var() + 1e-5)
        x_hat = (self.x.astype(np.float64) - self._expanded(m.mean)) / self._expanded(std)
        x_hat = x_hat * (1 if weight is None else self._expanded(weight))
        results = [self._result(y, x_hat, *(t for t in (bias, residual) if t is not None)), *self._moments(m)]
        if running[0] is not None:
            results += [(r, 4e-6 * (1 + np.abs(np.nan_to_num(r, posinf=0, neginf=0)))) for r in running]
        return results

    def _backward(self):
        m = nbbn.batch_stats(self.x, axis=self.axis)
        mean, var = m.mean, m.var()
        gradient, weight = self._data(self.dtype), self._maybe(self._parameter)
        training = bool(self._rng.random() < 0.6)
        results = nbbn.batch_norm_backward(
            gradient, self.x, mean, var, weight, axis=self._axis_given(), training=training, out=self._out()
        )
        g = np.nan_to_num(gradient.astype(np.float64), posinf=0, neginf=0)
        inv_std = self._expanded(1 / np.sqrt(var + 1e-5))
        x_hat = np.nan_to_num((self.x.astype(np.float64) - self._expanded(mean)) * inv_std, posinf=0, neginf=0)
        n = max(1, self.x.size // max(1, self.channels))
        largest = np.abs(g).max(initial=0) * (1 + np.abs(x_hat).max(initial=0) ** 2)
        scale = np.abs(np.nan_to_num(inv_std, posinf=0)).max(initial=0)
        scale *= 1 if weight is None else np.abs(weight).max(initial=0)
        dx, tolerance = self._result(results[0])
        sums = n * np.abs(g).max(initial=0) * (1 + np.abs(x_hat).max(initial=0))
        return [(dx, tolerance + 1e-5 * scale * largest), (results[1], 1e-5 * sums), (results[2], 1e-5 * sums)]

    def _ema(self):
        running = self._parameter(), self._parameter(positive=True)
        m = nbbn.batch_stats(self.x, axis=self.axis)
        momentum, ddof = float(self._rng.choice([0.0, 0.1, 1.0])), int(self._rng.integers(2))
        nbbn.ema_update(*running, m, momentum, ddof=ddof, nonfinite=str(self._rng.choice(["propagate", "raise"])))
        # what is promised of the statistics, where they are large and the running ones are not
        errors = (1e-6 * np.sqrt(m.to_numpy().var()), 2e-6 * m.to_numpy().var())
        return [
            (r, 4e-6 * (1 + np.abs(np.nan_to_num(r, posinf=0, neginf=0))) + np.nan_to_num(e, posinf=0, neginf=0))
            for r, e in zip(running, errors, strict=True)
        ]

    def _merge(self):
        with nbbn.use_backend("numpy"):
            a, b = (nbbn.batch_stats(self._data(self.dtype), axis=self.axis) for _ in range(2))
        return self._moments(a + b) + [(m, np.inf) for m in ((a + b) - b).to_numpy().__reduce__()[1]]
