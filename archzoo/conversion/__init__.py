"""Models out of models, and in and out of other formats."""
