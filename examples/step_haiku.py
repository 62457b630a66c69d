"""A training step in Haiku: TNT without a learning rate classifies scikit-learn's handwritten digits."""

import haiku as hk
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tnt_optax

images, labels = load_digits(return_X_y=True)
images, test_images, labels, test_labels = train_test_split(np.float32(images / 16), labels, random_state=0)

model = hk.without_apply_rng(hk.transform(lambda images: hk.nets.MLP([32, 10])(images)))
value_and_grads = tnt_optax.value_and_sampled_grad(model.apply, tnt_optax.Categorical())
tx = tnt_optax.adaptive_tnt()


@jax.jit
def train_step(params, opt_state, images, labels, key):
    loss, grads, sampled_grads = value_and_grads(params, images, labels, key)
    updates, opt_state = tx.update(grads, opt_state, params, sampled_grads=sampled_grads)
    return optax.apply_updates(params, updates), opt_state, loss


params = model.init(jax.random.key(0), images[:1])
opt_state, rng = tx.init(params), np.random.default_rng(0)
for step in range(1, 31):
    batch = rng.choice(len(images), 256, replace=False)
    params, opt_state, loss = train_step(params, opt_state, images[batch], labels[batch], jax.random.key(step))
    if step % 10 == 0:
        accuracy = np.mean(model.apply(params, test_images).argmax(axis=-1) == test_labels)
        print(f"step {step}: loss {loss:.3f}, test accuracy {accuracy:.1%}")
