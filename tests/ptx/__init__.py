"""Test equipment that runs the PTX which Triton makes of a kernel: on the CPU, with real arguments, access by access.

    parse.py         PTX text to basic blocks of decoded instructions
    operands.py      types, registers and immediates as numpy arrays
    instructions/    one instruction to one numpy closure, by class; what is not there is an error, never a guess
    memory.py        global memory: bounds, alignment, writes of two CTAs to one place
    shared.py        shared memory: bounds, reads of what was never written, races
    machine.py       lanes, blocks, barriers
    compiling.py     a launch to PTX, specialised as Triton's just-in-time path does
    execution.py     a launch, bound to its real arguments, through the machine
    cases.py         one call of an op at one shape, with its reference in plain torch
    case_sets.py     which of them are run
    compare.py       verdicts against float64, with eager torch in the same dtype as the yardstick
    golden.py        whole models
    large.py         tensors of more than 2^31 elements
    units.py         single instructions against scalar code
    breaks.py        real kernels broken on purpose

`python -m tests.ptx --help` says how to run it, README.md what it proves.
"""
