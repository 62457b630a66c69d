"""Trains an autoencoder with TNT and saves checkpoints: killed at any moment and started again, it ends the same."""

import argparse
import hashlib
from pathlib import Path

import jax
import optax
import orbax.checkpoint as ocp
from common import data, models
from common.training import refuse_another_run
from flax import nnx
from rich.progress import track

import tnt_optax

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200, help="how many in all, those of earlier runs included")
parser.add_argument("--every", type=int, default=10, help="steps between checkpoints; there is one at the end, too")
parser.add_argument("--seed", type=int, default=0, help="of the parameters, the batches and the sampled targets")
parser.add_argument("--widths", type=int, nargs="+", default=[128, 64, 32, 8], help="of the encoder's layers")
parser.add_argument("--directory", type=Path, default=Path("results/checkpoints"), help="where the checkpoints are")
args = parser.parse_args()

images, predictive = jax.numpy.asarray(data.digits().train), tnt_optax.Bernoulli()
graphdef, params = nnx.split(models.Autoencoder(images.shape[1], args.widths, rngs=nnx.Rngs(args.seed)))
forward = jax.jit(lambda params, inputs: nnx.merge(graphdef, params)(inputs))
value_and_grads = tnt_optax.value_and_sampled_grad(forward, predictive)
tx = tnt_optax.tnt(learning_rate=0.03, damping=0.1, trust_radius=0.1, statistics_period=2, inverse_period=5)
initial = jax.jit(lambda params: (params, tx.init(params), jax.numpy.int32(0)))


@jax.jit
def train_step(params, opt_state, step):  # The batch and the sampled targets depend on the seed and the step alone.
    batch_key, sample_key = jax.random.split(jax.random.fold_in(jax.random.key(args.seed), step))
    batch = jax.random.choice(batch_key, images, (128,), replace=False)
    _, grads, sampled_grads = value_and_grads(params, batch, batch, sample_key)
    updates, opt_state = tx.update(grads, opt_state, params, sampled_grads=sampled_grads)
    return optax.apply_updates(params, updates), opt_state, step + 1


target = jax.eval_shape(initial, nnx.as_pure(params))  # The types, shapes and dtypes of what a checkpoint holds.
run = {jax.tree_util.keystr(path): str(x.shape) for path, x in jax.tree.leaves_with_path(target[0])}
run["seed"] = str(args.seed)
keep = ocp.checkpoint_managers.LatestN(2)
options = ocp.CheckpointManagerOptions(preservation_policy=keep, cleanup_tmp_directories=True)
handlers = ocp.handlers.create_default_handler_registry(default=ocp.StandardCheckpointHandler())
with ocp.CheckpointManager(args.directory.resolve(), options=options, handler_registry=handlers) as manager:
    start = manager.latest_step() or 0  # Of the complete ones: what a killed run left half written is not listed.
    saved = manager.metadata(start).custom_metadata if start else run
    refuse_another_run(args.directory, saved, run)
    state = manager.restore(start, args=ocp.args.StandardRestore(target)) if start else initial(nnx.as_pure(params))
    for step in track(range(start, args.steps), "train"):
        state = train_step(*state)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            manager.save(step + 1, args=ocp.args.StandardSave(state), custom_metadata=run)
digest = hashlib.sha256(b"".join(x.tobytes() for x in jax.tree.leaves(jax.device_get(state[:2])))).hexdigest()
print(f"step {state[2]}, loss {predictive.loss(forward(state[0], images), images):.4f}, SHA-256 {digest}")
