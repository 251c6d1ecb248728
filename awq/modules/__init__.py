"""AutoAWQ's import paths for modules."""
