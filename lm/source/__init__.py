"""What a model is made of on disk, each part read so that nothing of it is lost; `lm.load` joins them."""
