"""What `diloco-client run` does in the processes that it starts, so that a script joins a run that it knows nothing of.

`bootstrap` is on the way when Python starts, and waits for torch's optimizers; `Script` follows them from the first
step to the end of the program. docs/launcher.md tells what this can do and what not.
"""
