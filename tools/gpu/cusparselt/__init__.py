"""Does INT8 2:4 pay on a GPU below any engine? cuSPARSELt through torch, which is all that it needs.

    python3 -m tools.gpu.cusparselt --out $OUT/cusparselt.json --budget 190    on the GPU machine
    python3 -m tools.gpu.cusparselt --out /tmp/x.json --rehearse --models tiny  anywhere, on the CPU

Modules: `products` (the few operations and their forms), `timing`, `gemms` (one matrix product in every type),
`encoder_layer` (one layer in every type), `__main__` (what is measured, in which order, until when).
"""
