"""Statistics and normalization of data on disk, block by block: the commands ``stats`` and ``normalize``.

Nothing is mapped into memory: blocks are read into one buffer, which stays in the processor's cache, so that memory
use does not depend on the size of a file. ``.npz`` members are decompressed as they are read.
"""
