"""Tokens in, vectors out."""
