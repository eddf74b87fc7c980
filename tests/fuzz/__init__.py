"""Mutants of the files that the library reads: `python -m tests.fuzz --minutes 5 --seed 1`.

Every mutant follows from its seed and its number alone. It is judged in a forked child with limits on time and memory:
it is taken, or refused by an error of the library. Everything else is a finding. A new kind of file is a `Surface`
(see `forked`) named in `SURFACES` of `__main__`.
"""
