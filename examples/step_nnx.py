"""A training step in Flax NNX: TNT without a learning rate classifies scikit-learn's handwritten digits."""

import jax
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tnt_optax

images, labels = load_digits(return_X_y=True)
images, test_images, labels, test_labels = train_test_split(np.float32(images / 16), labels, random_state=0)


@nnx.jit
def train_step(model, optimizer, images, labels, key):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def forward(params, images):
        return nnx.merge(graphdef, params, rest, copy=True)(images)

    value_and_grads = tnt_optax.value_and_sampled_grad(forward, tnt_optax.Categorical())
    loss, grads, sampled_grads = value_and_grads(params, images, labels, key)
    optimizer.update(model, grads, sampled_grads=sampled_grads)
    return loss


rngs = nnx.Rngs(0)
model = nnx.Sequential(nnx.Linear(64, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 10, rngs=rngs))
optimizer = nnx.Optimizer(model, tnt_optax.adaptive_tnt(), wrt=nnx.Param)
rng = np.random.default_rng(0)
for step in range(1, 31):
    batch = rng.choice(len(images), 256, replace=False)
    loss = train_step(model, optimizer, images[batch], labels[batch], jax.random.key(step))
    if step % 10 == 0:
        accuracy = np.mean(model(test_images).argmax(axis=-1) == test_labels)
        print(f"step {step}: loss {loss:.3f}, test accuracy {accuracy:.1%}")
