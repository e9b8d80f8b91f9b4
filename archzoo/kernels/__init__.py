"""Accelerator code behind the components; each kernel has its plain-PyTorch twin as reference."""
