"""Computes the two step-wise rewards of an answer (R1-VL, arXiv 2503.12937, section 3.3). Does not use JAX.

StepRAR is the step-wise reasoning accuracy reward: the final answer and the key steps. StepRVR is the step-wise
reasoning validity reward: the sections and their order.

    score_answer                   scores one answer and gives the reasons
    step_accuracy, step_validity   return the StepRAR and StepRVR of N answers as arrays
    ScorerPool                     scores in worker processes with time and memory limits; use it for model output
    Rules, PRESETS, get_rules      define the options of the rules and the named presets

README.md in this folder describes the rules. The functions take texts and return numbers, so this package does not
import r1vl_jax/types.py.
"""

from r1vl_jax.rewards.pool import ScorerPool
from r1vl_jax.rewards.rules import PRESETS, Rules, get_rules
from r1vl_jax.rewards.scoring import Score, score_answer, step_accuracy, step_validity

__all__ = ["PRESETS", "Rules", "Score", "ScorerPool", "get_rules", "score_answer", "step_accuracy", "step_validity"]
