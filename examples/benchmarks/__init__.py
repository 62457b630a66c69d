"""What TNT costs in time, arithmetic and memory: `python -m benchmarks --help`, in the folder `examples`."""
