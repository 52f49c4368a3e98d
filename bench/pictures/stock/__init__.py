"""The best that PyTorch does without kernels of one's own."""

from bench.pictures.stock import attention, guidance, velocity

FORMS = attention.FORMS | guidance.FORMS | velocity.FORMS
