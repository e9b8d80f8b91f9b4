"""Parts that mix over channels."""
