"""Defines the builder of R1-VL-10K, the questions of StepGRPO, as a TFDS data set."""

from r1vl_jax.data.builders.base import MANUAL_DOWNLOAD, QuestionsBuilder


class R1vl10k(QuestionsBuilder):
    """Builds R1-VL-10K, whose rows have image, problem, solution and key steps."""

    name = "r1vl_10k"
    DESCRIPTION = """
    R1-VL-10K: questions about images with step-by-step solutions and the key steps in them, groups of alternative
    wordings. Made for the StepGRPO stage of R1-VL.
    """
    HOMEPAGE = "https://huggingface.co/datasets/jingyiZ00/R1-VL-10K"
    CITATION = """
    @article{zhang2025r1vl,
      title={R1-VL: Learning to Reason with Multimodal Large Language Models via Step-wise Group Relative Policy
             Optimization},
      author={Zhang, Jingyi and Huang, Jiaxing and Yao, Huanjin and Liu, Shunyu and Zhang, Xikun and Lu, Shijian and
              Tao, Dacheng},
      journal={arXiv preprint arXiv:2503.12937},
      year={2025}
    }
    """
    MANUAL_DOWNLOAD_INSTRUCTIONS = MANUAL_DOWNLOAD
    SECTIONS = {"train": "rl"}
