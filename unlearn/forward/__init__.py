"""What a term of the loss reads of the model: statistics of supervised tokens, hidden states, the reference model's."""
