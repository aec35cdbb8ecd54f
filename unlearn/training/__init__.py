"""The one training loop: batches, gradients, schedule, checkpoints, exact resume."""
