"""Triton kernels of esper_elastic, one file per op: the equation, the kernels, the launcher.

Installed as ``esper_elastic.triton_kernels``. Importing this package imports no triton; importing one of its modules does, and only
``esper_elastic.ops`` does that.
"""
