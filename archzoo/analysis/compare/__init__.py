"""`archzoo compare`: arms that differ in one thing, trained alike, and what may be said of them.

`arms` says which arms there are, `plan` which runs and that they are alike in all else, `runner`
trains them side by side in processes of their own (`child`), `runs` reads what became of each,
`statistics` and `claims` say what follows, `tables` writes it down, and `command` is the command.
"""
