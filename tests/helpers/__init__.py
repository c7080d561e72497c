"""What tests of several folders share: tiny models, prompts, runs, tokenizers, servers and paths."""
