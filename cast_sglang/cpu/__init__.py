"""The out-of-tree CPU platform: SGLang, EAGLE and CAST in plain torch."""
