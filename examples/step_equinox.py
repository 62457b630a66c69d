"""A training step in Equinox: TNT without a learning rate classifies scikit-learn's handwritten digits."""

import equinox as eqx
import jax
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tnt_optax

images, labels = load_digits(return_X_y=True)
images, test_images, labels, test_labels = train_test_split(np.float32(images / 16), labels, random_state=0)
tx = tnt_optax.adaptive_tnt()


@eqx.filter_jit
def train_step(model, opt_state, images, labels, key):
    params, static = eqx.partition(model, eqx.is_inexact_array)  # Other leaves are static, and None in `params`.

    def forward(params, images):
        return jax.vmap(eqx.combine(params, static))(images)

    value_and_grads = tnt_optax.value_and_sampled_grad(forward, tnt_optax.Categorical())
    loss, grads, sampled_grads = value_and_grads(params, images, labels, key)
    updates, opt_state = tx.update(grads, opt_state, params, sampled_grads=sampled_grads)
    return eqx.apply_updates(model, updates), opt_state, loss


model = eqx.nn.MLP(in_size=64, out_size=10, width_size=32, depth=1, key=jax.random.key(0))
opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
rng = np.random.default_rng(0)
for step in range(1, 31):
    batch = rng.choice(len(images), 256, replace=False)
    model, opt_state, loss = train_step(model, opt_state, images[batch], labels[batch], jax.random.key(step))
    if step % 10 == 0:
        accuracy = np.mean(jax.vmap(model)(test_images).argmax(axis=-1) == test_labels)
        print(f"step {step}: loss {loss:.3f}, test accuracy {accuracy:.1%}")
