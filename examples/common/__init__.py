"""What the example programs share: data, models, the training loop, tables and pictures."""
