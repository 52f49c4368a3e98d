"""Operations against their rivals: every operation is declared here, once."""
