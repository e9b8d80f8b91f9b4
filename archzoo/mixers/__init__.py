"""Parts that mix over time."""
