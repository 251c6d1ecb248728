"""What a model is: its blocks and what surrounds them, read off its values."""
