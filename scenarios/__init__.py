"""What we ask: scenario files, prompt readers and the prompts written for this project."""
