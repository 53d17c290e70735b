"""What the CPU kernels are compiled for on x86-64; read by setup.py too, so nothing is imported here.

Names of extensions are those of GCC's and clang's ``-m`` flags and ``__builtin_cpu_supports``.
"""

# From the least to the most; every CPU of a line can run the lines above it. AVX-512 is not among them: the
# kernels' vectors are of 32 bytes, and compiled for it they were no faster.
CAPABILITIES: dict[str, tuple[str, ...]] = {
    "default": (),
    "avx2": ("sse4.2", "popcnt", "avx", "avx2", "fma", "bmi", "bmi2"),
}

# what code for one CPU (POINTCMT_ARCH) may need, as far as compilers use it by themselves
FEATURES: tuple[str, ...] = (
    *CAPABILITIES["avx2"],
    *("avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512cd", "avx512ifma", "avx512vbmi"),
    *("avx512vbmi2", "avx512vnni", "avx512bitalg", "avx512vpopcntdq"),
)
