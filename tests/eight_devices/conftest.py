"""These tests have a process of their own (tests/test_eight_devices.py starts it), with eight virtual devices."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
