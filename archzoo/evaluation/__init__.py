"""Evaluation through lm-eval: the model behind its interface, its tasks, and the command.

`likelihood.py` needs nothing but the zoo, `harness.py` the extra `eval`.
"""
