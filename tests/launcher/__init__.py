"""Test equipment that launches kernels by Triton's own launcher, into a driver which is none.

    driver.c         libcuda.so.1 as far as Triton calls it, as strict as the documentation, without a GPU
    launching.py     a launch through it, and what the driver was handed against what the launch says

The kernels are compiled as on a GPU. What is checked: that the launcher is built and takes every argument, tensor maps
by the driver's rules, grids, threads, shared memory, early launches, and every byte of the parameters. Nothing is
computed: tests/ptx does that. `python -m tests.launcher --help` says how to run all of it.
"""
