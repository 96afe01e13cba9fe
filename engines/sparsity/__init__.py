"""Which weights of an engine run on sparse kernels, and why the others do not."""
