"""Models that leave the zoo: as one file of plain PyTorch, and for Hugging Face's transformers."""
