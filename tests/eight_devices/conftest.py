"""These tests have a process of their own (tests/test_eight_devices.py starts it), with eight virtual devices."""

import os

import jax

# Eight devices on few, busy cores: XLA ends the process when one of them is 40 s late at a collective operation.
timeout = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {timeout}"
jax.config.update("jax_num_cpu_devices", 8)
