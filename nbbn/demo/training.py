"""Training: stochastic gradient descent with momentum."""

from collections.abc import Callable

import numpy as np

from nbbn.demo.network import Array, Network, cross_entropy

BATCH = 32
EPOCHS = 8
LEARNING_RATE = 0.05
#: Of the gradient descent: the weight of the OLD velocity. Not the momentum of batch normalization.
VELOCITY_DECAY = 0.9


def steps(images: int, epochs: int = EPOCHS) -> int:
    """How many batches `train` goes through: whole ones only."""
    return epochs * (images // BATCH)


def train(
    network: Network,
    images: Array,
    labels: Array,
    rng: np.random.Generator,
    epochs: int = EPOCHS,
    after_step: Callable[[float], object] = lambda loss: None,
) -> Network:
    """Train in place, in shuffled batches; calls ``after_step(loss)``; leaves the network in evaluation mode."""
    network.train()
    velocities: list[Array] | None = None
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            loss, grad = cross_entropy(network(images[chosen]), labels[chosen])
            network.backward(grad)
            parameters = list(network.parameters())
            if velocities is None:
                velocities = [np.zeros_like(parameter) for parameter, _ in parameters]
            for velocity, (parameter, gradient) in zip(velocities, parameters, strict=True):
                velocity *= VELOCITY_DECAY
                velocity -= LEARNING_RATE * gradient
                parameter += velocity
            after_step(loss)
    return network.eval()
