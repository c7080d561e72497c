"""From a question as read to a prompt in the model's terms: images, chat text, tokens, positions.

Flow: data -> processing -> rollout. NumPy, PIL, PyAV and the checkpoint's tokenizer only; no jax, no torch.

    images.py     image file -> RGB -> rows of patches, uint8; the model normalises them
    videos.py     video file -> some of its frames
    positions.py  text lengths and grids -> M-RoPE positions
    chat.py       question -> chat text, through the checkpoint's template
    processor.py  all of it, for one example: `Processor.encode_prompt`
"""
