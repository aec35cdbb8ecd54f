"""Look inside: sparse autoencoders on the activations of a language model. Nothing is here yet."""
