"""Defines the builder of Mulberry-SFT, the answers that the warm-up imitates, as a TFDS data set."""

from r1vl_jax.config import SourceSection
from r1vl_jax.data.builders.base import MANUAL_DOWNLOAD, QuestionsBuilder


class MulberrySft(QuestionsBuilder):
    """Builds Mulberry-SFT without its reflective rows, as R1-VL's warm-up uses it."""

    name = "mulberry_sft"
    DESCRIPTION = """
    Mulberry-SFT: questions about images with step-by-step answers found by collective Monte Carlo tree search. As in
    the warm-up of R1-VL, rows whose answer reflects on a mistake are left out unless they were asked for.
    """
    HOMEPAGE = "https://huggingface.co/datasets/HuanjinYao/Mulberry-SFT"
    CITATION = """
    @article{yao2024mulberry,
      title={Mulberry: Empowering MLLM with o1-like Reasoning and Reflection via Collective Monte Carlo Tree Search},
      author={Yao, Huanjin and others},
      journal={arXiv preprint arXiv:2412.18319},
      year={2024}
    }
    """
    MANUAL_DOWNLOAD_INSTRUCTIONS = MANUAL_DOWNLOAD
    DROP_MATCHING = SourceSection().drop_matching
    SECTIONS = {"train": "sft"}
