"""Is it gone, and is the rest still there? Generations, the official LUME score, membership, utility.

`evaluate.evaluate` asks a model everything; `lume.score` scores generations that exist already. Attacks on an
unlearned model are not here.
"""
