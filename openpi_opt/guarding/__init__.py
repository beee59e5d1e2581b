"""The guard's parts: what is asked, the reference, the timed calls' witness, structure, power."""
