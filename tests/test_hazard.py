"""Fresh processes that refresh stacked inverses of several sizes in one program, which must never hang.

Batched LAPACK calls of several sizes in one jitted function deadlock XLA's CPU backend in about half of all runs
(docs/development/design.md says how the library avoids them). If they did here, the run of `make test` would pass once
in 2 times, and the 36 of `make test-all`, of which 12 are on a mesh whose devices share the threads, never.
"""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from tnt_optax import TensorView, tnt

inverse_axis = sys.argv[1] if len(sys.argv) > 1 else None
if inverse_axis:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)))

def modes(path, shape):
    return TensorView(tuple((i,) for i in range(1, len(shape))), batch_axes=(0,))

shapes = [(4, 64, 96), (3, 128, 32), (6, 200, 24), (5, 80), (4, 160, 64), (7, 48, 48)]
params = {f"{i}{copy}": jnp.ones(shape) for i, shape in enumerate(shapes) for copy in "ab"}
tx = tnt(0.1, views=modes, statistics_period=1, inverse_period=1, inverse_axis=inverse_axis)
grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
update = jax.jit(lambda g, s: tx.update(g, s, sampled_grads=g))
state = tx.init(params)
for _ in range(3):
    updates, state = update(grads, state)
two = jax.tree.map(lambda x: jnp.stack([x, x]), grads)
vmapped = jax.jit(jax.vmap(lambda g: tx.update(g, tx.init(g), sampled_grads=g)[0]))(two)
jax.block_until_ready((updates, vmapped))
assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, vmapped)))
print("done")
"""


def runs(number):
    return pytest.mark.parametrize("run", [pytest.param(i, marks=pytest.mark.slow) for i in range(number)])


def finishes(*arguments):
    command = [sys.executable, "-c", PROGRAM, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"


@runs(24)
def test_a_refresh_in_a_fresh_process_does_not_hang(run):
    finishes()


@runs(12)
def test_a_refresh_divided_over_devices_does_not_hang(run):
    finishes("data")
