"""A training step in plain JAX: TNT without a learning rate classifies scikit-learn's handwritten digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tnt_optax

images, labels = load_digits(return_X_y=True)
images, test_images, labels, test_labels = train_test_split(np.float32(images / 16), labels, random_state=0)


def forward(params, images):
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]  # The logits of the classes.


value_and_grads = tnt_optax.value_and_sampled_grad(forward, tnt_optax.Categorical())
tx = tnt_optax.adaptive_tnt()


@jax.jit
def train_step(params, opt_state, images, labels, key):
    loss, grads, sampled_grads = value_and_grads(params, images, labels, key)
    updates, opt_state = tx.update(grads, opt_state, params, sampled_grads=sampled_grads)
    return optax.apply_updates(params, updates), opt_state, loss


w1, w2 = (0.1 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(64, 32), (32, 10)]))
params = {"w1": w1, "b1": jnp.zeros(32), "w2": w2, "b2": jnp.zeros(10)}
opt_state, rng = tx.init(params), np.random.default_rng(0)
for step in range(1, 31):
    batch = rng.choice(len(images), 256, replace=False)
    params, opt_state, loss = train_step(params, opt_state, images[batch], labels[batch], jax.random.key(step))
    if step % 10 == 0:
        accuracy = np.mean(forward(params, test_images).argmax(axis=-1) == test_labels)
        print(f"step {step}: loss {loss:.3f}, test accuracy {accuracy:.1%}")
