"""A forward pass watched, edited, cut short or run block by block, always through the model's own code."""
