"""What the model says to a prompt, batched, the same text as one prompt at a time."""
