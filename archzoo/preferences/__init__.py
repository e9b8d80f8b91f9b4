"""Preferences: a reward model, PPO, REINFORCE and DPO, in small.

`losses` holds them as plain functions; `reward`, `policy` and `dpo` are what `fit` trains by one
setting, `objective`. Answers are written by the zoo's own recurrent decoding (`answers`).
"""
