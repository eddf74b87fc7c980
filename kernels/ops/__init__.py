"""One op a module: its kernels, its host function of the module's name, its configs."""
