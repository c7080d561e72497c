"""Step-wise rewards of an answer: StepRAR (accuracy and key steps) and StepRVR (validity). No JAX.

    score_answer                   scores one answer and says why
    step_accuracy, step_validity   return arrays for N answers
    ScorerPool                     scores in worker processes with limits of time and memory; use it for model output
    Rules, PRESETS, get_rules      the options of the rules, and their named presets

R1-VL, arXiv 2503.12937, section 3.3. README.md in this folder describes the rules. The functions take texts and return
numbers, so this stage needs nothing from r1vl_jax/types.py.
"""

from r1vl_jax.rewards.pool import ScorerPool
from r1vl_jax.rewards.rules import PRESETS, Rules, get_rules
from r1vl_jax.rewards.scoring import Score, score_answer, step_accuracy, step_validity

__all__ = ["PRESETS", "Rules", "Score", "ScorerPool", "get_rules", "score_answer", "step_accuracy", "step_validity"]
