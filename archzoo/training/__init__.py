"""Training with Lightning: the module, its optimizer, its callbacks, and the files of a run."""
