"""What looks at models: listings, grids, routing, lengths, training curves."""
