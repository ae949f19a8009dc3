"""The objectives of the recipe as tensor functions: no processes, no models. The arithmetic is in r1mega_kernels."""
