"""Workloads, optimizers and one runner: the paper's experiments and every comparison in the documentation."""
