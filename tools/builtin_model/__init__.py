"""The builder of the built-in model: corpus, tokenizer, training, and the bounds on what it must be able to do.

`python -m tools.builtin_model.build --out DIR`"""
