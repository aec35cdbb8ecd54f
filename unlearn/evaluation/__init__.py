"""Is it gone, and is the rest still there? Generations, the official LUME score, membership, utility.

`evaluate.evaluate` asks a model what some scores need; `scores` holds the scores, a file a family; `lume.score` scores
generations that exist already. Attacks on an unlearned model are not here.
"""
