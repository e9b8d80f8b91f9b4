"""Position methods: rotaries, biases and embeddings."""
