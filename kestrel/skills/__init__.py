"""What a model is asked to do: prompts in, tokens to answers."""
