"""The operations by Triton kernels: registration and derivatives. Importing it does not import Triton."""
