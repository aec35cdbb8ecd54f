"""From scores to layers to train, and how sure the choice is."""
