"""What a network is conditioned on: classes or prompts."""
