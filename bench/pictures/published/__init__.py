"""As the authors' code does it, written from the equations."""

from bench.pictures.published import attention, guidance, velocity

FORMS = attention.FORMS | guidance.FORMS | velocity.FORMS
