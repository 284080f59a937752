"""All that runs: kernels bound to memory, collectives between processes, Dask graphs, training runs.

May import floors 0 to 5, the kernel packages, Dask and distributed. Decisions are made below, as values;
here they are carried out.
"""
