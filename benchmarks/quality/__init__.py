"""How good the merged models are, measured on models that were really trained."""
