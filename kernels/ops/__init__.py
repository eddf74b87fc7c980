"""One module per op: its kernels, the host function of the module's name, its work, its default config."""
