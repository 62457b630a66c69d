"""A training step in Flax Linen: TNT without a learning rate classifies scikit-learn's handwritten digits."""

import flax.linen as nn
import jax
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tnt_optax
from tnt_optax.linen import TrainState  # Flax's own does not forward `sampled_grads` to the optimizer.

images, labels = load_digits(return_X_y=True)
images, test_images, labels, test_labels = train_test_split(np.float32(images / 16), labels, random_state=0)


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(nn.relu(nn.Dense(32)(images)))


forward = jax.jit(Classifier().apply)
value_and_grads = tnt_optax.value_and_sampled_grad(forward, tnt_optax.Categorical())


@jax.jit
def train_step(state, images, labels, key):
    loss, grads, sampled_grads = value_and_grads(state.params, images, labels, key)
    return state.apply_gradients(grads=grads, sampled_grads=sampled_grads), loss


variables = Classifier().init(jax.random.key(0), images[:1])
state = TrainState.create(apply_fn=forward, params=variables, tx=tnt_optax.adaptive_tnt())
rng = np.random.default_rng(0)
for step in range(1, 31):
    batch = rng.choice(len(images), 256, replace=False)
    state, loss = train_step(state, images[batch], labels[batch], jax.random.key(step))
    if step % 10 == 0:
        accuracy = np.mean(forward(state.params, test_images).argmax(axis=-1) == test_labels)
        print(f"step {step}: loss {loss:.3f}, test accuracy {accuracy:.1%}")
