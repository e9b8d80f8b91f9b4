"""Other Linears than the plain one: what the decoder's slot `linear` may name."""
