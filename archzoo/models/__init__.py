"""Architectures: one file each, its paper's architecture section."""
