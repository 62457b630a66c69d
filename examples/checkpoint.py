"""Trains a classifier of digits, and saves checkpoints with Orbax.

The program can be killed at any time. Started again with the same command, it resumes, and ends with the same bytes.
"""

import hashlib
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import typer
from sklearn.datasets import load_digits

import tnt_optax


def main(
    steps: Annotated[int, typer.Option(help="Number of steps, including those of earlier runs.")] = 100,
    every: Annotated[int, typer.Option(help="Number of steps between two checkpoints.")] = 10,
    width: Annotated[int, typer.Option(help="Number of units of the hidden layer.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the parameters, the batches and the sampled labels.")] = 0,
    directory: Annotated[Path, typer.Option(help="Folder of the checkpoints.")] = Path("results/checkpoints"),
) -> None:
    """Trains a classifier of digits, or resumes its training."""
    images, labels = map(jnp.asarray, load_digits(return_X_y=True))
    predictive, tx = tnt_optax.Categorical(), tnt_optax.adaptive_tnt()
    forward = jax.jit(lambda params, images: jax.nn.relu(images / 16 @ params["w1"]) @ params["w2"])
    value_and_grads = tnt_optax.value_and_sampled_grad(forward, predictive)

    def initial():  # All that a step changes: the parameters, the state of the optimizer, and the step number.
        params = {"w1": 0.1 * jax.random.normal(jax.random.key(seed), (64, width)), "w2": jnp.zeros((width, 10))}
        return params, tx.init(params), jnp.int32(0)

    @jax.jit
    def train_step(params, opt_state, step):  # Batch and sampled labels depend only on seed and step.
        batch_key, label_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
        batch = jax.random.choice(batch_key, len(images), (128,), replace=False)
        _, grads, sampled_grads = value_and_grads(params, images[batch], labels[batch], label_key)
        updates, opt_state = tx.update(grads, opt_state, params, sampled_grads=sampled_grads)
        return optax.apply_updates(params, updates), opt_state, step + 1

    run = {"width": width, "seed": seed}  # Saved with each checkpoint, and compared if a run resumes.
    # A killed run may leave a temporary folder with a part of a checkpoint. The next run removes it.
    options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=2, cleanup_tmp_directories=True)
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(directory.resolve(), options=options, item_handlers=handler) as manager:
        start, state = manager.latest_step() or 0, jax.jit(initial)()
        if start:
            if (saved := manager.metadata(start).custom_metadata) != run:
                raise SystemExit(f"{directory} is of another run: {saved} there, and {run} here.")
            state = manager.restore(start, args=ocp.args.StandardRestore(state))
        for step in range(start + 1, steps + 1):
            state = train_step(*state)
            manager.save(step, args=ocp.args.StandardSave(state), custom_metadata=run, force=step == steps)
    digest = hashlib.sha256(b"".join(x.tobytes() for x in jax.tree.leaves(jax.device_get(state)))).hexdigest()
    print(f"step {state[2]}, loss {predictive.loss(forward(state[0], images), labels):.4f}, SHA-256 {digest}")


typer.run(main)
