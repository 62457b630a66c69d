"""TNT on a mesh of devices, of one process or of several: data parallel along `data`, and parameters, momentum and
factors divided along both axes.

One process, eight virtual CPU devices:

    python examples/distributed.py --virtual-devices 8 --mesh 4 2

Two processes, here on one machine (the second likewise, with `--process 1`):

    python examples/distributed.py --virtual-devices 4 --mesh 4 2 --coordinator localhost:9876 --processes 2 --process 0

Started again with the same directory, it goes on at the last checkpoint, also on another mesh and with another number
of processes.
"""

import argparse
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from common import data
from common.problems import autoencoder_problem
from common.training import refuse_another_run
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.progress import Progress

import tnt_optax

AXES = ("data", "model")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--mesh", type=int, nargs=2, default=(1, 1), help="devices along `data` and along `model`")
parser.add_argument("--virtual-devices", type=int, help="CPU devices of each process; without it, those that there are")
parser.add_argument("--coordinator", help="host:port of process 0; without it, there is one process")
parser.add_argument("--processes", type=int, default=1, help="how many there are")
parser.add_argument("--process", type=int, default=0, help="which of them this is")
parser.add_argument("--steps", type=int, default=100, help="how many in all, those of earlier runs included")
parser.add_argument("--every", type=int, default=20, help="steps between checkpoints; there is one at the end, too")
parser.add_argument("--batch-size", type=int, default=128, help="images a step, of all processes together")
parser.add_argument("--widths", type=int, nargs="+", default=[128, 64, 32, 8], help="of the encoder's layers")
parser.add_argument("--directory", type=Path, default=Path("results/distributed"), help="where the checkpoints are")
args = parser.parse_args()

if args.virtual_devices:
    jax.config.update("jax_num_cpu_devices", args.virtual_devices)
if args.coordinator:
    # A process whose peer is gone ends with an error after the heartbeat's time, instead of waiting for ever.
    jax.distributed.initialize(args.coordinator, args.processes, args.process, heartbeat_timeout_seconds=10)
if args.batch_size % args.mesh[0]:
    parser.error(f"--batch-size {args.batch_size} is no multiple of the {args.mesh[0]} devices along `data`.")
if np.prod(args.mesh) != jax.device_count():
    parser.error(f"--mesh {args.mesh[0]} {args.mesh[1]} needs {np.prod(args.mesh)} devices, got {jax.device_count()}.")
# Auto: the compiler divides the work after the arrays. (With Explicit axes the model would have to say how.)
jax.set_mesh(jax.make_mesh(args.mesh, AXES, axis_types=(AxisType.Auto, AxisType.Auto)))

images = data.digits()
problem = autoencoder_problem(images, args.widths, args.batch_size, seed=0)
value_and_grads = tnt_optax.value_and_sampled_grad(problem.forward, problem.predictive)
# The devices along both axes divide the inverses among them.
tx = tnt_optax.tnt(0.03, damping=0.1, trust_radius=0.1, statistics_period=2, inverse_period=10, inverse_axis=AXES)


def on_mesh(x: jax.Array) -> jax.Array:
    """A matrix divided over `data` and `model`, a vector over `model`, as far as their lengths allow that."""
    mesh = jax.sharding.get_mesh()
    axes = zip(AXES[-x.ndim :], x.shape, strict=True)
    spec = PartitionSpec(*(name if length % mesh.shape[name] == 0 else None for name, length in axes))
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), np.asarray(x).__getitem__)


params = jax.tree.map(on_mesh, problem.params)
state = (params, tx.init(params))  # The state of the optimizer is sharded as the parameters are.
shardings = jax.tree.map(lambda x: x.sharding, state)  # The step keeps these shardings.


def train_step(state, batch, key):
    params, opt_state = state
    loss, grads, sampled_grads = value_and_grads(params, batch, batch, key)
    updates, opt_state = tx.update(grads, opt_state, params, sampled_grads=sampled_grads)
    return (optax.apply_updates(params, updates), opt_state), loss


train_step = jax.jit(train_step, donate_argnames="state", out_shardings=(shardings, None))


def my_part_of_batch(step: int) -> jax.Array:
    """Every process loads what its own devices hold; together that is one array, divided over `data`."""
    chosen = np.random.default_rng(step).choice(len(images.train), args.batch_size, replace=False)
    sharding = NamedSharding(jax.sharding.get_mesh(), PartitionSpec("data"))

    def load(index):  # Processes whose devices stand side by side along `model` load the same.
        return images.train[chosen[index[0]]]

    return jax.make_array_from_callback((args.batch_size, *images.train.shape[1:]), sharding, load)


# What a checkpoint is of: a model, and the modes of its parameters.
run = {jax.tree_util.keystr(path): str(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(state)}
keep = ocp.CheckpointManagerOptions(preservation_policy=ocp.checkpoint_managers.LatestN(2))
handlers = ocp.handlers.create_default_handler_registry(default=ocp.StandardCheckpointHandler())
with ocp.CheckpointManager(args.directory.resolve(), options=keep, handler_registry=handlers) as manager:
    start = manager.latest_step() or 0
    if start:
        refuse_another_run(args.directory, manager.metadata(start).custom_metadata or {}, run)
        state = manager.restore(start, args=ocp.args.StandardRestore(state))  # On the mesh of today.
    loss = jnp.nan
    with Progress(disable=args.process > 0) as progress:
        for step in progress.track(range(start, args.steps), description=f"{args.mesh[0]} x {args.mesh[1]} devices"):
            state, loss = train_step(state, my_part_of_batch(step), jax.random.key(step))
            if (step + 1) % args.every == 0 or step + 1 == args.steps:
                manager.save(step + 1, args=ocp.args.StandardSave(state), custom_metadata=run)

everywhere = jax.jit(lambda x: x, out_shardings=NamedSharding(jax.sharding.get_mesh(), PartitionSpec()))(state)
digest = hashlib.sha256(b"".join(x.tobytes() for x in jax.tree.leaves(jax.device_get(everywhere)))).hexdigest()
print(f"process {args.process}: {args.steps} steps, loss of the last batch {float(loss):.4f}, SHA-256 {digest}")
