"""What each kernel computes, written plainly: for NumPy arrays, and for PyTorch tensors alike.

The arrays' own type decides which of the two computes. Nothing here is imported by a kernel.
"""
