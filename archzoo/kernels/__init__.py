"""Accelerator code behind the components; each kernel has a PyTorch reference implementation."""
