"""TNT on a mesh of devices of one or several processes, with checkpoints from which a run on another mesh can resume.

One process with eight virtual CPU devices, and the first of two processes with four each on one machine (start the
second one with `--process 1`):

    python examples/distributed.py --virtual-devices 8 --mesh 4 2
    python examples/distributed.py --virtual-devices 4 --mesh 4 2 --coordinator localhost:9876 --processes 2 --process 0
"""

import hashlib
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import tnt_optax

AXES = ("data", "model")


def initial_params(width):
    normal = np.random.default_rng(0).normal
    params = {"w1": normal(0, 0.1, (64, width)), "w2": normal(0, 0.1, (width, 10)), "b1": np.zeros(width)}
    return jax.tree.map(np.float32, params)


def forward(params, images):
    return jax.nn.relu(images @ params["w1"] + params["b1"]) @ params["w2"]  # The logits of the classes.


def on_mesh(x, devices):
    """A matrix divided over `data` and `model`, or a vector divided over `model`, if the lengths are multiples."""
    axes = zip(AXES[-x.ndim :], x.shape, strict=True)
    spec = PartitionSpec(*(name if length % devices.shape[name] == 0 else None for name, length in axes))
    return jax.make_array_from_callback(x.shape, NamedSharding(devices, spec), x.__getitem__)


def main(
    mesh: Annotated[tuple[int, int], typer.Option(help="Numbers of devices along `data` and `model`.")] = (1, 1),
    virtual_devices: Annotated[int | None, typer.Option(help="Number of CPU devices of each process.")] = None,
    coordinator: Annotated[str | None, typer.Option(help="Address (host:port) of process 0.")] = None,
    processes: Annotated[int, typer.Option(help="Number of processes.")] = 1,
    process: Annotated[int, typer.Option(help="Number of this process, from 0.")] = 0,
    steps: Annotated[int, typer.Option(help="Number of steps, including those of earlier runs.")] = 100,
    every: Annotated[int, typer.Option(help="Number of steps between two checkpoints.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Number of examples of a batch, on all devices together.")] = 128,
    width: Annotated[int, typer.Option(help="Number of units of the hidden layer.")] = 32,
    directory: Annotated[Path, typer.Option(help="Folder of the checkpoints.")] = Path("results/distributed"),
) -> None:
    """Trains a classifier of digits on a mesh of devices, or resumes its training."""
    if virtual_devices:
        jax.config.update("jax_num_cpu_devices", virtual_devices)
    if coordinator:
        # If its peer is gone, a process ends with an error after this time, instead of waiting for ever.
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=10)
    if batch_size % mesh[0]:
        raise SystemExit(f"--batch-size {batch_size} is no multiple of the {mesh[0]} devices along `data`.")
    if np.prod(mesh) != jax.device_count():
        raise SystemExit(f"--mesh {mesh[0]} {mesh[1]} needs {np.prod(mesh)} devices, got {jax.device_count()}.")
    # Auto: the compiler divides the work as the arrays are divided. (With Explicit axes, the model specifies it.)
    devices = jax.make_mesh(mesh, AXES, axis_types=(AxisType.Auto, AxisType.Auto))
    jax.set_mesh(devices)

    images, labels = load_digits(return_X_y=True)
    images, labels = np.asarray(images / 16, "float32"), np.asarray(labels, "int32")
    predictive = tnt_optax.Categorical()
    value_and_grads = tnt_optax.value_and_sampled_grad(forward, predictive)
    tx = tnt_optax.adaptive_tnt(inverse_axis=AXES)  # All devices divide the inverses among them.
    params = jax.tree.map(lambda x: on_mesh(x, devices), initial_params(width))
    state = (params, tx.init(params))  # The state inherits the sharding of the parameters.

    def train_step(state, images, labels, key):
        _, grads, sampled_grads = value_and_grads(state[0], images, labels, key)
        updates, opt_state = tx.update(grads, state[1], state[0], sampled_grads=sampled_grads)
        return optax.apply_updates(state[0], updates), opt_state

    # With `out_shardings`, the step keeps the shardings.
    train_step = jax.jit(train_step, donate_argnames="state", out_shardings=jax.tree.map(lambda x: x.sharding, state))

    def load(x, chosen):  # A batch is divided over `data`. Each process loads the part of its own devices.
        sharding = NamedSharding(devices, PartitionSpec("data"))
        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, lambda index: x[chosen][index])

    run = {"width": width, "batch_size": batch_size}  # Runs in one directory share this, on any mesh.
    options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=2)
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(directory.resolve(), options=options, item_handlers=handler) as manager:
        if start := manager.latest_step() or 0:
            if (saved := manager.metadata(start).custom_metadata) != run:
                raise SystemExit(f"{directory} is of another run: {saved} there, and {run} here.")
            state = manager.restore(start, args=ocp.args.StandardRestore(state))  # On the current mesh.
        for step in range(start + 1, steps + 1):
            chosen = np.random.default_rng(step).choice(len(images), batch_size, replace=False)
            state = train_step(state, load(images, chosen), load(labels, chosen), jax.random.key(step))
            manager.save(step, args=ocp.args.StandardSave(state), custom_metadata=run, force=step == steps)

    state = jax.device_get(jax.jit(lambda x: x, out_shardings=NamedSharding(devices, PartitionSpec()))(state))
    digest = hashlib.sha256(b"".join(x.tobytes() for x in jax.tree.leaves(state))).hexdigest()
    loss = jax.jit(predictive.loss)(jax.jit(forward)(state[0], images), labels)
    print(f"process {process}: step {max(start, steps)}, loss {loss:.4f}, SHA-256 {digest}")


typer.run(main)
