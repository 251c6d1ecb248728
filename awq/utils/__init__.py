"""AutoAWQ's import paths for helpers."""
