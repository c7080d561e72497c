"""Step-wise rewards of an answer: StepRAR (accuracy and key steps) and StepRVR (validity). No JAX.

    score_answer                   one answer, with the reasons
    step_accuracy, step_validity   arrays for N answers
    ScorerPool                     the same in worker processes with limits: for text that a model wrote
    Rules, PRESETS, get_rules      the options, and their named choices

R1-VL, arXiv 2503.12937, section 3.3. Stages of the flow meet in r1vl_jax/types.py; this one takes texts and gives
numbers, and needs nothing of theirs.
"""

from r1vl_jax.rewards.pool import ScorerPool
from r1vl_jax.rewards.rules import PRESETS, Rules, get_rules
from r1vl_jax.rewards.scoring import Score, score_answer, step_accuracy, step_validity

__all__ = ["PRESETS", "Rules", "Score", "ScorerPool", "get_rules", "score_answer", "step_accuracy", "step_validity"]
