"""Turns a question as read from a file into a prompt for the model: images, chat text, tokens, positions.

Flow: data -> processing -> rollout. Uses NumPy, PIL, PyAV and the checkpoint's tokenizer; no jax, no torch.

    images.py     image file -> RGB -> rows of patches, uint8; the model normalises them
    videos.py     video file -> some of its frames
    positions.py  numbers of text tokens and grids -> M-RoPE positions
    chat.py       question -> chat text, through the checkpoint's template
    spans.py      characters of a sampled answer -> the tokens that contain them
    tokenizer.py  checkpoint folder -> tokenizer and special ids
    processor.py  all steps for one example: `Processor.encode_prompt`
"""

import os

# transformers says in each process that there is no torch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
