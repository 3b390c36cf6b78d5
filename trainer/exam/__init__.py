"""Questions, prompts, generation, parsing and scoring."""
