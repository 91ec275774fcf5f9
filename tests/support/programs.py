"""How the compiler is asked for a program that a test looks into."""

# The tests' other programs are compiled as is fastest (conftest.py): without fused loops, and with scatters
# taken apart before the program can be read.
AS_USERS = {"xla_cpu_use_fusion_emitters": True}
