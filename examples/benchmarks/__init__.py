"""The cost of TNT in time, arithmetic and memory: `python -m benchmarks --help`, inside `examples/`."""
