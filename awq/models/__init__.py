"""AutoAWQ's entry points: thin, all logic is below."""
