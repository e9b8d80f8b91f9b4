"""The zoo in plain PyTorch: one short implementation a part, from which exported files are made.

Here is no kernel, no adapter and no form that is only faster. Classes, arguments and weights go by
the zoo's names, so a checkpoint fits both, and tests hold both equal. `archzoo.export.source`
copies what a model uses into one file; so each definition stands by itself at the top of a module,
and needs torch and definitions from here or from the zoo's modules that are plain already.
"""
