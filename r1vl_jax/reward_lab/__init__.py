"""Compares reward rules on answers, and tests the rules with attacks. `python -m r1vl_jax.score` is its command.

rows.py        reads and selects input rows
scoring.py     scores texts in worker processes; adds scores to rows
rescoring.py   reports groups of answers under several rules
problems.py    questions to attack; five are built in
attacks.py     honest answers and attacks on a problem
probe.py       reports what each attack earns
tables.py      shows the reports as text tables
"""
