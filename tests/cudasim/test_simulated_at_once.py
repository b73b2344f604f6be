"""One launch where two would do: the same bits."""

import numpy as np
import pytest
import simulator
from test_simulated_contract import data, empty_moments, host, place

import nbbn.cuda as cuda
from nbbn.backends import RunningUpdate
from nbbn.cuda import launch, recipes


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("in_place", [True, False])
def test_one_launch_has_the_bits_of_two(monkeypatch, kind, in_place):
    """The same plan of sums either way: a cache that is too small only splits the launch."""
    shape = 3, 2, 260
    weight, bias = (place(a) for a in np.random.default_rng(2).standard_normal((2, 2)))
    results = []
    for l2_bytes in (1 << 18, 0):
        monkeypatch.setattr(cuda, "properties", lambda _, l2_bytes=l2_bytes: launch.Device(4, l2_bytes))
        x, _ = data(shape, kind)
        residual, _ = data(shape, kind, 0.0, seed=1)
        seen = cuda._seen(x)
        recipe = recipes.training(seen, seen, seen, 0, 0, cuda.properties(None))
        assert isinstance(recipe, recipes.TrainingAtOnce) is (l2_bytes > 0)
        out = x if in_place else place(np.zeros(shape), kind)
        update = RunningUpdate(place(np.zeros(2)), place(np.ones(2, np.float32)), 0.25, 0, False)
        moments = empty_moments(2)
        with simulator.order("shuffled" if l2_bytes else "ascending"):
            cuda.train(x, weight, bias, 1e-3, residual, True, out, *moments, update)
        results.append(b"".join(host(a).tobytes() for a in (out, *moments)))
        assert host(update.running_mean).any()
    assert len(set(results)) == 1


@pytest.mark.parametrize("in_place", [True, False])
def test_backward_in_one_launch_has_the_bits_of_two(monkeypatch, in_place):
    results = []
    for l2_bytes in (1 << 18, 0):
        monkeypatch.setattr(cuda, "properties", lambda _, l2_bytes=l2_bytes: launch.Device(4, l2_bytes))
        x, _ = data((3, 2, 260), "float32")
        grad, _ = data((3, 2, 260), "float32", 0.0, seed=1)
        seen = cuda._seen(x)
        recipe = recipes.gradients(seen, seen, seen, 0, cuda.properties(None))
        assert isinstance(recipe, recipes.GradientsAtOnce) is (l2_bytes > 0)
        out = grad if in_place else place(np.zeros((3, 2, 260)), "float32")
        gradients = out, place(np.zeros(2)), place(np.zeros(2, np.float64))
        mean, var, weight = place(np.full(2, 3.01)), place(np.array([1.0, 1.1])), place(np.array([0.5, -2.0]))
        with simulator.order("shuffled" if l2_bytes else "ascending"):
            cuda.backward(grad, x, mean, var, weight, 1e-3, True, *gradients)
        results.append(b"".join(host(a).tobytes() for a in gradients))
    assert len(set(results)) == 1
