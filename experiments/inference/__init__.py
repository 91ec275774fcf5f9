"""How fast texts are scored and continued."""
