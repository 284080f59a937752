"""GPU kernel templates in Numba-CUDA. A file of templates is called as the file of its ops in `rapydli_flow/ops`, or as
what they do; ``_mma`` and ``_wgmma`` are the same on tensor cores.

How a kernel is made and run, in the order in which it happens:

    grid            what a template returns: a Python function, its blocks, and how the copy engine sees arrays
    pair, ptx       intrinsics: a rule for the compiler and a twin in NumPy; loads, stores, registers, `unroll`
    scalar, tail    pointwise formulas as intrinsics, and what is fused into the store of an op
    specialise      the function as straight text with constants
    compile         text to cubins, and the cache of them; needs CUDA's compilers, but no GPU
    emulate         the same function, run by NumPy, which refuses races and accesses out of bounds
    card            what a rank needs of a card: `launch` is that of a `driver`, `emulated` is NumPy's
    nccl            cards hand each other memory; `emulated_nccl` is what NumPy plays of it
    cost            a guess of seconds, where several templates serve an op and nothing was measured
    many            pointwise ops of one formula as one kernel

Further intrinsics:

    arithmetic      index arithmetic that is written once for both halves of a pair
    access          of pools and copies          chosen      of ids and tables of addresses
    formulas, warp  of reductions                halves      of two halves in a word
    async_tiles     copies to shared memory      hopper      barriers and the copy engine, sm_90a
    tensor_core     mma.sync, sm_80 on           warpgroup   wgmma, sm_90a

What families share, and the files of their templates:

    tiles, tile_space                     products by fused multiply-adds: dense, conv, conv_input_grad,
                                          conv_filter_grad, local_conv
    mma, mma_loaders, mma_rules,          products on tensor cores: dense_mma, conv_mma, conv_input_grad_mma,
    mma_window                            conv_filter_grad_mma
    wgmma, wgmma_passes                   products on Hopper: dense_wgmma, conv_wgmma
    winograd_transform, winograd_rules    winograd, winograd_filter_grad
    parts                                 the second kernel of sums that are split
    elements                              pointwise
    row_program, row_kernels, rows        reductions along memory: softmax, loss, layer_norm
    slab_program, slab_kernels, slabs     other reductions: norm, reduce, extreme
    group_bands, group_kernels            group_norm, of programs of layer_norm
    copies                                shape, slice
    pool_geometry                         pool, pool_grad
    by themselves                         adaptive_pool, depthwise, depthwise_filter_grad, gather, local_norm, resize,
                                          source

May import `rapydli_flow` floors 0 and 1 (errors, spec, config, random, winograd, template) and NumPy. Numba and
llvmlite are imported within rules and `compile`, cuda.core within `compile` alone, CuPy within `nccl`, and `launch`
needs nothing but the driver: so every kernel runs on the emulator where no CUDA package is installed.
"""
